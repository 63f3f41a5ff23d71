"""Finds the layers that cost an int8 or fp8 model its keypoints, and the fewest to keep in fp16 so that gates hold."""

from __future__ import annotations

import glob
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from superpoint_trt.convert.onnx_file import (
    OnnxSource,
    check_quantizable,
    convolutions,
    raw_heads,
    read_onnx,
)
from superpoint_trt.convert.quantize.options import FirstConvolution, QuantizeOptions
from superpoint_trt.convert.quantize.qdq import kept_layers, quantize
from superpoint_trt.convert.quantize.ranges_file import Calibration, check_same_network
from superpoint_trt.core.files import PathLike
from superpoint_trt.core.progress import Progress, Steps
from superpoint_trt.core.types import Keypoints, Precision, SuperPointError
from superpoint_trt.prove.agreement import cosines, mutual_within, within
from superpoint_trt.prove.gates import Gate
from superpoint_trt.prove.verify import verify
from superpoint_trt.run.extractor import SuperPoint

FEW_IMAGES = 8
"""Enough images to rank layers on: the layers that matter stand out, and each layer costs a run on every image."""


_POINTS, _DESCRIPTORS = "points", "descriptors"

_LOOKS_AT: Mapping[str, tuple[str, ...]] = {
    "score_error_max": (_POINTS,),
    "keypoints_found_share": (_POINTS,),
    "score_rank_correlation": (_POINTS,),
    "descriptor_cosine_median": (_DESCRIPTORS,),
    "descriptor_cosine_p1": (_DESCRIPTORS,),
    "matches_kept_share": (_POINTS, _DESCRIPTORS),
    "findings": (_POINTS,),
}
"""What each gate of `verify` looks at. A gate that is missing here is an error, never counted as points."""


@dataclass(frozen=True)
class LayerCost:
    """How much of the fp32 points is left when this layer alone is quantized; 1 is all."""

    layer: str
    keypoints_found_share: float
    """Share of points with a counterpart within 1 px, the smaller of both directions, as `verify` measures it."""
    descriptor_cosine_median: float
    """Median cosine of both descriptors at the points that both find."""

    def lost(self, gate: str) -> float:
        """How much this layer alone takes away from what a gate looks at: descriptors, points, or both (matches)."""
        lost = {_POINTS: 1.0 - self.keypoints_found_share, _DESCRIPTORS: 1.0 - self.descriptor_cosine_median}
        return sum(lost[what] for what in _LOOKS_AT[gate])


@dataclass(frozen=True)
class Step:
    """One choice of layers, verified."""

    kept: list[str]
    """Layers in fp16."""
    gates: list[Gate]
    because: str
    """Why it was tried."""

    @property
    def failed(self) -> list[Gate]:
        """The gates that do not hold."""
        return [gate for gate in self.gates if not gate.passed]


@dataclass
class Choice:
    """The layers that `fewest_kept` chose, and every choice that it tried."""

    kept: list[str]
    """Layers in fp16, including those that the caller asked for."""
    passed: bool
    """Whether the gates hold."""
    steps: list[Step] = field(default_factory=list)
    """All choices tried, in order."""
    patterns: list[str] = field(default_factory=list)
    """The name patterns that make `quantize` keep these layers: the caller's, and the layers that were added."""

    def to_json(self) -> dict[str, Any]:
        """The choice as plain data."""
        return asdict(self)


def rank(
    model: OnnxSource,
    calibration: Calibration,
    images: Sequence[PathLike],
    precision: Precision = Precision.INT8,
    progress: Progress | None = None,
) -> list[LayerCost]:
    """Quantizes one layer at a time and counts the keypoints that stay, in onnxruntime.

    Args:
        model: fp32 SuperPoint .onnx of any type.
        calibration: the model's ranges.
        images: a few photographs.
        precision: INT8 or FP8.
        progress: called with (network runs done, all runs).

    Returns:
        All convolutions, the costliest first: by the points lost, then by the descriptors.

    Raises:
        SuperPointError: not an fp32 model, ranges of another model, an unusable image, or no keypoint in any image.
    """
    network = _Network(model, calibration, QuantizeOptions(precision))
    layers = list(convolutions(network.fp32))
    steps = Steps((len(layers) + 1) * len(images), progress)
    with tempfile.TemporaryDirectory() as folder:
        expected = _keypoints(network.write_fp32(folder), images, steps)
        if not sum(len(keypoints) for keypoints in expected):
            raise SuperPointError("the network finds no keypoint in these images: use photographs like those to come.")
        costs = [_cost(layer, expected, network.write_only(layer, folder), images, steps) for layer in layers]
    return sorted(costs, key=lambda c: (c.keypoints_found_share, c.descriptor_cosine_median))


