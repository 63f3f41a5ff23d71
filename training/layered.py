"""Pictures with parallax and occlusion: photographs on planes at several depths, seen by two cameras.

A scene is a background plane and other planes in front of it, cut out in blobs, bars and shapes with holes. Everything
is given by formulas, so where a point of one picture lies in the other, and whether something stands before it, is
exact at any place between pixels. All on the GPU in batches; the first camera is the world.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from training.geometry import inverse, pixel_grid, rotation, scaling, translation, uniform
from training.views import SUPERSAMPLE, _mix

LEAST_NEARNESS = 1e-4
"""One over the largest depth that a camera sees."""
SILHOUETTE_PX = 2.0
"""Nearer to a silhouette than this, what a point of interest belongs to is not known."""


@dataclass(frozen=True)
class Worlds:
    """How scenes and cameras vary."""

    planes: int = 5
    """The background and what stands before it."""
    focal: tuple[float, float] = (0.7, 1.5)
    """Focal length, in widths of the picture."""
    background_depth: tuple[float, float] = (3.0, 10.0)
    nearest_depth: float = 1.0
    background_tilt_deg: float = 55.0
    """Largest angle between the background's normal and the first camera's axis; of other planes the next."""
    tilt_deg: float = 40.0
    turn_deg: tuple[float, float] = (18.0, 8.0)
    """Standard deviation of how far the second camera walks round the scene, sideways and up."""
    most_turn_deg: float = 45.0
    roll_deg: float = 12.0
    dolly_octaves: float = 0.5
    """Half the range of log2 of its distance from the point that both look at."""
    aim: float = 0.06
    """Standard deviation of where that point lies in the second picture, in widths."""
    extent: tuple[float, float] = (0.12, 0.45)
    """Half the size of what stands in front, in widths of the first picture."""
    zoom_octaves: tuple[float, float] = (-0.5, 0.9)
    """log2 of canvas pixels along one pixel of the first picture."""


class Scene(NamedTuple):
    """B scenes of K planes, with both cameras."""

    to_canvas: Tensor
    """(B, K, 3, 3): pixels of the first picture -> pixels of the plane's photograph."""
    to_second: Tensor
    """(B, K, 3, 3): pixels of the first picture -> of the second, by way of the plane."""
    normal: Tensor
    """(B, 2, K, 3): a camera's inverse intrinsics times the plane's normal over its distance, as that camera sees it:
    times a pixel (x, y, 1) it is one over the depth there."""
    shape: Tensor
    """(B, K, 8): centre x and y and radius in px of the photograph, power, bars, hole, phase, kind of the outline."""
    sizes: Tensor
    """(B, K, 2): height and width of the photographs."""
    camera: Tensor
    """(B, 3, 3) rotation from the first camera to the second."""
    moved: Tensor
    """(B, 3) its translation: x2 = R x1 + t."""
    intrinsics: Tensor
    """(B, 3, 3), both cameras'."""


class Points(NamedTuple):
    """Where points of one picture lie in the other."""

    there: Tensor
    """(B, N, 2) px; far outside if the point lies behind the other camera."""
    seen: Tensor
    """(B, N) bool: the other picture shows it."""
    unsure: Tensor
    """(B, N) bool: near a silhouette in either picture."""


def scene(sizes: Tensor, view_hw: tuple[int, int], worlds: Worlds) -> Scene:
    """Scenes at random.

    Args:
        sizes: (B, K, 2) height and width of the photographs of the planes, the background's first.
        view_hw: size of the pictures.
        worlds: how they vary.
    """
    batch, planes, device = len(sizes), sizes.shape[1], sizes.device
    height, width = view_hw
    focal = uniform((batch,), *worlds.focal, device) * width
    intrinsics = torch.zeros(batch, 3, 3, device=device)
    intrinsics[:, 0, 0] = intrinsics[:, 1, 1] = focal
    intrinsics[:, 0, 2], intrinsics[:, 1, 2], intrinsics[:, 2, 2] = (width - 1) / 2, (height - 1) / 2, 1
    back = inverse(intrinsics)
    in_front = torch.arange(planes, device=device) > 0
    middle = intrinsics[:, :2, 2][:, None]
    view = torch.tensor([width, height], device=device)
    centre = middle + (uniform((batch, planes, 2), -0.5, 0.5, device) * view) * in_front[:, None]
    far = uniform((batch, 1), *map(math.log2, worlds.background_depth), device)
    nearer = uniform((batch, planes), 0, 1, device) * (far - math.log2(worlds.nearest_depth)) * 0.9
    depth = 2 ** (far - nearer * in_front)
    ray = torch.cat([centre, torch.ones_like(centre[..., :1])], dim=-1) @ back.transpose(1, 2)
    normal = _normals(batch, planes, worlds, device)
    # A plane n X = d through its own point at that depth, divided by d.
    normal = normal / ((normal * ray).sum(dim=-1) * depth)[..., None]
    camera, moved = _second_camera(batch, focal, view, far, worlds)
    through = camera[:, None] + moved[:, None, :, None] * normal[:, :, None]
    to_second = intrinsics[:, None] @ through @ back[:, None]
    # In the second camera's frame n1 X1 = 1 + n1 t for n1 = R n.
    turned = normal @ camera.transpose(1, 2)
    turned = turned / (1 + (turned * moved[:, None]).sum(dim=-1, keepdim=True))
    both = torch.stack([normal, turned], dim=1) @ back[:, None]
    to_canvas, shape = _outlines(sizes, view, centre, in_front, worlds)
    return Scene(to_canvas, to_second, both, shape, sizes, camera, moved, intrinsics)


