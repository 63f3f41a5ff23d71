"""The guide's module of this name: `SuperPoint()`, `load_state_dict(...)`, `model({"image": tensor})`."""

from superpoint_trt.network import SuperPoint

__all__ = ["SuperPoint"]
