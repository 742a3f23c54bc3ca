"""Speed, measured: the recurrence and a layer against a PyTorch loop, `nn.LSTM` and a plain copy; a whole training step
against its matrix products. Nothing is written for a backend that fails its exactness check first.

`indrnn.cli.bench` is the command; `grid` runs the points, `step` the training steps, `targets` says what was aimed at.
"""
