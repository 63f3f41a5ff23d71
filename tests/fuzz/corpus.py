"""The small good files that fuzzing starts from, made anew each time: fixed seeds, so equal bytes on one machine."""

from __future__ import annotations

import importlib.util
import io
import json
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnx
import torch
from conftest import photograph, random_compact, random_state
from PIL import Image
from safetensors.torch import save as safetensors_bytes

from superpoint_trt.checkpoint import layouts
from superpoint_trt.convert.export import ExportOptions, to_onnx
from superpoint_trt.core.image_file import opencv_quiet
from superpoint_trt.core.types import DecodeOptions, ModelDescription, OutputType

CHANNELS = (2, 2, 2, 4)
DESCRIPTOR_DIM = 4
"""The smallest network that is a SuperPoint: three stages, cells of 4x4 px."""
HEIGHT_PX, WIDTH_PX = 48, 64
COMPACT = (
    ("stem", ["image"], 2, 4, 2, True, ""),
    ("eighth", ["stem"], 2, 4, 4, True, ""),
    ("wide", ["eighth"], 2, 3, 2, True, ""),
    ("features", ["wide"], 2, 1, 1, False, "eighth"),
    ("patches", ["image"], 1, 8, 8, True, ""),
    ("detector", ["features", "patches"], 65, 1, 1, False, ""),
    ("descriptor", ["features"], DESCRIPTOR_DIM, 1, 1, False, ""),
)
"""A small network with a topology."""


def state(layout: str, seed: int = 0) -> dict[str, torch.Tensor]:
    """A state_dict of the smallest network; its detector fires everywhere, so that there are keypoints to check."""
    return random_state(layout, seed, channels=CHANNELS, dim=DESCRIPTOR_DIM)


def picture(color: bool = False, height: int = HEIGHT_PX, width: int = WIDTH_PX) -> np.ndarray:
    gray = photograph(height, width)
    return np.stack([gray, gray[::-1], gray[:, ::-1]], axis=2).copy() if color else gray


