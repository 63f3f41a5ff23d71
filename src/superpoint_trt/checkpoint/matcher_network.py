"""The PyTorch matcher: which points of two images are the same.

After LightGlue (Lindenberger et al. 2023, arXiv 2306.13643): points attend to those of their own image with rotary
positions, then to those of the other image (section 3.1); each layer can end with an assignment, a dual softmax times
how matchable both points are (section 3.2); every layer's assignment is supervised (section 3.4). Different here: half
the width; the attention's output goes straight into the update's hidden layer, since two linear maps in a row are one;
the detection score is an input; both images are one batch; and a match is more probable the more its neighborhood
supports it, by matches between points near both of its ends (the idea of Rocco et al. 2018, arXiv 1810.10510).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from superpoint_trt.checkpoint.matcher import NEIGHBORHOOD, NORM_EPS, Activation, MatcherShape, MatcherWeights
from superpoint_trt.core.types import Float32

HIDDEN = -1e4
"""Added to the similarity with a row that only fills up: its share of a softmax is 0."""


SHARPNESS = 30.0
"""To begin with, the similarity of two points whose descriptors are equal. The packaged networks want 30 to 36:
there a point's partner has a similarity of 0.75, and the best wrong point 0.70."""
SUPPORT = (4.0, 2.0)
"""To begin with, a head's `support`."""
ATTENDED = 20.0
"""To begin with, what the points of two images with equal descriptors get in the cross-attention's softmax."""
NEARBY = 6.0
"""To begin with, what a point itself gets in the self-attention of the head that looks nearest; the first head looks
everywhere."""
FREQUENCIES = (1.0, 32.0)
"""Least and largest of the angles by which positions turn, along half the image's longer side; rad."""


class PointSets(NamedTuple):
    """Points of B images, filled up to N rows."""

    xy: Tensor
    """(B, N, 2) float32, px."""
    scores: Tensor
    """(B, N) float32, detection scores in [0, 1]."""
    descriptors: Tensor
    """(B, N, D) float32, of unit length."""
    rows: Tensor
    """(B,) int32: real rows; they come first."""
    size: Tensor
    """(B, 2) float32: width and height of the image in px."""


class Assignment(NamedTuple):
    """What one layer says."""

    similarity: Tensor
    """(B, N, N) float32, support included; `HIDDEN` where a row of either image only fills up."""
    matchable0: Tensor
    """(B, N) float32 logits: whether a point of the first image has a partner at all."""
    matchable1: Tensor
    """(B, N), of the second image."""

    def log_probability(self) -> Tensor:
        """(B, N, N): logarithm of the probability that two points are a match (section 3.2, equation 8)."""
        both = self.similarity.log_softmax(dim=2) + self.similarity.log_softmax(dim=1)
        return both + F.logsigmoid(self.matchable0)[..., None] + F.logsigmoid(self.matchable1)[:, None]


class Update(nn.Module):
    """A point's state and what it read become its new state (section 3.1, equation 1)."""

    def __init__(self, width: int, read: int, activation: Activation) -> None:
        super().__init__()
        self.activation = F.gelu if activation is Activation.GELU else F.relu
        self.read = nn.Linear(width, read)
        self.hidden = nn.Linear(2 * width, 2 * width)
        self.norm = nn.LayerNorm(2 * width, eps=NORM_EPS)
        self.write = nn.Linear(2 * width, width)
        # A layer begins by changing little.
        nn.init.normal_(self.write.weight, std=0.1 / math.sqrt(2 * width))
        nn.init.zeros_(self.write.bias)

    def forward(self, state: Tensor, message: Tensor) -> Tensor:
        """(B, N, W) both -> (B, N, W)."""
        hidden = self.hidden(torch.cat([state, message], dim=-1))
        change: Tensor = self.write(self.activation(self.norm(hidden)))
        return state + change


