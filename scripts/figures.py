"""Draws every picture of the READMEs and of docs/. `make figures` runs it.

    python scripts/figures.py [NAME ...] [--output docs/images] [--shared ../shared]

Without a name all are drawn. A picture whose photographs are not in this repository is left out, with a line that says
so, unless the folder --shared has them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, Callable

import click
import cv2
import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parents[1]
for folder in (ROOT, ROOT / "src", ROOT / "scripts", ROOT / "benchmarks"):
    sys.path.insert(0, str(folder))

from superpoint_trt import packaged  # noqa: E402
from superpoint_trt.core.image import load_image  # noqa: E402
from superpoint_trt.core.networks import packaged_network  # noqa: E402
from superpoint_trt.core.types import SuperPointError  # noqa: E402
from superpoint_trt.run.captions import Picture, add_caption  # noqa: E402
from superpoint_trt.run.draw import save_picture  # noqa: E402
from superpoint_trt.run.extractor import SuperPoint  # noqa: E402

IMAGES = ROOT / "docs" / "images"
VIEW_WH = (400, 300)
VIEWS = 32
FRAME_MS = 90
WEBP_QUALITY = 70


class LeftOut(Exception):
    """A picture that cannot be drawn here, and why."""


def draw_demo(output: Path, shared: Path) -> None:
    """`superpoint demo`: the picture of the READMEs."""
    import tempfile

    from superpoint_trt.cli.demo import match_with_warped_copy

    with tempfile.TemporaryDirectory() as folder, SuperPoint("full") as superpoint:
        match_with_warped_copy(superpoint, folder)
        output.write_bytes((Path(folder) / "matches.jpg").read_bytes())


def draw_keypoints_figure(output: Path, shared: Path) -> None:
    """`superpoint infer`: the best points of the packaged photograph."""
    from superpoint_trt.run.draw import draw_keypoints, keypoints_caption

    photo = load_image(packaged.PHOTO)
    with SuperPoint("full", max_keypoints=500) as superpoint:
        found = superpoint.extract(photo)
    save_picture(output, draw_keypoints(photo, found, keypoints_caption(found, "full")))


def draw_tracks_figure(output: Path, shared: Path) -> None:
    """`superpoint track`: a camera that moves over the packaged photograph, round and round."""
    from PIL import Image

    from superpoint_trt.pipeline.tracks import PointTracker, TrackOptions, draw_tracks

    options = TrackOptions(max_distance=0.7, min_length=3, max_length=8)
    tracker, frames = PointTracker(options), []
    with SuperPoint("full", max_keypoints=160) as superpoint:
        found = superpoint.extract_many(list(camera_views(load_image(packaged.PHOTO))))
        # The first round begins the tracks, so that the picture of the second has no first image.
        for index, (view, keypoints) in enumerate([*zip(camera_views(load_image(packaged.PHOTO)), found)] * 2):
            now = tracker.update(keypoints)
            if index >= VIEWS:
                shown = int((now.lengths >= options.min_length).sum())
                frames.append(add_caption(draw_tracks(view, now, options), [f"full: {shown:3d} points followed"]))
    first, *rest = [Image.fromarray(frame) for frame in frames]
    first.save(output, save_all=True, append_images=rest, duration=FRAME_MS, loop=0, quality=45, method=6)


def camera_views(photo: NDArray[Any]) -> Iterator[Picture]:
    """The photograph as a camera sees it that moves on a closed path: it turns, tilts and comes near."""
    (height, width), (view_w, view_h) = photo.shape[:2], VIEW_WH
    corners = np.float32([[-1, -1], [1, -1], [1, 1], [-1, 1]])
    for phase in np.arange(VIEWS) * 2 * np.pi / VIEWS:
        reach = np.array([0.37, 0.2775]) * (1 - 0.12 * np.cos(phase)) * width
        angle = 0.12 * np.sin(phase)
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        tilt = 1 + 0.06 * np.cos(phase) * corners[:, :1]
        seen = (corners * reach * tilt) @ turn.T
        seen += np.array([width / 2 + 0.06 * width * np.sin(phase), height * (0.40 - 0.10 * np.cos(phase))])
        target = (corners + 1) / 2 * np.array([view_w - 1, view_h - 1])
        matrix = cv2.getPerspectiveTransform(seen.astype(np.float32), target.astype(np.float32))
        yield np.asarray(
            cv2.warpPerspective(photo, matrix, VIEW_WH, flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE),
            np.uint8,
        )


def draw_stress_figure(output: Path, shared: Path) -> None:
    """The curves over rotation, zoom and blur, of the figures beside them."""
    from stress_plot import NAMES, models_of

    from superpoint_trt.prove.stress_plot import plot_stress

    titles = {**NAMES, "full-v1": "full, version 1"}
    plot_stress(list(models_of((IMAGES / "stress.json",)).values()), output, titles)


def draw_networks_figure(output: Path, shared: Path) -> None:
    """Accuracy over arithmetic of this project's networks and others."""
    from network_chart import draw_chart, read_networks

    draw_chart(read_networks(IMAGES / "networks.csv"), output)


def draw_training_figure(output: Path, shared: Path) -> None:
    """The log of the training from nothing: version 1 of the full network."""
    from training.plot import main as plot_log

    with redirect_stdout(sys.stderr):
        plot_log.callback(str(packaged_network("full-v1").log), str(output))


