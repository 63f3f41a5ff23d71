"""The options that several commands share. A group declares its options and builds what they describe."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Callable, TypeVar

import click

from superpoint_trt import packaged
from superpoint_trt.cli.streams import Notes
from superpoint_trt.core.device import ALL_DEVICES, DeviceChoice
from superpoint_trt.core.image_file import MOST_PIXELS, ReadOptions
from superpoint_trt.core.types import DecodeOptions, OutputType, Sampling, SuperPointError

if TYPE_CHECKING:
    from superpoint_trt.convert.export import ExportOptions

Command = Callable[..., Any]
"""A function that click calls with the values of its options."""

_Group = TypeVar("_Group", bound="OptionGroup")

_DECODE = DecodeOptions()
_SUBPIXEL = "--subpixel/--no-subpixel"
_SUBPIXEL_HELP = "Keypoints between pixels, or on whole ones."
DEVICES = "auto|cpu|cuda[:N]|openvino[:GPU|:NPU][:fp32]"
_HOST_CODE_HELP = "Run the code that a version-compatible engine carries. Only if you trust who built it."
_MAX_KEYPOINTS = ("--max-keypoints", "--top-k")
"""One option with two names: the second is the published guide's."""


# ----------------------------------------------------------------------------------------------------- single options


class _Option(click.Option):
    """An option whose default may be a function, so that reading it imports nothing before it is needed."""

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        if callable(self.default):
            with suppress(ImportError):  # the help works without the libraries that the command needs
                self.default = self.default()
        return super().get_help_record(ctx)


def _check_device(context: click.Context, parameter: click.Parameter, device: str) -> str:
    """Checks the form of a device's name; the runtime says whether there is such a device."""
    try:
        return str(DeviceChoice.parse(device))
    except SuperPointError as error:
        raise click.BadParameter(str(error)) from error


def _check_threads(context: click.Context, parameter: click.Parameter, threads: int | None) -> int | None:
    """Takes no more threads than the machine has, and notes it; what is no number of threads is refused later."""
    if threads is None:
        return None
    from superpoint_trt.run.extractor import MOST_THREADS

    most = os.cpu_count() or 1
    if not most < threads <= MOST_THREADS:
        return threads
    notes = context.find_object(Notes)
    if notes is not None:
        notes.append(f"{threads} threads were asked for, this machine has {most}")
    return most


NETWORKS = ", ".join(network.name for network in packaged.NETWORKS)
"""Names of the packaged networks, for the help."""
WEIGHTS = click.option(
    "--weights",
    default=packaged.DEFAULT,
    show_default=True,
    help=f"Checkpoint: .pth (needs torch) or .safetensors; or a packaged network: {NETWORKS}. A name wins over a file "
    "called so; ./NAME is the file.",
)
SAMPLING = click.option(
    "--sampling",
    type=click.Choice([sampling.value for sampling in Sampling]),
    help="How the network was trained to sample descriptors.  [default: as checkpoints of its layout were]",
)
SUBPIXEL = click.option(_SUBPIXEL, default=None, help=f"{_SUBPIXEL_HELP}  [default: the model's own]")
MODEL = click.option(
    "--model",
    default=packaged.DEFAULT,
    show_default=True,
    help=f".onnx, engine, or a checkpoint (runs in PyTorch); or a packaged network: {NETWORKS}.",
)
DEVICE = click.option(
    "--device", default="auto", show_default=True, callback=_check_device, metavar="auto|cpu|cuda|cuda:N"
)
JSON = click.option("--json", "json_path", help="File to write the figures to.")


def chosen_sampling(name: str | None) -> Sampling | None:
    """The value of `SAMPLING`; None: the checkpoint family's."""
    return Sampling(name) if name else None


# -------------------------------------------------------------------------------------------------------------- groups


def option(*names: str, **attributes: Any) -> Any:
    """Declares a field of an `OptionGroup`, with the arguments of `click.option`."""
    default = attributes.get("default", False if attributes.get("is_flag") else None)
    return field(default=default, metadata={"names": names, "attributes": attributes})


