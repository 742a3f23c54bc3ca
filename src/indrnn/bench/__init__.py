"""Measured speed: the recurrence and a layer against a PyTorch loop, `nn.LSTM` and a plain copy; a whole training step
against its matrix products. If a backend fails its exactness check, nothing is timed or written.

`indrnn.cli.bench` is the command, `commands` writes rows and tables, `clock` times, `exactness` checks before anything
is timed, `implementations` is what is timed, `grid` the recurrence at all sizes, `training_steps` whole updates,
`scaling` how their cost grows; these three also draw their figures.
"""