def images() -> list[bytes]:
    """One file of each format and kind that OpenCV and Pillow write."""
    gray, color = picture(height=24, width=40), picture(color=True, height=24, width=40)
    deep = gray.astype(np.uint16) * 257
    alpha = np.dstack([color, gray])
    kinds: list[tuple[str, np.ndarray, list[int]]] = [
        *((suffix, array, []) for suffix in (".png", ".tiff", ".webp", ".bmp", ".jp2") for array in (gray, color)),
        *((".png", array, []) for array in (deep, alpha, np.dstack([deep] * 3))),
        *((".tiff", array, []) for array in (deep, gray.astype(np.float32) / 255, gray.astype(np.float64) / 255)),
        (".png", gray // 128 * 255, [cv2.IMWRITE_PNG_BILEVEL, 1]),
        (".jpg", gray, []),
        (".jpg", color, [cv2.IMWRITE_JPEG_PROGRESSIVE, 1, cv2.IMWRITE_JPEG_RST_INTERVAL, 2]),
        (".pgm", gray, []),
        (".pgm", gray, [cv2.IMWRITE_PXM_BINARY, 0]),
        (".ppm", color, []),
        (".pbm", gray // 128, []),
        (".pam", alpha, []),
        (".pfm", gray.astype(np.float32) / 255, []),
        (".hdr", color.astype(np.float32) / 255, []),
        (".ras", color, []),
        (".gif", color, []),
        (".avif", color, []),
    ]
    found = []
    for suffix, array, options in kinds:
        try:
            with opencv_quiet():
                good, data = cv2.imencode(suffix, array, options)
        except cv2.error:  # this OpenCV does not write that format
            continue
        if good:
            found.append(data.tobytes())
    return [*found, *_pillow_images(color)]


def _pillow_images(color: np.ndarray) -> list[bytes]:
    """What OpenCV does not write: palettes, CMYK, EXIF, text and color profiles."""
    source = Image.fromarray(color)
    orientation = Image.Exif()
    orientation[0x0112] = 6
    kinds = [
        (source.convert("P", palette=Image.Palette.ADAPTIVE), "PNG", {"transparency": 3}),
        (source.convert("LA"), "PNG", {"icc_profile": b"no profile", "dpi": (300, 300)}),
        (source.convert("CMYK"), "JPEG", {}),
        (source, "JPEG", {"exif": orientation, "comment": b"hello", "subsampling": 2}),
        (source.convert("P"), "BMP", {}),
        (source, "TIFF", {"compression": "tiff_lzw"}),
        (source.convert("1"), "TIFF", {"compression": "group4"}),
        (source, "TIFF", {"compression": "jpeg"}),
    ]
    found = []
    for image, kind, options in kinds:
        buffer = io.BytesIO()
        try:
            image.save(buffer, kind, **options)
        except (OSError, ValueError, KeyError):
            continue
        found.append(buffer.getvalue())
    return found


def checkpoints() -> dict[str, bytes]:
    """The packaged kind of file, and other people's."""
    own = layouts.from_arrays({key: value.numpy() for key, value in state("v6").items()})
    return {
        "v6.pth": torch_bytes(state("v6")),
        "legacy.pth": torch_bytes(state("magicleap"), zipped=False),
        "huggingface.safetensors": safetensors_bytes(state("huggingface")),
        "half.safetensors": safetensors_bytes({key: value.half() for key, value in state("magicleap").items()}),
        "own.safetensors": own_bytes(own),
        "compact.safetensors": own_bytes(random_compact(table=COMPACT)),
    }


def strange_tensor(kind: str, tensor: torch.Tensor) -> Any:
    """A tensor in a form that torch saves and `weights_only` loads."""
    changes: dict[str, Callable[[torch.Tensor], Any]] = {
        "sparse": lambda t: t.to_sparse(),
        "csr": lambda t: t.reshape(len(t) if t.ndim else 1, -1).to_sparse_csr(),
        "meta": lambda t: t.to("meta"),
        "quantized": lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
        "nested": lambda t: torch.nested.nested_tensor([t, t]),
        "complex": lambda t: t.to(torch.complex64),
        "bool": lambda t: t > 0,
        "bits8": lambda t: torch.empty(t.shape, dtype=torch.uint8).view(torch.bits8),
        "float8": lambda t: t.to(torch.float8_e4m3fn),
        "bfloat16": lambda t: t.bfloat16(),
        "int64": lambda t: t.to(torch.int64),
        "gigantic": lambda t: torch.zeros(1).expand(1 << 32),
        "wide": lambda t: torch.zeros(1).expand(1 << 16, 1 << 14, 3, 3),
        "empty": lambda t: t[:0],
        "scalar": lambda t: t.reshape(-1)[0],
        "strided": lambda t: t.transpose(0, -1) if t.ndim > 1 else t,
        "parameter": lambda t: torch.nn.Parameter(t),
        "list": lambda t: t.reshape(-1)[:3].tolist(),
        "none": lambda t: None,
        "nan": lambda t: t * float("nan"),
        "huge": lambda t: t.double() * 1e300,
        "tiny": lambda t: t * 1e-44,
        "conjugate": lambda t: t.to(torch.complex64).conj(),
        "negative": lambda t: torch._neg_view(t),
    }
    return changes[kind](tensor)


def torch_bytes(value: object, zipped: bool = True) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


def own_bytes(checkpoint: layouts.Checkpoint) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        return layouts.save(checkpoint, Path(folder) / "own.safetensors").read_bytes()


def models() -> dict[str, onnx.ModelProto]:
    """One model of each type; the v6 layout has BatchNorm nodes, Magic Leap's none."""
    v6, plain = (layouts.from_arrays({k: v.numpy() for k, v in state(name).items()}) for name in ("v6", "magicleap"))
    size = {"height_px": HEIGHT_PX, "width_px": WIDTH_PX}
    decode = DecodeOptions(threshold=0.001)
    return {
        "dense.onnx": to_onnx(v6, ExportOptions(OutputType.DENSE, dynamic=True, **size)),
        "static.onnx": to_onnx(plain, ExportOptions(OutputType.DENSE, **size)),
        "heads.onnx": to_onnx(plain, ExportOptions(OutputType.HEADS, dynamic=True, **size)),
        "keypoints.onnx": to_onnx(plain, ExportOptions(OutputType.KEYPOINTS, max_keypoints=32, decode=decode, **size)),
    }


def features() -> dict[str, np.ndarray]:
    descriptors = np.zeros((5, 4), np.float32)
    descriptors[:, 0] = 1
    return {
        "keypoints": np.arange(10, dtype=np.float32).reshape(5, 2),
        "scores": np.linspace(0.9, 0.1, 5, dtype=np.float32),
        "descriptors": descriptors,
        "image_size": np.array([64, 48]),
    }


def matches() -> dict[str, np.ndarray]:
    """What `superpoint match --save` writes."""
    both = {f"{name}{index}": array for index in range(2) for name, array in features().items()}
    return {
        **both,
        "matches": np.stack([np.arange(5)] * 2, axis=1),
        "distances": np.zeros(5, np.float32),
        "inliers": np.array([True, True, True, True, False]),
        "geometry": np.eye(3),
        "geometry_type": np.array("homography"),
        "geometry_supported": np.array(True),
        "geometry_log10_nfa": np.array(-3.0),
    }


def npz(arrays: dict[str, np.ndarray], compressed: bool = False) -> bytes:
    buffer = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(buffer, **arrays)
    return buffer.getvalue()


def npz_of_headers(members: dict[str, tuple[dict[str, object], bytes]]) -> bytes:
    """An .npz whose .npy members say in their headers whatever they are told to say."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, (header, data) in members.items():
            text = repr(header).encode() + b"\n"
            archive.writestr(name, b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + data)
    return buffer.getvalue()


def calibration(model: bytes) -> dict[str, bytes]:
    """Ranges of a model, with weights rounded beside them, as `superpoint quantize` writes them."""
    from superpoint_trt.convert.quantize.calibrate import calibrate
    from superpoint_trt.convert.quantize.gptq import round_weights
    from superpoint_trt.convert.quantize.ranges_file import rounded_weights_path, save_calibration

    pictures = [(f"picture-{index}", np.roll(picture(), 7 * index, axis=1)) for index in range(2)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.onnx"
        path.write_bytes(model)
        found = calibrate(path, pictures)
        found = round_weights(path, found, pictures)
        written = save_calibration(found, Path(folder) / "ranges.calibration.json")
        return {path.name: path.read_bytes() for path in (written, rounded_weights_path(written))}


PLAN = b"vtrt" + bytes(range(60))
"""No engine, but it begins as one of TensorRT-RTX: `info` reads its .json without running it."""


def engine_metadata() -> dict[str, object]:
    """What lies beside an engine."""
    from superpoint_trt.core.files import sha256

    description = ModelDescription(OutputType.HEADS, height_px=480, width_px=640)
    return {
        "format": 1,
        "description": description.to_metadata(),
        "flavour": "rtx",
        "tensorrt_version": "1.7.1.116",
        "targets": ["sm89"],
        "gpu_name": None,
        "profile": {"min": [1, 240, 320], "opt": [1, 480, 640], "max": [1, 960, 1280]},
        "plan_sha256": sha256(PLAN),
        "onnx_sha256": "0" * 64,
        "rebuild": "superpoint build --onnx m.onnx --engine e.engine",
        "build": {"seconds": 1.0, "workspace_gib": None, "channels_last": ["logits"], "bytes": 64},
    }


BULK_NAMES = ("good.png", "two.png", "three.png")
"""Images of the good feature file."""
BULK_PAIRS = b"good.png two.png\ngood.png three.png\n"


def feature_file() -> bytes:
    """An .h5 with entries of three images."""
    from superpoint_trt.core.types import Keypoints
    from superpoint_trt.pipeline.feature_files import FeatureWriter

    arrays = features()
    found = Keypoints(arrays["keypoints"], arrays["scores"], arrays["descriptors"], (WIDTH_PX, HEIGHT_PX))
    with tempfile.TemporaryDirectory() as folder:
        with FeatureWriter(Path(folder) / "f.h5") as writer:
            for name in BULK_NAMES:
                writer.write(name, found, found.image_size)
        return (Path(folder) / "f.h5").read_bytes()


def match_file() -> bytes:
    """The .h5 of its matches."""
    from superpoint_trt.match.nearest import Matches
    from superpoint_trt.pipeline.match_files import MatchWriter, to_stored

    found = to_stored(Matches(np.stack([np.arange(5)] * 2, axis=1), np.zeros(5, np.float32)), 5, 5)
    with tempfile.TemporaryDirectory() as folder:
        with MatchWriter(Path(folder) / "m.h5") as writer:
            for line in BULK_PAIRS.decode().splitlines():
                first, second = line.split()
                writer.write((first, second), found)
        return (Path(folder) / "m.h5").read_bytes()


def unfinished_run() -> dict[str, bytes]:
    """What an extraction of two images keeps when one of its two shards is finished."""
    from superpoint_trt.pipeline.extract import ExtractOptions, extract

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, images = folder / "dense.onnx", [folder / image for image in BULK_NAMES[:2]]
        model.write_bytes(models()["dense.onnx"].SerializeToString())
        for path in images:
            path.write_bytes(pictures()[path.name])
        options = ExtractOptions(str(model), {"device": "cpu"}, part=1, parts=2, shard_size=1)
        extract(images, folder / "out.h5", options)
        return {f"out.h5.shards/{path.name}": path.read_bytes() for path in (folder / "out.h5.shards").iterdir()}


def pictures() -> dict[str, bytes]:
    """The images of the good feature file."""
    made = (np.roll(picture(), 9 * index, axis=1) for index in range(len(BULK_NAMES)))
    return {name: cv2.imencode(".png", image)[1].tobytes() for name, image in zip(BULK_NAMES, made)}


def stock() -> dict[str, bytes]:
    """The good files of a desk."""
    files = {name: model.SerializeToString() for name, model in models().items()}
    return {
        **files,
        **calibration(files["heads.onnx"]),
        "checkpoint.safetensors": checkpoints()["own.safetensors"],
        **pictures(),
        "pairs.txt": BULK_PAIRS,
        **({"features.h5": feature_file()} if importlib.util.find_spec("h5py") else {}),
    }


def as_json(value: object) -> bytes:
    return json.dumps(value).encode()
