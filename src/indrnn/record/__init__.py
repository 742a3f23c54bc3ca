"""What a run leaves behind, written and read again: its folder, metrics, TensorBoard events and result."""
