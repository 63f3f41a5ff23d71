"""Bulk work: many images, videos, feature files, maps."""

from superpoint_trt.pipeline.feature_files import FeatureFile, FeatureWriter, StoredFeatures, read_features

__all__ = ["FeatureFile", "FeatureWriter", "StoredFeatures", "read_features"]
