"""Views of the bank's images: homographies, and changes of light, sharpness and noise, all on the GPU in batches."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from training.geometry import Motion, inverse, pixel_grid, random_motions, scaling, translation, uniform, warp

SUPERSAMPLE = 2
"""Each view's pixel is the mean of 2 x 2 samples, so that a view that shrinks its image does not alias."""

GRAY = (0.299, 0.587, 0.114)


@dataclass(frozen=True)
class Views:
    """B views."""

    image: Tensor
    """(B, 1, H, W) float32 in [0, 1]."""
    inside: Tensor
    """(B, 1, H, W) float32: 1 where the view shows its image, 0 where it looks past its edge."""
    to_canvas: Tensor
    """(B, 3, 3): pixels of the view -> pixels of the canvas."""

    def octaves(self) -> Tensor:
        """(B,) log2 of canvas pixels along one pixel in the middle of the view: from how far it looks."""
        height, width = self.image.shape[2:]
        middle = self.to_canvas.new_tensor([(width - 1) / 2, (height - 1) / 2, 1])
        # The determinant of a homography's Jacobian at x is det(H) / (h3 x)^3.
        a, b, c = self.to_canvas.unbind(dim=1)
        area = (torch.linalg.cross(a, b) * c).sum(dim=1).abs() / (c @ middle).abs() ** 3
        return area.log2() / 2


FIRST = Motion(0.0, 12.0, 0.1, 0.12, 0.2, 0.0)
"""The first view of a pair, on top of a zoom that suits the image."""
SECOND = Motion(0.9, 22.0, 0.2, 0.3, 0.45, 0.35)
"""The second view, relative to the first."""
ZOOM_OCTAVES = (-0.5, 1.3)
"""log2 of canvas pixels along one pixel of the first view."""


def pair(colour: Tensor, sizes: Tensor, view_hw: tuple[int, int]) -> tuple[Views, Views, Tensor]:
    """Two views of each image, and the homographies between them.

    Args:
        colour: (B, 3, S, S) uint8 canvases.
        sizes: (B, 2) height and width in px of what each holds.
        view_hw: size of the views.

    Returns:
        both views, and (B, 3, 3): pixels of the first -> pixels of the second.
    """
    first = _first(sizes, view_hw)
    centre = first.new_tensor([[(view_hw[1] - 1) / 2, (view_hw[0] - 1) / 2]])
    second = first @ translation(centre) @ random_motions(len(sizes), view_hw, SECOND, sizes.device)
    views = [Views(*look(_mix(colour), sizes, matrix, view_hw), matrix) for matrix in (first, second)]
    return views[0], views[1], inverse(second) @ first


def _first(sizes: Tensor, view_hw: tuple[int, int]) -> Tensor:
    """Zoom and place: anything between a detail and the whole image, mostly inside it; half of them mirrored."""
    device, sizes = sizes.device, sizes.flip(1)  # width, height
    view = sizes.new_tensor([view_hw[1], view_hw[0]])
    low, high = ZOOM_OCTAVES
    widest = ((sizes / view).amin(dim=1).log2() + 0.1).clamp(low, high)
    zoom = 2 ** (low + (widest - low) * uniform((len(sizes),), 0, 1, device))[:, None]
    room = (sizes - view * zoom).clamp(min=0)
    centre = (sizes - 1) / 2 + room * uniform((len(sizes), 2), -0.5, 0.5, device)
    mirrored = torch.where(uniform((len(sizes), 1), 0, 1, device) < 0.5, -zoom, zoom)
    factors = torch.cat([mirrored, zoom], dim=1)
    return translation(centre) @ scaling(factors) @ random_motions(len(sizes), view_hw, FIRST, device)


def look(
    canvas: Tensor, sizes: Tensor, to_canvas: Tensor, view_hw: tuple[int, int], supersample: int = SUPERSAMPLE
) -> tuple[Tensor, Tensor]:
    """Resamples canvases.

    Args:
        canvas: (B, 1, S, S) float32.
        sizes: (B, 2) height and width of what each holds.
        to_canvas: (B, 3, 3) pixels of the view -> pixels of the canvas.
        view_hw: size of the views.
        supersample: samples along each side of a pixel.

    Returns:
        image and inside, both (B, 1, H, W) float32. Past its edge an image is continued by its last pixels.
    """
    height, width = view_hw
    fine = pixel_grid(height * supersample, width * supersample, canvas.device)
    fine = (fine + 0.5) / supersample - 0.5
    xy = warp(fine.expand(len(canvas), -1, -1), to_canvas)
    last = sizes.flip(1)[:, None] - 1
    within = ((xy >= 0) & (xy <= last)).all(dim=-1).float()
    xy = torch.minimum(xy.clamp(min=0), last)
    unit = (2 * xy + 1) / canvas.shape[-1] - 1
    shape = (len(canvas), height * supersample, width * supersample)
    image = F.grid_sample(canvas, unit.view(*shape, 2), mode="bilinear", align_corners=False)
    return F.avg_pool2d(image, supersample), F.avg_pool2d(within.view(len(canvas), 1, *shape[1:]), supersample)