@dataclass(frozen=True)
class OptionGroup:
    """Base of frozen dataclasses whose fields are options, each declared by `option`.

    @click.command()
    @RuntimeArgs.declare("runtime")
    def bench(runtime: RuntimeArgs) -> None: ...
    """

    @classmethod
    def declare(cls: type[_Group], argument: str, **changes: Mapping[str, Any]) -> Callable[[Command], Command]:
        """Adds the group's options to a command, which gets their values as one object.

        Args:
            argument: the command's argument that takes the object.
            changes: field name -> arguments of `click.option` that this command changes ("default", "help", ...), and
                "aliases", further names of the option.
        """
        declared = fields(cls)

        def decorate(command: Command) -> Command:
            @functools.wraps(command)
            def with_group(**values: Any) -> Any:
                own = {entry.name: values.pop(entry.name) for entry in declared}
                return command(**{argument: cls(**own)}, **values)

            decorated: Command = with_group
            for entry in reversed(declared):
                attributes = {"show_default": True, **entry.metadata["attributes"], **changes.get(entry.name, {})}
                names = (*entry.metadata["names"], *attributes.pop("aliases", ()))
                decorated = click.option(*names, entry.name, cls=_Option, **attributes)(decorated)
            return decorated

        return decorate


@dataclass(frozen=True)
class RuntimeArgs(OptionGroup):
    """What a model runs on."""

    device: str = option("--device", default="auto", callback=_check_device, metavar=DEVICES)
    threads: int | None = option(
        "--threads", type=int, callback=_check_threads, help="CPU threads.  [default: the runtime's choice]"
    )
    allow_host_code: bool = option("--allow-host-code", is_flag=True, help=_HOST_CODE_HELP)

    def settings(self) -> dict[str, Any]:
        """All fields, as keyword arguments of `SuperPoint`."""
        return {entry.name: getattr(self, entry.name) for entry in fields(self)}


def _check_devices(context: click.Context, parameter: click.Parameter, names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name if name == ALL_DEVICES else _check_device(context, parameter, name) for name in names)


@dataclass(frozen=True)
class SeveralDevicesArgs(OptionGroup):
    """What each of several models runs on, one device after the other."""

    devices: tuple[str, ...] = option(
        "--device",
        multiple=True,
        default=(ALL_DEVICES,),
        callback=_check_devices,
        metavar=f"{DEVICES}|{ALL_DEVICES}",
        help="May be repeated: each model runs on each. all: every device here that takes it.",
    )
    threads: int | None = option(
        "--threads", type=int, callback=_check_threads, help="CPU threads.  [default: the runtime's choice]"
    )
    allow_host_code: bool = option("--allow-host-code", is_flag=True, help=_HOST_CODE_HELP)


@dataclass(frozen=True)
class ImageArgs(OptionGroup):
    """Which image files are read."""

    max_pixels: int = option(
        "--max-pixels", type=int, default=MOST_PIXELS, help="Refuse image files with more pixels.", show_default="2^28"
    )
    allow_damaged: bool = option(
        "--allow-damaged", is_flag=True, help="Read what can still be read of a damaged image file."
    )

    def reading(self) -> ReadOptions:
        """The options of `load_image`."""
        return ReadOptions(self.max_pixels, self.allow_damaged)


@dataclass(frozen=True)
class ExtractArgs(ImageArgs):
    """Which keypoints of an image are kept, and at which size they are looked for.

    Each field has the name of the parameter of `SuperPoint` that it becomes.
    """

    threshold: float | None = option(
        "--threshold",
        type=float,
        help=f"Scores must be greater.  [default: {_DECODE.threshold:g}, or the model's own]",
    )
    max_keypoints: int | None = option(
        *_MAX_KEYPOINTS, type=int, help="Keep the keypoints with the highest scores.", show_default="all"
    )
    nms_radius_px: int | None = option(
        "--nms-radius",
        type=int,
        help=f"px; fixed inside a keypoints model.  [default: {_DECODE.nms_radius_px}, or the model's own]",
    )
    remove_borders_px: int | None = option(
        "--remove-borders",
        type=int,
        help=f"px; fixed inside a keypoints model.  [default: {_DECODE.remove_borders_px}, or the model's own]",
    )
    max_side_px: int | None = option("--max-side", type=int, help="Shrink larger images to this many px first.")
    subpixel: bool | None = option(_SUBPIXEL, default=None, help=f"{_SUBPIXEL_HELP}  [default: the model's own]")

    def settings(self) -> dict[str, Any]:
        """All fields, as keyword arguments of `SuperPoint`."""
        return {entry.name: getattr(self, entry.name) for entry in fields(self)}


