"""The command info, and what it tells: what a file of this project is, in words."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from superpoint_trt.cli.terminal import keypoints_at, print_info
from superpoint_trt.core.files import PathLike, git_blob_id, one_line, read_bytes, sha256
from superpoint_trt.core.matcher import METADATA_KEY, MatcherDescription
from superpoint_trt.core.networks import weights_path
from superpoint_trt.core.types import ModelDescription, OutputType, SuperPointError
from superpoint_trt.gpu.engine_file import read_plan
from superpoint_trt.gpu.tensorrt_api import flavor_of
from superpoint_trt.run.backends import CHECKPOINT_SUFFIXES, ENGINE_SUFFIXES

if TYPE_CHECKING:
    from onnx import ValueInfoProto

    from superpoint_trt.checkpoint.matcher import MatcherWeights

Facts = Iterable[tuple[str, str]]
"""Rows of a label and a value."""

IMAGE_IN_PARTS = "split into 4 int8 channels; 8-bit images: exact except for the value 255; float images: 9 bits"
"""How int8 reads the image where the first convolution is quantized too."""


@click.command()
@click.argument("file")
def info(file: str) -> None:
    """Say what a checkpoint, an .onnx, an engine, a feature file, a file of matches or a packaged network is."""
    print_info(file)


def facts(path: PathLike) -> Facts:
    """Tells what a checkpoint, an .onnx, an engine, a feature file or a file of matches is.

    Args:
        path: of the file; or the name of a packaged network.

    Raises:
        SuperPointError: not a file of this project, or damaged.
    """
    path = Path(weights_path(path))
    suffix = path.suffix.lower()
    if suffix == ".onnx":
        return _onnx_model(path)
    if suffix in CHECKPOINT_SUFFIXES:
        return _checkpoint(path)
    if suffix == ".npz":
        from superpoint_trt.run.store import is_matches_file

        return _matches(path) if is_matches_file(path) else _features(path)
    if suffix in ENGINE_SUFFIXES:
        return _engine(path)
    known = ", ".join((".onnx", *CHECKPOINT_SUFFIXES, ".npz", *ENGINE_SUFFIXES))
    raise SuperPointError(f"{path} is none of this project's files, whose names end in {known}.")


def _checkpoint(path: Path) -> Iterator[tuple[str, str]]:
    from superpoint_trt.checkpoint.layouts import load
    from superpoint_trt.checkpoint.matcher import is_matcher, load_matcher
    from superpoint_trt.checkpoint.public import PUBLIC

    if is_matcher(path):
        yield from _matcher_weights(path, load_matcher(path))
        return
    checkpoint = load(path)
    blob = git_blob_id(read_bytes(path, "checkpoint"))
    published = [weights for weights in PUBLIC if weights.git_blob == blob]
    yield "file", f"{path} ({_size(path)})"
    yield "what", "SuperPoint checkpoint"
    yield "layout", checkpoint.family.value
    if published:
        yield "published as", f"{published[0].name}, {published[0].about}; licence {published[0].license}"
    yield "batch norm", checkpoint.norm.value
    yield "sampling", checkpoint.sampling.value
    yield "channels", " ".join(str(count) for count in checkpoint.channels)
    yield "descriptors", f"{checkpoint.descriptor_dim}, one per {checkpoint.stride_px}x{checkpoint.stride_px} px"
    if checkpoint.descriptor_map:
        leads_to = checkpoint.descriptor_map
        yield "map", f"to the {len(leads_to.matrix)} numbers of the checkpoint with sha256 {leads_to.target_sha256}"
    if checkpoint.topology:
        yield (
            "topology",
            f"{len(checkpoint.topology)} convolutions: {', '.join(one.name for one in checkpoint.topology)}",
        )
    yield "parameters", f"{checkpoint.parameters:,}"
    yield "work", f"{checkpoint.gflop():.1f} GFLOP for an image of 640x480 px"
    yield "sha256", str(checkpoint.sha256)
    yield "git blob", blob


def _onnx_model(path: Path) -> Iterator[tuple[str, str]]:
    from superpoint_trt.convert.onnx_file import parse_onnx

    data = read_bytes(path, "model")
    model = parse_onnx(data, path)
    try:
        metadata = {str(entry.key): str(entry.value) for entry in model.metadata_props}
        tensors = ["; ".join(map(_tensor, values)) for values in (model.graph.input, model.graph.output)]
    except (ValueError, TypeError) as error:  # text that is not UTF-8
        raise SuperPointError(f"{path} is not an ONNX model, or is damaged: {one_line(error)}.") from error
    yield "file", f"{path} ({_size(path)})"
    yield "made by", f"{model.producer_name or 'unknown'} {model.producer_version}".strip()
    yield "opset", ", ".join(str(opset.version) for opset in model.opset_import if opset.domain in ("", "ai.onnx"))
    yield "inputs", tensors[0]
    yield "outputs", tensors[1]
    description = ModelDescription.from_metadata(metadata, path)
    if description:
        most = description.max_batch_size
        yield from _model(
            description, f"any (superpoint-trt runs {most} at a time)" if description.dynamic else str(most)
        )
    elif METADATA_KEY in metadata:
        yield from _matcher(MatcherDescription.from_metadata(metadata, path))
    else:
        yield "what", "another tool's model: no superpoint_trt metadata"
    yield "sha256", sha256(data)


def _matcher(description: MatcherDescription) -> Iterator[tuple[str, str]]:
    rows = f"{description.rows}" if description.rows else "any number of"
    yield "what", f"learned matcher, {description.layers} layers, {description.precision.value}"
    yield "matches", f"{rows} keypoints of each image, descriptors of {description.descriptor_dim} numbers"
    yield "features", description.features_sha256 or "unknown: it does not name the checkpoint that it learned from"


def _matcher_weights(path: Path, weights: MatcherWeights) -> Iterator[tuple[str, str]]:
    shape = weights.shape
    yield "file", f"{path} ({_size(path)})"
    yield "what", f"weights of a learned matcher, {shape.layers} layers, width {shape.width}, {shape.heads} heads"
    for dim in shape.descriptor_dims:
        learned_from = weights.features.get(dim, "unknown: it does not name the checkpoint that it learned from")
        yield "features", f"descriptors of {dim} numbers; {learned_from}"
    yield "parameters", f"{weights.parameters:,}"
    yield "sha256", str(weights.sha256)


def _engine(path: Path) -> Iterator[tuple[str, str]]:
    """Reads the .json next to the engine, so that any machine can tell. A plan without one opens only where it runs."""
    plan, metadata = read_plan(path)
    flavor = flavor_of(plan)
    if flavor is None and metadata is None:
        raise SuperPointError(
            f"{path} is not a TensorRT engine: it begins with {plan[:4]!r}; build one: superpoint build."
        )
    yield "file", f"{path} ({_size(path)})"
    if metadata is None:
        yield "what", f"{flavor.value if flavor else 'unknown'} engine without a .json: superpoint infer opens it"
        return
    yield from _model(metadata.description, str(metadata.profile.max[0]))
    yield "takes", str(metadata.profile)
    if metadata.build.get("channels_last"):
        yield "channels-last", ", ".join(metadata.build["channels_last"])
    yield "runs on", f"{metadata.runs_with}, {', '.join(metadata.targets)}"
    yield "built on", metadata.gpu_name or "a machine without a GPU"
    yield "rebuild", metadata.rebuild
    yield "sha256", metadata.plan_sha256


def _model(model: ModelDescription, largest_batch: str) -> Iterator[tuple[str, str]]:
    yield "what", f"SuperPoint, {model.type.value} outputs, {model.precision.value}"
    size = f"{model.width_px}x{model.height_px} px"
    yield "size", f"any (multiples of {model.stride_px} px, {size} expected)" if model.dynamic else size
    yield "largest batch", largest_batch
    yield "sampling", model.sampling.value
    yield "checkpoint", f"layout {model.family.value if model.family else 'unknown'}, sha256 {model.checkpoint_sha256}"
    if model.descriptors_of:
        yield "features of", f"the checkpoint with sha256 {model.descriptors_of}"
    yield "keypoints at", keypoints_at(model.subpixel)
    if model.approximation:
        yield "approximation", model.approximation
    if model.calibration:
        yield "calibration", model.calibration
        yield f"kept in {'fp32' if model.placement else 'fp16'}", model.kept_layers or "nothing"
        if model.placement:
            yield "quantized for", "CPUs: onnxruntime and OpenVINO; TensorRT does not take it"
        if model.fp16_with_int8_input:
            yield "reads int8", f"{model.fp16_with_int8_input} (fp16 layers whose input is int8)"
        if model.first_convolution == "parts":
            yield "image", IMAGE_IN_PARTS
    if model.type is OutputType.KEYPOINTS:
        yield (
            "decode",
            (
                f"NMS radius {model.nms_radius_px} px, border {model.remove_borders_px} px, "
                f"threshold {model.threshold}, {model.max_keypoints} keypoints"
            ),
        )


def _features(path: Path) -> Iterator[tuple[str, str]]:
    from superpoint_trt.run.store import load_features

    found = load_features(path)
    yield "file", f"{path} ({_size(path)})"
    yield "what", "keypoints of one image"
    yield "image", f"{found.image_size[0]}x{found.image_size[1]} px"
    yield "keypoints", str(len(found))
    yield "descriptors", f"{found.descriptors.shape[1]} x {found.descriptors.dtype}"
    if len(found):
        yield "scores", f"{found.scores.min():.4f} to {found.scores.max():.4f}"


def _matches(path: Path) -> Iterator[tuple[str, str]]:
    from superpoint_trt.run.store import read_matches_file

    found = read_matches_file(path)
    yield "file", f"{path} ({_size(path)})"
    yield "what", "matches of two images"
    for name, (width, height), count in zip(("first image", "second image"), found.image_sizes, found.keypoints):
        yield name, f"{width}x{height} px, {count} keypoints"
    yield "matches", f"{found.matches}, {found.inliers} inliers of one {found.geometry} model"
    if not found.found:
        yield "geometry", "none"
    else:
        yield "geometry", "supported" if found.supported else "not supported: chance gives as many inliers"


def _tensor(value: ValueInfoProto) -> str:
    import onnx

    kind = value.type.tensor_type
    sizes = [dim.dim_param or str(dim.dim_value) for dim in kind.shape.dim]
    return f"{value.name} [{', '.join(sizes)}] {onnx.TensorProto.DataType.Name(kind.elem_type).lower()}"


def _size(path: Path) -> str:
    return f"{path.stat().st_size / 1e6:.2f} MB"
