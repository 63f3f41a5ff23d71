"""Views of the bank's images: homographies, and changes of light, sharpness and noise, all on the GPU in batches."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from training.geometry import Motion, constant, inverse, pixel_grid, random_motions, scaling, translation, uniform, warp

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
        middle = constant(((width - 1) / 2, (height - 1) / 2, 1), self.to_canvas.device)
        # The determinant of a homography's Jacobian at x is det(H) / (h3 x)^3.
        a, b, c = self.to_canvas.unbind(dim=1)
        area = (torch.linalg.cross(a, b) * c).sum(dim=1).abs() / (c @ middle).abs() ** 3
        return area.log2() / 2


FIRST = Motion(0.0, 12.0, 0.1, 0.12, 0.2, 0.0)
"""The first view of a pair, on top of a zoom that suits the image."""
SECOND = Motion(0.9, 22.0, 0.2, 0.3, 0.45, 0.35)
"""The second view, relative to the first."""
FAR = Motion(0.3, 0.0, 1.0, 0.2, 0.3, 0.15, wide_angle_deg=180.0)
"""The second view of a far pair, relative to the first, on top of the steps back: turned by anything."""
TILTED = Motion(0.5, 30.0, 0.3, 0.45, 1.4, 0.3, wide_angle_deg=180.0)
"""The second view of a tilted pair: a plane seen from up to 68 degrees beside its normal is 2^1.4 times narrower."""
FAR_OCTAVES = 2.0
"""The other view of a far pair sees its image up to this much smaller: 2 octaves are a zoom of 0.25."""
FAR_ROOM_OCTAVES = 0.7
"""What steps farther back than this must begin nearer by, so that the image still fills the view."""
ZOOM_OCTAVES = (-0.5, 1.3)
"""log2 of canvas pixels along one pixel of the first view."""


def pair(
    colour: Tensor, sizes: Tensor, view_hw: tuple[int, int], far_share: float = 0.0, tilted_share: float = 0.0
) -> tuple[Views, Views, Tensor]:
    """Two views of each image, and the homographies between them.

    Args:
        colour: (B, 3, S, S) uint8 canvases.
        sizes: (B, 2) height and width in px of what each holds.
        view_hw: size of the views.
        far_share: of pairs, those whose views differ by any rotation and a zoom down to 0.25, either way.
        tilted_share: of pairs, those where one view looks from far beside the other (TILTED); none of them is far.

    Returns:
        both views, and (B, 3, 3): pixels of the first -> pixels of the second.
    """
    count, device = len(sizes), sizes.device
    kind = uniform((count, 1, 1), 0, 1, device)
    far, tilted = kind < far_share, kind > 1 - tilted_share
    back = uniform((count, 1), 0, FAR_OCTAVES, device) * far[:, 0]
    first = _first(sizes, view_hw, (back[:, 0] - FAR_ROOM_OCTAVES).clamp(min=0))
    centre = constant(((view_hw[1] - 1) / 2, (view_hw[0] - 1) / 2), device)[None]
    usual, beside, other = (random_motions(count, view_hw, motion, device) for motion in (SECOND, TILTED, FAR))
    motion = torch.where(far, other, torch.where(tilted, beside, usual))
    second = first @ translation(centre) @ scaling(2 ** back.expand(-1, 2)) @ motion
    swapped = (far | tilted) & (uniform((count, 1, 1), 0, 1, device) < 0.5)
    first, second = torch.where(swapped, second, first), torch.where(swapped, first, second)
    views = [Views(*look(_mix(colour), sizes, matrix, view_hw), matrix) for matrix in (first, second)]
    return views[0], views[1], inverse(second) @ first


def _first(sizes: Tensor, view_hw: tuple[int, int], nearer: Tensor) -> Tensor:
    """Zoom and place: anything between a detail and the whole image, mostly inside it; half of them mirrored.

    nearer: (B,) octaves by which the widest of views must come nearer.
    """
    device, sizes = sizes.device, sizes.flip(1)  # width, height
    view = constant((view_hw[1], view_hw[0]), device)
    low, high = ZOOM_OCTAVES
    widest = ((sizes / view).amin(dim=1).log2() + 0.1 - nearer).clamp(low, high)
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
    usual = constant(GRAY, colour.device).expand(count, 3)
    other = uniform((count, 3), 0.02, 1, colour.device) ** 2
    other = other / other.sum(dim=1, keepdim=True)
    weights = torch.where(uniform((count, 1), 0, 1, colour.device) < 0.5, usual, other) / 255
    return (colour.float() * weights[..., None, None]).sum(dim=1, keepdim=True)


# ------------------------------------------------------------------------------------------------------ light and noise


COARSEST_STEP_OCTAVES = -4.5
"""log2 of the coarsest step of compression that `disturb` takes unless told: about JPEG quality 65."""


def disturb(image: Tensor, coarsest_step_octaves: float = COARSEST_STEP_OCTAVES, shadow_share: float = 0.0) -> Tensor:
    """Uneven light, shadows, exposure, blur, compression and noise, each view's own; (B, 1, H, W) in [0, 1] again."""

    def some(share: float) -> Tensor:
        return (uniform((len(image), 1, 1, 1), 0, 1, image.device) < share).float()

    image = image * (_uneven_light(image) * some(0.5)).exp()
    if shadow_share:
        image = image * torch.lerp(torch.ones_like(image), _shadow(image), some(shadow_share))
    image = _exposure(image)
    blurred = _blur(image)
    image = torch.lerp(image, blurred, some(0.4))
    image = torch.lerp(image, _compress(image, coarsest_step_octaves), some(0.2))
    noise = torch.randn(image.shape, device=image.device)
    strength = uniform((len(image), 1, 1, 1), 0, 1, image.device) ** 2 * 0.07
    return (image + noise * strength * some(0.7)).clamp(0, 1)


