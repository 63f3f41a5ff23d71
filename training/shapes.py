"""Synthetic shapes whose corners are known by construction (DeTone et al. 2018, section 4), drawn on the GPU.

Every image is layers of convex polygons, ellipses and grids, painted back to front at twice the size and averaged.
A corner is lost when a later layer covers it, or when it has hardly any contrast.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from training.bank import Bank
from training.geometry import inverse, pixel_grid, rotation, scaling, translation, uniform, warp

SIZE_HW = (240, 320)
FINE = 2
MOST_POINTS = 128
LEAST_CONTRAST = 0.06
COVERED_PX = 2.0
"""A corner this near to a later shape's edge, or inside it, no longer looks like one."""


class _Picture:
    """A batch of pictures in the making, and their corners so far."""

    def __init__(self, count: int, device: torch.device) -> None:
        self.count, self.device = count, device
        height, width = SIZE_HW
        self.span = torch.tensor([width, height], device=self.device, dtype=torch.float32)
        grid = pixel_grid(height * FINE, width * FINE, self.device)
        self.pixels = ((grid + 0.5) / FINE - 0.5)[None]
        coarse = torch.randn((count, 1, 6, 8), device=self.device)
        shape = (height * FINE, width * FINE)
        uneven = F.interpolate(coarse, shape, mode="bicubic").flatten(1) * uniform((count, 1), 0, 0.08, device)
        self.gray = (uniform((count, 1), 0.1, 0.9, device) + uneven).clamp(0, 1)
        self.xy = torch.zeros(count, 0, 2, device=self.device)
        self.alive = torch.zeros(count, 0, dtype=torch.bool, device=self.device)

    def colour(self, *more: int) -> Tensor:
        return uniform((self.count, *more), 0, 1, self.device)

    def place(self, low: float, high: float) -> tuple[Tensor, Tensor]:
        """Centres (B, 2) and radii (B, 1) in px, the latter a share of the picture's height."""
        centre = uniform((self.count, 2), 0.05, 0.95, self.device) * self.span
        return centre, uniform((self.count, 1), low, high, self.device) * self.span[1]

    def polygon(self, vertices: Tensor, colour: Tensor, corners: Tensor | None = None) -> None:
        """Paints convex polygons, (B, V, 2) anticlockwise in a frame where y points down, in (B,) gray."""
        self._paint(lambda xy: polygon_distance(xy, vertices), colour, vertices if corners is None else corners)

    def ellipse(self, centre: Tensor, axes: Tensor, angle: Tensor, colour: Tensor) -> None:
        to_unit = inverse(translation(centre) @ rotation(angle) @ scaling(axes))
        shortest = axes.amin(dim=1, keepdim=True)
        self._paint(lambda xy: (warp(xy, to_unit).norm(dim=-1) - 1) * shortest, colour, centre[:, :0, None])

    def grid(self, matrix: Tensor, rows: int, columns: int, cells: Tensor) -> None:
        """Paints rows x columns cells; `matrix` maps (column, row) to px, `cells` (B, rows * columns) holds grays."""
        inside = inverse(matrix)
        at = warp(self.pixels.expand(self.count, -1, -1), inside)
        last = torch.tensor([columns, rows], device=self.device)
        within = ((at >= 0) & (at < last)).all(dim=-1)
        column, row = torch.minimum(at.floor().clamp(min=0), last - 1).long().unbind(dim=-1)
        painted = cells.gather(1, row * columns + column)
        frame = warp(
            torch.tensor([[0, 0], [columns, 0], [columns, rows], [0, rows]], device=self.device)
            .float()
            .expand(self.count, -1, -1),
            matrix,
        )
        self._cover(lambda xy: polygon_distance(xy, frame))
        before = self.gray
        self.gray = torch.where(within, painted, before)
        i, j = torch.meshgrid(
            torch.arange(columns + 1, device=self.device), torch.arange(rows + 1, device=self.device), indexing="xy"
        )
        corners = warp(torch.stack([i, j], dim=-1).reshape(1, -1, 2).float().expand(self.count, -1, -1), matrix)
        self._add(corners, self._grid_contrast(cells, rows, columns, corners, before))

    def _grid_contrast(self, cells: Tensor, rows: int, columns: int, corners: Tensor, before: Tensor) -> Tensor:
        """Whether the four quarters around each corner of the grid differ as around a corner, not as along an edge."""
        around = F.pad(cells.view(-1, 1, rows, columns), (1, 1, 1, 1), value=-1.0)
        quarters = torch.stack(
            [around[:, 0, a : rows + 1 + a, b : columns + 1 + b] for a in (0, 1) for b in (0, 1)], -1
        )
        quarters = quarters.flatten(1, 2)
        quarters = torch.where(quarters < 0, self._at(corners, before)[..., None], quarters)
        ul, ur, ll, lr = quarters.unbind(dim=-1)
        along_row = torch.maximum((ul - ur).abs(), (ll - lr).abs())
        along_column = torch.maximum((ul - ll).abs(), (ur - lr).abs())
        return (along_row > LEAST_CONTRAST) & (along_column > LEAST_CONTRAST)

    def _paint(self, distance: Callable[[Tensor], Tensor], colour: Tensor, corners: Tensor) -> None:
        self._cover(distance)
        corners = corners.reshape(self.count, -1, 2)
        seen = (self._at(corners, self.gray) - colour[:, None]).abs() > LEAST_CONTRAST
        inside = distance(self.pixels.expand(self.count, -1, -1)) < 0
        self.gray = torch.where(inside, colour[:, None], self.gray)
        self._add(corners, seen)

    def _at(self, xy: Tensor, gray: Tensor) -> Tensor:
        """The gray of the nearest pixel."""
        height, width = (side * FINE for side in SIZE_HW)
        fine = ((xy + 0.5) * FINE).long()
        x, y = fine[..., 0].clamp(0, width - 1), fine[..., 1].clamp(0, height - 1)
        return gray.gather(1, y * width + x)

    def _cover(self, distance: Callable[[Tensor], Tensor]) -> None:
        if self.xy.shape[1]:
            self.alive &= distance(self.xy) > COVERED_PX

    def _add(self, corners: Tensor, seen: Tensor) -> None:
        within = ((corners >= 0) & (corners <= self.span - 1)).all(dim=-1)
        self.xy = torch.cat([self.xy, corners], dim=1)
        self.alive = torch.cat([self.alive, seen & within], dim=1)

    def finish(self) -> tuple[Tensor, Tensor, Tensor]:
        """The images (B, H, W) uint8, xy (B, MOST_POINTS, 2), worth (B, MOST_POINTS)."""
        height, width = SIZE_HW
        image = F.avg_pool2d(self.gray.view(-1, 1, height * FINE, width * FINE), FINE)[:, 0]
        pad = max(0, MOST_POINTS - self.xy.shape[1])
        xy, alive = F.pad(self.xy, (0, 0, 0, pad)), F.pad(self.alive, (0, pad))
        keep = alive.float().topk(MOST_POINTS, dim=1).indices
        chosen = xy.gather(1, keep[..., None].expand(-1, -1, 2))
        return (image * 255).round().to(torch.uint8), chosen, alive.gather(1, keep).float()


