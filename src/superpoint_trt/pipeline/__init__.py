"""Bulk work: many images, videos, feature files, maps."""
