"""Finds keypoints with a converted model (the guide's step 3)."""

from superpoint_trt.cli import script
from superpoint_trt.guide import SuperPointTRT, tensorrt_inference

__all__ = ["SuperPointTRT"]

if __name__ == "__main__":
    script(tensorrt_inference)()
