"""The targets: for each parser, a strategy that yields cases, and what a sound result is."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fuzz import corpus, mutations
from fuzz.judge import Case, Ending
from hypothesis import strategies as st

UNIT_LENGTH_WITHIN = 1e-3


@dataclass(frozen=True)
class Target:
    """One parser."""

    name: str
    cases: Callable[[], st.SearchStrategy[Case]]
    sound: Callable[[Path, Ending], str | None] | None
    """None: the exit code and the files that are left tell enough."""
    needs: str | None = None
    """A module that is not among the development tools."""


# ------------------------------------------------------------------------------------------------------ sound results


def sound_features(desk: Path, ending: Ending) -> str | None:
    """What is wrong with out.npz, the features of an image; None if nothing is."""
    with np.load(desk / "out.npz") as arrays:
        xy, scores, descriptors = (arrays[name] for name in ("keypoints", "scores", "descriptors"))
        width, height = arrays["image_size"]
    if not (len(xy) == len(scores) == len(descriptors)):
        return "arrays of different lengths"
    if not all(np.isfinite(array).all() for array in (xy, scores, descriptors)):
        return "values that are not finite"
    if ((scores <= 0) | (scores > 1)).any():
        return "scores that are no probabilities"
    if (xy < -0.5).any() or (xy > [width - 0.5, height - 0.5]).any():
        return "keypoints outside the image"
    if (np.diff(scores) > 0).any():
        return "scores that rise"
    lengths = np.linalg.norm(descriptors, axis=1)  # 0: a damaged model may describe nothing
    if (np.minimum(lengths, abs(lengths - 1)) > UNIT_LENGTH_WITHIN).any():
        return "descriptors that are not of unit length"
    return None


def sound_output(desk: Path, ending: Ending) -> str | None:
    """Features where they were asked for; else something was printed."""
    if (desk / "out.npz").is_file():
        return sound_features(desk, ending)
    return None if ending.out.strip() else "nothing was printed"


def sound_figures(desk: Path, ending: Ending) -> str | None:
    """out.json holds numbers that are finite, or null."""
    if not (desk / "out.json").is_file():
        return sound_output(desk, ending)

    def refuse(text: str) -> float:
        raise ValueError(text)

    try:
        json.loads((desk / "out.json").read_bytes(), parse_constant=refuse)
    except ValueError as error:
        return f"figures that are not finite: {error}"
    return None


# ------------------------------------------------------------------------------------------------------------- targets

INFER = ("infer", "--image", "good.png", "--save", "out.npz", "--model")


@functools.lru_cache
def _models() -> dict[str, Any]:
    return corpus.models()


def image_cases() -> st.SearchStrategy[Case]:
    seeds = corpus.images()
    infer = ("infer", "--model", "dense.onnx", "--image", "odd.img", "--save", "out.npz")
    options = st.sampled_from(((), ("--max-side", "16"), ("--output", "out.png")))
    return st.builds(
        lambda data, more: Case(
            {"odd.img": data}, (*infer, *more), outputs=("out.npz", *(more[1:] if "out.png" in more else ()))
        ),
        mutations.bytes_like(seeds),
        options,
    )


CHECKPOINT_COMMANDS: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (("info", "ODD"), ()),
    (("export", "--weights", "ODD", "--height", "48", "--width", "64", "--output", "out.onnx"), ("out.onnx",)),
    (("weights", "convert", "ODD", "out.safetensors"), ("out.safetensors",)),
    (("infer", "--model", "ODD", "--image", "good.png", "--save", "out.npz"), ("out.npz",)),
)


def _on(commands: Any, name: str) -> Callable[[bytes, Any], Case]:
    """Content and (arguments, outputs) -> a case; ODD stands for the file's name."""

    def make(data: bytes, command: Any) -> Case:
        arguments, outputs = command
        follow = next(((("info", out)) for out in outputs if not out.endswith((".json", ".png"))), ())
        return Case(
            {name: data}, [name if word == "ODD" else word for word in arguments], "superpoint", outputs, {}, follow
        )

    return make


def _split(safetensors: bytes) -> tuple[dict[str, Any], bytes]:
    """The header of a .safetensors, and what follows it."""
    length = int.from_bytes(safetensors[:8], "little")
    return json.loads(safetensors[8 : 8 + length]), safetensors[8 + length :]


