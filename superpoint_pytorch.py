"""The guide's module of this name: `SuperPoint()`, `load_state_dict(...)`, `model({"image": tensor})`."""

from superpoint_trt.checkpoint.reference import SuperPoint

__all__ = ["SuperPoint"]
