"""What a pair's two views say of the points that the detector itself finds: where each lies, and which are worth it.

`refine` is the sub-pixel decode of the toolkit, so what is learnt here is what users read off. The losses follow
ALIKED's (Zhao et al. 2023, arXiv 2304.03608): reprojection, here of bounded weight; dispersity; reliability.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from superpoint_trt.core.types import CELL_PX
from training.geometry import inverse, pixel_grid, warp
from training.losses import TEMPERATURE, largest_near, sample, shown

NMS_PX = 4
BORDER_PX = 4
"""As the decode's defaults."""
WINDOW_PX = 2
"""A place is the mean over 5x5 px."""
LEAST_SCORE = 0.005
RIGHT_PX = 1.0
"""A place should be right to within this; of one that is far off, nothing is to be learnt."""
NEAR_PX = 3.0
"""Two views found the same point if it is this near, in px of the view that sees less detail."""
AROUND_PX = 32.0
SHARP = 0.03
"""Temperature of matches in `wrong_share`: at that of descriptor_loss, a point nearest by little is half a match."""
FADING_PX = 4.0
"""What lies this much farther away counts 1/e of what is nearer."""


class Found(NamedTuple):
    """Points of one view of each pair, best first."""

    xy: Tensor
    """(B, N, 2) to a fraction of a pixel; gradients pass."""
    score: Tensor
    """(B, N) of the whole pixel; gradients pass."""
    spread: Tensor
    """(B, N) mean distance of the 5x5 scores from the place, px."""
    real: Tensor
    """(B, N) bool: not padding."""


class Partners(NamedTuple):
    """Which points of the first view are which of the second."""

    nearest: Tensor
    """(B, N) index of the second view's point that lies nearest to where the first's one should be."""
    same: Tensor
    """(B, N) bool: each other's nearest, and near."""
    shared: Tensor
    """(B, N) bool: the second view shows where this point should be."""
    around: Tensor
    """(B, N, M) which points of the second view lie around there: the nearer the more, rows sum to 1; or to 0, where
    none is within `AROUND_PX` or the place is not shown."""


def score_map(logits: Tensor) -> Tensor:
    """(B, 65, H/8, W/8) -> (B, 1, H, W): probabilities before suppression."""
    return F.pixel_shuffle(logits.float().softmax(dim=1)[:, :-1], CELL_PX)


