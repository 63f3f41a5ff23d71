"""Heads that break careless decoders, in GPU memory by cuda.bindings alone, and the numpy reference of them.

Also a short standalone run, for compute-sanitizer:  compute-sanitizer --tool racecheck python tests/gpu/heads.py
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))

from superpoint_trt.core.types import DecodeOptions, Sampling
from superpoint_trt.gpu import arrays, cuda
from superpoint_trt.gpu.kernels.decode import Decoder, DeviceKeypoints, _head, decode_heads
from superpoint_trt.run import decode

KINDS = ("noise", "sparse", "levels", "plateaus", "flat", "peaked", "image-like")


def logits_of(kind: str, seed: int, shape: tuple[int, int, int, int]) -> np.ndarray:
    """(B, S*S + 1, h, w) float32."""
    rng = np.random.default_rng(seed)
    x = rng.normal(0, 1, shape).astype(np.float32)
    if kind == "sparse":
        x *= 2
        x[:, -1] += 6
    elif kind == "levels":  # ties all over
        x = np.round(x * 2) / np.float32(2)
    elif kind == "plateaus":  # some across cells
        x = np.round(x)
        x[:, :, 1:4, 1:3] = 0
        x[:, :, :, min(2, shape[3] - 1)] = 1
    elif kind == "flat":
        x[:] = 0.25
    elif kind == "peaked":
        x = x * 8 - 4
    elif kind == "image-like":  # smooth ridges, dustbin mostly on top
        stride = round((shape[1] - 1) ** 0.5)
        y, z = np.mgrid[: shape[2] * stride, : shape[3] * stride]
        for image in x:
            waves = rng.normal(0, 0.25, (12, 2))
            ridges = sum(np.cos(a * y + b * z + rng.uniform(0, 6)) for a, b in waves)
            cells = ridges.reshape(shape[2], stride, shape[3], stride).transpose(1, 3, 0, 2)
            image[:-1] = cells.reshape(stride * stride, *shape[2:]) * 1.5
            image[-1] = 6
    return x


def upload(values: np.ndarray, dtype: np.dtype | None = None, multiple: int = 0) -> arrays.DeviceArray:
    """A copy on the GPU; `dtype` names what the bits mean where numpy cannot.

    `multiple`: (B, C, H, W) laid channels-last, C padded to a multiple of it with what no sum survives: NaN.
    """
    if multiple:
        lying = np.ascontiguousarray(values.transpose(0, 2, 3, 1))
        pitch = -(-values.shape[1] // multiple) * multiple
        padded = np.full((*lying.shape[:3], pitch), -1 if values.dtype.kind == "u" else np.nan).astype(values.dtype)
        padded[..., : values.shape[1]] = lying
        memory = upload(padded)
        strides = arrays.channels_last(values.shape, pitch, values.dtype.itemsize)
        return arrays.DeviceArray(memory.address, values.shape, dtype or values.dtype, 0, memory, strides)
    values = np.ascontiguousarray(values)
    memory = cuda.DeviceMemory(values.nbytes)
    kind = cuda.runtime().cudaMemcpyKind.cudaMemcpyHostToDevice
    cuda.call("cudaMemcpy", memory.address, values.__array_interface__["data"][0], values.nbytes, kind)
    return arrays.DeviceArray(memory.address, values.shape, dtype or values.dtype, 0, memory)


def download(array: arrays.DeviceArray) -> np.ndarray:
    last = sum((size - 1) * stride for size, stride in zip(array.shape, array.strides or ()))
    block = np.empty(last + array.dtype.itemsize if array.strides else array.nbytes, np.uint8)
    kind = cuda.runtime().cudaMemcpyKind.cudaMemcpyDeviceToHost
    cuda.call("cudaMemcpy", block.__array_interface__["data"][0], array.address, block.nbytes, kind)
    return np.ndarray(array.shape, array.dtype, block, 0, array.strides)


def as_type(values: np.ndarray, head: str, multiple: int = 0) -> tuple[arrays.DeviceArray, np.ndarray]:
    """On the GPU in that type (`multiple`: as `upload`), and the same values as float32."""
    if head == "bfloat16":
        bits = (values.view(np.uint32) >> 16).astype(np.uint16)  # cut off, not rounded: any values will do
        return upload(bits, arrays.BFLOAT16, multiple), (bits.astype(np.uint32) << 16).view(np.float32)
    typed = values.astype(head)
    return upload(typed, multiple=multiple), typed.astype(np.float32)


def score_map(logits: arrays.DeviceArray, descriptors: arrays.DeviceArray) -> np.ndarray:
    """What the GPU's softmax gives, (B, H, W)."""
    decoder = Decoder(_head(logits), _head(descriptors), DecodeOptions(), Sampling.HALF_PIXEL)
    shape = (decoder.batch, decoder.height_px, decoder.width_px)
    scores = upload(np.full(shape, np.nan, np.float32))
    placed = upload(np.array([(shape[2], shape[1])] * shape[0], np.int32))
    decoder.score_map(placed.address, scores.address, -1.0, cuda.LEGACY_STREAM)
    cuda.call("cudaDeviceSynchronize")
    return download(scores)


