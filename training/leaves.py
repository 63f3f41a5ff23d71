"""Dead leaves: occluding shapes whose sizes follow a power law, as in natural scenes (Lee et al. 2001).

Each is filled with a plain colour, a texture, or a piece of a photograph. Drawn on the GPU.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from training.bank import Bank
from training.geometry import inverse, pixel_grid, rotation, scaling, translation, uniform, warp
from training.shapes import polygon_distance

SIDE_PX = 512
RADIUS_PX = (7.0, 160.0)
LEAVES = 220
TEXTURES = 6
PLAIN_SHARE = 0.45


def draw(count: int, photos: Bank, device: torch.device, batch: int = 16) -> Bank:
    """A bank of `count` collages of `SIDE_PX`^2, without points."""
    images = torch.cat([_collage(min(batch, count - i), photos, device) for i in range(0, count, batch)])
    return Bank(images, torch.full((count, 2), float(SIDE_PX), device=device), torch.ones(count, device=device))


def _collage(count: int, photos: Bank, device: torch.device) -> Tensor:
    """(B, 3, S, S) uint8, painted back to front."""
    pixels = pixel_grid(SIDE_PX, SIDE_PX, device).expand(count, -1, -1)
    textures = torch.stack([_texture(count, photos, kind, device) for kind in range(TEXTURES)])
    image = textures[0].clone()
    rows = torch.arange(count, device=device)
    for leaf in range(LEAVES):
        inside = (_leaf_distance(pixels, count, leaf, device) < 0).view(count, 1, SIDE_PX, SIDE_PX)
        fill = textures[torch.randint(TEXTURES, (count,), device=device), rows]
        plain = uniform((count, 1, 1, 1), 0, 1, device) < PLAIN_SHARE
        image = torch.where(inside, torch.where(plain, _colour(count, device), fill), image)
    return (
        (F.avg_pool2d(F.pad(image, (0, 1, 0, 1), mode="replicate"), 2, 1) * 255).round().clamp(0, 255).to(torch.uint8)
    )


def _leaf_distance(pixels: Tensor, count: int, leaf: int, device: torch.device) -> Tensor:
    """A leaf somewhere: ellipses and convex polygons of three to six corners in turn; large ones first."""
    low, high = RADIUS_PX
    share = uniform((count, 1), 0, 1, device)
    # The density of radii falls with the third power, so that every scale covers as much of the image as another.
    radius = (low**-2 + share * (high**-2 - low**-2)) ** -0.5
    radius = radius * (1 + 2 * (1 - leaf / LEAVES))
    centre = uniform((count, 2), 0, SIDE_PX, device)
    axes = torch.cat([radius, radius * uniform((count, 1), 0.3, 1, device)], dim=1)
    place = translation(centre) @ rotation(uniform((count,), 0, math.pi, device)) @ scaling(axes)
    sides = leaf % 5 + 2
    if sides == 2:
        return warp(pixels, inverse(place)).norm(dim=-1) - 1
    jitter = uniform((count, sides), -0.3, 0.3, device)
    angle = (torch.arange(sides, device=pixels.device) + jitter) * 2 * math.pi / sides
    return polygon_distance(pixels, warp(torch.stack([angle.cos(), angle.sin()], dim=-1), place))


def _colour(count: int, device: torch.device) -> Tensor:
    """(B, 3, 1, 1): mostly gray, a little colour."""
    gray = uniform((count, 1, 1, 1), 0, 1, device)
    return (gray + uniform((count, 3, 1, 1), -0.15, 0.15, device)).clamp(0, 1)


def _texture(count: int, photos: Bank, kind: int, device: torch.device) -> Tensor:
    """(B, 3, S, S) float: pieces of photographs, or noise whose power falls with frequency."""
    if kind < TEXTURES // 2:
        return _photo_piece(count, photos, device)
    noise = torch.zeros(count, 3, SIDE_PX, SIDE_PX, device=device)
    falling = uniform((count, 1, 1, 1), 0.4, 1.1, device)
    for octave in range(2, 9):
        coarse = torch.randn((count, 1, 2**octave, 2**octave), device=device)
        noise += F.interpolate(coarse, (SIDE_PX, SIDE_PX), mode="bilinear") * 2 ** (-falling * octave)
    noise = noise / noise.std(dim=(1, 2, 3), keepdim=True)
    return (_colour(count, device) + noise * uniform((count, 1, 1, 1), 0.03, 0.25, device)).clamp(0, 1)


def _photo_piece(count: int, photos: Bank, device: torch.device) -> Tensor:
    index = photos.sample(count)
    sizes = photos.sizes[index].flip(1)
    zoom = 2 ** uniform((count, 1), -1, 0.3, device)
    centre = uniform((count, 2), 0.2, 0.8, device) * sizes
    angle = uniform((count,), -math.pi, math.pi, device)
    half = torch.full((count, 2), -SIDE_PX / 2, device=device)
    place = translation(centre) @ rotation(angle) @ scaling(zoom.expand(-1, 2)) @ translation(half)
    xy = warp(pixel_grid(SIDE_PX, SIDE_PX, device).expand(count, -1, -1), place)
    last = sizes[:, None] - 1
    xy = (xy.abs() % (2 * last)).sub(last).abs().neg().add(last)  # mirrored at the edges
    unit = ((2 * xy + 1) / photos.images.shape[-1] - 1).view(count, SIDE_PX, SIDE_PX, 2)
    return F.grid_sample(photos.images[index].float() / 255, unit, align_corners=False)
