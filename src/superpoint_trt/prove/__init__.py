"""Whether a model is right, and how fast it is."""
