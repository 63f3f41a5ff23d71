"""The small networks that were tried: `python -m training.distill` trains them side by side."""

from __future__ import annotations

from dataclasses import dataclass

from superpoint_trt.checkpoint.compact import CompactNet
from superpoint_trt.checkpoint.layouts import NormPlacement
from superpoint_trt.checkpoint.topology import DESCRIPTORS, IMAGE, LOGITS, Convolution

Sizes = dict[str, tuple[int, int]]


@dataclass(frozen=True)
class Shape:
    """Channels of a small network, from the image to the heads."""

    stem: tuple[tuple[int, int, int], ...]
    """Channels, kernel and stride of the convolutions that come to a quarter of the image's size."""
    quarter: tuple[int, ...]
    """Channels of the 3x3 convolutions at a quarter."""
    eighth: tuple[int, ...]
    """Of those at an eighth; the first comes there by 2x2 / 2."""
    wide: tuple[int, ...]
    """Of those at a sixteenth, whose result is added to the eighth's; none: no such branch."""
    patches: int
    """Of the 8x8 / 8 convolution of the image that the detector reads beside the features."""
    detector: int
    descriptor: int
    """Hidden channels of the heads."""
    descriptor_dim: int = 64
    skip: int = 0
    """Of the 2x2 / 2 convolution of the last features at a quarter that the detector reads, too; none: 0."""

    def layers(self) -> tuple[list[Convolution], Sizes]:
        """Topology, and channels and kernel of each layer."""
        topology: list[Convolution] = []
        sizes: Sizes = {}

        def add(name: str, inputs: list[str], channels: int, kernel: int, stride: int = 1, **rest: object) -> str:
            topology.append(Convolution(name, tuple(inputs), stride, **rest))  # type: ignore[arg-type]
            sizes[name] = channels, kernel
            return name

        last = IMAGE
        for index, (channels, kernel, stride) in enumerate(self.stem):
            last = add(f"stem{index}", [last], channels, kernel, stride)
        for index, channels in enumerate(self.quarter):
            last = add(f"quarter{index}", [last], channels, 3)
        fine = last
        for index, channels in enumerate(self.eighth):
            last = add(f"eighth{index}", [last], channels, *((3, 1) if index else (2, 2)))
        if self.wide:
            base, here = last, last
            for index, channels in enumerate(self.wide):
                here = add(f"wide{index}", [here], channels, 3, 1 if index else 2)
            last = add("features", [here], self.eighth[-1], 1, relu=False, added_to=base)
        patches = add("patches", [IMAGE], self.patches, 8, 8)
        read = [last, patches] + ([add("skip", [fine], self.skip, 2, 2)] if self.skip else [])
        hidden = add("detector_hidden", read, self.detector, 3)
        add(LOGITS, [hidden], 65, 1, relu=False)
        hidden = add("descriptor_hidden", [last], self.descriptor, 3)
        add(DESCRIPTORS, [hidden], self.descriptor_dim, 1, relu=False)
        return topology, sizes

    def network(self, norm: NormPlacement = NormPlacement.BEFORE_RELU) -> CompactNet:
        """With weights drawn at random."""
        return CompactNet(*self.layers(), norm)


SHAPES = {
    # GFLOP at 640x480, parameters: 3.50, 0.47 M
    "small": Shape(((16, 4, 2), (32, 2, 2)), (32, 32), (64, 64, 64, 64), (128, 128), 32, 64, 64),
    # 3.46, 0.47 M: one layer less, no convolution at half the size
    "patchy": Shape(((32, 8, 4),), (32, 32), (64, 64, 64, 64), (128, 128), 32, 64, 64),
    # 3.68, 0.50 M: patchy, and the detector reads features of a quarter
    "sharp": Shape(((32, 8, 4),), (32, 32), (64, 64, 64, 64), (128, 128), 32, 64, 64, skip=32),
    # 3.96, 0.52 M: sharp, and 24 more channels in the detector
    "keen": Shape(((32, 8, 4),), (32, 32), (64, 64, 64, 64), (128, 128), 32, 88, 64, skip=32),
    # 3.66, 0.32 M: nothing at a sixteenth, two more layers at an eighth
    "narrow": Shape(((16, 4, 2), (32, 2, 2)), (32, 32), (64,) * 6, (), 32, 64, 64),
    # 1.44, 0.18 M
    "tiny": Shape(((16, 8, 4),), (16, 16), (48, 48, 48, 48), (64, 64), 16, 32, 64),
    "smoke": Shape(((4, 8, 4),), (4,), (8, 8), (8,), 4, 8, 8, 16),
}
