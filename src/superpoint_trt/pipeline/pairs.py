"""Which images are matched with which: the pairs file, and the ways to fill it."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from superpoint_trt.core.files import PathLike, read_bytes, write_atomically
from superpoint_trt.core.types import SuperPointError

Pair = tuple[str, str]
"""Names of two images, as the feature file has them."""

_LONGEST_LINE = 20_000
"""Characters of two paths; a longer line is no pair."""


@dataclass(frozen=True)
class PairOptions:
    """Which pairs are made. Exactly one of `exhaustive`, `sequential` and `listed` is set."""

    exhaustive: bool = False
    """Every image with every other."""
    sequential: int | None = None
    """Every image with so many that follow it, in the order of `in_sequence`."""
    loop_every: int | None = None
    """With `sequential`: every so many-th image is also paired with every other of these, which closes loops."""
    listed: PathLike | None = None
    """A file with lines "name0 name1"."""

    def __post_init__(self) -> None:
        ways = [self.exhaustive, self.sequential is not None, self.listed is not None]
        if sum(ways) != 1:
            given = "several ways to pair images are given" if any(ways) else "it is not said which images to pair"
            raise SuperPointError(f"{given}; give one of --exhaustive, --sequential K and --list FILE.")
        if self.loop_every is not None and self.sequential is None:
            raise SuperPointError("loops are closed in a sequence only: give --sequential K, too.")
        for name, value in (("following images", self.sequential), ("step between loop images", self.loop_every)):
            if value is not None and value < 1:
                raise SuperPointError(f"the number of {name} is {value}; expected 1 or more.")


def make_pairs(names: Iterable[str], options: PairOptions) -> list[Pair]:
    """The pairs of images.

    Args:
        names: of all images.
        options: which pairs.

    Returns:
        Each pair once, in either order.

    Raises:
        SuperPointError: there are fewer than two images, the list cannot be read, or it names an image that is not
            there.
    """
    ordered = in_sequence(names)
    if len(ordered) < 2:
        raise SuperPointError(f"pairs need two images; there are features of {len(ordered)}.")
    if options.listed is not None:
        return read_pairs(options.listed, ordered)
    if options.sequential is None:
        return list(itertools.combinations(ordered, 2))
    near = ((a, b) for i, a in enumerate(ordered) for b in ordered[i + 1 : i + 1 + options.sequential])
    loop = itertools.combinations(ordered[:: options.loop_every], 2) if options.loop_every else ()
    return each_once(itertools.chain(near, loop))


def in_sequence(names: Iterable[str]) -> list[str]:
    """Names in the order in which a person counts: "frame9.png" before "frame10.png"."""
    return sorted(names, key=lambda name: ([(t, int(n or 0)) for t, n in re.findall(r"(\D*)(\d*)", name)], name))


def write_pairs(path: PathLike, pairs: Iterable[Pair]) -> Path:
    """Writes a pairs file: a line "name0 name1" for each pair, as hloc and COLMAP read it.

    Raises:
        SuperPointError: a name holds a line break, or the file cannot be written; a file that was there is unchanged.
    """
    lines = [f"{first} {second}" for first, second in pairs]
    broken = next((line for line in lines if len(line.splitlines()) != 1), None)
    if broken is not None:
        raise SuperPointError(f"the name of an image in {broken!r} holds a line break; rename the file.")
    return write_atomically(path, "".join(f"{line}\n" for line in lines).encode())


def read_pairs(path: PathLike, names: Iterable[str]) -> list[Pair]:
    """Reads a pairs file. Names may hold spaces; empty lines are skipped.

    Args:
        path: the file.
        names: of all images there are.

    Returns:
        Each pair once, in the order of the file.

    Raises:
        SuperPointError: the file cannot be read, a line is not two different names, or can be read in two ways.
    """
    known = set(names)
    try:
        text = read_bytes(path, "pairs file").decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SuperPointError(f"pairs file {path} is no UTF-8 text ({error.reason} at byte {error.start}).") from error
    lines = enumerate(text.splitlines(), start=1)
    return each_once(_parse(path, number, line, known) for number, line in lines if line.strip())


def _parse(path: PathLike, number: int, line: str, known: set[str]) -> Pair:
    """Splits a line at the space that leaves two known names.

    Raises:
        SuperPointError: naming the line.
    """
    # A name may begin or end with a space; other spaces around the line are no part of it.
    found = {split for text in {line, line.strip()} for split in _splits(text) if known.issuperset(split)}
    if len(found) == 1 and len(set(*found)) == 2:
        return found.pop()
    words = line.split()
    missing = [word for word in words if word not in known] if len(words) == 2 else []
    if missing:
        why = f"there are no features of {missing[0]!r}"
    elif len(found) > 1:
        why = f"{line[:120]!r} can be read in {len(found)} ways, because names hold spaces; rename files"
    else:
        why = f"{line[:120]!r} is not two different names of images that have features, separated by a space"
    raise SuperPointError(f"line {number} of pairs file {path}: {why}.")


def _splits(line: str) -> Iterator[Pair]:
    """A line in two, at each of its spaces and runs of spaces."""
    if len(line) > _LONGEST_LINE:
        return
    for space in (r"\s+", r"\s"):
        yield from ((line[: m.start()], line[m.end() :]) for m in re.finditer(space, line))


def each_once(pairs: Iterable[Pair]) -> list[Pair]:
    """The pairs without those that come again, in either order."""
    seen: set[frozenset[str]] = set()
    found = []
    for pair in pairs:
        if frozenset(pair) not in seen:
            seen.add(frozenset(pair))
            found.append(pair)
    return found


def with_spaces(names: Sequence[str]) -> list[str]:
    """The names that hold spaces. This project reads pairs files with them, hloc does not."""
    return [name for name in names if re.search(r"\s", name)]
