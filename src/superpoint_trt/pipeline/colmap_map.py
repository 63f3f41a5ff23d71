"""Images, features and matches -> a COLMAP database with verified geometry, and a map. Runs pycolmap.

COLMAP puts the center of the first pixel at (0.5, 0.5), feature files at (0, 0); so keypoints move by half a pixel.
"""

from __future__ import annotations

import enum
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from superpoint_trt.core.files import PathLike, make_folder, one_line, read_bytes, write_atomically
from superpoint_trt.core.progress import PhaseProgress
from superpoint_trt.core.types import SuperPointError
from superpoint_trt.pipeline.colmap_process import ColmapSteps, MapKind, import_pycolmap, quiet, run_steps
from superpoint_trt.pipeline.feature_files import FeatureFile
from superpoint_trt.pipeline.locks import only_one
from superpoint_trt.pipeline.map_picture import MapPoints, draw_map
from superpoint_trt.pipeline.match_files import MatchFile
from superpoint_trt.pipeline.pairs import Pair, each_once
from superpoint_trt.run.draw import save_picture

HALF_PIXEL = 0.5
DATABASE, MODELS, REPORT, PICTURE = "database.db", "sparse", "report.json", "map.png"
"""Names in the output folder; `sparse/0`, `sparse/1` and so on are COLMAP's own."""
_MARK = ".superpoint-colmap"
"""A file that says whose the folder's database and map are."""
_UNFINISHED = ".superpoint-colmap.unfinished"
"""A folder in the output folder, in which the new database and map grow while the old ones stay."""
_LOCK = ".superpoint-colmap.lock"


class CameraSharing(str, enum.Enum):
    """Which images have the same camera, that is lens, focal length and size."""

    AUTO = "auto"
    """Those whose size and EXIF data agree."""
    SINGLE = "single"
    """All."""
    PER_FOLDER = "per-folder"
    PER_IMAGE = "per-image"


@dataclass(frozen=True)
class ColmapOptions:
    """What COLMAP makes, and what it assumes about the cameras."""

    map: MapKind | None = MapKind.INCREMENTAL
    """None: only the database."""
    cameras: CameraSharing = CameraSharing.AUTO
    camera_model: str = "SIMPLE_RADIAL"
    """COLMAP's name of a lens model."""
    camera_params: tuple[float, ...] = ()
    """The camera's parameters in COLMAP's order and pixels (PINHOLE: fx, fy, cx, cy). They are kept as they are.
    Empty: the focal length is taken from EXIF or guessed, and refined."""
    verify_px: float = 4.0
    """Largest distance of a match from the geometry of its pair, in geometric verification."""

    def __post_init__(self) -> None:
        if not 0 < self.verify_px < np.inf:
            raise SuperPointError(f"verification distance is {self.verify_px} px; expected more than 0 (4 is usual).")


@dataclass(frozen=True)
class MapReport:
    """What the database and the map hold."""

    images: int
    keypoints: int
    matched_pairs: int
    matches: int
    verified_pairs: int
    """Pairs whose matches agree with one geometry."""
    verified_matches: int
    map: str | None
    """The kind of map; None: none was asked for. The fields below are those of its largest model."""
    models: int = 0
    """Maps that could not be joined; 1 is what one wants."""
    registered: int = 0
    """Images whose place was found."""
    points: int = 0
    observations: int = 0
    reprojection_px: float | None = None
    """Mean distance between a keypoint and its point's projection. None: no map was found."""
    track_length: float | None = None
    """Mean number of images that see a point."""
    left_out: tuple[str, ...] = ()
    """Names of images whose place was not found."""
    pycolmap: str = ""
    """Version of pycolmap."""

    @classmethod
    def read(cls, path: Path) -> MapReport:
        """Reads what `make_map` wrote.

        Raises:
            SuperPointError: it is no report.
        """
        try:
            flat = json.loads(read_bytes(path, "report of a map"))
            return cls(**{**flat, "left_out": tuple(flat["left_out"])})
        except (ValueError, TypeError, KeyError) as error:
            raise SuperPointError(f"{path} is no report of a map ({one_line(error)}); remove it.") from error

    def rows(self) -> list[tuple[str, str]]:
        """The figures as a table for people: a label, and its value."""
        mean = self.keypoints / max(self.images, 1)
        rows = [
            ("images", f"{self.images}, {mean:.0f} keypoints each"),
            ("pairs with matches", f"{self.matched_pairs}, {self.matches} matches"),
            ("pairs verified", f"{self.verified_pairs}, {self.verified_matches} matches"),
        ]
        if self.map is None:
            return rows
        rows.append(("images in the map", f"{self.registered} of {self.images} ({self.map})"))
        if self.reprojection_px is None or self.track_length is None:
            return rows
        more = f"; {self.models - 1} smaller maps could not be joined" if self.models > 1 else ""
        return [
            *rows,
            ("points", f"{self.points}{more}"),
            ("reprojection error", f"{self.reprojection_px:.2f} px"),
            ("track length", f"{self.track_length:.2f} images see a point"),
        ]


