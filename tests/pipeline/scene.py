"""A scene with known cameras: the corner of a room, whose floor and two walls are photographs."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from conftest import photograph

SIZE_WH = (640, 480)
FOCAL_PX = 600.0
PARAMS = (FOCAL_PX, FOCAL_PX, SIZE_WH[0] / 2, SIZE_WH[1] / 2)
"""COLMAP's PINHOLE: with the center of the first pixel at (0.5, 0.5)."""
K = np.array([[FOCAL_PX, 0, SIZE_WH[0] / 2 - 0.5], [0, FOCAL_PX, SIZE_WH[1] / 2 - 0.5], [0, 0, 1]])
"""With the center of the first pixel at (0, 0)."""


@dataclass(frozen=True)
class Camera:
    rotation: np.ndarray
    """(3, 3) world to camera."""
    center: np.ndarray

    def project(self, points: np.ndarray) -> np.ndarray:
        """(N, 3) -> (N, 2) px, pixel centers at integers."""
        seen = (points - self.center) @ self.rotation.T @ K.T
        return seen[:, :2] / seen[:, 2:]

    def depth(self, points: np.ndarray) -> np.ndarray:
        return (points - self.center) @ self.rotation[2]


def look_at(center, target=(1.0, 0.8, 1.0)) -> Camera:
    """The world's second axis points down, as a camera's does."""
    center = np.asarray(center, float)
    ahead = np.asarray(target) - center
    ahead /= np.linalg.norm(ahead)
    right = np.cross([0.0, 1.0, 0.0], ahead)
    right /= np.linalg.norm(right)
    return Camera(np.stack([right, np.cross(ahead, right), ahead]), center)


def cameras(count: int) -> list[Camera]:
    """On an arc before the corner (2, 2, 2), which lies in the direction of all axes."""
    angles = np.linspace(-0.45, 0.45, count)
    return [
        look_at((1 - 2.6 * np.sin(0.785 + a), 0.2 + 0.1 * (i % 2), 1 - 2.6 * np.cos(0.785 + a)))
        for i, a in enumerate(angles)
    ]


def render(camera: Camera) -> np.ndarray:
    """The picture, (H, W) uint8; planes do not hide each other."""
    picture = np.full(SIZE_WH[::-1], 128, np.uint8)
    axes = np.eye(3)
    for index, name in enumerate(("astronaut", "coffee", "chelsea")):
        texture = photograph(512, 512, name)
        across, down = axes[(index + 1) % 3], axes[(index + 2) % 3]
        corners = np.array([2 * axes[index] + s * across + t * down for s, t in ((0, 0), (2, 0), (2, 2), (0, 2))])
        if (camera.depth(corners) < 0.1).any():
            continue
        from_texture = cv2.getPerspectiveTransform(
            np.array([[0, 0], [511, 0], [511, 511], [0, 511]], np.float32), camera.project(corners).astype(np.float32)
        )
        warped = cv2.warpPerspective(texture, from_texture, SIZE_WH, flags=cv2.INTER_AREA)
        covered = cv2.warpPerspective(np.ones_like(texture), from_texture, SIZE_WH, flags=cv2.INTER_NEAREST)
        picture[covered > 0] = warped[covered > 0]
    return picture


def center_errors(found: dict[str, np.ndarray], true: dict[str, np.ndarray]) -> np.ndarray:
    """Distances of camera centers after the best similarity (Umeyama 1991), in the true unit."""
    names = sorted(found)
    a, b = np.array([found[n] for n in names]), np.array([true[n] for n in names])
    a0, b0 = a - a.mean(0), b - b.mean(0)
    u, s, vt = np.linalg.svd(b0.T @ a0)
    sign = np.diag([1, 1, np.sign(np.linalg.det(u @ vt))])
    scale = (s * np.diag(sign)).sum() / (a0**2).sum()
    return np.linalg.norm(scale * a0 @ (u @ sign @ vt).T - b0, axis=1)
