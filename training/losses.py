"""What the two heads learn: cells to point at what repeats, descriptors to tell places apart."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from superpoint_trt.core.types import CELL_PX
from training.geometry import constant, uniform, warp

# ------------------------------------------------------------------------------------------------------------ detector

LABEL_NMS_PX = 4
"""A view that shrinks its image brings points closer than a detector reports; the most worthy stay."""
AREA_PER_LABEL_PX2 = 200
"""Likewise a view has no more points than this: a detector that fires in every cell ranks nothing."""


def detector_targets(xy: Tensor, worth: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
    """What each cell should say.

    Args:
        xy: (B, K, 2) points in px of the view.
        worth: (B, K) probability to learn for each; 0 pads.
        inside: (B, 1, H, W) where the view shows its image.

    Returns:
        (B, 65, H/8, W/8) distributions over a cell's pixels and the dustbin, and (B, H/8, W/8) which cells count.
    """
    height, width = inside.shape[2:]
    nearest = xy.round().long()
    seen = (nearest >= 0).all(-1) & (nearest[..., 0] < width) & (nearest[..., 1] < height)
    flat = torch.where(seen, nearest[..., 1] * width + nearest[..., 0], 0)
    points = torch.zeros(len(xy), height * width, device=xy.device)
    points = points.scatter_reduce(1, flat, worth * seen, "amax").view(-1, 1, height, width)
    points = points * (points == largest_near(points, LABEL_NMS_PX))
    last = points.flatten(1).topk(max(1, height * width // AREA_PER_LABEL_PX2), dim=1).values[:, -1]
    cells = F.pixel_unshuffle(points * (points >= last[:, None, None, None]), CELL_PX)
    total = cells.sum(dim=1, keepdim=True)
    cells = cells / total.clamp(min=1)
    whole = F.avg_pool2d(inside, CELL_PX)[:, 0] > 0.999
    return torch.cat([cells, (1 - total).clamp(min=0)], dim=1), whole


def largest_near(scores: Tensor, reach_px: int) -> Tensor:
    """(B, 1, H, W) the largest score at most `reach_px` away along either axis."""
    side = 2 * reach_px + 1
    # Rows, then columns: 18 values a pixel instead of 81, and a window that torch.compile fuses.
    rows = F.max_pool2d(scores, (1, side), stride=1, padding=(0, reach_px))
    return F.max_pool2d(rows, (side, 1), stride=1, padding=(reach_px, 0))


def detector_loss(logits: Tensor, target: Tensor, counts: Tensor, placing: float = 1.0) -> Tensor:
    """Cross-entropy over a cell's pixels and the dustbin (DeTone et al. 2018, section 3.4), with graded targets.

    That is a cross-entropy of whether there is a point, and the grade times one of where in the cell. The less a point
    is worth the less its place would count, though it is known as well: `placing` makes up for it.

    Args:
        logits: (B, 65, H/8, W/8).
        target: of `detector_targets`, with the next.
        counts: (B, H/8, W/8).
        placing: 0: a place counts as much as its point is worth. 1: as much as any other's.
    """
    logits = logits.float()
    whole = -(target * logits.log_softmax(dim=1)).sum(dim=1)
    pixels = target[:, :-1]
    worth = pixels.sum(dim=1)
    place = -(pixels * logits[:, :-1].log_softmax(dim=1)).sum(dim=1) / worth.clamp(min=1e-6)
    loss = whole + placing * (1 - worth) * place
    return (loss * counts).sum() / counts.sum().clamp(min=1)


# ---------------------------------------------------------------------------------------------------------- descriptors

TEMPERATURE = 0.07
SAME_PLACE_PX = 8.0
"""Points this near to the partner are neither right nor wrong."""
RANDOM_POINTS = 192
JITTER_PX = 0.5
"""Detections in two views of one point are about that far apart."""


def correspondences(
    xy: Tensor, worth: Tensor, homography: Tensor, inside: tuple[Tensor, Tensor], count: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Points that both views show: interest points first, then places anywhere.

    Args:
        xy: (B, K, 2) interest points in px of the first view.
        worth: (B, K), 0 pads.
        homography: (B, 3, 3) first view to second.
        inside: of both views, (B, 1, H, W).
        count: points wanted of each pair.

    Returns:
        (B, count, 2) in the first view, the same in the second, and (B, count) bool: which are real.
    """
    height, width = inside[0].shape[2:]
    anywhere = uniform((len(xy), RANDOM_POINTS, 2), 0, 1, xy.device) * constant((width - 1, height - 1), xy.device)
    first = torch.cat([xy, anywhere], dim=1)
    second = warp(first, homography)
    wanted = torch.cat([(worth > 0) * 2.0, torch.ones_like(anywhere[..., 0])], dim=1)
    in_both = shown(first, inside[0]) * shown(second, inside[1])
    chance = wanted * in_both * uniform(wanted.shape, 0.4, 1, xy.device)
    best = chance.topk(count, dim=1)
    rows = best.indices[..., None].expand(-1, -1, 2)
    return first.gather(1, rows), second.gather(1, rows), best.values > 0