def fewest_kept(
    model: OnnxSource,
    calibration: Calibration,
    images: Sequence[PathLike],
    costs: Sequence[LayerCost],
    options: QuantizeOptions | None = None,
    limits: Mapping[str, float] | None = None,
    progress: Progress | None = None,
) -> Choice:
    """Keeps layers in fp16, one by one, until the gates of `verify` hold; then drops the layers that are not needed.

    Each step adds the layer that costs most of what the first failing gate looks at. Every choice is verified, so the
    result is proven, not estimated from the ranking. Quantizing any one added layer of the result would fail a gate.

    Args:
        model: fp32 SuperPoint .onnx of any type.
        calibration: the model's ranges.
        images: photographs to verify on.
        costs: from `rank`.
        options: what to start from; its layers stay in fp16 in any case.
        limits: gate name -> limit, in place of the precision's own.
        progress: called with (images done, all images); starts again for each choice.

    Raises:
        SuperPointError: as `rank` and `verify`.
    """
    options = options or QuantizeOptions()
    network = _Network(model, calibration, options)
    with tempfile.TemporaryDirectory() as folder:
        trial = _Trial(network, folder, images, options.keep_fp16, limits, progress)
        added: list[str] = []
        step = trial.run(added, "as asked")
        while step.failed:
            layer = _costliest(costs, step)
            if layer is None:
                return Choice(step.kept, False, trial.steps)
            gate = step.failed[0].name
            added.append(layer.layer)
            step = trial.run(added, f"{layer.layer} alone costs most of {gate}: {layer.lost(gate):.4f}")
        for layer_name in added[:-1]:  # without the last one it failed
            fewer = [name for name in added if name != layer_name]
            if not trial.run(fewer, f"{layer_name} may not be needed any more").failed:
                added = fewer
        patterns = trial.patterns(added)
        return Choice(network.kept(patterns), True, trial.steps, patterns)


def _costliest(costs: Sequence[LayerCost], step: Step) -> LayerCost | None:
    """The costliest layer that is still quantized; None if none costs anything, or only one is left."""
    gate = step.failed[0].name
    left = [cost for cost in costs if cost.layer not in step.kept]
    worst = max(left, key=lambda cost: cost.lost(gate))
    return worst if len(left) > 1 and worst.lost(gate) > 0 else None


class _Network:
    """The network of a model up to its raw heads: the part that is quantized, whatever the model's type."""

    def __init__(
        self,
        model: OnnxSource,
        calibration: Calibration,
        options: QuantizeOptions,
    ) -> None:
        source = read_onnx(model)
        check_quantizable(source.model)
        check_same_network(calibration, source.description, source.path)
        self.fp32 = raw_heads(source)
        self._calibration, self._options = calibration, options

    def kept(self, patterns: Sequence[str]) -> list[str]:
        return kept_layers(self.fp32, replace(self._options, keep_fp16=tuple(patterns)))

    def write_fp32(self, folder: str) -> Path:
        return _write(self.fp32, folder, "fp32")

    def write_only(self, layer: str, folder: str) -> Path:
        """Quantizes one layer alone. The first one is split into int8 channels where that is possible."""
        others = [glob.escape(name) for name in convolutions(self.fp32) if name != layer]
        precision = self._options.precision
        alone = kept_layers(self.fp32, QuantizeOptions(precision))
        first = FirstConvolution.WHOLE if layer in alone else None
        quantized = quantize(self.fp32, self._calibration, QuantizeOptions(precision, tuple(others), first))
        return _write(quantized, folder, "quantized")

    def write_without(self, patterns: Sequence[str], folder: str) -> Path:
        options = replace(self._options, keep_fp16=tuple(patterns))
        quantized = quantize(self.fp32, self._calibration, options)
        return _write(quantized, folder, "quantized")


def _write(model: onnx.ModelProto, folder: str, name: str) -> Path:
    path = Path(folder) / f"{name}.onnx"
    path.write_bytes(model.SerializeToString())
    return path


class _Trial:
    """Verifies choices of layers, and keeps a record of them."""

    def __init__(
        self,
        network: _Network,
        folder: str,
        images: Sequence[PathLike],
        keep: Sequence[str],
        limits: Mapping[str, float] | None,
        progress: Progress | None,
    ) -> None:
        self.steps: list[Step] = []
        self._network, self._folder, self._images = network, folder, images
        self._keep, self._limits, self._progress = keep, limits, progress
        self._reference = network.write_fp32(folder)

    def patterns(self, added: Sequence[str]) -> list[str]:
        """The caller's patterns unchanged, so that COARSE keeps its meaning, and the added layers by name."""
        return [*self._keep, *map(glob.escape, added)]

    def run(self, added: Sequence[str], because: str) -> Step:
        patterns = self.patterns(added)
        kept = self._network.kept(patterns)
        found = verify(
            self._network.write_without(patterns, self._folder),
            self._reference,
            self._images,
            self._limits,
            "cpu",
            self._progress,
        )
        self.steps.append(Step(kept, found.gates, because))
        return self.steps[-1]


def _keypoints(model: Path, images: Sequence[PathLike], steps: Steps) -> list[Keypoints]:
    found = []
    with SuperPoint(model, device="cpu") as superpoint:
        for image in images:
            found.append(superpoint.extract(image))
            steps.advance()
    return found


def _cost(
    layer: str, expected: Sequence[Keypoints], model: Path, images: Sequence[PathLike], steps: Steps
) -> LayerCost:
    again = back = found_in_all = 0
    similar = []
    for truth, found in zip(expected, _keypoints(model, images, steps)):
        again += int(within(truth.xy, found.xy).sum())
        back += int(within(found.xy, truth.xy).sum())
        found_in_all += len(found)
        similar.append(cosines(truth, found, mutual_within(truth.xy, found.xy)))
    share = min(again / sum(map(len, expected)), back / max(found_in_all, 1))
    values = np.concatenate(similar)
    return LayerCost(layer, share, float(np.median(values)) if len(values) else -1.0)
