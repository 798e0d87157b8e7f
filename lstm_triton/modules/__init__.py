"""What users hold: `LSTM` and `LSTMCell` in place of PyTorch's, and `patch`, which puts them into a model."""
