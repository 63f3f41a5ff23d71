"""Homographic adaptation (DeTone et al. 2018, section 5): a detector's own answer, made repeatable.

The detector looks at many views of each image, in changing light too; what it finds is carried back and averaged.
Places that many views agree on become the interest points to learn.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from superpoint_trt.checkpoint.reference import SuperPointNet
from superpoint_trt.core.types import CELL_PX
from training.bank import Bank
from training.geometry import Motion, inverse, pixel_grid, random_motions, translation, uniform, warp
from training.views import disturb, look

MOTION = Motion(0.5, 20.0, 0.15, 0.2, 0.25, 0.0)
VIEW_HW = (480, 640)
LEVELS = 3
"""From how far away images are looked at, in octaves from 0: a corner seen from there is a curve from here."""
AREA_PER_POINT_PX2 = 200.0
"""As many points at most as one in this area, at each level's own resolution."""
NMS_PX = 4
LEAST = 0.002
"""Share of views that must agree to within about a pixel."""
AREA_PER_WORTHY_PX2 = (450.0, 270.0, 270.0)
"""One point in this area, at each level's own resolution, is more worth learning than not: users ask for 300 points of
240 x 320, and what ranks below those that a detector was taught is noise."""
SOFTNESS = 0.2
"""Over about twice this share of that many ranks, to both sides, worth falls from nearly 1 to nearly 0."""


@torch.no_grad()
def adapt(
    net: SuperPointNet,
    bank: Bank,
    views: int,
    batch: int,
    view_hw: tuple[int, int] = VIEW_HW,
    compiled: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Bank:
    """The bank with the interest points that the detector finds repeatably.

    Args:
        net: in eval mode, on the bank's device.
        bank: images to label.
        views: how many of each image at level 0; four times as many, of a quarter of the size, at the next.
        batch: views at a time at level 0, likewise.
        view_hw: size of the views at level 0.
        compiled: torch.compile what is done with a batch.
        progress: called with (images done, images in all).
    """
    most = int((bank.sizes.prod(dim=1).amax() / AREA_PER_POINT_PX2).item())
    observe = torch.compile(_observe, dynamic=False) if compiled else _observe
    found = []
    for index in range(len(bank)):
        canvas, size_hw = bank.images[index].float().mean(dim=0)[None, None] / 255, bank.sizes[index]
        levels = []
        for factor in (2**level for level in range(LEVELS)):
            smaller = F.avg_pool2d(canvas, factor), (size_hw / factor).floor()
            looks = batch * factor**2, (view_hw[0] // factor, view_hw[1] // factor)
            heard = [observe(net, *smaller, *looks) for _ in range(-(-views // batch))]
            xy, agreement = _points(_agreement(heard), smaller[1], most)
            levels.append(((xy + 0.5) * factor - 0.5, agreement))
        found.append([torch.stack(part) for part in zip(*levels)])
        if progress:
            progress(index + 1, len(bank))
    xy, agreement = (torch.stack(part) for part in zip(*found))
    area = bank.sizes.prod(dim=1).sum() / 4 ** torch.arange(LEVELS, device=agreement.device)
    return bank.with_points(xy, grade(agreement, area / area.new_tensor(AREA_PER_WORTHY_PX2)))


def grade(agreement: Tensor, worthy: Tensor) -> Tensor:
    """What each point is worth, by its rank among all points of its level.

    Among those of all images: how a point compares with the others of its image is nothing that a detector could see.

    Args:
        agreement: (N, L, K), 0 pads.
        worthy: (L,) how many points of a level are more worth learning than not.

    Returns:
        (N, L, K) in [0, 1]; 0 pads.
    """
    flat = agreement.transpose(0, 1).flatten(1)
    rank = flat.argsort(dim=1, descending=True).argsort(dim=1)
    worth = torch.sigmoid((1 - rank / worthy[:, None]) / SOFTNESS) * (flat > 0)
    return worth.view(agreement.shape[1], agreement.shape[0], -1).transpose(0, 1).contiguous()


def _observe(
    net: SuperPointNet, canvas: Tensor, size_hw: Tensor, count: int, view_hw: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """What the detector says in `count` views anywhere in an image, and how often each place was seen; (1, 1, S, S)."""
    place = uniform((count, 2), 0.2, 0.8, canvas.device) * (size_hw.flip(0) - 1)
    to_canvas = translation(place) @ random_motions(count, view_hw, MOTION, canvas.device)
    image, inside = look(canvas.expand(count, -1, -1, -1), size_hw.expand(count, 2), to_canvas, view_hw)
    heat = _heat(net, disturb(image))
    side = canvas.shape[-1]
    xy = warp(pixel_grid(side, side, canvas.device)[None], inverse(to_canvas))
    unit = (2 * xy + 1) / xy.new_tensor([view_hw[1], view_hw[0]]) - 1
    both = torch.cat([heat * inside, inside], dim=1)
    back = F.grid_sample(both, unit.view(count, side, side, 2), align_corners=False).sum(dim=0, keepdim=True)
    return back[:, :1], back[:, 1:]


def _heat(net: SuperPointNet, image: Tensor) -> Tensor:
    """(B, 1, H, W): the detector's probabilities, without the dustbin."""
    with torch.autocast(image.device.type, dtype=torch.bfloat16, enabled=image.device.type == "cuda"):
        logits = net.detector(net.backbone(image.contiguous(memory_format=torch.channels_last)))
    return F.pixel_shuffle(logits.float().softmax(dim=1)[:, :-1], CELL_PX)


def _agreement(heard: list[tuple[Tensor, Tensor]]) -> Tensor:
    """(1, 1, S, S): the share of all views that fired at each place, of those that saw it."""
    fired, seen = (torch.stack(part).sum(dim=0) for part in zip(*heard))
    return _blur(fired / seen.clamp(min=1))


def _points(agreement: Tensor, size_hw: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """The places with the most agreement: xy (most, 2) to a fraction of a pixel, and how much there is, (most,)."""
    height, width = agreement.shape[2:]
    peak = (agreement == F.max_pool2d(agreement, 2 * NMS_PX + 1, 1, NMS_PX)) & (agreement > LEAST)
    allowed = min(most, int(size_hw.prod().item() / AREA_PER_POINT_PX2), height * width)
    values, flat = (agreement * peak).flatten().topk(allowed)
    xy = torch.stack([flat % width, flat // width], dim=1).float() + _refine(agreement, flat)
    pad = most - allowed
    return F.pad(xy, (0, 0, 0, pad)), F.pad(values, (0, pad))


def _refine(agreement: Tensor, flat: Tensor) -> Tensor:
    """(N, 2): from a peak's pixel to the top of the parabola through it and its neighbours, along each axis."""
    around = F.unfold(agreement, 3, padding=1)[0].T[flat]
    here = around[:, 4]

    def top(before: Tensor, after: Tensor) -> Tensor:
        return ((after - before) / (2 * (2 * here - before - after)).clamp(min=1e-9)).clamp(-0.5, 0.5)

    return torch.stack([top(around[:, 3], around[:, 5]), top(around[:, 1], around[:, 7])], dim=1)


def _blur(heat: Tensor) -> Tensor:
    """(1, 1, S, S): about how often the detector fired within a pixel of each pixel, nearer ones counting more."""
    bell = torch.exp(-0.5 * torch.arange(-2, 3, device=heat.device).float() ** 2)
    return F.conv2d(F.conv2d(heat, bell.view(1, 1, 1, 5), padding=(0, 2)), bell.view(1, 1, 5, 1), padding=(2, 0))