def found_of(result: DeviceKeypoints, image: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    count = int(download(result.num_keypoints)[image])
    assert count <= result.scores.shape[1], "more rows were found than there is room for"
    return tuple(download(part)[image, :count] for part in (result.keypoints, result.scores, result.descriptors))


def check(
    kind: str,
    seed: int,
    grid: tuple[int, int, int],
    options: DecodeOptions,
    sampling: Sampling = Sampling.HALF_PIXEL,
    head: str = "float32",
    half: bool = False,
    stride: int = 8,
    dim: int = 256,
    multiple: int = 0,
) -> dict[str, float]:
    """Decodes on the GPU and in numpy; asserts what must be equal, and tells the rest. `multiple`: as `upload`.

    Softmax rounds a little differently in numpy, on every CPU anew, so equality has three parts: the maps agree to
    1e-6 of each score (cells of 8 px; numpy adds S*S + 1 terms one after the other in float32, whose error grows with
    their number, bounded by 6e-8 each); numpy's suppression and selection of the GPU's own map gives exactly the
    GPU's points, scores and order; and of numpy's own map `points_off` differ, which is 0 unless two scores lie
    within that rounding.
    """
    batch, rows, columns = grid
    rng = np.random.default_rng(seed + 1)
    on_gpu, logits = as_type(logits_of(kind, seed, (batch, stride * stride + 1, rows, columns)), head, multiple)
    coarse_gpu, coarse = as_type(rng.normal(0, 1, (batch, dim, rows, columns)).astype(np.float32), head, multiple)
    placed = [
        (columns * stride - int(rng.integers(stride)), rows * stride - int(rng.integers(stride))) for _ in range(batch)
    ]
    ours = score_map(on_gpu, coarse_gpu)
    theirs = decode.scores_from_logits(logits)
    error = float((np.abs(ours - theirs) / theirs).max())
    assert error < 1e-6 * max((stride * stride + 1) / 65, 1), error
    number = options.max_keypoints or rows * columns * stride * stride
    wanted = replace(options, max_keypoints=number)
    result = decode_heads(on_gpu, coarse_gpu, wanted, sampling=sampling, placed_wh=placed, half=half)
    told = {"score": error, "descriptor": 0.0, "points": 0, "points_off": 0}
    unit = decode.normalize(coarse, axis=1)
    for image, (width, height) in enumerate(placed):
        xy, scores, descriptors = found_of(result, image)
        expected_xy, expected_scores = decode.select(ours[image, :height, :width], options)
        np.testing.assert_allclose(xy, expected_xy, rtol=0, atol=1e-3 if options.subpixel else 0)
        np.testing.assert_array_equal(scores, expected_scores)
        assert descriptors.dtype == (np.float16 if half else np.float32)
        if len(xy):
            expected = decode.sample_descriptors(xy, unit[image], stride, sampling)
            off = float(np.abs(descriptors.astype(np.float32) - expected).max())
            assert off < (5e-4 if half else 2e-6), off
            told["descriptor"] = max(told["descriptor"], off)
        told["points"] += len(xy)
        if not options.subpixel:
            own_xy, _ = decode.select(theirs[image, :height, :width], options)
            told["points_off"] += len({tuple(p) for p in xy.tolist()} ^ {tuple(p) for p in own_xy.tolist()})
    return told


def main() -> None:
    """A bit of everything, small: sanitizers slow kernels down a hundredfold."""
    for seed, kind in enumerate(KINDS):
        for radius in (0, 2, 4, 7):
            options = DecodeOptions(radius, 3, 0.005, 60)
            for head, multiple in (("float32", 0), ("float16", 8)):
                dim = (100, 256, 64)[seed % 3]
                options = replace(options, subpixel=not options.subpixel)
                told = check(kind, seed, (2, 6, 9), options, head=head, half=bool(seed % 2), dim=dim, multiple=multiple)
                print(kind, radius, head, told)


if __name__ == "__main__":
    main()
