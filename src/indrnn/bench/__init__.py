"""Speed, measured: the recurrence and a layer against a PyTorch loop, `nn.LSTM` and a plain copy; a whole training step
against its matrix products. Nothing is written for a backend that fails its exactness check first.

`indrnn.cli.bench` is the command, `commands` what it does, `grid` the sizes, `step` the training steps, `scaling` how
they grow, `output` the files.
"""
