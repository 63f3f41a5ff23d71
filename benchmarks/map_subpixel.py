"""One scene mapped twice, with keypoints on whole pixels and between them: what sub-pixel keypoints are worth in a map.

    python benchmarks/map_subpixel.py --images FOLDER --output FOLDER [--model FILE] [--pinhole FX,FY,CX,CY]

OUTPUT/whole and OUTPUT/subpixel get features.h5 and matches.h5 in hloc's layout (mutual nearest neighbors of all pairs
of images), and COLMAP's map of them: import, geometric verification, incremental mapping. The points are the best of
each image, found at --max-side and given in pixels of the file. Needs h5py and pycolmap. For images without an EXIF
orientation, since COLMAP reads files as they are stored.
"""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

import click
import h5py
import numpy as np
import pycolmap

from superpoint_trt import Keypoints, SuperPoint
from superpoint_trt.core.image import find_images
from superpoint_trt.match.nearest import match

KINDS = {"whole": False, "subpixel": True}
"""Folder of OUTPUT -> the extractor's option."""
COLUMNS = ("registered", "points", "reprojection_px", "track_length")


def extract(model: str | None, paths: list[Path], subpixel: bool, most: int, side_px: int) -> dict[str, Keypoints]:
    """The keypoints of each image, by its file's name."""
    with SuperPoint(model, max_keypoints=most, max_side_px=side_px, subpixel=subpixel) as superpoint:
        print(f"{superpoint}, {'sub-pixel places' if subpixel else 'whole pixels'}", flush=True)
        return {path.name: superpoint.extract(path) for path in paths}


def write_features(path: Path, features: dict[str, Keypoints]) -> None:
    """One group an image, pixel centers at integers."""
    with h5py.File(path, "w") as file:
        for name, found in features.items():
            group = file.create_group(name)
            group["keypoints"] = found.xy
            group["scores"] = found.scores
            group["descriptors"] = found.descriptors.T.astype(np.float16)
            group["image_size"] = np.array(found.image_size, np.int64)


def write_matches(path: Path, features: dict[str, Keypoints]) -> None:
    """For each keypoint of the first image of a pair the row of its match in the second, or -1; all pairs."""
    with h5py.File(path, "w") as file:
        for first, second in itertools.combinations(sorted(features), 2):
            found = match(features[first].descriptors, features[second].descriptors)
            to, scores = np.full(len(features[first]), -1, np.int32), np.zeros(len(features[first]), np.float16)
            to[found.rows[:, 0]] = found.rows[:, 1]
            scores[found.rows[:, 0]] = 1 - found.distances**2 / 2  # the cosine
            group = file.create_group(f"{first}/{second}")
            group["matches0"], group["matching_scores0"] = to, scores


def fill_database(database: Path, pairs: Path, images: Path, folder: Path, pinhole: str | None) -> int:
    """Writes features and matches of a folder to COLMAP's database, and the list of pairs; returns how many images."""
    camera = {}
    if pinhole:
        fx, fy, cx, cy = map(float, pinhole.split(","))
        camera = {"camera_model": "PINHOLE", "camera_params": f"{fx},{fy},{cx + 0.5},{cy + 0.5}"}
    with h5py.File(folder / "features.h5") as features, h5py.File(folder / "matches.h5") as matches:
        names = sorted(features)
        with pycolmap.Database.open(database):
            pass  # an empty one
        pycolmap.import_images(database, images, pycolmap.CameraMode.SINGLE, image_names=names, options=camera)
        with pycolmap.Database.open(database) as opened:
            ids = {image.name: image.image_id for image in opened.read_all_images()}
            for name in names:
                # Pixel centers at integers here, at halves in COLMAP.
                opened.write_keypoints(ids[name], features[name]["keypoints"][()] + np.float32(0.5))
            for first, second in itertools.combinations(names, 2):
                to = matches[first][second]["matches0"][()]
                rows = np.flatnonzero(to >= 0)
                opened.write_matches(ids[first], ids[second], np.stack([rows, to[rows]], axis=1).astype(np.uint32))
    pairs.write_text("".join(f"{first} {second}\n" for first, second in itertools.combinations(names, 2)))
    return len(names)


def map_scene(images: Path, folder: Path, pinhole: str | None) -> dict[str, float | str]:
    """COLMAP's map of the files in a folder.

    Args:
        images: folder of the images.
        folder: holds features.h5 and matches.h5; gets database.db and the map.
        pinhole: "fx,fy,cx,cy" in px, pixel centers at integers, which mapping then leaves as they are; None: unknown.
    """
    database, pairs, model = folder / "database.db", folder / "pairs.txt", folder / "map"
    count = fill_database(database, pairs, images, folder, pinhole)
    pycolmap.set_random_seed(0)
    pycolmap.verify_matches(database, pairs, options={"ransac": {"max_num_trials": 20000, "min_inlier_ratio": 0.1}})
    fixed = ("focal_length", "principal_point", "extra_params") if pinhole else ()
    options = pycolmap.IncrementalPipelineOptions({f"ba_refine_{what}": False for what in fixed})
    model.mkdir()
    maps = pycolmap.incremental_mapping(database, images, model, options=options)
    if not maps:
        return dict.fromkeys(COLUMNS, "-")
    largest = max(maps.values(), key=lambda one: one.num_reg_images())
    return {
        "registered": f"{largest.num_reg_images()} of {count}",
        "points": largest.num_points3D(),
        "reprojection_px": round(largest.compute_mean_reprojection_error(), 3),
        "track_length": round(largest.compute_mean_track_length(), 2),
    }


@click.command()
@click.option("--images", required=True, type=click.Path(path_type=Path), help="Folder of one scene's images.")
@click.option("--output", required=True, type=click.Path(path_type=Path), help="Folder for files and maps.")
@click.option("--model", help="[default: the default network, full]")
@click.option("--max-keypoints", default=2048, show_default=True)
@click.option("--max-side", default=1024, show_default=True, help="px")
@click.option("--pinhole", help="Intrinsics FX,FY,CX,CY in px, if they are known.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="File for the figures.")
def main(images, output, model, max_keypoints, max_side, pinhole, json_path) -> None:
    """Maps a scene with keypoints on whole pixels and between them."""
    paths = [path for path in find_images(images) if path.parent == images]
    if len(paths) < 2:
        raise click.UsageError(f"{images} holds {len(paths)} images; a map needs two or more.")
    pycolmap.logging.minloglevel = 2
    figures = {}
    for kind, subpixel in KINDS.items():
        folder = output / kind
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        features = extract(model, paths, subpixel, max_keypoints, max_side)
        write_features(folder / "features.h5", features)
        write_matches(folder / "matches.h5", features)
        figures[kind] = map_scene(images, folder, pinhole)
    print(f"\n{'':10}" + "".join(f"{column:>18}" for column in COLUMNS))
    for kind, row in figures.items():
        print(f"{kind:10}" + "".join(f"{row[column]!s:>18}" for column in COLUMNS))
    if json_path:
        json_path.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