def _mix(colour: Tensor) -> Tensor:
    """(B, 3, S, S) uint8 -> gray in [0, 1]: half of them BT.601, the others in random proportions."""
    count = len(colour)
    usual = torch.tensor(GRAY, device=colour.device).expand(count, 3)
    other = uniform((count, 3), 0.02, 1, colour.device) ** 2
    other = other / other.sum(dim=1, keepdim=True)
    weights = torch.where(uniform((count, 1), 0, 1, colour.device) < 0.5, usual, other) / 255
    return (colour.float() * weights[..., None, None]).sum(dim=1, keepdim=True)


# ------------------------------------------------------------------------------------------------------ light and noise


def disturb(image: Tensor) -> Tensor:
    """Uneven light, exposure, blur, compression and noise, each view's own; (B, 1, H, W) in [0, 1] again."""

    def some(share: float) -> Tensor:
        return (uniform((len(image), 1, 1, 1), 0, 1, image.device) < share).float()

    image = image * (_uneven_light(image) * some(0.5)).exp()
    image = _exposure(image)
    blurred = _blur(image)
    image = torch.lerp(image, blurred, some(0.4))
    image = torch.lerp(image, _compress(image), some(0.2))
    noise = torch.randn(image.shape, device=image.device)
    strength = uniform((len(image), 1, 1, 1), 0, 1, image.device) ** 2 * 0.07
    return (image + noise * strength * some(0.7)).clamp(0, 1)


def _uneven_light(image: Tensor) -> Tensor:
    """Log gain that changes slowly over the view."""
    coarse = torch.randn((len(image), 1, 4, 5), device=image.device)
    return F.interpolate(coarse, image.shape[-2:], mode="bicubic") * uniform(
        (len(image), 1, 1, 1), 0, 0.7, image.device
    )


def _exposure(image: Tensor) -> Tensor:
    """Gamma, contrast about the mean, brightness; what is too bright or too dark is lost."""
    shape = (len(image), 1, 1, 1)
    image = image.clamp(1e-4, 1.5) ** 2 ** uniform(shape, -0.9, 0.9, image.device)
    mean = image.mean(dim=(1, 2, 3), keepdim=True)
    contrast = 2 ** uniform(shape, -1.3, 0.6, image.device)
    return ((image - mean) * contrast + mean + uniform(shape, -0.2, 0.2, image.device)).clamp(0, 1)


BLUR_PX = 4


def _blur(image: Tensor) -> Tensor:
    """Gaussian, longer along a random direction: defocus and motion alike."""
    count, side = len(image), 2 * BLUR_PX + 1
    at = torch.arange(-BLUR_PX, BLUR_PX + 1, device=image.device).float()
    y, x = torch.meshgrid(at, at, indexing="ij")
    angle = uniform((count, 1, 1), 0, math.pi, image.device)
    along = x * angle.cos() + y * angle.sin()
    across = -x * angle.sin() + y * angle.cos()
    wide = uniform((count, 1, 1), 0.4, 2.4, image.device)
    narrow = wide * uniform((count, 1, 1), 0.2, 1, image.device).clamp(min=0.3)
    kernel = (-0.5 * ((along / wide) ** 2 + (across / narrow) ** 2)).exp()
    kernel = (kernel / kernel.sum(dim=(1, 2), keepdim=True)).view(count, 1, side, side)
    padded = F.pad(image, (BLUR_PX,) * 4, mode="replicate").transpose(0, 1)
    return F.conv2d(padded, kernel, groups=count).transpose(0, 1)


def _compress(image: Tensor) -> Tensor:
    """Blocks of 8 x 8 px through a coarsely rounded DCT, as JPEG does."""
    count, _, height, width = image.shape
    k = torch.arange(8, device=image.device).float()
    basis = torch.cos(math.pi / 8 * (k[None] + 0.5) * k[:, None]) * math.sqrt(2 / 8)
    basis[0] /= math.sqrt(2)
    step = (1 + k[:, None] + k[None]) * 2 ** uniform((count, 1, 1, 1, 1), -8, -4.5, image.device)
    # The camera's blocks do not lie on the network's cells.
    down, right = torch.randint(8, (2, 1), device=image.device)
    rows, columns = (
        (torch.arange(height, device=image.device) + down) % height,
        (torch.arange(width, device=image.device) + right) % width,
    )
    blocks = image[:, :, rows][..., columns].reshape(count, height // 8, 8, width // 8, 8).transpose(2, 3)
    coefficients = basis @ blocks @ basis.T
    rounded = (coefficients / step).round() * step
    restored = (basis.T @ rounded @ basis).transpose(2, 3).reshape(image.shape)
    return restored[:, :, (rows - 2 * down) % height][..., (columns - 2 * right) % width]
