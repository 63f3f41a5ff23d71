"""The training of the packaged weights: what it generates, what it learns from, and every stage once, on the CPU."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from conftest import photograph
from training import ablation, development, losses, photos, places, shapes, train, views
from training.__main__ import main
from training.adapt import adapt, grade
from training.bank import Bank, join
from training.fold import fold, unfold
from training.geometry import inverse, warp
from training.networks import SHAPES
from training.rounding import _through, forward
from training.train import SMOKE, Run

from superpoint_trt import packaged
from superpoint_trt.checkpoint import layouts
from superpoint_trt.checkpoint.layouts import NormPlacement
from superpoint_trt.checkpoint.reference import Block, SuperPointNet, network, sample_descriptors
from superpoint_trt.convert.export import ExportOptions, to_onnx
from superpoint_trt.convert.quantize.calibrate import calibrate
from superpoint_trt.convert.quantize.options import CalibrationOptions, Method
from superpoint_trt.convert.quantize.qdq import quantize
from superpoint_trt.core.types import OutputType, Sampling, SuperPointError
from superpoint_trt.run.backends import open_backend

CPU = torch.device("cpu")
PACKAGED = {one.name: one.weights for one in packaged.NETWORKS}
SHAPE = ((8, 8, 16, 16, 24), 32, NormPlacement.BEFORE_RELU)
"""Of a tiny network."""


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


def test_far_pairs_turn_by_anything_and_step_back_to_a_quarter(bank):
    index = torch.arange(3).repeat(40)
    first, second, homography = views.pair(bank.images[index], bank.sizes[index], (24, 32), far_share=1.0)
    centre = torch.tensor([[15.5, 11.5], [16.5, 11.5]]).expand(len(index), -1, -1)
    moved = warp(centre, homography).diff(dim=1)[:, 0]
    octaves = second.octaves() - first.octaves()
    assert octaves.max() > 1.5 and octaves.min() < -1.5
    mirrored = torch.det(homography[:, :2, :2]) < 0
    turned = torch.atan2(moved[:, 1], moved[:, 0])[~mirrored]
    assert (turned.abs() > 2.4).any() and ((turned > 0.7) & (turned < 2.4)).any()


def test_strong_blur_keeps_the_light_and_loses_detail():
    image = torch.rand(12, 1, 48, 64)
    blurred, lost = views.blur_strongly(image)
    inner = slice(8, -8)
    assert blurred.mean(dim=(1, 2, 3)) == pytest.approx(image.mean(dim=(1, 2, 3)), abs=0.05)
    assert (blurred[..., inner, inner].std(dim=(1, 2, 3)) < 0.7 * image.std(dim=(1, 2, 3))).all()
    assert (lost > 0.3).all() and (lost < 3).all()


def test_night_is_dark_uneven_and_grainy():
    dark = views.darken(torch.full((8, 1, 48, 64), 0.6))
    assert dark.min() >= 0 and dark.max() <= 1 and dark.mean() < 0.45
    assert (dark.diff(dim=3).abs().mean(dim=(1, 2, 3)) > 1e-3).all()


def test_every_other_pair_is_spoilt_in_its_second_view():
    image = torch.rand(12, 1, 32, 32)
    spoilt, lost = train.spoil(image, 0.5, 1 / 3)
    changed = (spoilt != image).flatten(1).any(dim=1)
    assert changed.tolist() == [row in (0, 7, 2, 9, 4) for row in range(12)]
    assert (lost > 0).tolist() == [row in (0, 7, 2) for row in range(12)]
    assert train.spoil(image, 0, 0)[0] is image


# --------------------------------------------------------------------------------------------------------------- places


def two_views(offset: tuple[float, float]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Score maps of two views with the same two spots, `offset` px apart, and the homography (the identity)."""
    y, x = torch.meshgrid(torch.arange(48.0), torch.arange(64.0), indexing="ij")
    maps = []
    for dx, dy in ((0.0, 0.0), offset):
        spots = [((x - cx - dx) ** 2 + (y - cy - dy) ** 2).mul(-1).exp() for cx, cy in ((20.0, 20.0), (44.0, 30.0))]
        maps.append((0.9 * spots[0] + 0.5 * spots[1])[None, None])
    return maps[0], maps[1], torch.eye(3)[None]


