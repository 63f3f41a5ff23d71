"""The model of Triton's Python backend that `superpoint triton` writes. Triton runs it; this package must be there.

One request has one image, `image` (H, W, 1) or (H, W, 3) uint8, and gets `keypoints` (N, 2), `scores` (N,),
`descriptors` (N, D), all float32, and `image_size` (2,) int64 (width, height).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as triton

from superpoint_trt import Keypoints, SuperPoint, SuperPointError


class TritonPythonModel:
    """What Triton calls."""

    def initialize(self, args: dict[str, str]) -> None:
        """Opens the model file that lies beside this file."""
        parameters = json.loads(args["model_config"])["parameters"]
        file = Path(args["model_repository"]) / args["model_version"] / parameters["file"]["string_value"]
        device = f"cuda:{args['model_instance_device_id']}" if args["model_instance_kind"] == "GPU" else "cpu"
        self._superpoint = SuperPoint(file, device=device, **json.loads(parameters["settings"]["string_value"]))
        triton.Logger.log_info(f"{args['model_name']} runs on {self._superpoint.runtime}")

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Answers requests, each with its keypoints or with the error that says why there are none."""
        images = (triton.get_input_tensor_by_name(request, "image").as_numpy() for request in requests)
        return [self._response(found) for found in self._superpoint.extract_many(images)]

    def _response(self, found: Keypoints | SuperPointError) -> Any:
        if isinstance(found, SuperPointError):
            return triton.InferenceResponse(error=triton.TritonError(str(found)))
        arrays = found.to_dict().items()
        return triton.InferenceResponse([triton.Tensor(name, np.ascontiguousarray(array)) for name, array in arrays])

    def finalize(self) -> None:
        """Closes the model."""
        self._superpoint.close()
