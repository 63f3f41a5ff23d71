"""A steadier teacher than any network: the mean of its answers over the eight symmetries of the square.

A detector places a point a little differently in a mirrored or turned picture, and chooses others. What all eight have
in common is more repeatable than each, and lies nearer to where the point is (docs/notes/training-v2.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from superpoint_trt.core.types import CELL_PX

Symmetry = tuple[bool, int]
"""Whether the picture is mirrored, and how many quarters it is turned by then."""
SYMMETRIES: list[Symmetry] = [(mirrored, turns) for mirrored in (False, True) for turns in range(4)]
MOST_TEACHERS = 4
"""That share the symmetries: two each."""
LOST_OCTAVES = 0.3
"""A view that strong blur has robbed of more detail than this cannot show what the teacher saw."""
LEAST = 1e-8


@torch.no_grad()
def steady_logits(
    logits_of: Callable[[Tensor], Tensor], image: Tensor, symmetries: Sequence[Symmetry] = SYMMETRIES
) -> Tensor:
    """Logarithms of the mean of a detector's probabilities.

    Args:
        logits_of: (B, 1, H, W) -> (B, 65, H/8, W/8); H and W change places for half of the symmetries.
        image: (B, 1, H, W) in [0, 1].
        symmetries: those that the mean is of.

    Returns:
        (B, 65, H/8, W/8).
    """
    total: Tensor | float = 0.0
    for mirrored, turns in symmetries:
        seen = torch.rot90(image.flip(3) if mirrored else image, turns, (2, 3))
        share = logits_of(seen).float().softmax(dim=1)
        parts = F.pixel_shuffle(share[:, :-1], CELL_PX), share[:, -1:]
        pixels, dustbin = (torch.rot90(part, -turns, (2, 3)) for part in parts)
        if mirrored:
            pixels, dustbin = pixels.flip(3), dustbin.flip(3)
        total = total + torch.cat([F.pixel_unshuffle(pixels, CELL_PX), dustbin], dim=1)
    return (total / len(symmetries)).clamp(min=LEAST).log()


def dealt(teachers: int) -> list[list[Symmetry]]:
    """The symmetries, dealt out in turn: with two teachers, turning by a quarter or mirroring leads to the other one.

    Args:
        teachers: how many, 1 to `MOST_TEACHERS`.
    """
    return [[each for each in SYMMETRIES if sum(each) % teachers == mine] for mine in range(teachers)]


@torch.no_grad()
def shared_logits(teachers: Sequence[Callable[[Tensor], Tensor]], image: Tensor) -> Tensor:
    """Logarithms of the mean of eight answers, one for each symmetry, which the teachers share.

    Args:
        teachers: each as `logits_of` of `steady_logits`; 1 to `MOST_TEACHERS`.
        image: (B, 1, H, W) in [0, 1].

    Returns:
        (B, 65, H/8, W/8).
    """
    hands = list(zip(teachers, dealt(len(teachers))))
    total = sum(steady_logits(logits_of, image, own).exp() * len(own) for logits_of, own in hands)
    return (total / len(SYMMETRIES)).clamp(min=LEAST).log()


def divergence(told: Tensor, said: Tensor) -> Tensor:
    """Kullback-Leibler's, of logits along dimension 1."""
    told = told.log_softmax(dim=1)
    return (told.exp() * (told - said.log_softmax(dim=1))).sum(dim=1)


def unsteady(told: Tensor, said: Tensor, lost: Tensor) -> Tensor:
    """The mean divergence of a detector's answers on disturbed views from a teacher's on the undisturbed ones.

    Args:
        told: (B, 65, H/8, W/8) logits of the teacher.
        said: (B, 65, H/8, W/8) logits.
        lost: (B,) octaves of detail that each disturbed view has lost; those above LOST_OCTAVES do not count.
    """
    counts = (lost < LOST_OCTAVES).float()
    each = divergence(told, said.float()).mean(dim=(1, 2))
    return (each * counts).sum() / counts.sum().clamp(min=1)
