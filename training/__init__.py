"""Trains the packaged weights, from nothing: `python -m training`. Not installed with the package."""
