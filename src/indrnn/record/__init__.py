"""The run folder: its files, metrics, TensorBoard events and result, written and read."""