def polygon_distance(xy: Tensor, vertices: Tensor) -> Tensor:
    """(B, N) signed distance of points (B, N, 2) to the nearest side's line; negative inside."""
    edges = vertices.roll(-1, 1) - vertices
    normal = torch.stack([edges[..., 1], -edges[..., 0]], dim=-1)
    normal = normal / normal.norm(dim=-1, keepdim=True).clamp(min=1e-6)
    offset = (normal * vertices).sum(dim=-1)
    distance = xy[..., 0] * normal[:, :1, 0] + xy[..., 1] * normal[:, :1, 1] - offset[:, :1]
    for side in range(1, vertices.shape[1]):
        n = normal[:, side : side + 1]
        distance = torch.maximum(distance, xy[..., 0] * n[..., 0] + xy[..., 1] * n[..., 1] - offset[:, side : side + 1])
    return distance


# ---------------------------------------------------------------------------------------------------- kinds of pictures


def _convex(picture: _Picture, sides: int, low: float = 0.06, high: float = 0.45) -> Tensor:
    """Vertices on an ellipse, so that the polygon is convex, at angles at least half a regular step apart."""
    centre, radius = picture.place(low, high)
    step = 2 * math.pi / sides
    jitter = uniform((picture.count, sides), -0.25, 0.25, picture.device)
    angle = (torch.arange(sides, device=picture.device) + jitter) * step + uniform(
        (picture.count, 1), 0, 2 * math.pi, picture.device
    )
    circle = torch.stack([angle.cos(), angle.sin()], dim=-1)
    squeeze = torch.cat([radius, radius * uniform((picture.count, 1), 0.35, 1, picture.device)], dim=1)
    turn = rotation(uniform((picture.count,), 0, math.pi, picture.device))
    return warp(circle, translation(centre) @ turn @ scaling(squeeze))


def _polygons(picture: _Picture, layers: int) -> None:
    for layer in range(layers):
        picture.polygon(_convex(picture, 3 + layer % 4), picture.colour())


def _ellipses(picture: _Picture, layers: int) -> None:
    for _ in range(layers):
        centre, radius = picture.place(0.03, 0.3)
        axes = torch.cat([radius, radius * uniform((picture.count, 1), 0.3, 1, picture.device)], dim=1)
        picture.ellipse(centre, axes, uniform((picture.count,), 0, math.pi, picture.device), picture.colour())


def _bar(start: Tensor, end: Tensor, width: Tensor) -> Tensor:
    along = end - start
    across = torch.stack([-along[:, 1], along[:, 0]], dim=1) / along.norm(dim=1, keepdim=True).clamp(min=1e-3)
    half = across * width / 2
    return torch.stack([start - half, end - half, end + half, start + half], dim=1)


def _lines(picture: _Picture, layers: int) -> None:
    for _ in range(layers):
        ends = uniform((picture.count, 2, 2), 0.03, 0.97, picture.device) * picture.span
        width = uniform((picture.count, 1), 1.2, 5, picture.device)
        picture.polygon(_bar(ends[:, 0], ends[:, 1], width), picture.colour(), ends)


