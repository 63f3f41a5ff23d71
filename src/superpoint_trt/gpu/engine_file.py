"""The .json beside an engine's plan: what the engine is, and where it runs.

The plan itself is plain TensorRT, which trtexec, Triton and C++ programs load.
"""

from __future__ import annotations

import enum
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from superpoint_trt.core.files import PathLike, read_bytes, sha256
from superpoint_trt.core.typed_json import (
    JsonError,
    choice,
    integer,
    integers,
    mapping,
    member,
    optional_text,
    parse,
    text,
    texts,
)
from superpoint_trt.core.types import (
    LARGEST_BATCH,
    LONGEST_SIDE_PX,
    ModelDescription,
    ShapeRange,
    SuperPointError,
)
from superpoint_trt.gpu.tensorrt_api import Flavor, Part

FORMAT = 1
"""Version of the .json's layout. It rises when an older reader can no longer read the file."""

_MOST_CHARS = 1 << 20
"""Length of the .json that is accepted; ordinary ones have 2,000 characters."""


class VersionCompatible(str, enum.Enum):
    """What a plan that runs in other versions of TensorRT needs there."""

    LEAN_INSIDE = "lean runtime inside"
    """Nothing: it carries the lean runtime of its version, which is host code."""
    LEAN_APART = "lean runtime apart"
    """The lean or the full TensorRT of its own version."""


@dataclass(frozen=True)
class EngineMetadata:
    """What a plan was built from, with which TensorRT, for which GPUs, and the command that builds it again."""

    description: ModelDescription
    """The model's description; size and largest batch are the profile's."""
    flavor: Flavor
    tensorrt_version: str
    targets: tuple[str, ...]
    """Compute capabilities of the GPUs it runs on: ("sm90",)."""
    gpu_name: str | None
    """The GPU it was built on; None: it was built on a machine without one."""
    profile: ShapeRange
    plan_sha256: str
    onnx_sha256: str
    rebuild: str
    """The command that builds it again."""
    build: dict[str, Any]
    """Workspace, optimization level and others: for people to read, not compared."""
    version_compatible: VersionCompatible | None = None
    """None: the plan runs in the TensorRT that built it only."""

    @property
    def runs_with(self) -> str:
        """Which TensorRT runs the plan, in words."""
        made = f"{self.flavor.value} {self.tensorrt_version}"
        if self.version_compatible is None:
            return made
        if self.version_compatible is VersionCompatible.LEAN_APART:
            return f"{made}, or its lean runtime"
        newest = "" if _numbers(self.tensorrt_version)[0] >= 10 else ", before 11"
        return f"{made} and newer{newest}, also its dispatch and lean runtimes (carries host code)"

    def format_of(self, tensor: str) -> str:
        """TensorRT's name of the format that an input or output was built with."""
        return "HWC8" if tensor in self.build.get("channels_last", ()) else "LINEAR"

    def to_json(self) -> bytes:
        """The file's content."""
        named = {_KEYS.get(name, name): value for name, value in asdict(self).items()}
        if self.version_compatible is None:
            del named["version_compatible"]
        else:
            named["runs_with"] = self.runs_with  # for people
        flat = {"format": FORMAT, **named, "description": self.description.to_metadata(), "flavour": self.flavor.value}
        return (json.dumps(flat, indent=1) + "\n").encode()

    @classmethod
    def from_json(cls, data: bytes, path: Path) -> EngineMetadata:
        """Reads what `to_json` wrote.

        Raises:
            SuperPointError: the file is damaged, of a later format, or holds a value of another type or range.
        """
        try:
            return cls._from_flat(mapping(parse(data, _MOST_CHARS), "the file"))
        except (JsonError, SuperPointError) as error:
            raise SuperPointError(
                f"{path} cannot be read as an engine's metadata: {str(error).rstrip('.')}; build the engine again, or "
                "remove the .json to run the plan without it."
            ) from error

    @classmethod
    def _from_flat(cls, flat: Mapping[str, object]) -> EngineMetadata:
        """The content of the .json, each value checked.

        Raises:
            JsonError: a value is missing, of another type, or out of range.
            SuperPointError: the description cannot be read.
        """
        integer(member(flat, "format"), "format", FORMAT, FORMAT)
        description = ModelDescription.from_metadata(mapping(member(flat, "description"), "description"), "the engine")
        if description is None:
            raise JsonError("description has no superpoint_trt.type")
        build = mapping(flat.get("build", {}), "build")
        texts(build.get("channels_last", []), "build.channels_last")
        return cls(
            description=description,
            flavor=choice(member(flat, _KEYS["flavor"]), _KEYS["flavor"], Flavor),
            tensorrt_version=text(member(flat, "tensorrt_version"), "tensorrt_version"),
            targets=texts(member(flat, "targets"), "targets"),
            gpu_name=optional_text(member(flat, "gpu_name"), "gpu_name"),
            profile=_read_profile(mapping(member(flat, "profile"), "profile")),
            plan_sha256=text(member(flat, "plan_sha256"), "plan_sha256"),
            onnx_sha256=text(member(flat, "onnx_sha256"), "onnx_sha256"),
            rebuild=text(member(flat, "rebuild"), "rebuild"),
            build=build,
            version_compatible=choice(flat["version_compatible"], "version_compatible", VersionCompatible)
            if "version_compatible" in flat
            else None,
        )


