"""How far matching survives rotation, zoom and blur: curves over changes of photographs with known homographies."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from superpoint_trt import packaged
from superpoint_trt.core.files import PathLike, named, names_below, read_bytes
from superpoint_trt.core.image import find_images, load_image, place, to_gray
from superpoint_trt.core.progress import Progress, Steps
from superpoint_trt.core.types import Float32, Keypoints, Matrix, ModelDescription, SuperPointError
from superpoint_trt.prove import metrics
from superpoint_trt.prove.changes import Change, changed, rounded
from superpoint_trt.prove.opencv_features import DETECTORS, Extractor, opencv_extractor, opencv_version
from superpoint_trt.run.extractor import SuperPoint

BASELINE = "rootsift"
"""The detector that the command sets beside the models."""

SHORTEST_SIDE_PX = 128
"""Of a photograph that is used; at zoom 0.25 it has 32 px."""

UNCHANGED = Change()
TURNED_AND_SHRUNK = Change(turn_deg=90, zoom=0.5)
"""A change that is no point of a curve; it has a row of its own."""

RIGHT_PX = 3.0
MMA_PX = (1, 3)
REPEATABILITY_POINTS = 300


@dataclass(frozen=True)
class StressOptions:
    """Which photographs, how many points, which changes."""

    photographs: int = 20
    """Use at most so many, spread evenly over those that are found."""
    max_keypoints: int = 1000
    """The best so many of each picture."""
    max_side_px: int = 640
    """Larger photographs are shrunk first."""
    subpixel: bool | None = None
    """Keypoints between pixels, or on whole ones; None: the model's own default."""
    rotations_deg: tuple[float, ...] = (0, 15, 30, 45, 60, 90, 120, 150, 180)
    zooms: tuple[float, ...] = (1, 0.85, 0.7, 0.6, 0.5, 0.42, 0.35, 0.25)
    defocus_px: tuple[float, ...] = (0, 1, 2, 3, 4, 5, 6)
    motion_px: tuple[float, ...] = (0, 5, 10, 15, 20)

    def __post_init__(self) -> None:
        for name, value, least, most in (
            ("number of photographs", self.photographs, 1, 100_000),
            ("number of keypoints", self.max_keypoints, 1, 100_000),
            ("longer side", self.max_side_px, SHORTEST_SIDE_PX, 8192),
        ):
            if not least <= value <= most:
                raise SuperPointError(f"{name} is {value}; expected {least} to {most}.")

    @property
    def curves(self) -> dict[str, dict[float, Change]]:
        """Name of a curve -> how much -> the change."""
        return {
            "rotation_deg": {degrees: Change(turn_deg=degrees) for degrees in self.rotations_deg},
            "zoom": {zoom: Change(zoom=zoom) for zoom in self.zooms},
            "defocus_px": {radius: Change(defocus_px=radius) for radius in self.defocus_px},
            "motion_px": {length: Change(motion_px=length) for length in self.motion_px},
        }

    @property
    def changes(self) -> list[Change]:
        """Every change once."""
        on_curves = (change for curve in self.curves.values() for change in curve.values())
        return list(dict.fromkeys((UNCHANGED, *on_curves, TURNED_AND_SHRUNK)))


@dataclass(frozen=True)
class Figures:
    """One pair of pictures, or the mean of several. A picture without points counts 0 everywhere."""

    right: float
    """Right matches (3 px) as a share of the first picture's points."""
    mma1: float
    """Share of the matches that lie within 1 px."""
    mma3: float
    repeatability: float
    """Of the best 300 points, at 3 px, both ways."""

    @classmethod
    def of(cls, first: Keypoints, second: Keypoints, homography: Matrix) -> Figures:
        """Judges a pair of pictures.

        Args:
            first: all points of the first picture that take part, by falling score.
            second: those of the second.
            homography: (3, 3), pixels of the first to pixels of the second.
        """
        views, count = (first, second, homography), max(len(first), len(second))
        mma1, mma3 = metrics.matching_accuracy(*views, MMA_PX, count)
        again = metrics.repeatability(*views, REPEATABILITY_POINTS).share or 0.0
        return cls(metrics.right_share(*views, count, RIGHT_PX), mma1, mma3, again)

    @classmethod
    def mean(cls, figures: Sequence[Figures]) -> Figures:
        """The mean of each figure."""
        return cls(*np.mean([list(asdict(one).values()) for one in figures], axis=0).tolist())

    def to_json(self) -> dict[str, Any]:
        """One row of the report."""
        return {"right": self.right, "mma": {"1": self.mma1, "3": self.mma3}, "repeatability": self.repeatability}