def test_places_are_read_to_a_fraction_of_a_pixel_and_pull_the_views_together():
    first, second, homography = two_views((0.3, -0.2))
    second.requires_grad_()
    inside = torch.ones_like(first)
    found = [places.detect(scores, inside, 5) for scores in (first, second)]
    assert found[0].real.tolist() == [[True, True, False, False, False]]
    torch.testing.assert_close(found[0].xy[0, :2], torch.tensor([[20.0, 20.0], [44.0, 30.0]]), atol=1e-3, rtol=0)
    torch.testing.assert_close(found[1].xy[0, :2], torch.tensor([[20.3, 19.8], [44.3, 29.8]]), atol=0.02, rtol=0)
    who = places.partners(*found, homography, (inside, inside))
    assert who.same.tolist() == [[True, True, False, False, False]] and who.nearest[0, :2].tolist() == [0, 1]
    wrong, apart, spread = places.place_losses(*found, who, homography)
    assert apart.item() == pytest.approx(0.36, abs=0.02) and 0.5 < spread < 1.2
    assert wrong.item() == pytest.approx(0.36**2 / (0.36**2 + 1), abs=0.01)
    wrong.backward()
    assert second.grad[0, 0, 20, 19] < 0 < second.grad[0, 0, 20, 22]  # descending moves it back to the left


def test_a_distance_counts_in_the_view_that_sees_less():
    first, second, _ = two_views((0.5, 0.0))
    homography = torch.diag(torch.tensor([4.0, 4.0, 1.0]))[None]
    found = [places.detect(scores, torch.ones_like(scores), 2) for scores in (first, second)]
    nearest, is_same, shared = torch.tensor([[0, 1]]), torch.tensor([[True, False]]), torch.tensor([[True, True]])
    same = places.Partners(nearest, is_same, shared, torch.zeros(1, 2, 2))
    found[1] = found[1]._replace(xy=found[0].xy * 4 + torch.tensor([2.0, 0.0]))
    assert places.place_losses(*found, same, homography)[1].item() == pytest.approx(0.5, abs=0.02)


def test_a_point_without_a_partner_learns_to_choose_what_lies_around_it():
    def found(xy):
        points = torch.tensor([xy])
        return places.Found(points, torch.ones(1, len(xy)), torch.ones(1, len(xy)), torch.ones(1, len(xy)) > 0)

    inside = torch.ones(1, 1, 48, 64)
    first, second = found([[20.0, 20.0], [28.0, 20.0], [50.0, 40.0]]), found([[20.0, 20.0], [36.0, 20.0], [8.0, 8.0]])
    there = places.partners(first, second, torch.eye(3)[None], (inside, inside))
    assert there.same.tolist() == [[True, False, False]]
    assert there.around[0, 1].tolist() == pytest.approx([0.5, 0.5, 0], abs=0.02)  # 8 px from two, 23 px from the third
    assert there.around[0, 2, 1] > 0.99 and there.around[0, 2, 2] == 0
    coarse = torch.randn(1, 8, 6, 8, requires_grad=True)
    other = torch.randn(1, 8, 6, 8)
    back = places.partners(second, first, torch.eye(3)[None], (inside, inside))
    for _ in range(40):
        strayed = places.choice_loss(first, second, (coarse, other), there, back)[2]
        (gradient,) = torch.autograd.grad(strayed, coarse)
        coarse = (coarse - 20 * gradient).detach().requires_grad_()
    a, b = losses.sample(coarse, first.xy)[0], losses.sample(other, second.xy)[0]
    assert (a @ b.T)[2].argmax() == 1  # the last point chooses the only one around it


