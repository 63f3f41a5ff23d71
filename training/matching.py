"""What a matcher's assignments are worth: the loss to learn by, and the figures to judge by.

The loss is that of Lindenberger et al. 2023, section 3.4: the negative logarithm of the true assignments' probability
and of being without a partner, at every layer.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from superpoint_trt.checkpoint.matcher_network import Assignment
from training.pairs import Batch, Plan

# ----------------------------------------------------------------------------------------------------------------- loss


def objective(plan: Plan, net: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """The loss to descend, the mean over the layers; and its two parts at each layer, (layers, 2)."""
    device = batch.rows.device
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
        said = net(*batch.sides())
    worth = batch.worth(plan.least_worth)
    parts = torch.stack([torch.stack(loss_of(each, batch, worth)) for each in said])
    matched, alone = parts.mean(dim=0)
    return (1 - plan.unmatched_weight) * matched + plan.unmatched_weight * alone, parts.detach()


def loss_of(said: Assignment, batch: Batch, worth: Tensor) -> tuple[Tensor, Tensor]:
    """One layer's negative log-likelihood: of the true matches, and of points that have none.

    A partner that is less than wholly right counts as a match by its `Batch.worth`, and as none by the rest.
    """
    alone = torch.where(batch.partner >= 0, 1 - worth, batch.alone.float())
    chosen = log_probability_of(said, batch.partner[:, 0].clamp(min=0))
    lonely = F.logsigmoid(-torch.stack([said.matchable0, said.matchable1], dim=1))
    return _mean_of(-chosen, worth[:, 0]), _mean_of(-lonely, alone)


def _mean_of(values: Tensor, weight: Tensor) -> Tensor:
    """Over the points of all pairs: a mean over each pair first would let the few hardest matches decide."""
    return torch.where(weight > 0, values * weight, 0).sum() / weight.sum().clamp(min=1)


def log_probability_of(said: Assignment, partner: Tensor) -> Tensor:
    """(B, N): what `Assignment.log_probability` has at each row's partner, without computing the rest of it."""
    similarity = said.similarity
    chosen = similarity.gather(2, partner[..., None])[..., 0]
    there = chosen - similarity.logsumexp(dim=2) + F.logsigmoid(said.matchable0)
    back = F.logsigmoid(said.matchable1) - similarity.logsumexp(dim=1)
    return there + chosen + back.gather(1, partner)


# ------------------------------------------------------------------------------------------------------------ judgement


def nearest(batch: Batch) -> tuple[Tensor, Tensor]:
    """Mutual nearest neighbors of the same points, as `matcher_network.matches` gives matches."""
    first, second = batch.sides()
    row = torch.arange(first.xy.shape[1], device=first.xy.device)
    both = (row < first.rows[:, None])[..., None] & (row < second.rows[:, None])[:, None]
    alike = (first.descriptors @ second.descriptors.transpose(1, 2)).masked_fill(~both, -2)
    best, there = alike.max(dim=2)
    good = (alike.argmax(dim=1).gather(1, there) == row) & (best > -2)
    return torch.where(good, there, -1), torch.where(good, best, 0)


Figures = dict[str, Tensor]


def figures(found: tuple[Tensor, Tensor], batch: Batch, part: slice) -> Figures:
    """Of some pairs of a batch: true matches; whether matches of known truth are right; scores of these, and of all."""
    there, score, partner = found[0][part], found[1][part], batch.partner[part, 0]
    true, said = partner >= 0, there >= 0
    known = said & (true | batch.alone[part, 0])
    return {"true": true.sum(), "right": (there == partner)[known], "scores": score[known], "all": score[said]}


def summary(plan: Plan, batches: list[Batch], learned: list[tuple[Tensor, Tensor]]) -> dict[str, dict[str, float]]:
    """Figures of a matcher, beside those of mutual nearest neighbors; unrelated pairs apart.

    Precision and recall are those of matches whose score is at least `Plan.min_score`.

    Args:
        plan: kinds of pairs.
        batches: pairs.
        learned: of each batch all of the matcher's matches and their scores, however small.
    """
    plain = [nearest(batch) for batch in batches]
    rows: dict[str, dict[str, float]] = {"learned": {}, "nearest": {}}
    start = 0
    for name, count in zip(("changed", "layered", "unrelated"), plan.kinds):
        part = slice(start, start + count)
        made = [_together([figures(*each, part) for each in zip(found, batches)]) for found in (learned, plain)]
        for row, one, least in zip(rows.values(), made, (plan.min_score, -1.0)):
            row.update(_judged(name, one, count * len(batches), least))
        if name != "unrelated":
            rows["learned"].update(_as_many(name, *made))
        start += count
    return rows


def _together(made: list[Figures]) -> Figures:
    return {key: torch.cat([one[key].flatten() for one in made]) for key in made[0]}


def _judged(name: str, made: Figures, pairs: int, least: float) -> dict[str, float]:
    """The figures of one kind of pairs."""
    if name == "unrelated":
        return {"unrelated_matches": round(int((made["all"] > least).sum()) / pairs, 2)}
    true, right = int(made["true"].sum()), made["right"][made["scores"] > least]
    hit = int(right.sum())
    whole = area(made["right"], made["scores"], true)
    shares = {"precision": hit / max(len(right), 1), "recall": hit / max(true, 1), "area": whole}
    return {f"{name}_{key}": round(share, 4) for key, share in shares.items()}


def _as_many(name: str, learned: Figures, plain: Figures) -> dict[str, float]:
    """Precision and least score of the surest matches among which as many are right as nearest neighbors find.

    0 and 0 if they are fewer.
    """
    wanted = int(plain["right"].sum())
    scores, order = learned["scores"].sort(descending=True)
    right = learned["right"][order].long().cumsum(0)
    precision = score = 0.0
    if len(right) and int(right[-1]) >= wanted > 0:
        count = int((right < wanted).sum()) + 1
        precision, score = wanted / count, float(scores[count - 1])
    return {f"{name}_precision_of_as_many": round(precision, 4), f"{name}_score_of_as_many": round(score, 4)}


def area(hits: Tensor, scores: Tensor, true: int) -> float:
    """Average precision: the mean over all true matches of the precision where each is found, by falling score."""
    ordered = hits[scores.argsort(descending=True)].double()
    precision = ordered.cumsum(0) / torch.arange(1, len(ordered) + 1, device=ordered.device)
    return float((precision * ordered).sum() / max(true, 1))
