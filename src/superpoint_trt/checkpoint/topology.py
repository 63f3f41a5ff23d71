"""A network as a list of plain convolutions, for checkpoints that are no VGG: the torch reference and the export read it.

A checkpoint of this kind keeps the list in its safetensors metadata (`topology`, JSON), its weights under the layers'
names. The list says what reads what; channels and kernel sizes are the weights' own.
"""

from __future__ import annotations

from dataclasses import dataclass

IMAGE = "image"
LOGITS, DESCRIPTORS = "detector", "descriptor"
"""The two layers whose outputs are the raw heads."""


@dataclass(frozen=True)
class Convolution:
    """One convolution of a network, with what happens to its output."""

    name: str
    inputs: tuple[str, ...]
    """`image` or earlier layers, all of one size; more than one are concatenated along channels."""
    stride: int = 1
    relu: bool = True
    added_to: str = ""
    """Name of an earlier layer. The output is repeated 2x2 (nearest), cut to that layer's size, and added to it; who
    reads this layer reads the sum."""

    @staticmethod
    def padding(kernel: int, stride: int) -> int:
        """Zeros on every side: an output lies in the middle of the `stride` x `stride` inputs it stands for."""
        return (kernel - stride + 1) // 2