@dataclass(frozen=True)
class ModelStress:
    """One model's figures."""

    model: str
    """File, or name of an OpenCV detector or of a packaged network."""
    backend: str
    device: str
    precision: str
    subpixel: bool
    """Whether its keypoints lie between pixels."""
    keypoints: float
    """Mean number in a first picture."""
    figures: Mapping[Change, Figures]
    """Means over the photographs."""

    @property
    def of_unturned(self) -> float:
        """Right matches of `TURNED_AND_SHRUNK` against those of the unchanged picture; 0 where that has none."""
        unturned = self.figures[UNCHANGED].right
        return self.figures[TURNED_AND_SHRUNK].right / unturned if unturned else 0.0


@dataclass(frozen=True)
class StressReport:
    """Figures of several models on the same pictures."""

    options: StressOptions
    photographs: list[str]
    """Those that were used, each by its path below the folder that all share."""
    problems: list[str]
    """One line for each photograph that could not be used."""
    notes: list[str]
    """One line for each model that saw shrunk pictures."""
    models: list[ModelStress]

    def to_json(self) -> dict[str, Any]:
        """The report as plain data: options, photographs, problems, notes, models."""
        return {
            "options": asdict(self.options),
            "photographs": self.photographs,
            "problems": self.problems,
            "notes": self.notes,
            "models": [self._model_to_json(model) for model in self.models],
        }

    def _model_to_json(self, stressed: ModelStress) -> dict[str, Any]:
        rows = {change: figures.to_json() for change, figures in stressed.figures.items()}
        return {
            "model": stressed.model,
            "backend": stressed.backend,
            "device": stressed.device,
            "precision": stressed.precision,
            "subpixel": stressed.subpixel,
            "keypoints": stressed.keypoints,
            "curves": {
                name: [{"at": at, **rows[change]} for at, change in curve.items()]
                for name, curve in self.options.curves.items()
            },
            "turned_90_zoom_0.5": {**rows[TURNED_AND_SHRUNK], "right_of_unturned": stressed.of_unturned},
        }


def stress(
    photos: Sequence[PathLike],
    models: Sequence[PathLike] = (packaged.DEFAULT,),
    options: StressOptions | None = None,
    device: str = "auto",
    threads: int | None = None,
    progress: Progress | None = None,
) -> StressReport:
    """Changes photographs and judges how many keypoints each model still matches rightly.

    Args:
        photos: folders of photographs, or single ones.
        models: model files, or names of `opencv_features.DETECTORS` and of packaged networks.
        options: which photographs, how many points, which changes.
        device: where model files run, as `SuperPoint` takes it.
        threads: CPU threads of a model file.
        progress: called with (pictures done, all pictures).

    Raises:
        SuperPointError: no usable photograph, no model, or one that cannot be opened. Raised before the slow work. A
            single photograph that cannot be used is listed in `problems`.
    """
    options = options or StressOptions()
    if not models:
        raise SuperPointError("there is no model to judge; give at least one.")
    for model in models:
        with _opened(model, options, device, threads):
            pass
    photographs, problems = _read(_chosen(photos, options.photographs), options.max_side_px)
    steps = Steps(len(models) * len(photographs) * (1 + len(options.changes)), progress)
    stressed: list[ModelStress] = []
    notes: list[str] = []
    for model in models:
        with _opened(model, options, device, threads) as opened:
            stressed.append(_judge(opened, photographs, options, steps))
            notes += opened.notes()
    names = names_below([photograph.path for photograph in photographs])
    return StressReport(options, names, problems, notes, stressed)


# --------------------------------------------------------------------------------------------------------- photographs


@dataclass(frozen=True)
class Photograph:
    """The first picture of all pairs that are made from it."""

    path: Path
    gray: Float32
    """(H, W) float32 in [0, 1], in steps of 1/255."""
    seed: int
    """From the file's content, so that a photograph is changed alike under every name."""


def _chosen(photos: Sequence[PathLike], most: int) -> list[Path]:
    """At most so many of the photographs, spread evenly over all of them."""
    found = list(dict.fromkeys(path for one in photos for path in find_images(one)))
    if not found:
        raise SuperPointError("there are no photographs; name a folder that holds some.")
    rows = np.linspace(0, len(found) - 1, min(most, len(found))).round().astype(int)
    return [found[row] for row in rows]


