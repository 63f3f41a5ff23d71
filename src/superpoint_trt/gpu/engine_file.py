"""The .json beside an engine's plan: what the engine is, and where it runs.

The plan itself is plain TensorRT, which trtexec, Triton and C++ programs load.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from superpoint_trt.core.files import PathLike, one_line, read_bytes, sha256
from superpoint_trt.core.types import ModelDescription, ShapeRange, SuperPointError
from superpoint_trt.gpu.tensorrt_api import Flavor

FORMAT = 1
"""Version of the .json's layout. It rises when an older reader can no longer read the file."""


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

    def to_json(self) -> bytes:
        """The file's content."""
        named = {_KEYS.get(name, name): value for name, value in asdict(self).items()}
        flat = {"format": FORMAT, **named, "description": self.description.to_metadata(), "flavour": self.flavor.value}
        return (json.dumps(flat, indent=1) + "\n").encode()

    @classmethod
    def from_json(cls, data: bytes, path: Path) -> EngineMetadata:
        """Reads what `to_json` wrote.

        Raises:
            SuperPointError: the file is damaged, or of a later format.
        """
        try:
            flat = json.loads(data)
            if flat.pop("format") != FORMAT:
                raise ValueError("another format")
            description = ModelDescription.from_metadata(flat["description"])
            if description is None:
                raise ValueError("no description")
            sizes = {name: (int(b), int(h), int(w)) for name, (b, h, w) in flat["profile"].items()}
            known = {name: flat[_KEYS.get(name, name)] for name in cls.__dataclass_fields__}
            return cls(
                **{
                    **known,
                    "description": description,
                    "flavor": Flavor(flat["flavour"]),
                    "targets": tuple(flat["targets"]),
                    "profile": ShapeRange(**sizes),
                }
            )
        except (ValueError, KeyError, TypeError, AttributeError, SuperPointError) as error:
            raise SuperPointError(
                f"{path} cannot be read as an engine's metadata ({one_line(error)}); build the engine again, or remove "
                "the .json to run the plan without it."
            ) from error


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


def check_runs_here(metadata: EngineMetadata, engine: PathLike, flavor: Flavor, version: str, target: str) -> None:
    """Compares the TensorRT and the GPU that an engine was built for with those of this machine.

    Args:
        metadata: the engine's.
        engine: its path, for the error.
        flavor: the TensorRT of this machine.
        version: that TensorRT's version.
        target: compute capability of this machine's GPU, "sm90".

    Raises:
        SuperPointError: the engine cannot run here; the text names the difference and the command that rebuilds it.
    """
    made, here = f"{metadata.flavor.value} {metadata.tensorrt_version}", f"{flavor.value} {version}"
    differences = []
    if made != here:
        differences.append(f"was built by {made}, here is {here}")
    if target not in metadata.targets:
        built_on = f" ({metadata.gpu_name})" if metadata.gpu_name else ""
        differences.append(f"was built for {', '.join(metadata.targets)}{built_on}, this GPU is {target}")
    if differences:
        raise SuperPointError(
            f"{engine} {' and '.join(differences)}: engines do not travel. Build it here: {metadata.rebuild}"
        )


def with_profile(description: ModelDescription, profile: ShapeRange) -> ModelDescription:
    """A model's description with the sizes and the largest batch that an engine was built for."""
    (_, *least), (_, *usual), (batch, *most) = profile.min, profile.opt, profile.max
    return replace(description, height_px=usual[0], width_px=usual[1], dynamic=least != most, max_batch_size=batch)
