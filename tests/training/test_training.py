"""The training of the packaged weights: what it generates, what it learns from, and every stage once, on the CPU."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from conftest import photograph
from training import losses, photos, shapes, train, views
from training.__main__ import main
from training.adapt import adapt, grade
from training.bank import Bank, join
from training.fold import fold
from training.geometry import inverse
from training.rounding import _through, forward
from training.train import SMOKE, Run

from superpoint_trt.checkpoint import layouts
from superpoint_trt.checkpoint.layouts import NormPlacement
from superpoint_trt.checkpoint.reference import Block, SuperPointNet, sample_descriptors
from superpoint_trt.convert.export import ExportOptions, to_onnx
from superpoint_trt.convert.quantize.calibrate import calibrate
from superpoint_trt.convert.quantize.options import CalibrationOptions, Method
from superpoint_trt.convert.quantize.qdq import quantize
from superpoint_trt.core.types import OutputType, Sampling, SuperPointError
from superpoint_trt.run.backends import open_backend

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(7)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for name in ("camera", "coffee", "brick"):
        cv2.imwrite(str(folder / f"{name}.png"), photograph(120, 160, name))
    return folder


@pytest.fixture
def bank(folder) -> Bank:
    return photos.load(sorted(folder.iterdir()), CPU, 192)


# ------------------------------------------------------------------------------------------------------------- geometry


def test_inverse_is_numpys():
    matrices = torch.eye(3) + 0.2 * torch.randn(50, 3, 3)
    np.testing.assert_allclose(inverse(matrices).numpy(), np.linalg.inv(matrices.numpy()), rtol=1e-3, atol=1e-4)


def test_the_homography_carries_the_first_view_onto_the_second(bank):
    """OpenCV warps the first view; it must look like the second, wherever both show the image."""
    index = torch.tensor([0, 1, 0, 1])
    first, second, homography = views.pair(
        bank.images[index].sum(1, keepdim=True).div(3).byte().expand(-1, 3, -1, -1), bank.sizes[index], (96, 128)
    )
    for k in range(len(index)):
        expected = cv2.warpPerspective(first.image[k, 0].numpy(), homography[k].numpy(), (128, 96))
        shown = cv2.warpPerspective(first.inside[k, 0].numpy(), homography[k].numpy(), (128, 96))
        both = (shown > 0.99) & (second.inside[k, 0].numpy() > 0.99)
        assert both.sum() > 500
        difference = np.abs(cv2.GaussianBlur(expected - second.image[k, 0].numpy(), (0, 0), 1.5))[both]
        assert np.median(difference) < 0.02


def test_views_look_past_the_edge_only_where_they_say_so():
    white = torch.full((1, 1, 64, 64), 0.5)
    matrix = torch.tensor([[[1.0, 0, -10], [0, 1, 0], [0, 0, 1]]])
    image, inside = views.look(white, torch.tensor([[40.0, 40.0]]), matrix, (32, 64))
    assert (
        (inside[0, 0, :, :10] == 0).all() and (inside[0, 0, 1:, 11:49] == 1).all() and (inside[0, 0, :, 51:] == 0).all()
    )
    assert (image - 0.5).abs().max() < 1e-6


def test_disturbances_differ_and_stay_in_range(bank):
    image = views.pair(bank.images, bank.sizes, (64, 80))[0].image
    one, other = views.disturb(image), views.disturb(image)
    assert one.shape == image.shape and one.min() >= 0 and one.max() <= 1
    assert (one - other).abs().mean() > 0.01


# --------------------------------------------------------------------------------------------------------------- shapes


def test_a_painted_square_has_its_four_corners_and_loses_those_that_are_covered():
    picture = shapes._Picture(1, CPU)
    picture.gray = torch.full_like(picture.gray, 0.2)
    square = torch.tensor([[[50.0, 40.0], [150.0, 40.0], [150.0, 140.0], [50.0, 140.0]]])
    picture.polygon(square, torch.tensor([0.8]))
    picture.polygon(square + torch.tensor([80.0, 60.0]), torch.tensor([0.5]))
    image, xy, worth = picture.finish()
    assert image[0, 60, 60] == 204 and image[0, 150, 200] == 128 and image[0, 20, 20] == 51
    found = {tuple(point) for point in xy[0][worth[0] > 0].tolist()}
    assert found == {(50, 40), (150, 40), (50, 140), (130, 100), (230, 100), (230, 200), (130, 200)}


def test_checkerboard_corners_are_where_the_gray_changes_both_ways():
    picture = shapes._Picture(1, CPU)
    picture.gray = torch.full_like(picture.gray, 0.5)
    matrix = torch.tensor([[[20.0, 0, 40], [0, 20, 40], [0, 0, 1]]])
    picture.grid(matrix, 2, 2, torch.tensor([[0.0, 1.0, 1.0, 0.0]]))
    _, xy, worth = picture.finish()
    found = {tuple(point) for point in xy[0][worth[0] > 0].tolist()}
    assert (60.0, 60.0) in found and (40.0, 40.0) in found and len(found) == 9


def test_every_kind_of_shape_draws_and_ellipses_have_no_corners():
    drawn = shapes.draw(len(shapes.KINDS), CPU, batch=1)
    assert drawn.images.shape == (len(shapes.KINDS), 3, 320, 320)
    assert drawn.worth[3].sum() == 0 and drawn.worth[-1].sum() == 0
    assert all(drawn.worth[k].sum() > 0 for k in (1, 8, 9))
    xy = drawn.xy[drawn.worth > 0]
    assert (xy >= 0).all() and (xy <= torch.tensor([319.0, 239.0])).all()


def test_banks_join_in_the_shares_asked_for(bank):
    joined = join([bank, shapes.draw(2, CPU, batch=1)], [0.7, 0.3])
    assert joined.images.shape == (5, 3, 320, 320)
    assert joined.draw.tolist() == pytest.approx([0.7 / 3] * 3 + [0.15] * 2)


# --------------------------------------------------------------------------------------------------------------- losses


def test_detector_targets_name_the_pixel_of_the_cell(monkeypatch):
    monkeypatch.setattr(losses, "AREA_PER_LABEL_PX2", 64)
    inside = torch.ones(1, 1, 16, 24)
    inside[..., 20:] = 0
    xy = torch.tensor([[[9.0, 3.0], [2.2, 10.8], [4.0, 11.0], [100.0, 3.0], [-3.0, 3.0]]])
    worth = torch.tensor([[0.6, 1.0, 0.5, 1.0, 1.0]])
    target, counts = losses.detector_targets(xy, worth, inside)
    assert target.shape == (1, 65, 2, 3) and target.sum(dim=1) == pytest.approx(torch.ones(1, 2, 3))
    assert target[0, 3 * 8 + 1, 0, 1] == pytest.approx(0.6) and target[0, 64, 0, 1] == pytest.approx(0.4)
    assert target[0, 3 * 8 + 2, 1, 0] == 1  # the point beside it is too near, and less worthy
    assert target[0, 64, 0, 0] == 1
    assert counts.tolist() == [[[True, True, False], [True, True, False]]]


def test_a_view_learns_no_more_points_than_a_detector_can_rank(monkeypatch):
    monkeypatch.setattr(losses, "AREA_PER_LABEL_PX2", 1300)
    xy = torch.tensor([[[4.0 + 10 * k, 4.0 + 10 * k] for k in range(6)]])
    target, _ = losses.detector_targets(xy, torch.linspace(0.9, 0.4, 6)[None], torch.ones(1, 1, 64, 64))
    assert target[0, :64].sum() == pytest.approx(sum(torch.linspace(0.9, 0.4, 6)[:3].tolist()))


def test_detector_loss_is_the_entropy_at_best_and_counts_what_counts():
    target = torch.zeros(1, 65, 1, 2)
    target[0, 64] = 0.5
    target[0, 0] = 0.5
    best = torch.full((1, 65, 1, 2), -30.0)
    best[0, [0, 64]] = 0
    best[0, :, 0, 1] = torch.randn(65)
    loss = losses.detector_loss(best, target, torch.tensor([[[True, False]]]))
    assert loss == pytest.approx(np.log(2), abs=1e-4)


def test_a_place_counts_by_what_its_point_is_worth_or_as_much_as_any_others():
    target = torch.zeros(1, 65, 1, 1)
    target[0, 5], target[0, 64] = 0.25, 0.75
    logits = torch.zeros(1, 65, 1, 1)
    logits[0, 64] = np.log(64 * 3)  # a point or none: 1 to 3; its place: 1 of 64
    there, where = -0.25 * np.log(0.25) - 0.75 * np.log(0.75), np.log(64)
    everywhere = torch.ones(1, 1, 1, dtype=torch.bool)
    for placing, count in ((0.0, 0.25), (1.0, 1.0)):
        loss = losses.detector_loss(logits, target, everywhere, placing)
        assert loss == pytest.approx(there + count * where, rel=1e-5)


def test_descriptors_are_sampled_as_at_inference():
    coarse = torch.randn(2, 16, 6, 8)
    xy = torch.rand(2, 20, 2) * torch.tensor([63.0, 47.0])
    sampled = losses.sample(coarse, xy)
    for k in range(2):
        unit = torch.nn.functional.normalize(coarse[k], dim=0)
        expected = sample_descriptors(xy[k], unit, 8, Sampling.HALF_PIXEL)
        torch.testing.assert_close(sampled[k], expected, atol=1e-5, rtol=1e-4)


def test_correspondences_lie_under_the_homography_and_inside_both_views():
    homography = torch.tensor([[[1.0, 0, 30], [0, 1, 0], [0, 0, 1]]]).expand(2, -1, -1)
    inside = (torch.ones(2, 1, 48, 64), torch.ones(2, 1, 48, 64))
    xy = torch.tensor([[[10.0, 10.0], [50.0, 10.0]]]).expand(2, -1, -1)
    first, second, real = losses.correspondences(
        xy,
        torch.ones(2, 2),
        homography,
        inside,
        40,
    )
    assert real.all() and (second[real][:, 0] <= 63.5).all()
    torch.testing.assert_close(second, first + torch.tensor([30.0, 0.0]))
    assert all((first[k] == torch.tensor([10.0, 10.0])).all(-1).any() for k in range(2))
    assert not (first == torch.tensor([50.0, 10.0])).all(-1).any()


def test_descriptor_loss_knows_partners_from_strangers(monkeypatch):
    monkeypatch.setattr(losses, "JITTER_PX", 0.0)
    coarse = torch.randn(2, 64, 12, 16)
    cells = torch.stack(torch.meshgrid(torch.arange(1, 15, 2), torch.arange(1, 11, 2), indexing="xy"), -1).reshape(
        1, -1, 2
    )
    xy = (cells * 8 + 3.5).float().expand(2, -1, -1)
    real = torch.ones(xy.shape[:2], dtype=torch.bool)
    same, known = losses.descriptor_loss(coarse, coarse, (xy, xy, real), 2)
    other, unknown = losses.descriptor_loss(coarse, torch.randn_like(coarse), (xy, xy, real), 2)
    assert known == 1 and same < 0.1
    assert unknown < 0.2 and other > 4


# ----------------------------------------------------------------------------------------------------------- adaptation


class BrightSpots(torch.nn.Module):
    """A detector that is right by construction: it fires on bright pixels, and only on them."""

    def backbone(self, image):
        return image

    def detector(self, image):
        pixels = torch.nn.functional.pixel_unshuffle(image.float(), 8)
        return torch.cat([(pixels - 0.5) * 40, torch.zeros_like(pixels[:, :1])], dim=1)


def test_adaptation_finds_what_the_detector_sees_in_every_view(monkeypatch):
    monkeypatch.setattr("training.adapt.disturb", lambda image: image)
    spots = torch.tensor([[30, 40], [90, 25], [61, 77]])
    canvas = torch.zeros(1, 3, 128, 128, dtype=torch.uint8)
    for dy in range(-1, 2):
        for dx in range(-1, 2):
            canvas[0, :, spots[:, 1] + dy, spots[:, 0] + dx] = 255
    image = Bank(canvas, torch.tensor([[112.0, 128.0]]), torch.ones(1))
    found = adapt(BrightSpots(), image, views=24, batch=8, view_hw=(96, 128))
    for level, farthest in enumerate((0.6, 1.2)):
        best = found.xy[0, level, :3]
        assert torch.cdist(best, spots.float()).amin(dim=1).max() < farthest
        assert torch.cdist(spots.float(), best).amin(dim=1).max() < farthest
        assert found.worth[0, level, 0] > 0.99 and (found.worth[0, level].diff() <= 0).all()


def test_points_are_graded_among_those_of_all_images():
    agreement = torch.tensor([[[0.9, 0.8, 0.0]], [[0.3, 0.0, 0.0]], [[0.6, 0.5, 0.0]]])
    worth = grade(agreement, torch.tensor([2.0]))
    expected = 1 / (1 + np.exp(-(1 - np.array([0, 1, 2, 3, 4]) / 2) / 0.2))
    np.testing.assert_allclose(worth[agreement > 0], expected[[0, 1, 4, 2, 3]], rtol=1e-5)
    assert worth.shape == agreement.shape and (worth[agreement == 0] == 0).all()


def test_views_learn_the_points_of_the_distance_they_look_from():
    xy = torch.stack([torch.full((1, 2), 40.0), torch.full((1, 2), 80.0)])[None].expand(3, -1, -1, -1)
    worth = torch.tensor([[[1.0], [0.5]]]).expand(3, -1, -1)
    image = torch.zeros(3, 1, 96, 128)
    near, far = 0.8 * torch.eye(3), 2.1 * torch.eye(3)
    far[2, 2] = near[2, 2] = 1
    far[0] = -far[0]  # mirrored
    tilted = torch.tensor([[2.0, 0, 0], [0, 2.0, 0], [0.004, 0, 1]])  # the middle of the view: 1.65 px to 1, about
    view = views.Views(image, image, torch.stack([near, far, tilted]))
    assert view.octaves().tolist() == pytest.approx([-0.322, 1.070, 0.511], abs=2e-3)
    seen, known = train._seen(view, xy, worth)
    assert known[:, 0].tolist() == [1.0, 0.5, 0.5]
    np.testing.assert_allclose(seen[0, 0], [50, 50], rtol=1e-5)
    np.testing.assert_allclose(seen[1, 0], [-80 / 2.1, 80 / 2.1], rtol=1e-5)


# ----------------------------------------------------------------------------------------------------------------- fold


def test_folding_changes_nothing():
    net = SuperPointNet((8, 8, 16, 16, 24), 32, NormPlacement.BEFORE_RELU)
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, -1.5, 1.5)
            torch.nn.init.normal_(module.bias)
            torch.nn.init.normal_(module.running_mean)
            torch.nn.init.uniform_(module.running_var, 0.2, 2)
    net.eval()
    folded = fold(net)
    assert folded.norm is NormPlacement.NONE and folded.sampling is Sampling.HALF_PIXEL
    plain = SuperPointNet.from_checkpoint(folded)
    image = torch.rand(2, 1, 48, 64)
    with torch.no_grad():
        for expected, got in zip(net(image), plain(image)):
            torch.testing.assert_close(got, expected, atol=2e-4, rtol=1e-3)


def test_batchnorm_after_relu_is_not_folded(checkpoint):
    with pytest.raises(SuperPointError, match="after ReLU"):
        layouts.without_batchnorm(checkpoint("v6"))


# ------------------------------------------------------------------------------------------------------------- rounding


def test_a_rounded_layer_computes_with_whole_numbers():
    block = Block(6, 5, 3, NormPlacement.BEFORE_RELU).eval()
    torch.nn.init.uniform_(block.bn.weight, 0.5, 2)
    x = torch.rand(2, 6, 10, 12) * 3
    step = x.max() / 127
    steps = block.conv.weight.detach().abs().amax(dim=(1, 2, 3)) / 127
    whole = (block.conv.weight / steps[:, None, None, None]).round().to(torch.int8).double()
    summed = torch.nn.functional.conv2d((x / step).round().double(), whole, padding=1)
    expected = block.relu(block.bn(summed.float() * step * steps[:, None, None] + block.conv.bias[:, None, None]))
    both = torch.ones(2, 1, 1, 1, dtype=torch.bool), torch.tensor(True)
    got = _through(torch.nn.Sequential(block), x, *both)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert (got - block(x)).abs().max() > 1e-3


def test_rounding_costs_what_int8_costs(tmp_path):
    """Of onnxruntime, running the Q/DQ graph of the folded network, calibrated on the very image."""
    net = SuperPointNet((8, 8, 16, 16, 24), 32, NormPlacement.BEFORE_RELU).eval()
    gray = photograph(96, 128, "camera")
    onnx.save(to_onnx(fold(net), ExportOptions(OutputType.HEADS, height_px=96, width_px=128)), tmp_path / "net.onnx")
    ranges = calibrate(tmp_path / "net.onnx", [("it", gray)], CalibrationOptions(Method.MAX, equalize=False))
    quantized = quantize(onnx.load(tmp_path / "net.onnx"), ranges)
    (tmp_path / "int8.onnx").write_bytes(quantized.SerializeToString())
    image = gray[None, None] / np.float32(255)
    with open_backend(tmp_path / "int8.onnx", "cpu") as backend:
        theirs = backend.infer(image)["logits"]
    with torch.no_grad():
        exact, ours = (forward(net, torch.from_numpy(image), share)[0].numpy() for share in (0.0, 1.0))
    assert np.abs(ours - exact).mean() == pytest.approx(np.abs(theirs - exact).mean(), rel=0.3)


def test_gradients_pass_through_the_rounding():
    net = SuperPointNet((8, 8, 16, 16, 24), 32, NormPlacement.BEFORE_RELU)
    sum(part.square().sum() for part in forward(net, torch.rand(2, 1, 48, 64), 0.5)).backward()
    assert all(parameter.grad.abs().sum() > 0 for name, parameter in net.named_parameters() if "conv.weight" in name)


# ------------------------------------------------------------------------------------------------------------ the whole


@pytest.fixture
def tiny(monkeypatch):
    """What a tiny run spends most of its time on, made tiny too."""
    monkeypatch.setattr("training.leaves.SIDE_PX", 64)
    monkeypatch.setattr("training.leaves.LEAVES", 6)
    monkeypatch.setattr("training.validate.SIZE_HW", (96, 128))


def run(folder: Path, out: Path, stages: int = 3) -> dict[str, torch.Tensor]:
    paths = sorted(folder.iterdir())
    banks = [photos.load(paths, CPU, SMOKE.canvas_px), photos.load(paths[:1], CPU, SMOKE.canvas_px)]
    plan = replace(SMOKE, stages=SMOKE.stages[:stages])
    written = Run(plan, out, *banks, CPU).run()
    return {name: layer.weight for name, layer in layouts.load(written).layers.items()}


def test_every_stage_runs_repeats_itself_and_goes_on_from_where_it_was_cut_off(tiny, folder, tmp_path):
    whole = run(folder, tmp_path / "whole")
    assert {path.name for path in (tmp_path / "whole").iterdir()} == {
        "log.jsonl",
        "state.pt",
        "labels-first.pt",
        "labels-last.pt",
        "shapes.safetensors",
        "first.safetensors",
        "last.safetensors",
    }
    log = [json.loads(line) for line in (tmp_path / "whole/log.jsonl").read_text().splitlines()]
    assert all(np.isfinite(entry["detector"]) for entry in log if "detector" in entry)
    assert {"repeatability", "localisation_px", "mma3", "homography3"} < set(log[-1])
    run(folder, tmp_path / "cut", stages=1)
    resumed = run(folder, tmp_path / "cut")
    for name, weight in whole.items():
        np.testing.assert_array_equal(weight, resumed[name])


def test_the_command(tiny, folder, tmp_path):
    done = CliRunner().invoke(
        main,
        ["--photos", str(folder), "--output", str(tmp_path / "r"), "--device", "cpu", "--smoke", "--set", "pairs=2"],
    )
    assert done.exit_code == 0 and "trained: " in done.output
    assert layouts.load(tmp_path / "r/last.safetensors").norm is NormPlacement.NONE


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--set", "pairs=many"], "'many' is no int"),
        (["--set", "nothing=1"], "expected one of pairs"),
        (["--photos", "empty"], "no photographs in"),
        (["--photos", "broken"], "is not a readable image"),
        (["--device", "tpus"], "expected cuda, cuda:1 or cpu"),
    ],
)
def test_bad_arguments_end_in_one_line(arguments, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/cut.png").write_bytes(b"not an image")
    folder = [] if "--photos" in arguments else ["--photos", "empty"]
    done = CliRunner().invoke(
        main,
        [
            *folder,
            *arguments,
            "--output",
            "r",
            "--smoke",
            *(["--device", "cpu"] if "--device" not in arguments else []),
        ],
    )
    assert done.exit_code == 2 and words in " ".join(done.output.split())
    assert not (tmp_path / "r").exists()


def test_what_is_held_out_is_not_trained_on(tmp_path):
    for name in (*photos.HELD_OUT, "mine.png"):
        cv2.imwrite(str(tmp_path / name), np.zeros((16, 16), np.uint8))
    train, held_out = photos.find([tmp_path])
    assert {path.name for path in held_out} == set(photos.HELD_OUT)
    names = {path.name for path in train}
    assert "mine.png" in names and not names & {*photos.HELD_OUT, "astronaut.png", "camera.png"}