def _uneven_light(image: Tensor) -> Tensor:
    """Log gain that changes slowly over the view."""
    coarse = torch.randn((len(image), 1, 4, 5), device=image.device)
    return F.interpolate(coarse, image.shape[-2:], mode="bicubic") * uniform(
        (len(image), 1, 1, 1), 0, 0.7, image.device
    )


def _shadow(image: Tensor) -> Tensor:
    """(B, 1, H, W) factors: darker, to a sharp or soft edge, within a corner or a strip anywhere in the view."""
    count, _, height, width = image.shape
    y = torch.linspace(-1, 1, height, device=image.device)[:, None]
    x = torch.linspace(-1, 1, width, device=image.device)
    shape = (count, 2, 1, 1)
    angle = uniform(shape, 0, 2 * math.pi, image.device)
    away = x * angle.cos() + y * angle.sin() + uniform(shape, -0.6, 0.6, image.device)
    sharpness = 2 ** uniform((count, 1, 1, 1), 2.5, 7.5, image.device)
    inside = torch.sigmoid(away * sharpness).prod(dim=1, keepdim=True)
    return 1 - inside * uniform((count, 1, 1, 1), 0.3, 0.85, image.device)


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


def _compress(image: Tensor, coarsest_step_octaves: float) -> Tensor:
    """Blocks of 8 x 8 px through a coarsely rounded DCT, as JPEG does."""
    count, _, height, width = image.shape
    k = torch.arange(8, device=image.device).float()
    basis = torch.cos(math.pi / 8 * (k[None] + 0.5) * k[:, None]) * math.sqrt(2 / 8)
    basis[0] /= math.sqrt(2)
    step = (1 + k[:, None] + k[None]) * 2 ** uniform((count, 1, 1, 1, 1), -8, coarsest_step_octaves, image.device)
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


# ------------------------------------------------------------------------------------------- strong blur, and the night

STRONG_BLUR_PX = 7
DEFOCUS_RADIUS_PX = (1.5, 5.0)
MOTION_LENGTH_PX = (4.0, 14.0)
SHARP_SIGMA_PX = 0.7
"""Standard deviation of a blur that takes nothing away from a view: about that of its own pixels."""


def blur_strongly(image: Tensor) -> tuple[Tensor, Tensor]:
    """A lens out of focus (a disk) or a camera that moved (a line), one or the other for each view.

    Args:
        image: (B, 1, H, W).

    Returns:
        the same blurred, and (B,) how many octaves of detail are lost: from how much farther away it seems to be seen.
    """
    count, side, device = len(image), 2 * STRONG_BLUR_PX + 1, image.device
    at = torch.arange(-STRONG_BLUR_PX, STRONG_BLUR_PX + 1, device=device).float()
    y, x = torch.meshgrid(at, at, indexing="ij")
    radius = uniform((count, 1, 1), *DEFOCUS_RADIUS_PX, device)
    disk = (radius + 0.5 - (x.square() + y.square()).sqrt()).clamp(0, 1)
    length = uniform((count, 1, 1), *MOTION_LENGTH_PX, device)
    angle = uniform((count, 1, 1), 0, math.pi, device)
    along = (x * angle.cos() + y * angle.sin()).abs()
    across = (-x * angle.sin() + y * angle.cos()).abs()
    line = (length / 2 + 0.5 - along).clamp(0, 1) * (1.2 - across).clamp(0, 1)
    moved = uniform((count, 1, 1), 0, 1, device) < 0.5
    kernel = torch.where(moved, line, disk)
    kernel = (kernel / kernel.sum(dim=(1, 2), keepdim=True)).view(count, 1, side, side)
    padded = F.pad(image, (STRONG_BLUR_PX,) * 4, mode="replicate").transpose(0, 1)
    # Per axis, the variance of a disk is radius^2 / 4; of a line length^2 / 12, shared by two axes.
    variance = torch.where(moved, length.square() / 24, radius.square() / 4).flatten()
    lost = (1 + variance / SHARP_SIGMA_PX**2).log2() / 2
    return F.conv2d(padded, kernel, groups=count).transpose(0, 1), lost


def darken(image: Tensor) -> Tensor:
    """Night: light from a few lamps, few photons, an exposure that makes up for some of it. (B, 1, H, W) in [0, 1]."""
    shape, device = (len(image), 1, 1, 1), image.device
    coarse = torch.randn((len(image), 1, 4, 5), device=device)
    lamps = F.interpolate(coarse, image.shape[-2:], mode="bicubic") * uniform(shape, 0.3, 1.1, device)
    light = image.clamp(1e-4, 1) ** uniform(shape, 1.4, 2.8, device) * lamps.exp()
    mean = light.mean(dim=(1, 2, 3), keepdim=True).clamp(min=1e-4)
    exposed = light / mean * uniform(shape, 0.08, 0.3, device)
    photons = 2 ** uniform(shape, 5, 9, device)
    grainy = exposed + torch.randn(image.shape, device=device) * (exposed.clamp(min=0) / photons + 1e-5).sqrt()
    return grainy.clamp(0, 1) ** uniform(shape, 0.6, 1, device)
