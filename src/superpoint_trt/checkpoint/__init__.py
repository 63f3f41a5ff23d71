"""Files of weights: every known layout, the public ones, and the PyTorch networks they belong to."""
