"""Kernels without a GPU: they compile for every architecture, and what was compiled is kept."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
from helpers import rarely

from superpoint_trt.core.files import cache_folder
from superpoint_trt.core.types import SuperPointError
from superpoint_trt.gpu import kernels
from superpoint_trt.gpu.arrays import BFLOAT16
from superpoint_trt.gpu.kernels import compiler
from superpoint_trt.gpu.kernels.compiler import cubin
from superpoint_trt.gpu.kernels.decode import Head, is_tiled

FOLDER = Path(kernels.__file__).parent


@pytest.fixture()
def nvrtc():
    """NVIDIA's compiler, which needs no GPU."""
    try:
        return compiler._nvrtc()
    except SuperPointError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("capability", ["sm87", "sm90", *rarely("sm75", "sm80", "sm86", "sm89", "sm100", "sm120")])
def test_decode_compiles_everywhere(nvrtc, monkeypatch, tmp_path, capability):
    monkeypatch.setenv("SUPERPOINT_CACHE", str(tmp_path))
    defines = ("STRIDE=8", "DIM=256", "RADIUS=4", "HEAD=1", "WIDE_LOGITS=1", "WIDE_DESCRIPTORS=1", "SUBPIXEL=1")
    assert cubin((FOLDER / "decode.cu").read_bytes(), "decode.cu", capability, defines)[:4] == b"\x7fELF"


SHAPES = [(8, 64, 1, 4, 1), (8, 256, 0, 5, 0), (8, 256, 0, 4, 1), (8, 100, 2, 5, 1), (32, 1024, 1, 3, 0)]
OTHER_SHAPES = [(8, 256, 0, radius, wide) for radius in range(4) for wide in (0, 1)]
OTHER_SHAPES += [(1, 1, 0, 5, 0), (1, 1, 0, 5, 1), (4, 64, 1, 5, 0), (4, 64, 1, 5, 1), (16, 512, 1, 4, 0)]
OTHER_SHAPES += [(8, 256, 0, 4, 0), (8, 256, 0, 5, 1), (8, 100, 2, 5, 0), (16, 512, 1, 4, 1), (32, 1024, 1, 3, 1)]


@pytest.mark.parametrize(("stride", "dim", "head", "radius", "wide"), [*SHAPES, *rarely(*OTHER_SHAPES)])
def test_decode_compiles_for_every_shape(nvrtc, monkeypatch, tmp_path, stride, dim, head, radius, wide):
    """Shared memory that a block may not have shows here."""
    assert is_tiled(radius, stride)
    monkeypatch.setenv("SUPERPOINT_CACHE", str(tmp_path))
    defines = (f"STRIDE={stride}", f"DIM={dim}", f"RADIUS={radius}", f"HEAD={head}")
    defines += (f"WIDE_LOGITS={wide}", f"WIDE_DESCRIPTORS={wide}", f"SUBPIXEL={wide}")
    assert cubin((FOLDER / "decode.cu").read_bytes(), "decode.cu", "sm75", defines)


def test_what_does_not_fit_is_not_tiled():
    assert [is_tiled(radius, 8) for radius in (4, 5, 6, 1024)] == [True, True, False, False]
    assert not is_tiled(5, 16) and not is_tiled(4, 32)


@pytest.mark.parametrize(
    ("dtype", "address", "shape", "pitch", "wide"),
    [
        (np.float16, 4096, (1, 65, 60, 80), 72, True),  # as TensorRT pads it
        (np.float16, 4096, (1, 65, 60, 80), 65, False),  # as torch does not
        (np.float16, 4096 + 2, (1, 65, 60, 80), 72, False),
        (np.float16, 4096 + 16, (1, 65, 60, 80), 72, True),
        (np.float16, 4096, (1, 256, 60, 80), 0, False),  # cells lie together
        (BFLOAT16, 4096, (2, 256, 60, 80), 256, True),
        (np.float32, 4096, (2, 65, 60, 80), 68, True),
        (np.float32, 4096, (2, 65, 60, 80), 66, False),
        (np.float16, 4096, (3, 256, 1, 1), 0, True),  # one cell, channels together either way
        (np.float16, 4096, (3, 65, 1, 1), 0, False),
    ],
)
def test_what_can_be_read_16_bytes_at_a_time(dtype, address, shape, pitch, wide):
    assert Head(address, shape, np.dtype(dtype), pitch).is_wide is wide


