"""What ships inside the package, so that everything works offline: this project's own networks, and a photograph."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

_FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Network:
    """One packaged checkpoint: this project's own, float16, half-pixel sampling, sub-pixel keypoints. MIT."""

    name: str
    """What `--weights`, `--model` and `SuperPoint(...)` take in place of a path: a-z, 0-9 and -."""
    weights: Path
    """.safetensors."""
    card: Path
    """Data, protocol, figures, limits and licence."""
    log: Path
    """Of its training: one JSON object a line, as the runs wrote them."""
    about: str
    """In a few words, for `superpoint weights list`."""


def _network(name: str, weights: str, card: str, log: str, about: str) -> Network:
    return Network(name, _FOLDER / weights, _FOLDER / card, _FOLDER / log, about)


NETWORKS = (
    _network(
        "full",
        "superpoint_trt_v2.safetensors",
        "MODEL_CARD.md",
        "training_log.jsonl",
        "the paper's network, trained from nothing, version 2",
    ),
    _network(
        "small",
        "superpoint_trt_small.safetensors",
        "MODEL_CARD_small.md",
        "training_log_small.jsonl",
        "a thirteenth of full's work, taught by it: for CPUs and browsers",
    ),
    _network(
        "full-v1",
        "superpoint_trt_v1.safetensors",
        "MODEL_CARD_v1.md",
        "training_log_v1.jsonl",
        "version 1 of full, to repeat earlier results",
    ),
)
"""A further one is an entry here and its three files."""

DEFAULT = "full"
"""Name of the network that every command but `web` takes if it is told of none."""

WEIGHTS, MODEL_CARD, TRAINING_LOG = next(
    (network.weights, network.card, network.log) for network in NETWORKS if network.name == "full"
)
"""Files of the full network, whatever the default is."""

PHOTO = _FOLDER / "astronaut.jpg"
"""Eileen Collins, NASA, public domain; not among the training images. 512 x 512 px, RGB."""

MATCHER = _FOLDER / "superpoint_trt_matcher.safetensors"
"""Weights of the learned matcher (`checkpoint.matcher`); not part of every version. Nor are its card and its log."""

MATCHER_CARD = _FOLDER / "MODEL_CARD_matcher.md"

MATCHER_LOG = _FOLDER / "training_log_matcher.jsonl"

PAGE = _FOLDER / "web"
"""The page that `superpoint web` serves, built by `make web` from web/; a copy may be without it."""

PAGE_NETWORK = "small"
"""The network that the page takes if it is told of none: a browser runs it live."""
