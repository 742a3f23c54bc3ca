"""Measured speed: the recurrence and a layer against a PyTorch loop, `nn.LSTM` and a plain copy; a whole training step
against its matrix products. If a backend fails its exactness check, nothing is timed or written.

`indrnn.cli.bench` is the command, `commands` its parts, `implementations` what is timed, `grid` the sizes,
`training_steps` whole updates, `scaling` how their cost grows, `output` the files.
"""
