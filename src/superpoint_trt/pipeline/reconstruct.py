"""Photographs or a video -> a map: extraction, pairs, matches and COLMAP in a row.

Each step keeps what it has finished in the output folder, so a run that was killed goes on when it is started again.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from superpoint_trt.core.files import PathLike, file_sha256, make_folder, write_atomically
from superpoint_trt.core.progress import PhaseProgress
from superpoint_trt.core.types import SuperPointError
from superpoint_trt.pipeline.colmap_map import REPORT, ColmapOptions, MapReport, make_map
from superpoint_trt.pipeline.colmap_process import import_pycolmap
from superpoint_trt.pipeline.extract import ExtractOptions, ExtractSummary, extract
from superpoint_trt.pipeline.feature_files import FeatureFile
from superpoint_trt.pipeline.locks import only_one
from superpoint_trt.pipeline.match_pairs import PairMatchOptions, PairMatchSummary, fingerprint, match_pairs
from superpoint_trt.pipeline.pairs import Pair, PairOptions, make_pairs, write_pairs
from superpoint_trt.pipeline.video import VideoReader, choose_frames, is_video_name
from superpoint_trt.run.draw import encode_picture

FEATURES, PAIRS, MATCHES, IMAGES = "features.h5", "pairs.txt", "matches.h5", "images"
"""Names in the output folder, beside those of `colmap_map`."""
EXHAUSTIVE_UP_TO = 100
"""Images that are all matched with each other by default: 4,950 pairs."""
SEQUENTIAL, LOOP_EVERY = 20, 10
"""Of more images, each with so many that follow it, and every so many-th with every other of these."""
VIDEO_FPS = 2.0
"""Frames of a video that are taken a second by default."""
_LOCK = ".superpoint-reconstruct.lock"
_MADE_OF = "map.made_of.json"
_FRAMES_OF = "frames.made_of.json"


@dataclass(frozen=True)
class ReconstructOptions:
    """The options of the steps."""

    extract: ExtractOptions = field(
        default_factory=lambda: ExtractOptions(settings={"max_keypoints": 2048, "max_side_px": 1024})
    )
    pairs: PairOptions | None = None
    """None: all pairs up to `EXHAUSTIVE_UP_TO` images; of more, `SEQUENTIAL` and `LOOP_EVERY`."""
    matching: PairMatchOptions = field(default_factory=PairMatchOptions)
    colmap: ColmapOptions = field(default_factory=ColmapOptions)


@dataclass(frozen=True)
class ReconstructSummary:
    """What the steps did."""

    extracted: ExtractSummary
    pairs: int
    paired: PairOptions
    """How the pairs were made."""
    matched: PairMatchSummary
    map: MapReport
    map_was_there: bool
    """Whether the map of an earlier run was kept, because it was made of the same."""


def reconstruct(
    source: PathLike,
    output: PathLike,
    options: ReconstructOptions | None = None,
    progress: PhaseProgress | None = None,
) -> ReconstructSummary:
    """Makes a map of a scene.

    Args:
        source: a folder of photographs, or a video, whose frames are written to `output`/images.
        output: folder for features.h5, pairs.txt, matches.h5 and what `make_map` writes.
        options: of the steps.
        progress: is told each phase.

    Raises:
        SuperPointError: the source cannot be read, an earlier run in the folder had other options, another process
            works on the folder, or a step failed.
    """
    options = options or ReconstructOptions()
    import_pycolmap()  # what is missing shows before the work
    if Path(source).resolve() in (Path(output).resolve(), *Path(output).resolve().parents):
        raise SuperPointError(f"the output {output} lies in the folder of the photographs; choose another --output.")
    with only_one(Path(output), _LOCK):
        return _reconstruct(Path(source), Path(output), options, progress)


def _reconstruct(
    source: Path, folder: Path, options: ReconstructOptions, progress: PhaseProgress | None
) -> ReconstructSummary:
    """Makes a map in a folder that no other process works on."""
    images = _images(source, folder, options.extract, progress)
    extracted = extract([images], folder / FEATURES, _rooted(options.extract, images), progress)
    with FeatureFile(folder / FEATURES) as features:
        names = features.names()
    paired = options.pairs or default_pairs(len(names))
    pairs = make_pairs(names, paired)
    write_pairs(folder / PAIRS, pairs)
    matched = match_pairs(folder / FEATURES, pairs, folder / MATCHES, options.matching, progress)
    report, was_there = _map(images, folder, pairs, options.colmap, progress)
    return ReconstructSummary(extracted, len(pairs), paired, matched, report, was_there)


def default_pairs(images: int) -> PairOptions:
    """The pairs that are made if nothing is said."""
    if images <= EXHAUSTIVE_UP_TO:
        return PairOptions(exhaustive=True)
    return PairOptions(sequential=SEQUENTIAL, loop_every=LOOP_EVERY)


def _rooted(options: ExtractOptions, images: Path) -> ExtractOptions:
    return replace(options, inputs=replace(options.inputs, root=images))


def _images(source: Path, folder: Path, options: ExtractOptions, progress: PhaseProgress | None) -> Path:
    """The folder of the photographs; of a video, one with its frames."""
    if source.is_dir():
        return source
    if not is_video_name(source):
        raise SuperPointError(f"{source} is neither a folder of photographs nor a video.")
    fps = options.inputs.fps if options.inputs.fps or options.inputs.every > 1 else VIDEO_FPS
    with VideoReader(source) as video:
        target = make_folder(folder / IMAGES)
        made_of = {"video": fingerprint(source), "every": options.inputs.every, "fps": fps}
        _check_frames(target, json.dumps(made_of), options.overwrite)
        frames = choose_frames(video.frames(), options.inputs.every, fps)
        for done, frame in enumerate(frames):
            path = target / f"{frame.name}.jpg"
            if not path.is_file():
                write_atomically(path, encode_picture(video.read(frame), path.suffix))
            if progress:
                progress("writing frames", done + 1, len(frames))
    return target


def _check_frames(folder: Path, made_of: str, overwrite: bool) -> None:
    """Checks that the frames in a folder, if there are any, are of this video; removes others if they may go.

    Raises:
        SuperPointError: they are of another video, or were chosen in another way.
    """
    marker, old = folder.parent / _FRAMES_OF, list(folder.glob("*.jpg"))
    if marker.is_file() and marker.read_text(encoding="utf-8") == made_of:
        return
    if old and not overwrite:
        raise SuperPointError(
            f"{folder} has frames of another video, or at other times; choose another --output, or --overwrite."
        )
    for path in old:
        path.unlink()
    write_atomically(marker, made_of.encode())


def _map(
    images: Path, folder: Path, pairs: Sequence[Pair], options: ColmapOptions, progress: PhaseProgress | None
) -> tuple[MapReport, bool]:
    """Makes the map, unless there is one of the same matches and options."""
    marker = folder / _MADE_OF
    made_of = json.dumps(
        {"features": file_sha256(folder / FEATURES), "matches": file_sha256(folder / MATCHES), **asdict(options)}
    )
    if marker.is_file() and marker.read_text(encoding="utf-8") == made_of and (folder / REPORT).is_file():
        return MapReport.read(folder / REPORT), True
    marker.unlink(missing_ok=True)
    report = make_map(images, folder / FEATURES, folder / MATCHES, folder, options, progress)
    write_atomically(marker, made_of.encode())
    return report, False