def _read(paths: Iterable[Path], side_px: int) -> tuple[list[Photograph], list[str]]:
    """Reads photographs, and says which cannot be used.

    Raises:
        SuperPointError: none can be used.
    """
    photographs, problems = [], []
    for path in paths:
        try:
            gray = _fitted(to_gray(load_image(path)), side_px)
            photographs.append(Photograph(path, gray, zlib.crc32(read_bytes(path, "image"))))
        except SuperPointError as error:
            problems.append(named(error, path))
    if not photographs:
        raise SuperPointError(f"none of {len(problems)} photographs can be used: {problems[0]}")
    return photographs, problems


def _fitted(gray: Float32, side_px: int) -> Float32:
    """Shrinks a picture (H, W) whose longer side is above `side_px`.

    Raises:
        SuperPointError: its shorter side is too short then.
    """
    import cv2

    height, width = gray.shape
    scale = min(1.0, side_px / max(height, width))
    size_wh = round(width * scale), round(height * scale)
    if min(size_wh) < SHORTEST_SIDE_PX:
        shrunk = f", which shrink to {size_wh[0]}x{size_wh[1]}" if scale < 1 else ""
        raise SuperPointError(f"{width}x{height} px{shrunk}; a side must have {SHORTEST_SIDE_PX} px.")
    return rounded(cv2.resize(gray, size_wh, interpolation=cv2.INTER_AREA) if scale < 1 else gray)


# -------------------------------------------------------------------------------------------------------------- models


@dataclass
class _Opened:
    """A model that is ready to extract."""

    model: str
    extract: Extractor
    backend: str
    device: str
    precision: str
    subpixel: bool
    description: ModelDescription | None = None
    """Of a model file."""
    pictures: int = 0
    shrunk: list[tuple[int, int]] = field(default_factory=list)
    """(height, width) of the pictures that were larger than a model of fixed size takes."""

    def __call__(self, gray: Float32) -> Keypoints:
        """The keypoints of a picture (H, W)."""
        self.pictures += 1
        if self.description and place((gray.shape[0], gray.shape[1]), self.description).resized:
            self.shrunk.append((gray.shape[0], gray.shape[1]))
        return self.extract(gray)

    def notes(self) -> list[str]:
        """What a reader of its figures must know."""
        if not self.shrunk or not self.description:
            return []
        takes = f"{self.description.width_px}x{self.description.height_px} px"
        return [
            f"{self.model}: takes {takes}, and {len(self.shrunk)} of {self.pictures} pictures were shrunk to that; its "
            "curves are too low. Export it with --dynamic, or take a smaller --max-side."
        ]


@contextmanager
def _opened(model: PathLike, options: StressOptions, device: str, threads: int | None) -> Iterator[_Opened]:
    """Opens a model file, a packaged network, or an OpenCV detector.

    Raises:
        SuperPointError: naming the model.
    """
    if str(model) in DETECTORS:
        extract = opencv_extractor(str(model), options.max_keypoints)
        yield _Opened(str(model), extract, opencv_version(), "cpu", "fp32", subpixel=str(model) != "orb")
        return
    name = str(model)
    try:
        superpoint = SuperPoint(
            model, max_keypoints=options.max_keypoints, subpixel=options.subpixel, device=device, threads=threads
        )
    except SuperPointError as error:
        raise SuperPointError(named(error, name)) from error
    with superpoint:
        runtime = superpoint.runtime
        yield _Opened(
            name,
            superpoint.extract,
            runtime.backend,
            ", ".join(filter(None, (runtime.device, runtime.decode))),
            runtime.precision,
            bool(superpoint.options.subpixel),
            superpoint.description,
        )


def _judge(opened: _Opened, photographs: Sequence[Photograph], options: StressOptions, steps: Steps) -> ModelStress:
    """All figures of one model."""
    counts: list[int] = []
    judged: dict[Change, list[Figures]] = {change: [] for change in options.changes}
    for photograph in photographs:
        first = opened(photograph.gray).top(options.max_keypoints)
        counts.append(len(first))
        steps.advance()
        for change, figures in judged.items():
            picture = changed(photograph.gray, change, photograph.seed)
            second = opened(picture.gray).top(options.max_keypoints)
            figures.append(Figures.of(first, second, picture.homography))
            steps.advance()
    return ModelStress(
        opened.model,
        opened.backend,
        opened.device,
        opened.precision,
        opened.subpixel,
        float(np.mean(counts)),
        {change: Figures.mean(figures) for change, figures in judged.items()},
    )