def _exported(name: str) -> Callable[[], Any]:
    """Reads a default of `ExportOptions`, whose module imports onnx."""

    def read() -> Any:
        from superpoint_trt.convert.export import ExportOptions

        value = getattr(ExportOptions(), name)
        return value.value if isinstance(value, OutputType) else value

    return read


@dataclass(frozen=True)
class GraphArgs(OptionGroup):
    """What kind of .onnx to write, for which size."""

    kind: str = option(
        "--type",
        type=click.Choice([kind.value for kind in OutputType]),
        default=_exported("type"),
        help="Outputs of the model: score map and descriptors, keypoints, or the network's raw heads.",
    )
    height: int = option(
        "--height", type=int, default=_exported("height_px"), help="Input height in px, a multiple of 8."
    )
    width: int = option("--width", type=int, default=_exported("width_px"), help="Input width in px, a multiple of 8.")
    max_keypoints: int = option(
        *_MAX_KEYPOINTS, type=int, default=_exported("max_keypoints"), help="Rows of a keypoints model."
    )
    opset: int = option("--opset", type=int, default=_exported("opset"), help="11 to the newest that onnx has.")

    def options(self) -> ExportOptions:
        """The options of `export`."""
        from superpoint_trt.convert.export import ExportOptions

        return ExportOptions(
            type=OutputType(self.kind),
            height_px=self.height,
            width_px=self.width,
            max_keypoints=self.max_keypoints,
            opset=self.opset,
        )


@dataclass(frozen=True)
class ExportArgs(GraphArgs):
    """Everything that `superpoint export` can be told about the .onnx."""

    dynamic: bool = option(
        "--dynamic", is_flag=True, help="Free height, width and batch; --height and --width are the usual size."
    )
    max_batch_size: int = option(
        "--max-batch-size", type=int, default=_exported("max_batch_size"), help="Above 1 the batch size is free."
    )
    nms_radius: int = option("--nms-radius", type=int, default=_DECODE.nms_radius_px, help="px; keypoints models.")
    threshold: float = option("--threshold", type=float, default=_DECODE.threshold, help="Keypoints models.")
    remove_borders: int = option(
        "--remove-borders", type=int, default=_DECODE.remove_borders_px, help="px; keypoints models."
    )
    subpixel: bool | None = option(
        _SUBPIXEL, default=None, help=f"{_SUBPIXEL_HELP} The model's default.  [default: the checkpoint's own]"
    )
    fold_batchnorm: bool = option(
        "--fold-batchnorm",
        is_flag=True,
        help="v6: fold the BatchNorm after a ReLU into the next convolution. Faster; an approximation within 44 px of "
        "the border.",
    )
    descriptors_of: str | None = option(
        "--descriptors-of",
        help="Checkpoint, or packaged network, whose descriptors the model's are to match, by the map in the weights.  "
        "[default: the weights' own descriptors]",
    )

    def options(self) -> ExportOptions:
        """The options of `export`."""
        return replace(
            super().options(),
            dynamic=self.dynamic,
            max_batch_size=self.max_batch_size,
            decode=DecodeOptions(self.nms_radius, self.remove_borders, self.threshold, subpixel=self.subpixel),
            fold_batchnorm=self.fold_batchnorm,
            descriptors_of=self.descriptors_of,
        )


DECODE_FIELDS = ("max_keypoints", "nms_radius", "threshold", "remove_borders")
"""The fields of `ExportArgs` that only a keypoints model has a use for."""


def given_flags(names: tuple[str, ...]) -> list[str]:
    """Which options of the running command, by field name, the user typed; as flags ("--nms-radius")."""
    context = click.get_current_context()
    typed = [n for n in names if context.get_parameter_source(n) is click.core.ParameterSource.COMMANDLINE]
    return ["--" + name.replace("_", "-") for name in typed]