class Head(nn.Module):
    """A layer's assignment (section 3.2), with the support of neighborhoods."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.project = nn.Linear(width, width)
        self.matchable = nn.Linear(width, 1)
        self.support = nn.Parameter(torch.tensor(SUPPORT))

    def forward(self, state: Tensor, real: Tensor, near: Tensor) -> Assignment:
        """state: (2 B, N, W), the first images, then the second. real: (2 B, N) bool. near: of `neighborhoods`."""
        scaled = self.project(state) / state.shape[-1] ** 0.25
        matchable = self.matchable(state)[..., 0].float()
        first, second = scaled.float().chunk(2)
        real0, real1 = real.chunk(2)
        near0, near1 = near.chunk(2)
        filling = ~(real0[..., None] & real1[:, None])
        with torch.autocast(state.device.type, enabled=False):  # bfloat16 has too few digits for similarities of 100
            alike = (first @ second.transpose(1, 2)).masked_fill(filling, HIDDEN)
            support = (near0 @ dual_softmax(alike).masked_fill(filling, 0) @ near1).log1p()
            similarity = (alike + self.support[0] * support).masked_fill(filling, HIDDEN)
            supported = dual_softmax(similarity) * support
            matchable = matchable + self.support[1] * torch.cat([supported.sum(dim=2), supported.sum(dim=1)])
        return Assignment(similarity, *matchable.masked_fill(~real, HIDDEN).chunk(2))


def dual_softmax(similarity: Tensor) -> Tensor:
    """(B, N, N): how probable it is that two points choose each other."""
    return similarity.softmax(dim=2) * similarity.softmax(dim=1)


def neighborhoods(xy: Tensor, rows: Tensor, size: Tensor) -> Tensor:
    """(B, N, N) float32: how near points of an image are to each other, 1 at most; 0 for a point and itself.

    A neighborhood is as large as so and so many of the image's points need (`NEIGHBORHOOD`), so zoom does not matter.
    """
    area = size.prod(dim=1) / rows.clamp(min=1) * NEIGHBORHOOD**2
    apart = (xy[:, :, None] - xy[:, None]).square().sum(dim=-1)
    return torch.where(apart > 0, (-apart / (2 * area[:, None, None])).exp(), 0.0)


class Layer(nn.Module):
    """Self-attention, cross-attention, and the head that may end here."""

    def __init__(self, shape: MatcherShape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.add_module("self", Update(shape.width, 3 * shape.width, shape.activation))
        self.cross = Update(shape.width, 2 * shape.width, shape.activation)
        self.head = Head(shape.width)

    def forward(self, state: Tensor, angle: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
        """State (2 B, N, W), angles, and mask (2 B, 1, 1, N) to add to similarities -> the new state."""
        own = self.get_submodule("self")
        assert isinstance(own, Update)
        asked, offered, value = self._split(own.read(state), 3)
        state = own(state, _attend(_turn(asked, angle), _turn(offered, angle), value, mask))
        # Points of the two images ask and offer alike, so that both directions see the same similarities.
        asked, value = self._split(self.cross.read(state), 2)
        updated: Tensor = self.cross(state, _attend(asked, _swap(asked), _swap(value), _swap(mask)))
        return updated

    def _split(self, read: Tensor, parts: int) -> list[Tensor]:
        """(B, N, parts * W) -> parts of (B, heads, N, W / heads)."""
        shaped = read.view(*read.shape[:2], parts, self.heads, -1).permute(2, 0, 3, 1, 4)
        return list(shaped.unbind(0))


def _attend(asked: Tensor, offered: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """(B, heads, N, d) each, mask (B, 1, 1, N) -> (B, N, heads * d)."""
    mask = mask.to(value.dtype)
    return F.scaled_dot_product_attention(asked, offered, value, attn_mask=mask).transpose(1, 2).flatten(2)


def _turn(x: Tensor, angle: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary positions (Su et al. 2021; section 3.1, equations 3 and 4): the two halves of a head turn by each angle.

    Args:
        x: (B, heads, N, d).
        angle: cosine and sine, (B, 1, N, d / 2) float32.
    """
    cos, sin = angle
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).to(x.dtype)


def _swap(x: Tensor) -> Tensor:
    """The second images' rows before the first ones'."""
    first, second = x.chunk(2)
    return torch.cat([second, first])