def _normals(batch: int, planes: int, worlds: Worlds, device: torch.device) -> Tensor:
    """(B, K, 3) unit normals, within an angle of the axis."""
    most = torch.full((planes,), worlds.tilt_deg, device=device)
    most[0] = worlds.background_tilt_deg
    tilt = (uniform((batch, planes), 0, 1, device).sqrt() * most).deg2rad()
    way = uniform((batch, planes), 0, 2 * math.pi, device)
    return torch.stack([tilt.sin() * way.cos(), tilt.sin() * way.sin(), tilt.cos()], dim=-1)


def _second_camera(batch: int, focal: Tensor, view: Tensor, far: Tensor, worlds: Worlds) -> tuple[Tensor, Tensor]:
    """Walks round a point on the first camera's axis: rotation (B, 3, 3) and translation (B, 3)."""
    device = focal.device
    most = math.radians(worlds.most_turn_deg)
    angles = torch.randn(batch, 2, device=device) * torch.tensor(worlds.turn_deg, device=device).deg2rad()
    side, up = angles.clamp(-most, most).unbind(dim=1)
    roll = torch.randn(batch, device=device) * math.radians(worlds.roll_deg)
    rotate_y = rotation(side)[:, [0, 2, 1]][:, :, [0, 2, 1]]
    rotate_x = rotation(up)[:, [2, 0, 1]][:, :, [2, 0, 1]]
    camera = rotation(roll) @ rotate_x @ rotate_y
    pivot = 2 ** (far[:, 0] * uniform((batch,), 0.2, 1, device))
    distance = pivot * 2 ** uniform((batch,), -worlds.dolly_octaves, worlds.dolly_octaves, device)
    aim = torch.randn(batch, 2, device=device) * worlds.aim * view[0] / focal[:, None]
    target = torch.cat([aim, torch.ones_like(aim[:, :1])], dim=1) * distance[:, None]
    return camera, target - camera[:, :, 2] * pivot[:, None]


def _outlines(sizes: Tensor, view: Tensor, centre: Tensor, in_front: Tensor, worlds: Worlds) -> tuple[Tensor, Tensor]:
    """Which part of its photograph each plane shows where, and its outline."""
    batch, planes, device = len(sizes), sizes.shape[1], sizes.device
    flat = batch * planes
    sizes = sizes.flip(-1).flatten(0, 1)
    low, high = worlds.zoom_octaves
    # The background is to fill the picture, and more, for the second camera sees more of it.
    widest = ((sizes / view).amin(dim=1).log2() - 0.1).clamp(low, high)
    front = in_front.repeat(batch)
    zoom = 2 ** torch.where(front, low + (high - low) * uniform((flat,), 0, 1, device), widest)
    extent = uniform((flat,), *worlds.extent, device) * view[0]
    # What stands in front shows any part of its photograph; what is past its edge is not there.
    room = (sizes - 2 * extent[:, None] * zoom[:, None]).clamp(min=0) * front[:, None]
    canvas = (sizes - 1) / 2 + room * uniform((flat, 2), -0.5, 0.5, device)
    turn = rotation(torch.randn(flat, device=device) * 0.3)
    mirrored = torch.where(uniform((flat, 1), 0, 1, device) < 0.5, -zoom[:, None], zoom[:, None])
    scale = scaling(torch.cat([mirrored, zoom[:, None]], dim=1))
    to_canvas = translation(canvas) @ scale @ turn @ translation(-centre.flatten(0, 1))
    power = 2 ** uniform((flat, 1), 0, 3, device)
    bars = uniform((flat, 1), 4, 14, device)
    hole = uniform((flat, 1), 0.15, 0.6, device)
    phase = uniform((flat, 1), 0, 2 * math.pi, device)
    kind = (uniform((flat, 1), 0, 4, device)).floor() * front[:, None] - (~front[:, None]).float()
    shape = torch.cat([canvas, (extent * zoom)[:, None], power, bars, hole, phase, kind], dim=1)
    return to_canvas.unflatten(0, (batch, planes)), shape.unflatten(0, (batch, planes))