def _star(picture: _Picture, layers: int) -> None:
    centre, radius = picture.place(0.15, 0.55)
    colour = picture.colour()
    angle = uniform((picture.count, 1), 0, 2 * math.pi, picture.device)
    for arm in range(layers):
        turn = angle + (arm + uniform((picture.count, 1), -0.25, 0.25, picture.device)) * 2 * math.pi / layers
        reach = radius * uniform((picture.count, 1), 0.5, 1, picture.device)
        end = centre + reach * torch.cat([turn.cos(), turn.sin()], dim=1)
        width = uniform((picture.count, 1), 1.2, 4, picture.device)
        picture.polygon(_bar(centre, end, width), colour, end[:, None])
    seen = (picture._at(end[:, None] * 0.05 + centre[:, None] * 0.95, picture.gray) - colour[:, None]).abs() < 0.02
    picture._add(centre[:, None], seen)


def _grids(picture: _Picture, rows: int, columns: int) -> None:
    centre, radius = picture.place(0.25, 0.7)
    turn = rotation(uniform((picture.count,), 0, math.pi, picture.device))
    tilt = torch.eye(3, device=picture.device).repeat(picture.count, 1, 1)
    tilt[:, 2, :2] = uniform((picture.count, 2), -0.35, 0.35, picture.device)
    squeeze = torch.cat([radius, radius * uniform((picture.count, 1), 0.4, 1, picture.device)], dim=1)
    to_unit = scaling(torch.tensor([[2 / columns, 2 / rows]], device=picture.device)) @ translation(
        torch.tensor([[-columns / 2, -rows / 2]], device=picture.device)
    )
    parity = torch.arange(rows * columns, device=picture.device)
    parity = ((parity // columns + parity % columns) % 2).bool()[None]
    two = torch.where(parity, picture.colour(1), picture.colour(1))
    free = picture.colour(rows * columns)
    cells = torch.where(picture.colour(1) < 0.6, two, free)
    picture.grid(translation(centre) @ turn @ scaling(squeeze) @ tilt @ to_unit, rows, columns, cells)


def _cube(picture: _Picture) -> None:
    """Three faces of a box that meet in one corner, seen without perspective; each face its own gray."""
    centre, radius = picture.place(0.12, 0.35)
    base = uniform((picture.count, 1), 0, 2 * math.pi, picture.device)
    turn = (
        base
        + torch.tensor([0.0, 2.1, 4.2], device=picture.device)
        + uniform((picture.count, 3), -0.45, 0.45, picture.device)
    )
    length = radius * uniform((picture.count, 3), 0.5, 1, picture.device)
    edges = length[..., None] * torch.stack([turn.cos(), turn.sin()], dim=-1)
    for a, b in ((0, 1), (1, 2), (2, 0)):
        face = [torch.zeros_like(edges[:, a]), edges[:, a], edges[:, a] + edges[:, b], edges[:, b]]
        corners = torch.stack(face, dim=1) + centre[:, None]
        picture.polygon(corners, picture.colour(), corners[:, :0])
    outer = torch.cat([torch.zeros_like(edges[:, :1]), edges, edges + edges.roll(-1, 1)], dim=1) + centre[:, None]
    picture._add(outer, torch.ones(outer.shape[:2], dtype=torch.bool, device=picture.device))


KINDS = (
    lambda p: _polygons(p, 1),
    lambda p: _polygons(p, 8),
    lambda p: (_ellipses(p, 5), _polygons(p, 3)),
    lambda p: _ellipses(p, 9),
    lambda p: _lines(p, 7),
    lambda p: (_polygons(p, 3), _lines(p, 5)),
    lambda p: _star(p, 4),
    lambda p: (_polygons(p, 2), _star(p, 6)),
    lambda p: _grids(p, 3, 4),
    lambda p: _grids(p, 6, 7),
    lambda p: (_polygons(p, 2), _grids(p, 5, 5), _lines(p, 2)),
    lambda p: _grids(p, 9, 1),
    lambda p: (_grids(p, 1, 6), _polygons(p, 2)),
    lambda p: _cube(p),
    lambda p: (_polygons(p, 2), _cube(p), _ellipses(p, 2)),
    lambda p: None,
)
"""The last is a bare background: nothing to find."""


def draw(count: int, device: torch.device, batch: int = 32) -> Bank:
    """A bank of `count` pictures with their corners, all kinds alike."""
    parts = []
    made = 0
    while made < count:
        picture = _Picture(min(batch, count - made), device)
        KINDS[made // batch % len(KINDS)](picture)
        parts.append(picture.finish())
        made += picture.count
    gray, xy, worth = (torch.cat(part) for part in zip(*parts))
    height, width = SIZE_HW
    images = F.pad(gray, (0, 0, 0, width - height))[:, None].expand(-1, 3, -1, -1)
    sizes = gray.new_tensor(SIZE_HW, dtype=torch.float32).expand(count, 2)
    return Bank(images, sizes, torch.ones(count, device=gray.device), xy[:, None], worth[:, None])