class MatcherNet(nn.Module):
    """The matcher. `forward` gives every layer's assignment; `match` reads the last one."""

    def __init__(self, shape: MatcherShape) -> None:
        super().__init__()
        self.shape = shape
        self.project = nn.ModuleDict({str(dim): nn.Linear(dim + 1, shape.width) for dim in shape.descriptor_dims})
        self.positions = nn.Linear(2, shape.head_width // 2, bias=False)
        self.layers = nn.ModuleList([Layer(shape) for _ in range(shape.layers)])
        self._begin_as_nearest()

    @torch.no_grad()
    def _begin_as_nearest(self) -> None:
        """Weights that give nearly the dual softmax of the descriptors, with support: training begins from there.

        Attention begins where there is something to see: at points nearby, and at alike ones of the other image.
        """
        shape = self.shape
        width, heads, half = shape.width, shape.heads, shape.head_width // 2
        low, high = map(math.log2, FREQUENCIES)
        way = torch.rand(half) * 2 * math.pi
        turns = torch.stack([way.cos(), way.sin()], dim=1)
        self.positions.weight.copy_(2 ** torch.linspace(low, high, half)[:, None] * turns)
        for dim, project in zip(shape.descriptor_dims, self.project.values()):
            assert isinstance(project, nn.Linear)
            turned = nn.init.orthogonal_(torch.empty(width, dim)) * math.sqrt(max(dim, width))
            project.weight.copy_(torch.cat([turned, torch.zeros(width, 1)], dim=1))
            nn.init.zeros_(project.bias)
        # Half of each query and key is constant: turned by positions, their product is largest where these agree.
        nearby = torch.linspace(0, NEARBY, heads).sqrt() * math.sqrt(math.sqrt(shape.head_width) / half)
        constant = torch.stack([nearby, torch.zeros(heads)], dim=1).repeat_interleave(half, dim=1).flatten()
        for layer in self.layers:
            assert isinstance(layer, Layer)
            own = layer.get_submodule("self")
            assert isinstance(own, Update)
            own.read.bias[: 2 * width] = constant.repeat(2)
            asked, *values = (nn.init.orthogonal_(torch.empty(width, width)) for _ in range(3))
            asked *= math.sqrt(ATTENDED / math.sqrt(shape.head_width))
            own.read.weight[2 * width :], layer.cross.read.weight[:] = values[0], torch.cat([asked, values[1]])
            layer.head.project.weight.copy_(torch.eye(width) * math.sqrt(SHARPNESS / math.sqrt(width)))
            nn.init.zeros_(layer.head.project.bias)
            nn.init.zeros_(layer.head.matchable.weight)
            nn.init.constant_(layer.head.matchable.bias, -1.0)

    @classmethod
    def from_weights(cls, weights: MatcherWeights) -> MatcherNet:
        """The network of a file, in evaluation mode."""
        net = cls(weights.shape)
        net.load_state_dict({name: torch.from_numpy(array) for name, array in weights.arrays.items()})
        return net.eval()

    def weights(self, features: dict[int, str] | None = None) -> MatcherWeights:
        """The network's weights, to save."""
        arrays: dict[str, Float32] = {name: t.detach().float().cpu().numpy() for name, t in self.state_dict().items()}
        return MatcherWeights(self.shape, arrays, features or {})

    def forward(self, first: PointSets, second: PointSets) -> list[Assignment]:
        """What each layer says.

        Args:
            first: of the first images.
            second: of the second images, with as many rows.
        """
        xy, scores, descriptors, rows, size = (torch.cat(pair) for pair in zip(first, second))
        real = torch.arange(xy.shape[1], device=xy.device) < rows[:, None]
        mask = torch.zeros_like(scores).masked_fill(~real, HIDDEN)[:, None, None]
        angle, near = self._angles(xy, size), neighborhoods(xy, rows, size)
        project = self.project[str(descriptors.shape[-1])]
        # The state stays float32 under autocast: what the layers add to it is small.
        state = project(torch.cat([descriptors, scores.clamp(min=0).sqrt()[..., None]], dim=-1)).float()
        said = []
        for layer in self.layers:
            assert isinstance(layer, Layer)
            state = layer(state, angle, mask)
            said.append(layer.head(state, real, near))
        return said

    def _angles(self, xy: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine by which each point's queries and keys turn; the image's longer side runs from -1 to 1."""
        with torch.autocast(xy.device.type, enabled=False):
            middle = (size[:, None] - 1) / 2
            unit = (xy.float() - middle) * 2 / size.amax(dim=1)[:, None, None]
            angle = F.linear(unit, self.positions.weight)[:, None]
            return angle.cos(), angle.sin()


def matches(said: Assignment, min_score: float) -> tuple[Tensor, Tensor]:
    """Mutual best partners whose probability is high enough (section 3.2).

    Args:
        said: of a layer.
        min_score: least probability of a match.

    Returns:
        (B, N) int32 rows of the second image, -1 for none; and (B, N) float32 probabilities, 0 for none.
    """
    # float32 throughout, as the exported graph computes it.
    matchable = said.matchable0.sigmoid()[..., None] * said.matchable1.sigmoid()[:, None]
    probability = dual_softmax(said.similarity) * matchable
    best, there = probability.max(dim=2)
    back = probability.argmax(dim=1)
    row = torch.arange(best.shape[1], device=best.device)
    good = (back.gather(1, there) == row) & (best > min_score)
    return torch.where(good, there, -1).int(), torch.where(good, best, 0)
