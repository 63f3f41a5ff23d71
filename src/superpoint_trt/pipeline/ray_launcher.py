"""Extracts shards on a Ray cluster: each actor opens the model once, and takes shards as it comes to them.

Ray moves no images and no features: an actor gets the names of the files of some shards, and writes the shards where
`superpoint extract` writes them. So every machine must see the images and the output under the same paths. What a kill
leaves, of an actor or of everything, is taken up by the same rule as without Ray: a shard with a report is finished.
"""

from __future__ import annotations

import logging
import pickle
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, Callable

from superpoint_trt.core.files import one_line
from superpoint_trt.core.install import install_hint
from superpoint_trt.core.types import SuperPointError
from superpoint_trt.pipeline.contexts import Closes
from superpoint_trt.pipeline.shards import Settings, Shard, ShardFolder
from superpoint_trt.pipeline.workers import RayOptions, WorkOptions, extract_shards

CPUS_OF_AN_ACTOR = 4
"""Where there is no GPU."""
_SHARDS_A_CALL = 4
"""An actor reads ahead within a call, so that its GPU waits once for so many shards."""


class RayLauncher(Closes):
    """Extracts by the actors of a Ray cluster. A context manager.

    Args:
        options: model, and how to read and write.
        ray_options: the cluster, and how many actors.

    Raises:
        SuperPointError: Ray is not installed, the cluster cannot be reached, or the model does not open there.
    """

    def __init__(self, options: WorkOptions, ray_options: RayOptions) -> None:
        self._ray = _import_ray()
        if ray_options.actors is not None and ray_options.actors < 1:
            raise SuperPointError(f"--actors is {ray_options.actors}; expected 1 or more.")
        self._connect(ray_options.address)
        resources = self._ray.cluster_resources()
        gpus, cpus = int(resources.get("GPU", 0)), max(1, int(resources.get("CPU", 1)))
        self._actors = ray_options.actors or gpus or max(1, cpus // CPUS_OF_AN_ACTOR)
        # With fewer GPUs than actors, several share one; Ray takes fractions.
        self._gpus = min(1.0, gpus / self._actors)
        self._cpus = max(1, cpus // self._actors) if not gpus else 1
        threads = options.settings.get("threads") or (None if gpus else self._cpus)
        self._options = replace(options, settings={**options.settings, "threads": threads})
        described = self._ray.remote(num_gpus=self._gpus, num_cpus=1)(_describe).remote(self._options)
        self.settings: Settings
        with self._errors():
            self.settings, model = self._ray.get(described)
        self.ran_on = f"{self._actors} Ray actors, {model}"

    def _connect(self, address: str | None) -> None:
        if self._ray.is_initialized():
            return
        try:
            self._ray.init(
                address=address,
                log_to_driver=False,
                include_dashboard=None if address else False,
                logging_level="error",
            )
        except Exception as error:  # Ray raises what its parts raise
            where = address or "on this machine"
            raise SuperPointError(f"the Ray cluster {where} cannot be used: {one_line(error)}.") from error

    def extract(self, shards: Sequence[Shard], folder: ShardFolder, advance: Callable[[int], None]) -> None:
        """Extracts shards, in any order.

        Raises:
            SuperPointError: an actor could not write its shards, or Ray gave up.
        """
        if not shards:
            return
        data = self._ray.data
        data.DataContext.get_current().enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        rows = [{"shard": pickle.dumps(shard)} for shard in shards]
        calls = max(-(-len(rows) // _SHARDS_A_CALL), min(len(rows), 2 * self._actors))
        tasks = data.from_items(rows, override_num_blocks=calls)
        done = tasks.map_batches(
            ShardActor,
            fn_constructor_args=(self._options, str(folder.output.absolute())),
            compute=data.ActorPoolStrategy(size=self._actors),
            num_gpus=self._gpus or None,
            num_cpus=None if self._gpus else self._cpus,
            batch_size=None,
        )
        with self._errors():
            for row in done.iter_rows():
                if row["error"]:
                    raise SuperPointError(row["error"])
                advance(int(row["images"]))

    def _errors(self) -> _RayErrors:
        return _RayErrors(self._ray)

    def close(self) -> None:
        """Ends the connection; a cluster that was started here ends, too."""
        self._ray.shutdown()


class ShardActor:
    """Extracts the shards that Ray gives it.

    Args:
        options: model, and how to read and write.
        output: absolute path of the output, as every machine sees it.
    """

    def __init__(self, options: WorkOptions, output: str) -> None:
        self._options, self._folder = options, ShardFolder(Path(output))
        self._superpoint = options.open()

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        """Extracts shards; those that are finished, by an actor that died afterwards say, are left as they are."""
        shards: list[Shard] = [pickle.loads(row) for row in batch["shard"]]
        to_do = [shard for shard in shards if self._folder.report(shard.number) is None]
        try:
            extract_shards(self._superpoint, to_do, self._folder, self._options)
            error = ""
        except SuperPointError as met:
            error = str(met)
        return {"images": [len(shard.items) for shard in shards], "error": [error] * len(shards)}


def _describe(options: WorkOptions) -> tuple[Settings, str]:
    """The settings of a run, and what the model runs on. Asked where actors will be: this machine may have no GPU."""
    with options.open() as superpoint:
        return options.settings_of(superpoint), str(superpoint.runtime)


class _RayErrors:
    """Turns Ray's exceptions into one line."""

    def __init__(self, ray: ModuleType) -> None:
        self._ray = ray

    def __enter__(self) -> None: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, self._ray.exceptions.RayError):
            cause = getattr(error, "cause", None) or error
            raise SuperPointError(f"Ray: {one_line(cause, 400)}.") from error


def _import_ray() -> ModuleType:
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise SuperPointError(f"--launcher ray needs Ray: {install_hint('ray')}.") from error
    module: ModuleType = ray
    return module
