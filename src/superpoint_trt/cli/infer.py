"""The command infer: image -> keypoints."""

from __future__ import annotations

import time

import click

from superpoint_trt.cli.options import MODEL, ExtractArgs, RuntimeArgs
from superpoint_trt.cli.terminal import check_outputs, open_model, print_found, print_row, save_drawing


@click.command()
@MODEL
@click.option("--image", required=True, help="Any image OpenCV reads, of any size from 8x8 px.")
@click.option("--output", help="Picture to write: the image with its keypoints.")
@click.option("--save", help="Features to write: .npz with keypoints, scores, descriptors, image_size.")
@ExtractArgs.declare("extract")
@RuntimeArgs.declare("runtime")
def infer(
    model: str, image: str, output: str | None, save: str | None, extract: ExtractArgs, runtime: RuntimeArgs
) -> None:
    """Find the keypoints of an image; draw and save them."""
    from superpoint_trt.core.image_file import read_image_file
    from superpoint_trt.run.draw import check_picture_name
    from superpoint_trt.run.store import check_npz, save_features

    check_outputs((output, save), (image, model))
    if output:
        check_picture_name(output)
    if save:
        check_npz(save)
    # A picture is drawn in full size; without one, a large file may be decoded at a smaller scale.
    loaded = read_image_file(image, extract.reading(), None if output else extract.max_side_px)
    with open_model(model, runtime, extract) as superpoint:
        started = time.perf_counter()
        keypoints = superpoint.extract(loaded)
        print_found(keypoints, (time.perf_counter() - started) * 1e3)
    if save:
        print_row("features", save_features(save, keypoints))
    if output:
        save_drawing(loaded.pixels, keypoints, output)
