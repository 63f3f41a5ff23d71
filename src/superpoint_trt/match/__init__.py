"""Correspondences of two images, and the geometry they support."""