def shown(xy: Tensor, inside: Tensor) -> Tensor:
    """(B, N) float: 1 where a point lies in the part of the view that shows its image."""
    height, width = inside.shape[2:]
    nearest = xy.round()
    within = (nearest >= 0).all(-1) & (nearest[..., 0] < width) & (nearest[..., 1] < height)
    x, y = nearest[..., 0].clamp(0, width - 1), nearest[..., 1].clamp(0, height - 1)
    flat = (y * width + x).nan_to_num(0).long()
    return within * (inside.flatten(1).gather(1, flat) > 0.999)


def descriptor_loss(
    first: Tensor,
    second: Tensor,
    points: tuple[Tensor, Tensor, Tensor],
    group: int,
    same_place_px: float = SAME_PLACE_PX,
) -> tuple[Tensor, Tensor]:
    """Each point must know its partner among all points of `group` pairs.

    Cross-entropy over cosine similarities, both ways (InfoNCE, van den Oord et al. 2018), on descriptors sampled as at
    inference.

    Args:
        first: (B, D, H/8, W/8) coarse descriptors of the first views, not normalised.
        second: of the second views.
        points: of `correspondences`.
        group: how many pairs share their negatives; must divide B.
        same_place_px: points this near to the partner are neither right nor wrong.

    Returns:
        the loss, and the share of points whose partner is nearest.
    """
    a_xy, b_xy, real = points
    a, b = (
        sample(coarse, xy + torch.randn(xy.shape, device=xy.device) * JITTER_PX)
        for coarse, xy in ((first, a_xy), (second, b_xy))
    )
    groups, members = len(a) // group, group * a.shape[1]
    a, b = a.reshape(groups, members, -1), b.reshape(groups, members, -1)
    similarity = a @ b.transpose(1, 2) / TEMPERATURE
    place = _apart(b_xy, group)
    apart = (place[:, :, None] - place[:, None]).square().sum(dim=-1)
    itself = torch.eye(members, dtype=torch.bool, device=a.device)
    real = real.reshape(groups, members)
    ignored = (apart < same_place_px**2) & ~itself | ~real[:, None] | ~real[..., None] & ~itself
    similarity = similarity.masked_fill(ignored, -1e4)
    target = torch.arange(members, device=a.device).expand(groups, -1)
    there = F.cross_entropy(similarity.transpose(1, 2), target, reduction="none")
    back = F.cross_entropy(similarity, target, reduction="none")
    count = real.sum().clamp(min=1)
    loss = ((there + back) * real).sum() / (2 * count)
    return loss, ((similarity.argmax(dim=2) == target) & real).sum() / count


def _apart(xy: Tensor, group: int) -> Tensor:
    """(B, N, 2) -> (B / group, group * N, 2), so that points of different pairs are far apart."""
    offset = torch.arange(group, device=xy.device, dtype=xy.dtype) * 1e5
    moved = xy.view(-1, group, *xy.shape[1:]) + offset[None, :, None, None]
    return moved.flatten(1, 2)


def sample(coarse: Tensor, xy: Tensor) -> Tensor:
    """(B, N, D) unit descriptors at (B, N, 2) px: network.sample_descriptors of every image at once."""
    cells = constant((coarse.shape[3], coarse.shape[2]), xy.device)
    unit = (xy + 0.5) / (cells * CELL_PX) * 2 - 1
    dense = F.normalize(coarse.float(), dim=1)
    return F.normalize(F.grid_sample(dense, unit[:, None], align_corners=False)[:, :, 0], dim=1).transpose(1, 2)
