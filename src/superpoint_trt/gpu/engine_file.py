"""What an engine says of itself: the .json beside the plan. The plan stays one that trtexec, Triton and C++ load."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from superpoint_trt.core.files import PathLike, one_line, read_bytes, sha256
from superpoint_trt.core.types import ModelDescription, ShapeRange, SuperPointError
from superpoint_trt.gpu.tensorrt_api import Flavor

FORMAT = 1
"""Of the .json; a later one that cannot be read as this one counts up."""


@dataclass(frozen=True)
class EngineMetadata:
    """What a plan was made of, by and for. Everything needed to refuse it where it cannot run, and to make it again."""

    description: ModelDescription
    """The model's own; size and largest batch are the profile's."""
    flavor: Flavor
    tensorrt_version: str
    targets: tuple[str, ...]
    """Compute capabilities it runs on: ("sm90",)."""
    gpu_name: str | None
    """Where it was built; None: on a machine without one."""
    profile: ShapeRange
    plan_sha256: str
    onnx_sha256: str
    rebuild: str
    """The command that makes it again."""
    build: dict[str, Any]
    """Workspace, level and the like: for people, not compared."""

    def to_json(self) -> bytes:
        """As it lies beside the plan."""
        fields = {"flavour" if name == "flavor" else name: value for name, value in asdict(self).items()}
        flat = {
            "format": FORMAT,
            **fields,
            "description": self.description.to_metadata(),
            "flavour": self.flavor.value,
        }
        return (json.dumps(flat, indent=1) + "\n").encode()

    @classmethod
    def from_json(cls, data: bytes, path: Path) -> EngineMetadata:
        """Reads what `to_json` wrote.

        Raises:
            SuperPointError: damaged, or of a later format.
        """
        try:
            flat = json.loads(data)
            if flat.pop("format") != FORMAT:
                raise ValueError("another format")
            description = ModelDescription.from_metadata(flat["description"])
            if description is None:
                raise ValueError("no description")
            sizes = {name: (int(b), int(h), int(w)) for name, (b, h, w) in flat["profile"].items()}
            known = {name: flat[name] for name in cls.__dataclass_fields__ if name != "flavor"}
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


def sidecar(engine: PathLike) -> Path:
    """Where an engine's metadata lie: its name and .json."""
    return Path(f"{Path(engine)}.json")


def read_plan(engine: PathLike) -> tuple[bytes, EngineMetadata | None]:
    """A plan and what lies beside it.

    Returns:
        The plan's bytes, and its metadata; None if it has none.

    Raises:
        SuperPointError: missing or damaged, or the .json is another plan's.
    """
    data = read_bytes(engine, "engine")
    beside = sidecar(engine)
    if not beside.exists():
        return data, None
    metadata = EngineMetadata.from_json(read_bytes(beside, "engine metadata"), beside)
    if sha256(data) != metadata.plan_sha256:
        raise SuperPointError(
            f"{engine} is not the plan that {beside.name} describes (cut short, or replaced by another); build it "
            f"again: {metadata.rebuild} (or remove the .json to run the plan without it)."
        )
    return data, metadata


def check_runs_here(metadata: EngineMetadata, engine: PathLike, flavor: Flavor, version: str, target: str) -> None:
    """Compares what an engine was made for with what is here.

    Args:
        metadata: the engine's.
        engine: for the error.
        flavor: the TensorRT here.
        version: its version.
        target: this GPU's compute capability, "sm90".

    Raises:
        SuperPointError: it cannot run here; the text names the difference and the command that rebuilds it.
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
    """A model's description, its sizes and batch those an engine was built for."""
    (_, *least), (_, *usual), (batch, *most) = profile.min, profile.opt, profile.max
    return replace(description, height_px=usual[0], width_px=usual[1], dynamic=least != most, max_batch_size=batch)
