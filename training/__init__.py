"""Trains the packaged networks. Not installed with the package."""