def test_the_share_of_wrong_matches():
    """Two points; the second has no partner, and looks like a point that has none either."""
    centers = torch.tensor([[[11.5, 11.5], [43.5, 11.5]]])
    first = places.Found(centers, torch.ones(1, 2), torch.ones(1, 2), torch.ones(1, 2) > 0)
    second = first._replace(xy=torch.tensor([[[11.5, 11.5], [27.5, 35.5]]]))
    coarse, other = torch.zeros(1, 3, 6, 8), torch.zeros(1, 3, 6, 8)
    coarse[0, 0, 1, 1] = coarse[0, 1, 1, 5] = other[0, 0, 1, 1] = other[0, 1, 4, 3] = 1

    def share():
        return places.wrong_share(first, second, (coarse, other), torch.eye(3)[None])

    assert share().item() == pytest.approx(0.5, abs=1e-3)
    coarse[0, :, 1, 5] = torch.tensor([0.8, 0.6, 0.0])  # chooses the right pair's point, which does not choose it
    assert share().item() < 0.01
    far = torch.eye(3)[None].clone()
    far[0, 0, 2] = 4.0  # now the first match is 4 px off
    assert places.wrong_share(first, second, (coarse, other), far).item() > 0.99
    nothing = first._replace(real=torch.zeros(1, 2) > 0)
    assert places.wrong_share(nothing, second, (coarse, other), far).item() == 1


def test_scores_move_to_points_that_both_views_find():
    """Three points of 0.6, 0.3 and 0.1 in each view; the first is found in both, the third lies where nobody looks."""
    xy = torch.tensor([[[11.5, 11.5], [43.5, 11.5], [59.5, 43.5]]])
    score = torch.tensor([[0.6, 0.3, 0.1]], requires_grad=True)
    first = places.Found(xy, score, torch.ones(1, 3), torch.ones(1, 3) > 0)
    second = first._replace(xy=torch.tensor([[[11.5, 13.5], [27.5, 35.5], [59.5, 43.5]]]), score=score.detach())
    inside = torch.ones(1, 1, 48, 64)
    inside[..., 40:, :] = 0
    there = places.partners(first, second, torch.eye(3)[None], (inside, inside))
    back = places.partners(second, first, torch.eye(3)[None], (inside, inside))
    lone = places.lone_share(first, second, there, back)
    assert lone.item() == pytest.approx(1 / 3)
    lone.backward()
    assert score.grad[0, 0] < 0 < score.grad[0, 1] and score.grad[0, 2] == 0


def test_points_outside_their_image_are_not_found():
    first, _, _ = two_views((0, 0))
    inside = torch.ones_like(first)
    inside[..., 40:] = 0
    assert places.detect(first, inside, 2).real.tolist() == [[True, False]]


def test_scores_rise_where_matches_are_right():
    first, second, homography = two_views((0.0, 0.0))
    first.requires_grad_()
    coarse = torch.randn(1, 16, 6, 8)
    other = coarse.clone()
    other[..., 4:] = torch.randn(1, 16, 6, 4)  # nothing on the right-hand side looks the same again
    inside = torch.ones_like(second)
    found = [places.detect(scores, inside, 2) for scores in (first, second)]
    there = places.partners(*found, homography, (inside, inside))
    back = places.partners(*found[::-1], homography, (inside, inside))
    loss, _, _, chance = places.choice_loss(*found, (coarse, other), there, back)
    assert 0 < loss < 1 and 0.2 < chance < 0.95
    loss.backward()
    assert first.grad[0, 0, 20, 20] < 0 < first.grad[0, 0, 30, 44]


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


def test_small_networks_fold_and_unfold_too(tmp_path):
    """Every shape that is trained makes a checkpoint that can be read again."""
    for name, shape in SHAPES.items():
        torch.manual_seed(0)
        net = shape.network().eval()
        for module in net.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.uniform_(-0.2, 0.2)
                module.running_var.uniform_(0.5, 2.0)
        found = layouts.load(layouts.save(fold(net), tmp_path / f"{name}.safetensors"))
        assert found.topology == net.topology and found.subpixel and found.descriptor_dim == shape.descriptor_dim
        images = torch.rand(2, 1, 40, 56)
        again = shape.network().eval()
        with torch.no_grad():
            unfold(again, found, images)
            for one, *others in zip(net(images), network(found)(images), again(images)):
                for other in others:
                    torch.testing.assert_close(other, one, atol=1e-4, rtol=1e-4)