def _solid(xy: Tensor, shape: Tensor, sizes: Tensor) -> Tensor:
    """(M, N) bool: where planes are, at places (M, N, 2) of their photographs.

    Kinds of outlines: -1 all of the photograph, 0 a rounded block, 1 a blob, 2 bars, 3 a block with a hole.
    """
    last = sizes.flip(-1)[:, None] - 1
    within = ((xy >= 0) & (xy <= last)).all(dim=-1)
    centre, (radius, power, bars, hole, phase, kind) = shape[:, None, :2], shape[:, 2:].unsqueeze(-1).unbind(dim=1)
    unit = (xy - centre) / radius[..., None]
    x, y = unit.unbind(dim=-1)
    block = (x.abs().clamp(min=1e-4) ** power + y.abs().clamp(min=1e-4) ** power) ** (1 / power)
    angle = torch.atan2(y, x)
    wave = 1 + 0.25 * (3 * angle + phase).sin() + 0.15 * (5 * angle + 2 * phase).sin() + 0.1 * (9 * angle).cos()
    blob = unit.square().sum(dim=-1).sqrt() / wave * 1.25
    barred = block.where((bars * x + phase).sin() > -0.2, 2)
    holed = block.where(block > hole, 2)
    outlines = torch.stack([block, blob, barred, holed])
    chosen = outlines.gather(0, kind.clamp(min=0).long().expand_as(block)[None])[0]
    return within & ((chosen < 1) | (kind < 0))


class _Seen(NamedTuple):
    """What a camera sees at some places."""

    plane: Tensor
    """(B, N) which plane is in front; int64."""
    shown: Tensor
    """(B, N) bool: any is there."""
    canvas: Tensor
    """(B, N, 2) the place on its photograph."""


def look_at(scene: Scene, camera: int, xy: Tensor) -> _Seen:
    """What a camera (0 or 1) sees at places (B, N, 2) of its picture."""
    batch, planes = scene.to_canvas.shape[:2]
    matrix = scene.to_canvas @ inverse_each(scene.to_second) if camera else scene.to_canvas
    canvas = _project(xy.repeat_interleave(planes, dim=0), matrix.flatten(0, 1))
    solid = _solid(canvas, scene.shape.flatten(0, 1), scene.sizes.flatten(0, 1)).unflatten(0, (batch, planes))
    normal = scene.normal[:, camera]
    nearness = xy[:, None, :, 0] * normal[..., :1] + xy[:, None, :, 1] * normal[..., 1:2] + normal[..., 2:]
    nearest, plane = torch.where(solid, nearness, 0.0).max(dim=1)
    rows = plane[:, None, :, None].expand(-1, 1, -1, 2)
    return _Seen(plane, nearest > LEAST_NEARNESS, canvas.unflatten(0, (batch, planes)).gather(1, rows)[:, 0])


def _unit_scale(matrix: Tensor) -> Tensor:
    """The same homography with numbers around 1: float32 inverts no others well."""
    return matrix / matrix.abs().amax(dim=(-2, -1), keepdim=True)


def _project(xy: Tensor, matrix: Tensor) -> Tensor:
    """(B, N, 2) points through (B, 3, 3), of any sign."""
    x, y = xy.unbind(dim=-1)
    u, v, w = (matrix[:, row, :1] * x + matrix[:, row, 1:2] * y + matrix[:, row, 2:] for row in range(3))
    w = torch.where(w.abs() < 1e-9, 1e-9, w)
    return torch.stack([u, v], dim=-1) / w[..., None]