def test_preprocess_compiles(nvrtc, monkeypatch, tmp_path):
    monkeypatch.setenv("SUPERPOINT_CACHE", str(tmp_path))
    assert cubin((FOLDER / "preprocess.cu").read_bytes(), "preprocess.cu", "sm75")


def test_a_source_that_does_not_compile_says_why(nvrtc, monkeypatch, tmp_path):
    monkeypatch.setenv("SUPERPOINT_CACHE", str(tmp_path))
    with pytest.raises(SuperPointError, match=r"NVRTC does not compile bad\.cu .*sm_90.*undefined"):
        cubin(b"__global__ void f() { nothing(); }", "bad.cu", "sm90")


class Compiler:
    """Counts what it compiles."""

    version = (0, 13, 0)

    def __init__(self) -> None:
        self.compiled: list[tuple[str, ...]] = []

    def nvrtcVersion(self):
        return self.version

    def compile(self, _: object, source: bytes, file: str, options) -> bytes:
        self.compiled.append((file, *options))
        return b"code of " + source + " ".join(options).encode()


@pytest.fixture()
def fake(monkeypatch, tmp_path):
    found = Compiler()
    monkeypatch.setattr(compiler, "_nvrtc", lambda: found)
    monkeypatch.setattr(compiler, "_compile", found.compile)
    monkeypatch.setenv("SUPERPOINT_CACHE", str(tmp_path / "not" / "there yet"))
    return found


def test_compiled_once(fake):
    first = cubin(b"a", "a.cu", "sm90", ("X=1",))
    assert cubin(b"a", "a.cu", "sm90", ("X=1",)) == first
    assert fake.compiled == [("a.cu", "--gpu-architecture=sm_90", "--define-macro=X=1")]
    assert len(list(cache_folder().iterdir())) == 1


@pytest.mark.parametrize(
    "other",
    [
        {"source": b"b"},
        {"capability": "sm89"},
        {"defines": ("X=2",)},
        {"defines": ()},
        {"driver": 12040},
        {"file": "b.cu"},
    ],
    ids=str,
)
def test_whatever_changes_is_compiled_anew(fake, other):
    same = {"source": b"a", "file": "a.cu", "capability": "sm90", "defines": ("X=1",), "driver": 13000}
    cubin(**same)
    cubin(**{**same, **other})
    assert len(fake.compiled) == 2
    cubin(**same)
    assert len(fake.compiled) == 2


def test_another_nvrtc_compiles_anew(fake):
    cubin(b"a", "a.cu", "sm90")
    fake.version = (0, 13, 1)
    cubin(b"a", "a.cu", "sm90")
    assert len(fake.compiled) == 2


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-1], lambda data: b"", lambda data: data[:20], lambda data: b"x" + data[1:]]
)
def test_a_broken_entry_is_rebuilt(fake, damage):
    whole = cubin(b"a", "a.cu", "sm90")
    (entry,) = cache_folder().iterdir()
    kept = entry.read_bytes()
    entry.write_bytes(damage(kept))
    assert cubin(b"a", "a.cu", "sm90") == whole
    assert len(fake.compiled) == 2 and entry.read_bytes() == kept


def test_what_the_driver_refuses_is_compiled_fresh(fake):
    cubin(b"a", "a.cu", "sm90")
    cubin(b"a", "a.cu", "sm90", fresh=True)
    assert len(fake.compiled) == 2


def test_without_a_place_to_write_it_still_compiles(fake, monkeypatch, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SUPERPOINT_CACHE", str(tmp_path / "file" / "below"))
    with caplog.at_level(logging.INFO):
        assert cubin(b"a", "a.cu", "sm90") == cubin(b"a", "a.cu", "sm90")
    assert len(fake.compiled) == 2 and "not kept" in caplog.text


@pytest.mark.parametrize("capability", ["sm75", "sm90", *rarely("sm80", "sm86", "sm87", "sm89", "sm100", "sm120")])
@pytest.mark.parametrize("dim", [64, *rarely(32, 256, 1024)])
def test_match_compiles_everywhere(nvrtc, monkeypatch, tmp_path, capability, dim):
    monkeypatch.setenv("SUPERPOINT_CACHE", str(tmp_path))
    assert cubin((FOLDER / "match.cu").read_bytes(), "match.cu", capability, (f"DIM={dim}",))[:4] == b"\x7fELF"