def _joined(header: bytes, data: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + data


def topology_cases() -> st.SearchStrategy[Case]:
    header, data = _split(corpus.checkpoints()["compact.safetensors"])

    def with_topology(topology: bytes) -> bytes:
        said = {**header["__metadata__"], "topology": topology.decode("utf-8", "replace")}
        return _joined(json.dumps({**header, "__metadata__": said}).encode(), data)

    content = st.builds(with_topology, mutations.json_like([json.loads(header["__metadata__"]["topology"])]))
    return st.builds(_on(CHECKPOINT_COMMANDS, "odd.safetensors"), content, st.sampled_from(CHECKPOINT_COMMANDS))


def safetensors_cases() -> st.SearchStrategy[Case]:
    seeds = [data for name, data in corpus.checkpoints().items() if name.endswith(".safetensors")]
    parts = [_split(data) for data in seeds]
    headers = st.builds(
        _joined, mutations.json_like([header for header, _ in parts]), st.sampled_from([d for _, d in parts])
    )
    content = mutations.bytes_like(seeds) | headers | headers
    return st.builds(_on(CHECKPOINT_COMMANDS, "odd.safetensors"), content, st.sampled_from(CHECKPOINT_COMMANDS))


STRANGE = ("sparse", "csr", "meta", "quantized", "nested", "complex", "bool", "bits8", "float8", "bfloat16", "int64")
STRANGE += ("gigantic", "wide", "empty", "scalar", "strided", "parameter", "list", "none", "nan", "huge", "tiny")
STRANGE += ("conjugate", "negative")


@st.composite
def strange_states(draw: st.DrawFn) -> bytes:
    """A state_dict with a few tensors of another form, keys of another kind, or wrapped."""
    original = corpus.state(draw(st.sampled_from(("v6", "magicleap", "huggingface"))))
    state: dict[Any, Any] = dict(original)
    keys = list(state)
    for _ in range(draw(st.integers(1, 3))):
        key = draw(st.sampled_from(keys))
        kind = draw(st.sampled_from((*STRANGE, "delete", "rename", "key")))
        if kind == "delete":
            state.pop(key, None)
        elif kind == "rename":
            state[draw(st.sampled_from(mutations.NASTY_TEXT[:9]) | st.text(max_size=4))] = state.pop(key, 0)
        elif kind == "key":
            state[draw(st.sampled_from((7, None, (1, 2), 1.5)))] = state.pop(key, 0)
        elif isinstance(state.get(key), torch.Tensor):
            with contextlib.suppress(RuntimeError, NotImplementedError, IndexError, TypeError):  # not of every shape
                state[key] = corpus.strange_tensor(kind, original[key])  # not a gigantic one made dense
    wrap = draw(st.sampled_from((None, None, None, "state_dict", "model", "net", "nothing")))
    if wrap == "nothing":
        return corpus.torch_bytes(draw(st.sampled_from(([], {}, 3, "x", [state], {"model": 3}, {"model": {}}))))
    value = {wrap: state, "epoch": 3} if wrap else state
    try:
        return corpus.torch_bytes(value, zipped=draw(st.booleans()))
    except (RuntimeError, NotImplementedError, ValueError):  # torch does not save that
        return corpus.torch_bytes({"weight": torch.zeros(1)})


def pth_cases() -> st.SearchStrategy[Case]:
    seeds = [data for name, data in corpus.checkpoints().items() if name.endswith(".pth")]
    content = mutations.bytes_like(seeds) | _pickles(seeds[0]) | strange_states() | strange_states()
    return st.builds(_on(CHECKPOINT_COMMANDS, "odd.pth"), content, st.sampled_from(CHECKPOINT_COMMANDS))


@st.composite
def _pickles(draw: st.DrawFn, seed: bytes) -> bytes:
    """A .pth whose pickle is damaged inside a sound zip."""
    import zipfile

    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(seed)) as source, zipfile.ZipFile(buffer, "w") as target:
        for member in source.namelist():
            data = source.read(member)
            target.writestr(member, draw(mutations.bytes_like([data])) if member.endswith(".pkl") else data)
    return buffer.getvalue()