def detect(scores: Tensor, inside: Tensor, count: int) -> Found:
    """The `count` best peaks of the part of each view that shows its image.

    Args:
        scores: (B, 1, H, W).
        inside: (B, 1, H, W), 1 where a view shows its image.
        count: N.
    """
    height, width = scores.shape[2:]
    allowed = F.pad(torch.ones_like(inside[..., BORDER_PX:-BORDER_PX, BORDER_PX:-BORDER_PX]), (BORDER_PX,) * 4)
    known = scores.detach() * ((inside > 0.999) & (allowed > 0))
    peak = known == largest_near(known, NMS_PX)
    score, flat = (known * peak).flatten(1).topk(min(count, height * width), dim=1)
    pixel = torch.stack([flat % width, flat // width], dim=-1)
    xy, spread = refine(scores, pixel)
    return Found(xy, scores.flatten(1).gather(1, flat), spread, score > LEAST_SCORE)


def refine(scores: Tensor, pixel: Tensor) -> tuple[Tensor, Tensor]:
    """The sub-pixel decode: p + sum(s_i o_i) / sum(s_i) over the 5x5 pixels around p; outside the image s is 0.

    Args:
        scores: (B, 1, H, W) before suppression.
        pixel: (B, N, 2) whole pixels, int64.

    Returns:
        (B, N, 2) places, and (B, N) the mean distance of the scores from them, px.
    """
    padded = F.pad(scores, (WINDOW_PX,) * 4)
    offsets = pixel_grid(2 * WINDOW_PX + 1, 2 * WINDOW_PX + 1, scores.device) - WINDOW_PX
    at = pixel[:, :, None] + WINDOW_PX + offsets.long()
    flat = at[..., 1] * padded.shape[-1] + at[..., 0]
    around = padded.flatten(1).gather(1, flat.flatten(1)).view(flat.shape)
    share = around / around.sum(dim=-1, keepdim=True).clamp(min=1e-9)
    shift = share @ offsets
    away = (offsets - shift[:, :, None]).square().sum(dim=-1)
    return pixel + shift, (share * (away + 1e-6).sqrt()).sum(dim=-1)


def partners(first: Found, second: Found, homography: Tensor, inside: tuple[Tensor, Tensor]) -> Partners:
    """Who is who, by the true homography (B, 3, 3) from the first view to the second."""
    there, back = warp(first.xy.detach(), homography), warp(second.xy.detach(), inverse(homography))
    distance = _distance(there, second.xy.detach(), first.real, second.real)
    other = _distance(first.xy.detach(), back, first.real, second.real)
    nearest = distance.argmin(dim=2)
    mutual = distance.argmin(dim=1).gather(1, nearest) == torch.arange(nearest.shape[1], device=nearest.device)
    # The distance in the view that sees less detail: in the other one, it is that much longer.
    short = torch.minimum(distance, other)
    shared = first.real & (shown(there, inside[1]) > 0)
    same = mutual & (short.gather(2, nearest[..., None])[..., 0] < NEAR_PX) & shared
    around = (-distance / FADING_PX).masked_fill(distance > AROUND_PX, -1e4).softmax(dim=2)
    some = shared & (distance.amin(dim=2) < AROUND_PX)
    return Partners(nearest, same, shared, around * some[..., None])


def _distance(a: Tensor, b: Tensor, a_real: Tensor, b_real: Tensor) -> Tensor:
    """(B, N, M) px; padding is far from everything."""
    apart = (a[:, :, None] - b[:, None]).square().sum(dim=-1).sqrt()
    return apart.masked_fill(~(a_real[..., None] & b_real[:, None]), 1e6)


def place_losses(first: Found, second: Found, pairs: Partners, homography: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """How well the two views agree on the places of the points that both found.

    Distances d are measured in the view that sees less detail.

    Returns:
        means of d^2 / (d^2 + RIGHT_PX^2), to descend; of d, px; and of how widely scores spread around places, px.
    """
    rows = pairs.nearest[..., None].expand(-1, -1, 2)
    partner = second.xy.gather(1, rows)
    forward = _length(warp(first.xy, homography) - partner)
    backward = _length(warp(partner, inverse(homography)) - first.xy)
    apart = torch.minimum(forward, backward)
    spread = (first.spread + second.spread.gather(1, pairs.nearest)) / 2
    wrong = apart.square() / (apart.square() + RIGHT_PX**2)
    count = pairs.same.sum().clamp(min=1)
    means = [torch.where(pairs.same, part, 0).sum() / count for part in (wrong, apart, spread)]
    return means[0], means[1], means[2]


def _length(vector: Tensor) -> Tensor:
    return (vector.square().sum(dim=-1) + 1e-4).sqrt()


def choice_loss(
    first: Found, second: Found, coarse: tuple[Tensor, Tensor], there: Partners, back: Partners
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of each view's points those should score higher whose match is right.

    A point's chance is the probability, by the descriptors as they are, that it and its partner choose each other among
    the points found; 0 without a partner. The loss is the share of all scores that is given to what would not match:
    within each view, since what is hard about a view itself is no reason to find less in it.

    Args:
        first: points of the first views.
        second: of the second views.
        coarse: (B, D, H/8, W/8) of both views.
        there: partners of the first view's points.
        back: of the second view's.

    Returns:
        the loss, by which scores learn and descriptors do not; two by which descriptors learn: the mean negative
        logarithm of the chance of points that have a partner, and how far points that have none are from choosing
        those around the place where they should be (which have partners of their own, so no match comes of it: two
        points without a partner that choose each other are the usual wrong match); and the mean chance.
    """
    a, b = (sample(part, points.xy.detach()) for part, points in zip(coarse, (first, second)))
    both = first.real[..., None] & second.real[:, None]
    similarity = (a @ b.transpose(1, 2) / TEMPERATURE).masked_fill(~both, -1e4)
    chosen = similarity.log_softmax(dim=2), similarity.log_softmax(dim=1)
    logarithm = chosen[0] + chosen[1]
    right = logarithm.gather(2, there.nearest[..., None])[..., 0]
    missed = -torch.where(there.same, right, 0).sum() / there.same.sum().clamp(min=1)
    strayed = [
        _mean_of(-(pairs.around * table).sum(dim=2), (pairs.around.sum(dim=2) > 0) & ~pairs.same)
        for pairs, table in ((there, chosen[0]), (back, chosen[1].transpose(1, 2)))
    ]
    chance = logarithm.detach().exp()
    parts = []
    for points, pairs, table in ((first, there, chance), (second, back, chance.transpose(1, 2))):
        right = table.gather(2, pairs.nearest[..., None])[..., 0] * pairs.same
        score = points.score * pairs.shared
        parts.append(((score * (1 - right)).sum(dim=1) / score.sum(dim=1).clamp(min=1e-3), right, pairs.shared))
    lost, right, shared = (torch.cat(part) for part in zip(*parts))
    return lost.mean(), missed, (strayed[0] + strayed[1]) / 2, (right * shared).sum() / shared.sum().clamp(min=1)


def wrong_share(first: Found, second: Found, coarse: tuple[Tensor, Tensor], homography: Tensor) -> Tensor:
    """The share of matches that are wrong, 1 - MMA@3, made smooth, so that descriptors learn it.

    Two points are a match as far as they choose each other: by the product of both softmaxes over the points found. So
    points without a partner learn to choose nobody who chooses them, which the losses of points with a partner do not
    ask for.

    Args:
        first: points of the first views.
        second: of the second views.
        coarse: (B, D, H/8, W/8) of both views.
        homography: (B, 3, 3) from the first views to the second.

    Returns:
        the mean over the pairs, in [0, 1].
    """
    a, b = (sample(part, points.xy.detach()) for part, points in zip(coarse, (first, second)))
    both = first.real[..., None] & second.real[:, None]
    similarity = (a @ b.transpose(1, 2) / SHARP).masked_fill(~both, -1e4)
    match = (similarity.log_softmax(dim=2) + similarity.log_softmax(dim=1)).exp() * both
    there = warp(first.xy.detach(), homography)
    near = _distance(there, second.xy.detach(), first.real, second.real) < NEAR_PX
    right = (match * near).sum(dim=(1, 2)) / match.sum(dim=(1, 2)).clamp(min=1e-3)
    return 1 - right.mean()


def lone_share(first: Found, second: Found, there: Partners, back: Partners) -> Tensor:
    """The share of the scores that goes to points which the other view shows and its detector does not find.

    Within each view, as in `choice_loss`; descriptors have no say here. Its mean over all views, in [0, 1].

    Args:
        first: points of the first views.
        second: of the second views.
        there: partners of the first view's points.
        back: of the second view's.
    """
    parts = []
    for points, pairs in ((first, there), (second, back)):
        score = points.score * pairs.shared
        parts.append((score * ~pairs.same).sum(dim=1) / score.sum(dim=1).clamp(min=1e-3))
    return torch.cat(parts).mean()


def _mean_of(values: Tensor, counted: Tensor) -> Tensor:
    return torch.where(counted, values, 0).sum() / counted.sum().clamp(min=1)
