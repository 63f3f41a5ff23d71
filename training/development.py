"""`python -m training.development --photos FOLDER --weights CHECKPOINT`: how a network bears change.

Held-out photographs against themselves turned, shrunk, blurred, darkened, compressed and looked at from the side. This
is what settings are chosen by, so that the pairs of docs/evaluation.md choose nothing. The pairs come from numpy and
OpenCV with seeds of their own: the same on every machine.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from superpoint_trt.checkpoint import layouts
from superpoint_trt.checkpoint.reference import SuperPointNet, decode, dense, sample_descriptors
from superpoint_trt.core.types import DecodeOptions, Sampling
from training import photos
from training.geometry import warp
from training.places import refine

POINTS = 1000
FEW = 300
LIMITS_PX = (1.0, 3.0)
FIGURES = ("mma1", "mma3", "rep1", "rep3", "right")

Gray = NDArray[np.uint8]
Features = tuple[Tensor, Tensor]
"""xy (N, 2) px, best first, and descriptors (N, D) of unit length."""


@dataclass(frozen=True)
class Change:
    """What becomes of the second picture of a pair."""

    name: str
    angle_deg: float = 0.0
    zoom: float = 1.0
    tilt: float = 0.0
    """Largest shift of a corner, as a share of the side."""
    spoil: Callable[[Gray, np.random.Generator], Gray] | None = None


def _convolved(gray: Gray, kernel: NDArray[np.float64]) -> Gray:
    return cv2.filter2D(gray, -1, kernel / kernel.sum(), borderType=cv2.BORDER_REPLICATE)


def _defocused(radius_px: float) -> Callable[[Gray, np.random.Generator], Gray]:
    def spoil(gray: Gray, _: np.random.Generator) -> Gray:
        reach = int(np.ceil(radius_px))
        y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
        return _convolved(gray, np.clip(radius_px + 0.5 - np.hypot(x, y), 0, 1))

    return spoil


def _moved(length_px: float) -> Callable[[Gray, np.random.Generator], Gray]:
    def spoil(gray: Gray, random: np.random.Generator) -> Gray:
        reach = int(np.ceil(length_px / 2))
        y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
        angle = random.uniform(0, np.pi)
        along, across = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
        line = np.clip(length_px / 2 + 0.5 - abs(along), 0, 1) * np.clip(1 - abs(across), 0, 1)
        return _convolved(gray, line)

    return spoil


def _dark(exposure: float, photons: float) -> Callable[[Gray, np.random.Generator], Gray]:
    """Lamps instead of daylight, and few photons: mean gray `exposure`, so many photons at white."""

    def spoil(gray: Gray, random: np.random.Generator) -> Gray:
        height, width = gray.shape
        lamps = cv2.resize(random.standard_normal((4, 5)), (width, height), interpolation=cv2.INTER_CUBIC)
        light = (gray / 255.0) ** 2.2 * np.exp(lamps)
        light *= exposure / light.mean()
        counted = random.poisson(np.clip(light, 0, 1) * photons) / photons
        return (np.clip(counted + random.normal(0, 0.004, gray.shape), 0, 1) * 255).astype(np.uint8)

    return spoil


def _shaded(gray: Gray, random: np.random.Generator) -> Gray:
    """The shadow of something in front, with a sharp edge, over about half of the picture; the rest overexposed."""
    height, width = gray.shape
    steps = cv2.resize(random.standard_normal((5, 6)), (width, height), interpolation=cv2.INTER_CUBIC)
    light = np.where(cv2.GaussianBlur((steps > 0).astype(np.float64), (0, 0), 1.5) > 0.5, 1.3, 0.35)
    return np.clip(gray * light, 0, 255).astype(np.uint8)


def _compressed(quality: int) -> Callable[[Gray, np.random.Generator], Gray]:
    def spoil(gray: Gray, _: np.random.Generator) -> Gray:
        coded = cv2.imencode(".jpg", gray, [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
        return cv2.imdecode(coded, cv2.IMREAD_GRAYSCALE).astype(np.uint8)

    return spoil


CHANGES = (
    Change("side 0.15", tilt=0.15),
    Change("side 0.3", tilt=0.3),
    Change("side 0.4", tilt=0.4),
    *(Change(f"turn {angle}", angle_deg=angle) for angle in (30, 60, 90, 135, 180)),
    *(Change(f"zoom {zoom}", zoom=zoom) for zoom in (0.7, 0.5, 0.35, 0.25)),
    Change("turn 45 zoom 0.5", angle_deg=45, zoom=0.5),
    Change("turn 90 zoom 0.5", angle_deg=90, zoom=0.5),
    Change("defocus 2 px", tilt=0.05, spoil=_defocused(2)),
    Change("defocus 5 px", tilt=0.05, spoil=_defocused(5)),
    Change("motion 10 px", tilt=0.05, spoil=_moved(10)),
    Change("dusk", tilt=0.05, spoil=_dark(0.2, 1000)),
    Change("night", tilt=0.05, spoil=_dark(0.05, 250)),
    Change("shade", tilt=0.15, spoil=_shaded),
    Change("jpeg 8", tilt=0.05, spoil=_compressed(8)),
)
GROUPS = {
    "view": ("side", "zoom 0.7"),
    "turn": ("turn 30", "turn 60", "turn 90", "turn 135", "turn 180"),
    "zoom": ("zoom 0.5", "zoom 0.35", "zoom 0.25"),
    "blur": ("defocus", "motion"),
    "light": ("dusk", "night", "shade"),
}
"""Changes by how their names begin."""


def changed(gray: Gray, change: Change, seed: int) -> tuple[Gray, NDArray[np.float64]]:
    """The second picture of a pair, and the homography from the first to it.

    No change is exact: each has a few degrees, a few per cent and a fraction of a pixel of its own.
    """
    random = np.random.default_rng([seed, zlib.crc32(change.name.encode())])
    height, width = gray.shape
    zoom = change.zoom * random.uniform(0.96, 1.0)
    angle = np.radians(change.angle_deg + random.uniform(-3, 3))
    corners = np.array([[0, 0], [width, 0], [width, height], [0, height]], np.float64) - 0.5
    moved = corners + random.uniform(-change.tilt, change.tilt, (4, 2)) * [width, height]
    turn = zoom * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    moved = moved @ turn.T
    moved -= moved.min(axis=0) + random.uniform(0, 1, 2)
    matrix = cv2.getPerspectiveTransform(corners.astype(np.float32), moved.astype(np.float32)).astype(np.float64)
    size = np.ceil(moved.max(axis=0)).astype(int)
    # What shrinks is averaged first, as a lens and a sensor do.
    sigma = 0.5 * np.sqrt(max(1 / zoom**2 - 1, 0))
    sharp = gray if sigma < 0.2 else cv2.GaussianBlur(gray, (0, 0), sigma, borderType=cv2.BORDER_REPLICATE)
    seen = cv2.warpPerspective(sharp, matrix, tuple(size.tolist()), flags=cv2.INTER_CUBIC, borderValue=127)
    return (change.spoil(seen, random) if change.spoil else seen).astype(np.uint8), matrix


def pairs(paths: list[Path], side_px: int = 768) -> Iterator[tuple[Gray, list[tuple[str, Gray, NDArray[np.float64]]]]]:
    """Of each photograph the gray picture, and all changes of it: name, picture, homography."""
    for path in paths:
        gray = photos.fit(cv2.imread(str(path), cv2.IMREAD_GRAYSCALE), side_px).astype(np.uint8)
        seed = zlib.crc32(path.stem.encode())
        yield gray, [(change.name, *changed(gray, change, seed)) for change in CHANGES]


# ------------------------------------------------------------------------------------------------------------- features


@dataclass
class Network:
    """Features by a network, decoded as the toolkit does."""

    net: SuperPointNet
    device: torch.device
    subpixel: bool = True
    sampling: Sampling = Sampling.HALF_PIXEL

    @torch.no_grad()
    def __call__(self, gray: Gray) -> Features:
        """The best `POINTS` at the package's defaults."""
        height, width = (side // 8 * 8 for side in gray.shape)
        image = torch.from_numpy(gray[:height, :width].copy()).to(self.device)[None, None].float() / 255
        scores, descriptors = dense(*self.net(image))
        xy, _, sampled = decode(scores, descriptors, DecodeOptions(max_keypoints=POINTS), self.sampling)[0]
        if self.subpixel:
            xy = refine(scores[:, None], xy[None].long())[0][0]
            sampled = sample_descriptors(xy, descriptors[0], 8, self.sampling)
        return xy, sampled


def root_sift(gray: Gray) -> Features:
    """OpenCV's SIFT, best responses first; descriptors as Arandjelovic and Zisserman 2012."""
    points, found = cv2.SIFT_create().detectAndCompute(gray, None)
    if found is None:
        return torch.zeros(0, 2), torch.zeros(0, 128)
    best = np.argsort([-point.response for point in points], kind="stable")[:POINTS]
    root = np.sqrt(found[best] / np.maximum(found[best].sum(axis=1, keepdims=True), 1e-9))
    return torch.tensor([points[row].pt for row in best]), torch.from_numpy(root.astype(np.float32))


# -------------------------------------------------------------------------------------------------------------- figures


def judge(first: Features, second: Features, matrix: NDArray[np.float64], size_hw: tuple[int, int]) -> dict[str, float]:
    """Of one pair: the share of mutual nearest neighbours that are right, and of points found again.

    `right` is the number of right matches (3 px) as a share of the points of the first picture.
    """
    (xy, descriptors), (other, others) = first, second
    if not len(xy) or not len(other):
        return dict.fromkeys(FIGURES, 0.0)
    there = warp(xy.double()[None], torch.from_numpy(matrix).to(xy.device)[None])[0]
    similarity = descriptors @ others.T
    forward = similarity.argmax(dim=1)
    mutual = similarity.argmax(dim=0)[forward] == torch.arange(len(xy), device=xy.device)
    error = (there - other[forward]).norm(dim=1)
    last = there.new_tensor([size_hw[1] - 1, size_hw[0] - 1])
    shown = ((there >= 0) & (there <= last)).all(dim=1)[:FEW]
    near = torch.cdist(there[:FEW], other.double()).amin(dim=1)
    shares = [(error[mutual] < limit).double().mean() for limit in LIMITS_PX]
    shares += [((near < limit) & shown).sum() / shown.sum() for limit in LIMITS_PX]
    shares += [((error < LIMITS_PX[-1]) & mutual).sum() / len(xy)]
    return dict(zip(FIGURES, torch.stack([share.double() for share in shares]).nan_to_num(0).tolist()))


Pairs = list[tuple[Gray, list[tuple[str, Gray, NDArray[np.float64]]]]]


def evaluate(features: Callable[[Gray], Features], made: Pairs) -> dict[str, dict[str, float]]:
    """Figures of each change, of each of `GROUPS`, and of all; means over the photographs."""
    rows: dict[str, list[dict[str, float]]] = {}
    # Every picture has a size of its own: cuDNN must not time all its algorithms for each.
    with torch.backends.cudnn.flags(enabled=True, benchmark=False):
        for gray, others in made:
            first = features(gray)
            for name, picture, matrix in others:
                rows.setdefault(name, []).append(judge(first, features(picture), matrix, picture.shape[:2]))
    means = {name: _mean(row) for name, row in rows.items()}
    groups = {
        group: [row for name, row in means.items() if name.startswith(starts)] for group, starts in GROUPS.items()
    }
    return {**means, **{group: _mean(row) for group, row in groups.items() if row}, "all": _mean(list(means.values()))}


def _mean(rows: list[dict[str, float]]) -> dict[str, float]:
    return {key: round(float(np.mean([row[key] for row in rows])), 4) for key in rows[0]}


def network(path: str, device: torch.device, subpixel: bool = True) -> Network:
    """Of a checkpoint file."""
    loaded = layouts.load(path)
    return Network(SuperPointNet.from_checkpoint(loaded).to(device), device, subpixel, loaded.sampling)


def table(figures: dict[str, dict[str, float]]) -> str:
    """One line a change."""
    keys = list(next(iter(figures.values())))
    lines = [f"{'':18}" + "".join(f"{key:>8}" for key in keys)]
    lines += [f"{name:18}" + "".join(f"{row[key]:8.3f}" for key in keys) for name, row in figures.items()]
    return "\n".join(lines)


@click.command()
@click.option("--photos", "folders", multiple=True, required=True, help="Folder of photographs; may be given again.")
@click.option("--weights", required=True, help="Checkpoint, or `sift`.")
@click.option("--subpixel/--no-subpixel", default=True, show_default=True)
@click.option("--device", default="cpu", show_default=True)
@click.option("--most", default=10**6, help="Photographs to look at.")
@click.option("--json", "output", help="File for the figures.")
def main(folders: tuple[str, ...], weights: str, subpixel: bool, device: str, most: int, output: str | None) -> None:
    """Judges weights on changed photographs that were kept out of training."""
    held_out = photos.find([Path(folder) for folder in folders])[1][:most]
    features: Any = root_sift if weights == "sift" else network(weights, torch.device(device), subpixel)
    figures = evaluate(features, list(pairs(held_out)))
    print(table(figures))
    if output:
        Path(output).write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