@st.composite
def feature_files(draw: st.DrawFn) -> bytes:
    arrays: dict[str, Any] = corpus.features()
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from(sorted(arrays)))
        kind = draw(st.sampled_from(("type", "shape", "value", "delete", "header", "whole")))
        if kind == "delete":
            arrays.pop(name)
            if not arrays:
                break
            continue
        array = arrays[name]
        if kind == "type":
            with np.errstate(all="ignore"), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                kinds = ("f2", "f8", "f16", "c8", "i1", "u8", "?", "S3", "U3", "M8[s]", "V4")
                arrays[name] = _as_type(array, draw(st.sampled_from(kinds)))
        elif kind == "shape":
            shapes = ((), (0,), (1,), (2, 5), (5, 1, 2), (10,), (0, 2), (1,) * 32)
            arrays[name] = np.resize(array, draw(st.sampled_from(shapes)))
        elif kind == "value":
            wide = array.astype(np.float64) if array.dtype.kind in "fiu?" else np.zeros(3)
            wide.reshape(-1)[:1] = draw(st.sampled_from((*mutations.NASTY_FLOATS, 1e30, -5.0)))
            arrays[name] = wide
        elif kind == "header":
            return _headers(draw)
        else:
            return corpus.npz({name: array}, draw(st.booleans()))
    return corpus.npz(arrays, draw(st.booleans()))


def _as_type(array: np.ndarray, kind: str) -> np.ndarray:
    try:
        return array.astype(kind)
    except (TypeError, ValueError):
        return np.zeros(array.shape, kind)


def _headers(draw: st.DrawFn) -> bytes:
    """Members that promise other shapes than they hold; zeros pack a thousandfold."""
    members = {}
    for name, array in corpus.features().items():
        header: dict[str, object] = {"descr": array.dtype.str, "fortran_order": False, "shape": array.shape}
        data = array.tobytes()
        if draw(st.booleans()):
            key = draw(st.sampled_from(("descr", "fortran_order", "shape", "extra")))
            sizes = st.sampled_from((0, 1, 2, 5, -1, 1 << 20, 1 << 31, 1 << 40, 1 << 62, 10**30))
            values = {
                "descr": st.sampled_from(("<f4", ">f8", "|O", "<U99999999", "|V2147483647", [("a", "<f4")], "x", 3)),
                "fortran_order": st.sampled_from((True, 3, "x")),
                "shape": st.lists(sizes, max_size=3).map(tuple) | st.sampled_from((3, "x", (1.5,), (True,))),
                "extra": st.just(1),
            }
            header[key] = draw(values[key])
            data = draw(st.sampled_from((data, data * 2, data[:3], bytes(1 << 22))))
        members[f"{name}.npy"] = (header, data)
    return corpus.npz_of_headers(members)


def npz_cases() -> st.SearchStrategy[Case]:
    seeds = [
        corpus.npz(corpus.features()),
        corpus.npz(corpus.features(), compressed=True),
        corpus.npz(corpus.matches()),
    ]
    content = mutations.bytes_like(seeds) | feature_files() | feature_files()
    return st.builds(lambda data: Case({"odd.npz": data}, ("info", "odd.npz")), content)


ONNX_COMMANDS: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (("info", "ODD"), ()),
    ((*INFER, "ODD"), ("out.npz",)),
    ((*INFER, "ODD"), ("out.npz",)),
    (("cast", "--onnx", "ODD", "--output", "out.onnx"), ("out.onnx",)),
    (("cast", "--onnx", "ODD", "--precision", "bf16", "--output", "out.onnx"), ("out.onnx",)),
    (
        (
            "quantize",
            "--onnx",
            "ODD",
            "--calibration",
            "ranges.calibration.json",
            "--no-verify",
            "--output",
            "out.onnx",
        ),
        ("out.onnx",),
    ),
    (("verify", "--model", "ODD", "--weights", "static.onnx", "--images", "good.png", "--json", "out.json"), ()),
    (("build", "--onnx", "ODD", "--engine", "out.engine", "--runtime", "rtx", "--target", "sm89"), ()),
)


def _onnx_case(data: bytes, command: Any) -> Case:
    arguments, outputs = command
    arguments = ["odd.onnx" if word == "ODD" else word for word in arguments]
    more = {"verify": ("out.json",), "build": ("out.engine", "out.engine.json")}.get(arguments[0], ())
    follow = ("info", outputs[0]) if outputs and arguments[0] != "infer" else ()
    return Case({"odd.onnx": data}, arguments, "superpoint", (*outputs, *more), {}, follow)


def onnx_bytes_cases() -> st.SearchStrategy[Case]:
    seeds = [model.SerializeToString() for model in _models().values()]
    return st.builds(_onnx_case, mutations.bytes_like(seeds), st.sampled_from(ONNX_COMMANDS[:6]))


def onnx_message_cases() -> st.SearchStrategy[Case]:
    content = mutations.message_like(list(_models().values())) | _metadata_changed() | _metadata_changed()
    content = mutations.message_like(list(_models().values())) | content
    return st.builds(_onnx_case, content, st.sampled_from(ONNX_COMMANDS))


