"""Finds keypoints with a converted model (the guide's step 3)."""

if __name__ == "__main__":
    # Before the slow imports, so that an interrupt meanwhile shows no traceback.
    from superpoint_trt.__main__ import main

    main("superpoint_trt.cli.guide", "tensorrt_inference")

from superpoint_trt.cli.guide import SuperPointTRT

__all__ = ["SuperPointTRT"]
