"""Homographies in batches: (B, 3, 3) float32, pixel centres at integers."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


def constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    """(N,) float32, filled on the device: `torch.tensor` copies from the host, which a CUDA graph cannot hold."""
    return torch.stack([torch.full((), value, dtype=torch.float32, device=device) for value in values])


def translation(xy: Tensor) -> Tensor:
    """(B, 2) -> (B, 3, 3)."""
    matrix = torch.eye(3, device=xy.device).repeat(len(xy), 1, 1)
    matrix[:, :2, 2] = xy
    return matrix


def rotation(angle: Tensor) -> Tensor:
    """(B,) radians -> (B, 3, 3)."""
    matrix = torch.eye(3, device=angle.device).repeat(len(angle), 1, 1)
    cos, sin = angle.cos(), angle.sin()
    matrix[:, 0, 0], matrix[:, 0, 1], matrix[:, 1, 0], matrix[:, 1, 1] = cos, -sin, sin, cos
    return matrix


def scaling(factors: Tensor) -> Tensor:
    """(B, 2) factors along x and y -> (B, 3, 3)."""
    matrix = torch.eye(3, device=factors.device).repeat(len(factors), 1, 1)
    matrix[:, 0, 0], matrix[:, 1, 1] = factors.T
    return matrix


def inverse(matrix: Tensor) -> Tensor:
    """(B, 3, 3) by cofactors: unlike torch.linalg.inv it never waits for the GPU, and it compiles."""
    a, b, c = matrix.unbind(dim=1)
    columns = torch.stack([torch.linalg.cross(b, c), torch.linalg.cross(c, a), torch.linalg.cross(a, b)], dim=2)
    return columns / (a * columns[..., 0]).sum(dim=1)[:, None, None]


def warp(xy: Tensor, matrix: Tensor) -> Tensor:
    """(B, N, 2) points through (B, 3, 3)."""
    x, y = xy.unbind(dim=-1)
    u, v, w = (matrix[:, row, :1] * x + matrix[:, row, 1:2] * y + matrix[:, row, 2:] for row in range(3))
    return torch.stack([u, v], dim=-1) / w.clamp(min=1e-4)[..., None]


def pixel_grid(height: int, width: int, device: torch.device) -> Tensor:
    """(H * W, 2): the pixels' centres, in reading order."""
    y, x = torch.meshgrid(torch.arange(height, device=device), torch.arange(width, device=device), indexing="ij")
    return torch.stack([x, y], dim=-1).reshape(-1, 2).float()


@dataclass(frozen=True)
class Motion:
    """How far a view may differ from looking straight at the image. Every range is drawn from independently."""

    zoom_octaves: float
    """Half the range of log2 of the magnification."""
    angle_deg: float
    """Standard deviation of the rotation."""
    wide_angle_share: float
    """Share of views that are rotated by anything up to `wide_angle_deg` instead."""
    perspective: float
    """Largest change of depth from the view's centre to the middle of a side, relative."""
    stretch_octaves: float
    """Half the range of log2 of the ratio of the axes, along a random direction."""
    shift: float
    """Half the range of the centre's shift, in half sides of the view."""
    wide_angle_deg: float = 110.0
    """Largest rotation of those that `wide_angle_share` counts."""


def uniform(shape: tuple[int, ...], low: float, high: float, device: torch.device) -> Tensor:
    """Uniform numbers, from torch's own generator of the device."""
    return torch.rand(shape, device=device) * (high - low) + low


def random_motions(count: int, view_hw: tuple[int, int], motion: Motion, device: torch.device) -> Tensor:
    """(B, 3, 3): pixels of a view -> the plane it looks at, whose origin is at the view's centre, 1 px to 1 px."""
    height, width = view_hw
    zoom = 2 ** uniform((count, 1), -motion.zoom_octaves, motion.zoom_octaves, device)
    angle = torch.randn(count, device=device) * math.radians(motion.angle_deg)
    wide = uniform((count,), -1, 1, device) * math.radians(motion.wide_angle_deg)
    angle = torch.where(uniform((count,), 0, 1, device) < motion.wide_angle_share, wide, angle)
    half = constant(((width - 1) / 2, (height - 1) / 2), device)
    tilt = torch.eye(3, device=device).repeat(count, 1, 1)
    tilt[:, 2, :2] = uniform((count, 2), -motion.perspective, motion.perspective, device) / half
    ratio = 2 ** (uniform((count,), -motion.stretch_octaves, motion.stretch_octaves, device) / 2)
    axis = rotation(uniform((count,), 0, math.pi, device))
    stretch = axis @ scaling(torch.stack([ratio, 1 / ratio], dim=1)) @ axis.transpose(1, 2)
    shift = uniform((count, 2), -motion.shift, motion.shift, device) * half
    to_centre = translation(-half.expand(count, 2))
    return translation(shift) @ rotation(angle) @ stretch @ scaling(zoom.expand(-1, 2)) @ tilt @ to_centre