@st.composite
def _metadata_changed(draw: st.DrawFn) -> bytes:
    """A good model whose metadata say something else."""
    import copy

    model = copy.deepcopy(draw(st.sampled_from(list(_models().values()))))
    values = ("true", "1.5", "-1", "16", "1e30", str(10**30), "NaN", "null", "[1]", '{"a": 1}', "x", "", mutations.DEEP)
    ours = [entry for entry in model.metadata_props if entry.key.startswith("superpoint_trt.")]
    for _ in range(draw(st.integers(1, 3))):
        draw(st.sampled_from(ours)).value = draw(st.sampled_from(values) | st.integers(0, 99).map(str))
    return model.SerializeToString()


def engine_cases() -> st.SearchStrategy[Case]:
    content = mutations.json_like([corpus.engine_metadata()])
    arguments = st.sampled_from((("info", "odd.engine"), ("info", "odd.engine"), (*INFER, "odd.engine")))
    return st.builds(
        lambda data, words: Case({"odd.engine": corpus.PLAN, "odd.engine.json": data}, words), content, arguments
    )


def calibration_cases() -> st.SearchStrategy[Case]:
    stock = corpus.calibration(_models()["heads.onnx"].SerializeToString())
    ranges, weights = stock["ranges.calibration.json"], stock["ranges.calibration.int8.safetensors"]
    arguments = ("quantize", "--onnx", "heads.onnx", "--calibration", "odd.calibration.json", "--no-verify")

    def make(data: bytes, more: bytes, precision: str) -> Case:
        files = {"odd.calibration.json": data, "odd.calibration.int8.safetensors": more}
        words = (*arguments, "--keep-fp16", "none", "--precision", precision, "--output", "out.onnx")
        return Case(
            files, words, "superpoint", ("out.onnx",), {}, ("infer", "--image", "good.png", "--model", "out.onnx")
        )

    def agreeing(data: bytes) -> tuple[bytes, bytes]:
        """Damaged weights whose digest the ranges name."""
        from superpoint_trt.core.files import sha256

        named = json.loads(ranges)
        named["weights_sha256"] = sha256(data)
        return json.dumps(named).encode(), data

    pairs = st.one_of(
        st.tuples(mutations.json_like([json.loads(ranges)]), st.just(weights)),
        st.tuples(mutations.json_like([json.loads(ranges)]), st.just(weights)),
        mutations.bytes_like([weights]).map(agreeing),
    )
    return st.builds(lambda pair, precision: make(*pair, precision), pairs, st.sampled_from(("int8", "int8", "fp8")))


EVALUATE = (
    "evaluate",
    "--model",
    "dense.onnx",
    "--no-baselines",
    "--detector-size",
    "48x64",
    "--descriptor-size",
    "48x64",
)
EVALUATE += ("--json", "out.json", "--dataset")


def _encoded(array: np.ndarray, suffix: str = ".ppm") -> bytes:
    import cv2

    return bytes(cv2.imencode(suffix, array)[1].tobytes())


def homography_cases() -> st.SearchStrategy[Case]:
    good = ["1 0 24\n0 1 8\n0 0 1\n", "1.1e0 -2e-2 3\n0.01 0.9 -4\n1e-5 2e-5 1\n"]
    numbers = st.sampled_from(("nan", "inf", "1e400", "1e-400", "0", "-0", "1e300", "x", "0x10", "١", "1,5", "1_0", ""))
    tables = st.lists(st.lists(numbers | st.floats(-1e3, 1e3).map(str), min_size=2, max_size=4), min_size=2, max_size=4)
    texts = st.one_of(
        mutations.bytes_like([text.encode() for text in good]),
        tables.map(lambda rows: "\n".join(" ".join(row) for row in rows).encode()),
        st.lists(st.floats(-1e6, 1e6, allow_nan=False), min_size=9, max_size=9).map(
            lambda v: "\n".join(" ".join(map(str, v[i : i + 3])) for i in (0, 3, 6)).encode()
        ),
    )
    first, second = _encoded(corpus.picture(color=True)), _encoded(corpus.picture(color=True)[::-1])
    return st.builds(
        lambda text: Case(
            {"set/v_a/1.ppm": first, "set/v_a/2.ppm": second, "set/v_a/H_1_2": text},
            (*EVALUATE, "set"),
            "superpoint",
            ("out.json",),
        ),
        texts,
    )