def make_map(
    images: PathLike,
    features: PathLike,
    matches: PathLike,
    output: PathLike,
    options: ColmapOptions | None = None,
    progress: PhaseProgress | None = None,
) -> MapReport:
    """Makes a COLMAP database, verifies the geometry of every pair, and maps the scene.

    Args:
        images: the folder that the names in the feature file start from.
        features: feature file.
        matches: match file of the same images.
        output: folder for `database.db`, `sparse/`, `report.json` and `map.png`; what it has of these is replaced.
        options: kind of map and cameras.
        progress: is told each phase.

    Returns:
        What was found; the same is in `report.json`.

    Raises:
        SuperPointError: a file is missing or damaged, an image has no file, the files do not belong together, COLMAP
            failed, the folder has a map of somebody else, or pycolmap or h5py is missing.
    """
    options = options or ColmapOptions()
    colmap, tell = import_pycolmap(), progress or _silent
    folder = Path(output)
    with FeatureFile(features) as stored, MatchFile(matches) as matched, quiet(colmap):
        names = stored.names()
        pairs = list(matched.pairs(names))
        _check_images(Path(images), names, stored.path)
        with _unfinished(folder) as work:
            _check_owner(folder)
            _import(colmap, work / DATABASE, Path(images), stored, matched, names, pairs, options, tell)
            steps = ColmapSteps(
                database=str(work / DATABASE),
                images=str(images),
                models=str(work / MODELS),
                count=len(names),
                verify_px=options.verify_px,
                map=options.map.value if options.map else None,
                refine_camera=not options.camera_params,
            )
            if options.map:
                make_folder(work / MODELS)
            run_steps(steps, tell)
            report, best = _report(colmap, work, names, options)
            write_atomically(work / REPORT, (json.dumps(asdict(report), indent=1) + "\n").encode())
            if best is not None:
                save_picture(work / PICTURE, draw_map(map_points(best)))
            _replace(folder, work)
    return report


def _check_images(images: Path, names: Sequence[str], features: Path) -> None:
    """Checks that every image has a file.

    Raises:
        SuperPointError: naming one that has none.
    """
    missing = [name for name in names if not (images / name).is_file()]
    if missing:
        raise SuperPointError(
            f"{images} has no {missing[0]!r} ({len(missing)} of {len(names)} images of {features} are missing); name "
            "the folder that the features were extracted from (extract --root)."
        )


def _check_owner(folder: Path) -> None:
    """Checks that a database and a map in the output folder are of an earlier run.

    Raises:
        SuperPointError: they are not.
    """
    there = [name for name in (DATABASE, MODELS) if (folder / name).exists()]
    if there and not (folder / _MARK).exists():
        raise SuperPointError(
            f"{folder} has a {there[0]} that superpoint colmap did not make; choose another --output."
        )


@contextmanager
def _unfinished(folder: Path) -> Iterator[Path]:
    """A new folder for the work, which goes in the end; what a killed run has left in it goes first.

    Raises:
        SuperPointError: another process works on the output folder.
    """
    work = folder / _UNFINISHED
    with only_one(folder, _LOCK):
        shutil.rmtree(work, ignore_errors=True)
        try:
            yield make_folder(work)
        finally:
            shutil.rmtree(work, ignore_errors=True)


def _replace(folder: Path, work: Path) -> None:
    """Replaces what an earlier run has left in the output folder by the finished work."""
    write_atomically(folder / _MARK, b"superpoint colmap replaces the database and the map in this folder.\n")
    for name in (DATABASE, MODELS, REPORT, PICTURE):  # renamed, not removed: so quickly that nothing comes between
        if (folder / name).exists():
            (folder / name).replace(work / f"old-{name}")
        if (work / name).exists():
            (work / name).replace(folder / name)


