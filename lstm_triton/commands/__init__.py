"""The commands of `python -m lstm_triton`."""
