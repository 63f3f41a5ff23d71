"""Files of weights: every known layout, the public checkpoints, and the PyTorch reference network."""
