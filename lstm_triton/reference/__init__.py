"""What should come out? The cell, a layer and its masks in plain PyTorch: the specification."""