def test_unfolding_goes_on_from_what_was_shipped():
    shape = (8, 8, 16, 16, 24), 32
    shipped = fold(SuperPointNet(*shape, NormPlacement.BEFORE_RELU).eval())
    net = SuperPointNet(*shape, NormPlacement.BEFORE_RELU)
    images = torch.rand(4, 1, 48, 64)
    unfold(net, shipped, images)
    with torch.no_grad():
        expected = SuperPointNet.from_checkpoint(shipped)(images)
        for mode in (net.eval(), net.train()):
            for got, wanted in zip(mode(images), expected):
                torch.testing.assert_close(got, wanted, atol=2e-4, rtol=1e-3)


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


INGREDIENTS = {
    "far_share": 1.0,
    "blurred_share": 0.5,
    "night_share": 0.5,
    "coarsest_step_octaves": -3.0,
    "place_weight": 0.3,
    "spread_weight": 0.15,
    "choice_weight": 0.5,
}


def test_the_command_goes_on_from_a_checkpoint_with_every_ingredient(tiny, folder, tmp_path):
    shape = SMOKE.channels, SMOKE.descriptor_dim, NormPlacement.BEFORE_RELU
    layouts.save(fold(SuperPointNet(*shape).eval()), tmp_path / "start.safetensors", half=True)
    settings = [word for name, value in INGREDIENTS.items() for word in ("--set", f"{name}={value}")]
    paths = ["--photos", str(folder), "--output", str(tmp_path / "r"), "--start", str(tmp_path / "start.safetensors")]
    done = CliRunner().invoke(main, [*paths, "--device", "cpu", "--smoke", *settings])
    assert done.exit_code == 0, done.output
    assert {path.name for path in (tmp_path / "r").glob("*.safetensors")} == {"last.safetensors"}
    log = [json.loads(line) for line in (tmp_path / "r/log.jsonl").read_text().splitlines()]
    assert all(np.isfinite(entry["apart_px"]) for entry in log if "apart_px" in entry)


def test_a_stage_ends_in_time(tiny, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "WARM_STEPS", 1)
    paths = sorted(folder.iterdir())
    banks = [photos.load(paths, CPU, SMOKE.canvas_px), photos.load(paths[:1], CPU, SMOKE.canvas_px)]
    endless = replace(SMOKE, stages=(train.Stage("shapes", 10**6, 1e-3),))
    assert Run(endless, tmp_path, *banks, CPU, stage_limit_s=0.5).run().exists()


# ---------------------------------------------------------------------------------------------------------- development


def test_development_pairs_show_the_same_place_and_repeat_themselves(folder):
    gray = cv2.imread(str(folder / "camera.png"), cv2.IMREAD_GRAYSCALE)
    for change in development.CHANGES:
        picture, matrix = development.changed(gray, change, 3)
        again, _ = development.changed(gray, change, 3)
        np.testing.assert_array_equal(picture, again)
        if change.spoil is None and change.zoom > 0.4:
            height, width = picture.shape
            expected = cv2.warpPerspective(gray, matrix, (width, height), borderValue=127)
            assert np.abs(expected.astype(float) - picture).mean() < 6


def test_development_figures_of_a_known_case():
    xy = torch.tensor([[10.0, 10.0], [30.0, 10.0], [10.0, 30.0], [30.0, 30.0]])
    off = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 9.0], [0.5, 0.0]])
    got = development.judge((xy, torch.eye(4)), (xy + off, torch.eye(4)), np.eye(3), (48, 64))
    assert got == {"mma1": 0.5, "mma3": 0.75, "rep1": 0.5, "rep3": 0.75, "right": 0.75}


