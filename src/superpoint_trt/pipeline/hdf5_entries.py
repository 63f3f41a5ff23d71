"""Entries of a feature file as bytes of HDF5.

The HDF5 library takes 0.2 ms of one thread to make the group of an image with its four datasets, and as long to copy
it. But these five object headers are the same for every image, except for some numbers. So they are written here, as
copies of one template, and the library only links the groups into the file, which is what needs an index.

A group can be linked only from where it has a link already. So 16 groups at a time stand on a shelf, a group without a
name, from which the library moves their links to their places. The empty shelves stay in the file: 28 bytes an image.

Formats: HDF5 File Format Specification, version 3.0. HDF5 1.8 and newer read them.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from types import ModuleType
from typing import Any, Union

import numpy as np
from numpy.typing import NDArray

from superpoint_trt.pipeline.packed import Entry

UNCERTAINTY = "uncertainty"
"""Attribute of `keypoints`."""
ON_A_SHELF = 16
"""HDF5 looks through the whole shelf for each group that it takes."""
_NOWHERE = (1 << 64) - 1
"""The address of what is not in the file."""

_Part = Union[bytes, str]
"""Bytes that all entries share, or the name of a field of 8 bytes in which they differ."""


def _length(parts: Iterable[_Part]) -> int:
    return sum(8 if isinstance(part, str) else len(part) for part in parts)


def _padded(parts: Sequence[_Part]) -> list[_Part]:
    return [*parts, bytes(-_length(parts) % 8)]


# ------------------------------------------------------------------------------------- object headers (chapter IV.A)


def _message(kind: int, *body: _Part, is_constant: bool = False) -> list[_Part]:
    content = _padded(body)
    return [struct.pack("<HHB3x", kind, _length(content), is_constant), *content]


def _header(*messages: list[_Part]) -> list[_Part]:
    """An object header of version 1, the last without checksums, so that its numbers can be filled in."""
    content = [part for message in messages for part in message]
    return [struct.pack("<BxHII4x", 1, len(messages), 1, _length(content)), *content]


def _dataspace(*sides: int | str) -> list[_Part]:
    sizes = [side if isinstance(side, str) else struct.pack("<Q", side) for side in sides]
    return [struct.pack("<BBB5x", 1, len(sides), 0), *sizes]


_INT64 = struct.pack("<BBBBIHH", 0x10, 0x08, 0, 0, 8, 0, 64)
"""Signed, little-endian: class and version, bits, size, first bit, number of bits."""


def _floating(nbytes: int) -> bytes:
    """IEEE 754, little-endian."""
    exponent_bits, fraction_bits = {2: (5, 10), 4: (8, 23), 8: (11, 52)}[nbytes]
    bits, bias = 8 * nbytes, (1 << (exponent_bits - 1)) - 1
    fields = (0, bits, fraction_bits, exponent_bits, 0, fraction_bits, bias)
    return struct.pack("<BBBBIHHBBBBI", 0x11, 0x20, bits - 1, 0, nbytes, *fields)


def _dataset(
    kind: bytes, sides: Sequence[int | str], layout: Sequence[_Part], is_inside: bool, *more: list[_Part]
) -> list[_Part]:
    """The header of a dataset whose values are there already; `is_inside`: in the header itself."""
    fill = struct.pack("<BBBBI", 2, 1 if is_inside else 2, 2, 1, 0)
    return _header(
        _message(0x1, *_dataspace(*sides)),
        _message(0x3, kind, is_constant=True),
        _message(0x5, fill, is_constant=True),
        _message(0x8, *layout),
        *more,
    )


def _outside(name: str) -> list[_Part]:
    """Values that lie somewhere in the file."""
    return [struct.pack("<BB", 3, 1), f"{name}.address", f"{name}.nbytes"]


def _attribute(name: str, field: str) -> list[_Part]:
    """One float64."""
    text, kind, space = name.encode() + b"\0", _floating(8), _dataspace()
    start = struct.pack("<BxHHH", 1, len(text), len(kind), _length(space))
    return _message(0xC, start, *_padded([text]), *_padded([kind]), *_padded(space), field)


def _group(links: Iterable[tuple[str, bytes | str]]) -> list[_Part]:
    """The header of a group with links, each a name and an address."""
    nothing_else = struct.pack("<BBQQ", 0, 0, _NOWHERE, _NOWHERE)
    rows = [_message(0x6, struct.pack("<BBB", 1, 0, len(name)) + name.encode(), to) for name, to in links]
    return _header(_message(0x2, nothing_else), _message(0xA, bytes(2)), *rows)


# ------------------------------------------------------------------------------------------------------------- entries


class EntryHeaders:
    """Makes the headers of entries.

    Args:
        dtype: of the descriptors: float16 or float32.
    """

    def __init__(self, dtype: np.dtype[Any]) -> None:
        self._dtype = dtype
        size: list[_Part] = [struct.pack("<BBH", 3, 0, 16), "width", "height"]
        datasets = {
            "keypoints": _dataset(_floating(4), ("keypoints.count", 2), _outside("keypoints"), False,
                                  _attribute(UNCERTAINTY, UNCERTAINTY)),
            "scores": _dataset(_floating(4), ("scores.count",), _outside("scores"), False),
            "descriptors": _dataset(_floating(dtype.itemsize), ("dim", "descriptors.count"), _outside("descriptors"),
                                    False),
            "image_size": _dataset(_INT64, (2,), size, True),
        }  # fmt: skip
        self._starts: dict[str, int] = {}
        parts: list[_Part] = []
        for name, header in datasets.items():
            self._starts[name] = _length(parts)
            parts += header
        self._group_start = _length(parts)
        parts += _group((name, f"{name}.header") for name in datasets)
        places, at = {}, 0
        for part in parts:
            if isinstance(part, str):
                places[part] = ("<f8" if part == UNCERTAINTY else "<u8", at)
            at += _length([part])
        self._template = b"".join(bytes(8) if isinstance(part, str) else part for part in parts)
        self._record = np.dtype(
            {
                "names": list(places),
                "formats": [kind for kind, _ in places.values()],
                "offsets": [offset for _, offset in places.values()],
                "itemsize": at,
            }
        )

    def make(self, entries: Sequence[Entry], places: Sequence[int], start: int) -> tuple[bytes, list[int]]:
        """Makes the headers of some entries, and the shelves that their groups stand on.

        Args:
            entries: what they are.
            places: the address of the arrays of each, one behind another as `packed` has them.
            start: the address at which the result will lie.

        Returns:
            The bytes, and the address of each shelf; each has the next `ON_A_SHELF` entries.
        """
        rows = np.frombuffer(self._template * len(entries), np.uint8).copy().view(self._record)
        at, count = np.array(places, np.uint64), np.array([entry.count for entry in entries], np.uint64)
        sizes = np.array([entry.sizes(self._dtype) for entry in entries], np.uint64).reshape(-1, 3)
        for name, nbytes in zip(("keypoints", "scores", "descriptors"), sizes.T):
            rows[f"{name}.count"] = count
            rows[f"{name}.nbytes"] = nbytes
            rows[f"{name}.address"] = np.where(nbytes > 0, at, np.uint64(_NOWHERE))
            at = at + nbytes
        rows["dim"] = [entry.dim for entry in entries]
        rows["width"], rows["height"] = np.array([entry.image_size for entry in entries]).reshape(-1, 2).T
        rows[UNCERTAINTY] = [entry.uncertainty for entry in entries]
        records = start + self._record.itemsize * np.arange(len(entries), dtype=np.uint64)
        for name, offset in self._starts.items():
            rows[f"{name}.header"] = records + np.uint64(offset)
        shelves = _shelves(records + np.uint64(self._group_start))
        content = rows.tobytes()
        addresses, end = [], start + len(content)
        for shelf in shelves:
            addresses.append(end)
            end += len(shelf)
        return b"".join([content, *shelves]), addresses


@cache
def entry_headers(dtype: np.dtype[Any]) -> EntryHeaders:
    """The `EntryHeaders` of a type of descriptors."""
    return EntryHeaders(dtype)


def _shelves(groups: NDArray[np.uint64]) -> list[bytes]:
    """Groups without names that hold other groups, given by their addresses."""
    pieces = (groups[start : start + ON_A_SHELF].tolist() for start in range(0, len(groups), ON_A_SHELF))
    return [_joined(_group((_on_shelf(i), struct.pack("<Q", at)) for i, at in enumerate(piece))) for piece in pieces]


def _on_shelf(index: int) -> str:
    return f"{index:02d}"


def _joined(parts: Iterable[_Part]) -> bytes:
    return b"".join(part for part in parts if isinstance(part, bytes))


Shelf = tuple[int, Sequence[str]]
"""The address of a shelf, and the names that the groups on it are to have."""


def link_entries(h5py: ModuleType, file: Any, shelves: Sequence[Shelf]) -> None:
    """Moves groups from their shelves to their names.

    Args:
        h5py: the module.
        file: the open h5py.File.
        shelves: where they are.

    Raises:
        ValueError, RuntimeError, OSError: a name is taken, or HDF5 fails.
    """
    links = h5py.h5p.create(h5py.h5p.LINK_CREATE)
    links.set_create_intermediate_group(True)
    links.set_char_encoding(h5py.h5t.CSET_UTF8)
    for shelf, (_, names) in zip(_objects_at(h5py, file, [address for address, _ in shelves]), shelves):
        for index, name in enumerate(names):
            shelf.links.move(_on_shelf(index).encode(), file.id, name.encode(), lcpl=links)


def _objects_at(h5py: ModuleType, file: Any, addresses: Sequence[int]) -> Iterator[Any]:
    """Opens objects by their addresses. h5py has no other way than references, which hold an address each."""
    if not addresses:
        return
    with h5py.File("references", "w", driver="core", backing_store=False) as scratch:
        held = scratch.create_dataset("references", (len(addresses),), h5py.ref_dtype)
        held.id.write(h5py.h5s.ALL, h5py.h5s.ALL, np.array(addresses, "<u8"), h5py.h5t.STD_REF_OBJ)
        references = held[()]
    for reference in references:
        yield h5py.h5r.dereference(reference, file.id)