def _read_profile(sizes: Mapping[str, object]) -> ShapeRange:
    """The optimization profile; its three sizes must rise."""
    low, usual, high = (_read_shape(member(sizes, name), f"profile.{name}") for name in ("min", "opt", "max"))
    if not all(a <= b <= c for a, b, c in zip(low, usual, high)):
        raise JsonError(f"profile runs from {low} over {usual} to {high}; expected min <= opt <= max")
    return ShapeRange(low, usual, high)


def _read_shape(value: object, key: str) -> tuple[int, int, int]:
    batch, height, width = integers(value, key, 3, 1, LONGEST_SIDE_PX)
    return integer(batch, key, 1, LARGEST_BATCH), height, width


_KEYS = {"flavor": "flavour"}
"""Fields that have another name in the file: published files keep their keys."""


def sidecar(engine: PathLike) -> Path:
    """The file with an engine's metadata: the engine's name and .json."""
    return Path(f"{Path(engine)}.json")


def read_plan(engine: PathLike) -> tuple[bytes, EngineMetadata | None]:
    """Reads a plan and its metadata.

    Returns:
        The plan's bytes, and its metadata; None if there is no .json.

    Raises:
        SuperPointError: a file is missing or damaged, or the .json describes another plan.
    """
    data = read_bytes(engine, "engine")
    json_path = sidecar(engine)
    if not json_path.exists():
        return data, None
    metadata = EngineMetadata.from_json(read_bytes(json_path, "engine metadata"), json_path)
    if sha256(data) != metadata.plan_sha256:
        raise SuperPointError(
            f"{engine} is not the plan that {json_path.name} describes (cut short, or replaced by another); build it "
            f"again: {metadata.rebuild} (or remove the .json to run the plan without it)."
        )
    return data, metadata


def check_runs_here(
    metadata: EngineMetadata, engine: PathLike, flavor: Flavor, version: str, target: str, part: Part = Part.FULL
) -> None:
    """Compares the TensorRT and the GPU that an engine was built for with those of this machine.

    Args:
        metadata: the engine's.
        engine: its path, for the error.
        flavor: the TensorRT of this machine.
        version: that TensorRT's version.
        target: compute capability of this machine's GPU, "sm90".
        part: whether that TensorRT is the full one, or its lean or dispatch runtime.

    Raises:
        SuperPointError: the engine cannot run here; the text names the difference and the command that rebuilds it.
    """
    differences = []
    refused = why_refused(metadata, flavor, version, part)
    if refused:
        differences.append(refused)
    if target not in metadata.targets:
        built_on = f" ({metadata.gpu_name})" if metadata.gpu_name else ""
        differences.append(f"was built for {', '.join(metadata.targets)}{built_on}, this GPU is {target}")
    if differences:
        raise SuperPointError(
            f"{engine} {' and '.join(differences)}: engines do not travel. Build it here: {metadata.rebuild}"
        )


def why_refused(metadata: EngineMetadata, flavor: Flavor, version: str, part: Part = Part.FULL) -> str:
    """Why a TensorRT does not run a plan; empty if it does.

    Args:
        metadata: the engine's.
        flavor: the TensorRT.
        version: its version.
        part: whether it is the full one, or its lean or dispatch runtime.

    Returns:
        A verb and what follows, for a sentence about the engine: "was built by ...".
    """
    made = f"{metadata.flavor.value} {metadata.tensorrt_version}"
    here = f"{flavor.value}{'' if part is Part.FULL else f' {part.value} runtime'} {version}"
    differs = f"was built by {made}, here is {here}"
    compatible, same = metadata.version_compatible, (metadata.flavor, metadata.tensorrt_version) == (flavor, version)
    if compatible is None and part is not Part.FULL:
        return f"{differs}, which runs plans built with --version-compatible only"
    if compatible is None:
        return "" if same else differs
    if metadata.flavor is not flavor:
        return differs
    if compatible is VersionCompatible.LEAN_APART:
        needs = f"{differs}: without a lean runtime inside it needs {made}, full or lean"
        return "" if same and part is not Part.DISPATCH else needs
    built, found = _numbers(metadata.tensorrt_version), _numbers(version)
    if found[:2] < built[:2]:
        return f"{differs}: a plan runs in its own version of TensorRT and newer ones"
    if found[0] >= 11 and built[0] < 10:
        return f"{differs}: TensorRT 11 runs plans of 10.0 and newer; use 10, or its dispatch runtime"
    return ""


def _numbers(version: str) -> tuple[int, ...]:
    """The parts of a version: 10.16.1.11 -> (10, 16, 1, 11)."""
    return tuple(int(part) if part.isdigit() else 0 for part in version.split("."))


def with_profile(description: ModelDescription, profile: ShapeRange) -> ModelDescription:
    """A model's description with the sizes and the largest batch that an engine was built for."""
    (_, *least), (_, *usual), (batch, *most) = profile.min, profile.opt, profile.max
    return replace(description, height_px=usual[0], width_px=usual[1], dynamic=least != most, max_batch_size=batch)