def test_development_prints_a_table(tiny, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(photos, "HELD_OUT", ("camera",))
    monkeypatch.setattr(development, "CHANGES", development.CHANGES[:2])
    layouts.save(fold(SuperPointNet(*SHAPE).eval()), tmp_path / "net.safetensors")
    for weights in (str(tmp_path / "net.safetensors"), "sift"):
        words = ["--photos", str(folder), "--weights", weights, "--json", str(tmp_path / "figures.json")]
        done = CliRunner().invoke(development.main, words)
        assert done.exit_code == 0, done.output
        assert set(json.loads((tmp_path / "figures.json").read_text())) == {"side 0.15", "side 0.3", "view", "all"}


def test_the_ablation_trains_and_judges_its_variants(tmp_path, folder, monkeypatch):
    monkeypatch.setattr(photos, "HELD_OUT", ("camera",))
    monkeypatch.setattr(development, "CHANGES", development.CHANGES[:1])
    monkeypatch.setattr("training.leaves.SIDE_PX", 64)
    monkeypatch.setattr("training.leaves.LEAVES", 6)
    started = []

    class Pretended:
        def __init__(self, words, stdout, stderr):
            started.append(words)
            out = Path(words[words.index("--output") + 1])
            shutil.copy(tmp_path / "start.safetensors", out / "last.safetensors")

        def wait(self):
            return 0

    monkeypatch.setattr(ablation.subprocess, "Popen", Pretended)
    shape = SMOKE.channels, SMOKE.descriptor_dim, NormPlacement.BEFORE_RELU
    layouts.save(fold(SuperPointNet(*shape).eval()), tmp_path / "start.safetensors")
    words = ["--photos", str(folder), "--start", str(tmp_path / "start.safetensors"), "--output", str(tmp_path / "a")]
    words += ["--variant", "plain", "--variant", "choice", "--device", "cpu", "--smoke"]
    done = CliRunner().invoke(ablation.main, words)
    assert done.exit_code == 0, done.output
    assert set(json.loads((tmp_path / "a/figures.json").read_text())) == {"start", "plain", "choice"}
    assert (tmp_path / "a/choice/labels-last.pt").exists()
    assert [("choice_weight=0" in words, "place_weight=0" in words) for words in started] == [
        (True, True),
        (False, True),
    ]


def test_switched_off_means_every_ingredient():
    plan = asdict(train.Plan())
    assert all(plan[name] != value for name, value in ablation.PLAIN.items())


def test_the_command(tiny, folder, tmp_path):
    done = CliRunner().invoke(
        main,
        ["--photos", str(folder), "--output", str(tmp_path / "r"), "--device", "cpu", "--smoke", "--set", "pairs=2"],
    )
    assert done.exit_code == 0 and "trained: " in done.output
    assert layouts.load(tmp_path / "r/last.safetensors").norm is NormPlacement.NONE
    words = ["--photos", str(folder), "--output", str(tmp_path / "on"), "--device", "cpu", "--smoke"]
    words += ["--set", "steady_weight=1"] + 2 * ["--teacher", str(tmp_path / "r/last.safetensors")]
    done = CliRunner().invoke(main, [*words, "--start", str(tmp_path / "r/last.safetensors")])
    assert done.exit_code == 0, done.output
    steps = [json.loads(line) for line in (tmp_path / "on/log.jsonl").read_text().splitlines() if "unsteady" in line]
    assert steps and all(0 < step["unsteady"] < 10 for step in steps)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--set", "pairs=many"], "'many' is no int"),
        (["--set", "nothing=1"], "expected one of pairs"),
        (["--set", "looks_at_found=1"], "expected one of pairs"),
        (["--set", "steady_weight=1"], "steady_weight needs --start or --teacher"),
        (["--teacher", "none"], "--teacher has no effect while steady_weight is 0"),
        (["--device", "meta"], "expected cuda, cuda:1 or cpu"),
        (["--photos", "empty"], "no photographs in"),
        (["--photos", "broken"], "is not a readable image"),
        (["--device", "tpus"], "expected cuda, cuda:1 or cpu"),
        (5 * ["--teacher", "none"], "expected at most 4"),
        (["--set", "steady_weight=1", "--teacher", "none.safetensors"], "none.safetensors does not exist"),
        (
            ["--start", str(PACKAGED["full"])],
            "has another shape; expected the full network: channels (8, 8, 16, 16, 24)",
        ),
        (["--start", str(PACKAGED["small"])], "has another shape"),
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
    whole_source = f"{photos.HELD_OUT_SOURCES[0]}/one"
    (tmp_path / whole_source).parent.mkdir()
    for name in (*photos.HELD_OUT, whole_source, "mine"):
        cv2.imwrite(str(tmp_path / f"{name}.png"), np.zeros((16, 16), np.uint8))
    train, held_out = photos.find([tmp_path])
    assert {path.stem for path in held_out} == {*photos.HELD_OUT, "one"}
    names = {path.stem for path in train}
    assert "mine" in names and not names & {*photos.HELD_OUT, "one", "astronaut", "camera"}