@st.composite
def _folders(draw: st.DrawFn) -> Case:
    """A folder of images and other things, as a dataset, to verify on, or to calibrate on."""
    good = _encoded(corpus.picture(color=True))
    contents = (
        good,
        good,
        good,
        _encoded(corpus.picture(), ".png"),
        _encoded(corpus.picture(height=9, width=200), ".png"),
        _encoded(np.zeros((48, 64), np.uint8), ".png"),
        _encoded(np.zeros((3, 3), np.uint8), ".png"),
        b"",
        b"no image",
        good[:40],
        b"1 0 0\n0 1 0\n0 0 1\n",
        b"1 0 24\n0 1 8\n0 0 1\n",
    )
    names = ("1.ppm", "2.ppm", "3.png", "img1.png", "img2.pgm", "01.jpg", "H_1_2", "H_1_3", "H1to2p", "H_1_02")
    names += ("H_1_" + "9" * 30, "９.png", "x.PNG", ".png", "a b\n.png", "é.jpg", "\udcff.png")
    folders = ("set/", "set/v_a/", "set/i_b/", "set/v_a/deep/", "set/graf/", "set/\udcff/", "set/1.ppm/")
    files: dict[str, bytes] = {}
    special: dict[str, str] = {}
    for _ in range(draw(st.integers(1, 8))):
        name = draw(st.sampled_from(folders[:3] if draw(st.integers(0, 3)) else folders)) + draw(st.sampled_from(names))
        parents = {str(parent) for parent in Path(name).parents}
        taken = {*files, *special}
        if name in taken or parents & taken or any(other.startswith(name + "/") for other in taken):
            continue
        kind = draw(st.integers(0, 29))
        if kind == 29:
            special[name] = draw(st.sampled_from(("folder", "link:nowhere", "link:.", "link:../set", "fifo")))
        else:
            files[name] = draw(st.sampled_from(contents))
    command: tuple[str, ...] = draw(
        st.sampled_from(
            (
                (*EVALUATE, "set"),
                (*EVALUATE, "set"),
                ("verify", "--model", "dense.onnx", "--weights", "dense.onnx", "--images", "set", "--json", "out.json"),
                (
                    "quantize",
                    "--onnx",
                    "heads.onnx",
                    "--calibration-images",
                    "set",
                    "--no-verify",
                    "--output",
                    "out.onnx",
                ),
            )
        )
    )
    outputs = ("out.onnx", "heads.calibration.json", "heads.calibration.int8.safetensors")
    return Case(files, command, "superpoint", outputs if command[0] == "quantize" else ("out.json",), special)


# ---------------------------------------------------------------------------------------------------------- bulk work


def _hdf5_changed(draw: st.DrawFn, seed: bytes) -> bytes:
    """A sound .h5 that holds other things: datasets of other types and shapes, links, groups that are missing."""
    import h5py

    buffer = io.BytesIO(seed)
    with h5py.File(buffer, "r+") as file:
        places: list[str] = []
        file.visit(places.append)
        for _ in range(draw(st.integers(1, 3))):
            place = draw(st.sampled_from(places))
            kind = draw(st.sampled_from(("array", "array", "array", "delete", "link", "attribute", "name", "huge")))
            with contextlib.suppress(KeyError, ValueError, RuntimeError, TypeError):  # its group has gone
                _change_hdf5(draw, h5py, file, place, kind)
    return buffer.getvalue()


def _change_hdf5(draw: st.DrawFn, h5py: Any, file: Any, place: str, kind: str) -> None:
    if kind == "name":
        file.move(place, draw(st.sampled_from(("x", "a/b", "é", " ", "..", "a\nb")) | st.text(min_size=1, max_size=3)))
        return
    if kind == "attribute":
        value = draw(st.sampled_from((np.nan, "x", [1.0, 2.0], 10**9, h5py.Empty("f4"))))
        file[place].attrs["uncertainty"] = value
        return
    del file[place]
    if kind == "link":
        links = (h5py.SoftLink("/"), h5py.SoftLink("/nowhere"), h5py.ExternalLink("features.h5", "/"), file["/"])
        file[place] = draw(st.sampled_from(links))
    elif kind == "huge":
        file.create_dataset(place, draw(st.sampled_from(((10**9, 2), (5, 10**8), (10**12,)))), "f4", chunks=True)
    elif kind == "array":
        shape = draw(st.sampled_from(((5, 2), (5,), (4, 5), (2,), (), (0,), (0, 2), (4, 0), (5, 2, 1), (1, 1))))
        dtype = draw(st.sampled_from(("f2", "f4", "f8", "i2", "i4", "u1", "i8", "c8", "S3", "?")))
        value = draw(st.sampled_from((0, 1, -1, 4, 5, 127, np.nan, np.inf)))
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            file[place] = np.full(shape, value).astype(dtype)


