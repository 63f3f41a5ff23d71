"""Finds keypoints with a converted model (the guide's step 3)."""

from superpoint_trt.cli.guide import SuperPointTRT, tensorrt_inference
from superpoint_trt.cli.main import script

__all__ = ["SuperPointTRT"]

if __name__ == "__main__":
    script(tensorrt_inference)()
