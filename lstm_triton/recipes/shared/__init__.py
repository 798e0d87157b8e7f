"""What the recipes share: options and errors, the training loop, figures, texts and tables."""
