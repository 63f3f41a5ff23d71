"""What training draws its views from: images on square canvases, and the interest points known in them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Bank:
    """Images of many sizes, each at the top left of a canvas of S x S px."""

    images: Tensor
    """(N, 3, S, S) uint8. Views mix the channels into gray, each in proportions of its own."""
    sizes: Tensor
    """(N, 2) float32: height and width in px of what the canvas holds."""
    draw: Tensor
    """(N,) float32: how often an image is drawn, relative to the others."""
    xy: Tensor | None = None
    """(N, L, K, 2) float32: interest points, x then y in px of the canvas, pixel centres at integers.

    Level l holds what is of interest to a view that looks from l octaves farther away than 1 px to 1 px.
    """
    worth: Tensor | None = None
    """(N, L, K) float32: the detection probability to learn at each point; 0 pads."""

    def __len__(self) -> int:
        return len(self.images)

    def with_points(self, xy: Tensor, worth: Tensor) -> Bank:
        """The same images with other interest points."""
        return replace(self, xy=xy, worth=worth)

    def points(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Of some images: xy (B, L, K, 2) and worth (B, L, K); none where the bank has no points."""
        if self.xy is None or self.worth is None:
            return self.sizes.new_zeros(len(index), 1, 0, 2), self.sizes.new_zeros(len(index), 1, 0)
        return self.xy[index], self.worth[index]

    def sample(self, count: int) -> Tensor:
        """(count,) indices, drawn by `draw`."""
        return torch.multinomial(self.draw, count, replacement=True)


def join(banks: list[Bank], shares: list[float]) -> Bank:
    """One bank of several, each drawn with its share of all; canvases grow to the largest."""
    side = max(bank.images.shape[-1] for bank in banks)
    images = [torch.nn.functional.pad(b.images, (0, side - b.images.shape[-1]) * 2) for b in banks]
    draw = [bank.draw / bank.draw.sum() * share for bank, share in zip(banks, shares)]
    return Bank(torch.cat(images), torch.cat([bank.sizes for bank in banks]), torch.cat(draw))