def pictures(canvas: Tensor, scene: Scene, view_hw: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """What the cameras see.

    Args:
        canvas: (B, K, 3, S, S) uint8 photographs of the planes.
        scene: the scenes.
        view_hw: size of the pictures.

    Returns:
        (2 B, 1, H, W) float32 in [0, 1], the first pictures, then the second; and where they show anything, likewise.
    """
    height, width = view_hw
    batch, planes, side = len(canvas), canvas.shape[1], canvas.shape[-1]
    gray = _mix(canvas.flatten(0, 1)).view(batch, planes, side, side)
    light = 2 ** uniform((batch, planes, 1, 1), -0.5, 0.5, gray.device)
    gray = (gray * light).clamp(0, 1)
    fine = pixel_grid(height * SUPERSAMPLE, width * SUPERSAMPLE, canvas.device)
    fine = ((fine + 0.5) / SUPERSAMPLE - 0.5).expand(batch, -1, -1)
    images, insides = [], []
    for camera in (0, 1):
        seen = look_at(scene, camera, fine)
        # The photographs of a scene as one tall picture, in which each plane has rows of its own.
        x, y = seen.canvas.unbind(dim=-1)
        tall = torch.stack([(2 * x + 1) / side - 1, (2 * (y + seen.plane * side) + 1) / (side * planes) - 1], dim=-1)
        shape = (batch, height * SUPERSAMPLE, width * SUPERSAMPLE)
        sampled = F.grid_sample(gray.view(batch, 1, planes * side, side), tall.view(*shape, 2), align_corners=False)
        shown = seen.shown.view(batch, 1, *shape[1:]).float()
        images.append(F.avg_pool2d(sampled * shown + 0.5 * (1 - shown), SUPERSAMPLE))
        insides.append(F.avg_pool2d(shown, SUPERSAMPLE))
    return torch.cat(images), torch.cat(insides)


def follow(scene: Scene, camera: int, xy: Tensor, view_hw: tuple[int, int]) -> Points:
    """Where points of one camera's picture lie in the other's.

    Args:
        scene: the scenes.
        camera: 0 or 1, whose picture the points are in.
        xy: (B, N, 2) px.
        view_hw: size of the pictures.
    """
    here = look_at(scene, camera, xy)
    rows = torch.arange(len(xy), device=xy.device)[:, None]
    matrix = scene.to_second if camera == 0 else _unit_scale(inverse_each(scene.to_second))
    there = _project_each(xy, matrix[rows, here.plane])
    other = 1 - camera
    normal = scene.normal[rows, other, here.plane]
    in_front = there[..., 0] * normal[..., 0] + there[..., 1] * normal[..., 1] + normal[..., 2] > LEAST_NEARNESS
    limit = xy.new_tensor([view_hw[1], view_hw[0]]) - 0.5
    inside = ((there >= -0.5) & (there < limit)).all(dim=-1)
    there = torch.where((in_front & here.shown)[..., None], there, -1e4).clamp(-1e4, 1e4)
    across = look_at(scene, other, there)
    seen = here.shown & in_front & inside & across.shown & (across.plane == here.plane)
    unsure = _near_silhouette(scene, camera, xy, here) | (_near_silhouette(scene, other, there, across) & inside)
    return Points(there, seen, unsure)


def _near_silhouette(scene: Scene, camera: int, xy: Tensor, seen: _Seen) -> Tensor:
    """(B, N) bool: whether another plane, or none, is seen a little to any side."""
    steps = xy.new_tensor([[1, 0], [-1, 0], [0, 1], [0, -1]]) * SILHOUETTE_PX
    around = look_at(scene, camera, (xy[:, None] + steps[:, None]).flatten(1, 2))
    plane, shown = (part.unflatten(1, (len(steps), -1)) for part in (around.plane, around.shown))
    return ((plane != seen.plane[:, None]) | (shown != seen.shown[:, None])).any(dim=1)


def inverse_each(matrix: Tensor) -> Tensor:
    """(B, K, 3, 3) -> their inverses."""
    return inverse(_unit_scale(matrix).flatten(0, 1)).view(matrix.shape)


def _project_each(xy: Tensor, matrix: Tensor) -> Tensor:
    """(B, N, 2) points, each through a homography of its own, (B, N, 3, 3)."""
    u, v, w = (matrix @ torch.cat([xy, torch.ones_like(xy[..., :1])], dim=-1)[..., None])[..., 0].unbind(dim=-1)
    w = torch.where(w.abs() < 1e-9, 1e-9, w)
    return torch.stack([u, v], dim=-1) / w[..., None]