@st.composite
def hdf5_like(draw: st.DrawFn, seed: bytes) -> bytes:
    if draw(st.integers(0, 3)):
        return _hdf5_changed(draw, seed)
    return draw(mutations.bytes_like([seed]))


MATCH_PAIRS = ("match-pairs", "--device", "cpu", "--output", "out.h5", "--pairs")


def feature_file_cases() -> st.SearchStrategy[Case]:
    commands = (
        ((*MATCH_PAIRS, "pairs.txt", "--features", "odd.h5"), ("out.h5",)),
        (("pairs", "odd.h5", "--exhaustive", "--output", "out.txt"), ("out.txt",)),
    )
    return st.builds(
        lambda data, command: Case({"odd.h5": data}, command[0], outputs=command[1]),
        hdf5_like(corpus.feature_file()),
        st.sampled_from((commands[0], *commands)),
    )


def pairs_cases() -> st.SearchStrategy[Case]:
    words = st.sampled_from((*corpus.BULK_NAMES, "other", " ", "  ", "\t", "\n", "\r\n", "\ufeff", "\0", "\u2028", "#"))
    texts = mutations.bytes_like([corpus.BULK_PAIRS]) | st.lists(words, max_size=12).map(lambda w: " ".join(w).encode())
    listing = ("pairs", "features.h5", "--output", "out.txt", "--list", "odd.txt")
    commands = (
        (listing, ("out.txt",)),
        (("match-pairs", *MATCH_PAIRS[1:], "odd.txt", "--features", "features.h5"), ("out.h5",)),
    )
    return st.builds(
        lambda data, command: Case({"odd.txt": data}, command[0], outputs=command[1]), texts, st.sampled_from(commands)
    )


def match_file_cases() -> st.SearchStrategy[Case]:
    command = ("colmap", "--images", ".", "--features", "features.h5", "--matches", "odd.h5", "--output", "map")
    outputs = ("map/database.db", "map/report.json", "map/.superpoint-colmap")
    return hdf5_like(corpus.match_file()).map(lambda data: Case({"odd.h5": data}, command, outputs=outputs))


@st.composite
def run_state_cases(draw: st.DrawFn) -> Case:
    """An extraction that was stopped in the middle, and whose files were damaged then."""
    files = dict(corpus_run_state())
    name = draw(st.sampled_from(sorted(name for name in files if not name.endswith("lock"))))
    if name.endswith(".json"):
        files[name] = draw(mutations.json_like([json.loads(files[name])]))
    elif name.endswith(".h5"):
        files[name] = draw(hdf5_like(files[name]))
    else:
        positions = draw(st.sampled_from(([5, -1], [0], [0.5, 1.0], [[0, 1]], [1, 0], ["a", "b"], [0, 0], 3)))
        files[name] = draw(
            st.just(corpus.npz({"positions": np.array(positions)})) | mutations.bytes_like([files[name]])
        )
    commands = (
        ("extract", "good.png", "two.png", "--model", "dense.onnx", "--device", "cpu", "--output", "out.h5"),
        ("merge", "out.h5"),
        ("merge", "out.h5", "--unfinished"),
    )
    return Case(files, draw(st.sampled_from(commands)), outputs=("out.h5",))


@functools.lru_cache
def corpus_run_state() -> dict[str, bytes]:
    return corpus.unfinished_run()


TARGETS = {
    target.name: target
    for target in (
        Target("image", image_cases, sound_features),
        Target("safetensors", safetensors_cases, sound_output),
        Target("topology", topology_cases, sound_output),
        Target("pth", pth_cases, sound_output),
        Target("npz", npz_cases, sound_output),
        Target("onnx_bytes", onnx_bytes_cases, sound_output),
        Target("onnx_message", onnx_message_cases, sound_figures),
        Target("engine_json", engine_cases, sound_output),
        Target("calibration", calibration_cases, sound_output),
        Target("homography", homography_cases, sound_figures),
        Target("folder", lambda: _folders(), sound_figures),
        Target("feature_file", feature_file_cases, None, "h5py"),
        Target("pairs_list", pairs_cases, None, "h5py"),
        Target("match_file", match_file_cases, None, "h5py"),
        Target("run_state", lambda: run_state_cases(), None, "h5py"),
    )
}
