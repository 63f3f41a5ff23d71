"""What a user names (images, folders, globs, lists, videos) as one list of images with names."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from superpoint_trt.core.files import PathLike, read_bytes
from superpoint_trt.core.image import IMAGE_SUFFIXES
from superpoint_trt.core.types import SuperPointError
from superpoint_trt.pipeline.match_files import check_group_names
from superpoint_trt.pipeline.packed import check_name
from superpoint_trt.pipeline.video import Frame, choose_frames, is_video_name, list_frames

LIST_MARK = "@"


@dataclass(frozen=True)
class InputOptions:
    """How inputs are named, and which frames of videos are taken."""

    root: PathLike | None = None
    """Names are relative to this folder. None: the folder that was named, or the one that all inputs share."""
    every: int = 1
    """Of each so many frames of a video the first."""
    fps: float | None = None
    """At most so many frames of a video a second."""

    def __post_init__(self) -> None:
        choose_frames((), self.every, self.fps)  # refuses numbers out of range, also if there is no video


class Item(NamedTuple):
    """One image to be worked on."""

    name: str
    """Its name in feature files: the path below the root with "/"; of a frame, the video's and the frame's."""
    path: str
    """The image file or the video."""
    frame: Frame | None = None
    """Which frame of a video; None: an image file."""


def find_items(inputs: Sequence[PathLike], options: InputOptions | None = None) -> list[Item]:
    """Finds the images that a user names.

    Args:
        inputs: images; folders, whose images are taken, also those of subfolders, but no hidden files and no videos;
            globs; "@list.txt", a file with one path on each line, relative to the root; videos.
        options: root, and frames of videos.

    Returns:
        The images in the order of the inputs; within a folder or a glob sorted by path. A file that is named twice
        comes once.

    Raises:
        SuperPointError: an input does not exist or holds no image, a file lies outside the root, or two images would
            have one name in feature or match files.
    """
    options = options or InputOptions()
    if not inputs:
        raise SuperPointError("no input is given; expected images, folders, globs, @list.txt or videos.")
    root = Path(options.root) if options.root is not None else None
    if root is not None and not root.is_dir():
        raise SuperPointError(f"the root {root} is no folder; names are relative to it.")
    found = (file for given in inputs for file in _files_of(str(given), root))
    first: dict[str, str] = {}
    for file in found:
        first.setdefault(os.path.abspath(file), file)
    files = list(first.values())
    base = os.path.abspath(root if root is not None else _shared_folder(inputs, files))
    items = [item for file in files for item in _items_of(file, base, options)]
    check_names(item.name for item in items)
    return items


def check_names(names: Iterable[str]) -> None:
    """Checks that names can be those of entries, and differ, also in match files.

    Raises:
        SuperPointError: naming one that cannot, or two that do not differ.
    """
    seen: dict[str, None] = {}
    for name in names:
        check_name(name)
        if name in seen:
            raise SuperPointError(f"two images have the name {name!r}; rename one, or give another --root.")
        seen[name] = None
    check_group_names(seen)


def _files_of(given: str, root: Path | None) -> list[str]:
    """The files of one input, sorted unless they are listed."""
    if given.startswith(LIST_MARK):
        return _read_list(given[len(LIST_MARK) :], root)
    if os.path.isdir(given):
        found = sorted(_images_below(given))
        if not found:
            raise SuperPointError(f"{given} holds no image; names should end in {', '.join(IMAGE_SUFFIXES)}.")
        return found
    if os.path.exists(given):
        return [given]
    found = sorted(path for path in glob.iglob(given, recursive=True) if os.path.isfile(path))
    if not found:
        what = "matches no file" if glob.has_magic(given) else "does not exist"
        raise SuperPointError(f"input {given} {what} (looked in {Path.cwd()}).")
    return found


def _read_list(path: str, root: Path | None) -> list[str]:
    try:
        lines = read_bytes(path, "list of images").decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise SuperPointError(f"{path} is not UTF-8 text; expected one path of an image on each line.") from error
    named = [line.strip() for line in lines if line.strip()]
    if not named:
        raise SuperPointError(f"{path} names no image; expected one path on each line.")
    return [os.path.join(root, name) if root is not None else name for name in named]


def _images_below(folder: str) -> Iterator[str]:
    """Image files below a folder; hidden ones are left out: a camera's card has such leftovers of other systems."""
    for inside, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for file in files:
            if file.lower().endswith(IMAGE_SUFFIXES) and not file.startswith("."):
                yield os.path.join(inside, file)


def _shared_folder(inputs: Sequence[PathLike], files: Sequence[str]) -> str:
    """The folder that names are relative to, if none is given."""
    if len(inputs) == 1 and os.path.isdir(inputs[0]):
        return str(inputs[0])
    try:
        return os.path.commonpath({os.path.dirname(os.path.abspath(file)) for file in files})
    except ValueError as error:  # on Windows, files on two drives
        raise SuperPointError("the inputs have no folder in common; give each drive a run of its own.") from error


def _items_of(file: str, base: str, options: InputOptions) -> Iterator[Item]:
    below = os.path.relpath(os.path.abspath(file), base)
    if below.split(os.sep)[0] == os.pardir:
        raise SuperPointError(f"{file} lies outside the root {base}; names are relative to it: give another --root.")
    name = below.replace(os.sep, "/")
    if not is_video_name(file):
        yield Item(name, file)
        return
    for frame in choose_frames(list_frames(file), options.every, options.fps):
        yield Item(f"{name}/{frame.name}", file, frame)
