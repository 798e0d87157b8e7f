"""Complete programs built on `lstm_triton`, importable and runnable as `python -m lstm_triton.recipes.NAME`."""
