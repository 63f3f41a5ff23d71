"""Real photographs, only those whose licence allows training on them: the folders given, and scikit-image's own."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor

from superpoint_trt.core.types import SuperPointError
from training.bank import Bank

CANVAS_PX = 768

SKIMAGE = (
    "brick.png",
    "cell.png",
    "chelsea.png",
    "clock_motion.png",
    "coffee.png",
    "coins.png",
    "grass.png",
    "gravel.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "moon.png",
    "motorcycle_left.png",
    "motorcycle_right.png",
    "page.png",
    "retina.jpg",
    "rocket.jpg",
    "text.png",
)
"""In the wheel and free of restrictions (its data/README and docstrings). `astronaut` and `camera` stay out: the tests
and the demo look at them."""

HELD_OUT = ("kodim07", "kodim15", "kodim22")
"""For the curve over training and `development.py`; never trained on. File names without their endings."""
HELD_OUT_SOURCES = ("akc", "carpentry", "immich", "toscana", "visitisrael")
"""Sources of `photos/free`, likewise: whole ones, since pictures of one source may show the same place twice."""
SUFFIXES = (".png", ".jpg", ".ppm", ".webp")

SEQUENCE = "tum_freiburg"
SEQUENCE_DRAW = 0.4
"""Seventeen frames of one office count as about seven photographs."""


def find(folders: list[Path]) -> tuple[list[Path], list[Path]]:
    """Image files to train on, and those held out.

    Args:
        folders: searched for .png, .jpg, .ppm and .webp at any depth; the scikit-image wheel's photographs are added.

    Raises:
        SuperPointError: no photograph in any of them.
    """
    import skimage

    found = sorted(p for folder in folders for p in folder.rglob("*") if p.suffix in SUFFIXES)
    if not found:
        raise SuperPointError(
            f"no photographs in {', '.join(map(str, folders))}: name folders that hold some (--photos)."
        )
    own = Path(skimage.__file__).parent / "data"
    train = [path for path in found if not _held_out(path)]
    train += [own / name for name in SKIMAGE if (own / name).is_file()]
    return train, [path for path in found if _held_out(path)]


def _held_out(path: Path) -> bool:
    return path.stem in HELD_OUT or path.parent.name in HELD_OUT_SOURCES


def load(paths: list[Path], device: torch.device, canvas_px: int = CANVAS_PX) -> Bank:
    """Photographs on canvases; what is larger is shrunk to fit."""
    canvases, sizes = [], []
    for path in paths:
        read = cv2.imread(str(path), cv2.IMREAD_COLOR)
        if read is None:
            raise SuperPointError(f"{path} is not a readable image: mend it, or take it out of the folder.")
        pixels = fit(read, canvas_px)
        height, width = pixels.shape[:2]
        canvas = np.zeros((canvas_px, canvas_px, 3), np.uint8)
        canvas[:height, :width] = pixels[..., ::-1]
        canvases.append(torch.from_numpy(canvas).permute(2, 0, 1))
        sizes.append((height, width))
    draw = [SEQUENCE_DRAW if SEQUENCE in path.parts else 1.0 for path in paths]
    return Bank(torch.stack(canvases).to(device), _floats(sizes, device), _floats(draw, device))


def fit(pixels: np.ndarray, side_px: int) -> np.ndarray:
    """Shrinks a picture whose longer side is more than `side_px`."""
    scale = side_px / max(pixels.shape[:2])
    return pixels if scale >= 1 else cv2.resize(pixels, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)


def _floats(values: list, device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device)