def map_points(model: Any) -> MapPoints:
    """Points and cameras of a pycolmap Reconstruction."""
    points = [point for point in model.points3D.values()]
    placed = sorted((image for image in model.images.values() if image.has_pose), key=lambda image: str(image.name))
    return MapPoints(
        xyz=np.array([point.xyz for point in points], np.float64).reshape(-1, 3),
        colors_rgb=np.array([point.color for point in points], np.uint8).reshape(-1, 3),
        centers=np.array([image.projection_center() for image in placed], np.float64).reshape(-1, 3),
        rotations=np.array([image.cam_from_world().rotation.matrix() for image in placed]).reshape(-1, 3, 3),
    )


# ------------------------------------------------------------------------------------------------------------ database


def _import(
    colmap: ModuleType,
    database_path: Path,
    images: Path,
    features: FeatureFile,
    matches: MatchFile,
    names: Sequence[str],
    pairs: Sequence[Pair],
    options: ColmapOptions,
    tell: PhaseProgress,
) -> None:
    """Writes cameras, images, keypoints and matches to a new database."""
    with colmap.Database.open(database_path):
        pass
    _import_images(colmap, database_path, images, names, options)
    with colmap.Database.open(database_path) as database:
        ids = {image.name: image.image_id for image in database.read_all_images()}
        unread = [name for name in names if name not in ids]
        if unread:
            raise SuperPointError(f"COLMAP cannot read {images / unread[0]} ({len(unread)} such images).")
        counts = {}
        for done, name in enumerate(names):
            tell("writing keypoints", done, len(names))
            keypoints = features[name].keypoints
            counts[name] = len(keypoints)
            database.write_keypoints(ids[name], np.asarray(keypoints, np.float32) + np.float32(HALF_PIXEL))
        for done, pair in enumerate(each_once(pairs)):
            tell("writing matches", done, len(pairs))
            rows = matches[pair].rows
            if len(rows) and (rows.max(axis=0) >= (counts[pair[0]], counts[pair[1]])).any():
                raise SuperPointError(
                    f"{matches.path} matches keypoints of {pair[0]!r} and {pair[1]!r} that {features.path} does not "
                    "have; match these features again."
                )
            database.write_matches(ids[pair[0]], ids[pair[1]], rows.astype(np.uint32))


def _import_images(
    colmap: ModuleType, database_path: Path, images: Path, names: Sequence[str], options: ColmapOptions
) -> None:
    reading = colmap.ImageReaderOptions()
    try:
        reading.camera_model = options.camera_model
        reading.camera_params = ", ".join(f"{value:.12g}" for value in options.camera_params)
        mode = getattr(colmap.CameraMode, options.cameras.name)
        colmap.import_images(database_path, images, mode, image_names=list(names), options=reading)
    except (RuntimeError, ValueError) as error:
        raise SuperPointError(
            f"COLMAP does not take the images: {one_line(error)}; look at the camera's model, {options.camera_model}, "
            "and parameters."
        ) from error


# ----------------------------------------------------------------------------------------------------------------- map


def _report(colmap: ModuleType, folder: Path, names: Sequence[str], options: ColmapOptions) -> tuple[MapReport, Any]:
    """Reads what COLMAP has made. Returns the report and the largest model, or None if there is none."""
    with colmap.Database.open(folder / DATABASE) as database:
        report = MapReport(
            images=len(names),
            keypoints=database.num_keypoints(),
            matched_pairs=database.num_matched_image_pairs(),
            matches=database.num_matches(),
            verified_pairs=database.num_verified_image_pairs(),
            verified_matches=database.num_inlier_matches(),
            map=options.map.value if options.map else None,
            pycolmap=colmap.__version__,
        )
    if options.map is None:
        return report, None
    models = [colmap.Reconstruction(path) for path in sorted((folder / MODELS).iterdir())]
    if not models:
        return replace(report, left_out=tuple(names)), None
    best = max(models, key=lambda model: (model.num_reg_images(), model.num_points3D()))
    placed = {image.name for image in best.images.values() if image.has_pose}
    return (
        replace(
            report,
            models=len(models),
            registered=best.num_reg_images(),
            points=best.num_points3D(),
            observations=best.compute_num_observations(),
            reprojection_px=best.compute_mean_reprojection_error(),
            track_length=best.compute_mean_track_length(),
            left_out=tuple(name for name in names if name not in placed),
        ),
        best,
    )


def _silent(phase: str, done: int, total: int) -> None:
    """Tells nobody."""