def draw_map_figure(output: Path, shared: Path) -> None:
    """`superpoint reconstruct`: a map of 17 frames of TUM RGB-D (CC BY 4.0), beside one of them."""
    frames = _frames(shared)
    import pycolmap
    from matcher_figures import mapped

    from superpoint_trt.pipeline.colmap_map import map_points
    from superpoint_trt.pipeline.map_picture import draw_map, map_caption

    points = map_points(pycolmap.Reconstruction(mapped(frames, "nearest")[0] / "sparse" / "0"))
    names = sorted(frames.glob("*.png"))
    joined = side_by_side(load_image(names[8]), draw_map(points, 640, has_caption=False), 600)
    save_picture(output, add_caption(joined, [f"one of {len(names)} frames, and their map: {map_caption(points)}"]))


def draw_changed_figure(output: Path, shared: Path) -> None:
    """Both matchers on a photograph of Kodak's that nothing was trained on, and its changed copy."""
    photo = load_image(_held_out(shared)[1])
    from matcher_figures import changed_pair, cut, draw_with_both

    _save_webp(output, draw_with_both(changed_pair(cut(photo))))


def draw_frames_figure(output: Path, shared: Path) -> None:
    """Both matchers on two far frames of TUM RGB-D."""
    frames = _frames(shared)
    from matcher_figures import draw_with_both, frames_pair

    _save_webp(output, draw_with_both(frames_pair(frames)))


def draw_unrelated_figure(output: Path, shared: Path) -> None:
    """Both matchers on two photographs that have nothing in common."""
    first, second = (load_image(path) for path in _held_out(shared))
    from matcher_figures import cut, draw_with_both, unrelated_pair

    _save_webp(output, draw_with_both(unrelated_pair(cut(first), cut(second))))


def draw_both_maps_figure(output: Path, shared: Path) -> None:
    """Maps of 17 frames of TUM RGB-D with both matchers."""
    frames = _frames(shared)
    from matcher_figures import draw_maps_of_both

    _save_webp(output, draw_maps_of_both(frames))


def _frames(shared: Path) -> Path:
    """The folder of TUM's frames, if it and what makes maps are there.

    Raises:
        LeftOut: one of them is missing.
    """
    import importlib.util

    frames = shared / "data" / "photos" / "tum_freiburg"
    if not frames.is_dir():
        raise LeftOut(f"needs the frames of TUM RGB-D in {frames}")
    missing = [name for name in ("pycolmap", "h5py") if not importlib.util.find_spec(name)]
    if missing:
        raise LeftOut(f"needs {', '.join(missing)}: pip install '.[bulk,colmap]'")
    return frames


def _held_out(shared: Path) -> list[Path]:
    """Two of Kodak's photographs that were kept out of training.

    Raises:
        LeftOut: they are not there.
    """
    paths = [shared / "data" / "photos" / "kodak" / f"kodim{number}.png" for number in ("07", "22")]
    if not all(path.is_file() for path in paths):
        raise LeftOut(f"needs {paths[0].name} and {paths[1].name} of Kodak in {paths[0].parent}")
    return paths


def _save_webp(output: Path, picture: Picture) -> None:
    from PIL import Image

    Image.fromarray(picture).save(output, quality=WEBP_QUALITY, method=6)


def side_by_side(left: Picture, right: Picture, height_px: int) -> Picture:
    """Two pictures of one height, with white between them."""
    scaled = [
        cv2.resize(one, (round(one.shape[1] * height_px / one.shape[0]), height_px), interpolation=cv2.INTER_AREA)
        for one in (left, right)
    ]
    white = np.full((height_px, 16, 3), 255, np.uint8)
    return np.concatenate([scaled[0], white, scaled[1]], axis=1).astype(np.uint8)


FIGURES: dict[str, Callable[[Path, Path], None]] = {
    "matches.jpg": draw_demo,
    "keypoints.jpg": draw_keypoints_figure,
    "tracks.webp": draw_tracks_figure,
    "networks.png": draw_networks_figure,
    "stress.png": draw_stress_figure,
    "training.png": draw_training_figure,
    "maps.jpg": draw_map_figure,
    "matcher_changed.webp": draw_changed_figure,
    "matcher_frames.webp": draw_frames_figure,
    "matcher_unrelated.webp": draw_unrelated_figure,
    "matcher_maps.webp": draw_both_maps_figure,
}
"""Name of the file in docs/images -> what draws it."""


@click.command()
@click.argument("names", nargs=-1, type=click.Choice(list(FIGURES)))
@click.option("--output", type=click.Path(path_type=Path), default=IMAGES, help="Folder of the pictures.")
@click.option("--shared", type=click.Path(path_type=Path), default=ROOT.parent / "shared", help="Other photographs.")
def main(names: tuple[str, ...], output: Path, shared: Path) -> None:
    """Draws the pictures of the READMEs and of docs/."""
    output.mkdir(parents=True, exist_ok=True)
    for name in names or FIGURES:
        try:
            FIGURES[name](output / name, shared)
        except (LeftOut, SuperPointError) as why:
            print(f"{name}: left out, {why}")
            if isinstance(why, SuperPointError):
                sys.exit(2)
        else:
            print(f"{name}: {(output / name).stat().st_size / 1024:.0f} KB")


if __name__ == "__main__":
    main()
