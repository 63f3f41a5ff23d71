"""Training of the matcher: scenes with known geometry, labels with known answers, and a run from start to end."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from conftest import photograph
from training import layered, photos
from training.layered import Worlds
from training.matcher import SMOKE, Batch, Truth, _as_many, area, figures, label, loss_of, main, nearest

from superpoint_trt import packaged
from superpoint_trt.checkpoint.matcher import load_matcher
from superpoint_trt.checkpoint.matcher_network import Assignment, PointSets

CPU = torch.device("cpu")
VIEW_HW = (120, 160)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(7)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for name in ("camera", "coffee", "brick", "astronaut", "chelsea", "page"):
        cv2.imwrite(str(folder / f"{name}.png"), photograph(180, 240, name))
    return folder


@pytest.fixture(scope="module")
def scenes(folder):
    """Eight scenes of smooth photographs, rendered."""
    torch.manual_seed(3)
    bank = photos.load(sorted(folder.iterdir()), CPU, 256)
    index = torch.stack([torch.randperm(len(bank))[:4] for _ in range(8)])
    # Smooth, so that a place between pixels has one gray, whichever camera samples it.
    colour = F.avg_pool2d(bank.images.float(), 9, 1, 4).mean(dim=1, keepdim=True).expand(-1, 3, -1, -1).byte()
    scene = layered.scene(bank.sizes[index], VIEW_HW, Worlds(planes=4))
    image, inside = layered.pictures(colour[index], scene, VIEW_HW)
    return scene, image.chunk(2), inside.chunk(2)


def grays(image, xy):
    height, width = image.shape[2:]
    unit = (2 * xy + 1) / xy.new_tensor([width, height]) - 1
    return F.grid_sample(image, unit[:, None], align_corners=False)[:, 0, 0]


# --------------------------------------------------------------------------------------------------------------- scenes


@pytest.mark.parametrize("camera", [0, 1])
def test_a_followed_point_shows_the_same_texture(scenes, camera):
    scene, image, _ = scenes
    xy = torch.rand(8, 500, 2) * torch.tensor([159.0, 119.0])
    points = layered.follow(scene, camera, xy, VIEW_HW)
    sure = points.seen & ~points.unsure
    assert 0.15 < sure.float().mean() < 0.95
    here, there = grays(image[camera], xy), grays(image[1 - camera], points.there)
    assert (here - there).abs()[sure].median() < 0.01
    assert ((here - there).abs()[sure] < 0.06).float().mean() > 0.95
    other = grays(image[1 - camera], points.there + 25)
    assert (here - other).abs()[sure].median() > 0.05, "elsewhere the texture is another"


def test_following_there_and_back_returns(scenes):
    scene, *_ = scenes
    xy = torch.rand(8, 400, 2) * torch.tensor([159.0, 119.0])
    there = layered.follow(scene, 0, xy, VIEW_HW)
    back = layered.follow(scene, 1, there.there, VIEW_HW)
    sure = there.seen & ~there.unsure & ~back.unsure
    assert (back.there - xy)[sure].norm(dim=-1).max() < 0.05
    assert back.seen[sure].float().mean() > 0.99


def test_points_agree_with_the_cameras(scenes):
    """Every sure correspondence lies on its epipolar line, and no single homography explains a scene: parallax."""
    scene, *_ = scenes
    xy = torch.rand(8, 400, 2) * torch.tensor([159.0, 119.0])
    points = layered.follow(scene, 0, xy, VIEW_HW)
    bent = 0
    for row in range(8):
        sure = (points.seen & ~points.unsure)[row]
        t = scene.moved[row].double()
        cross = torch.tensor([[0, -t[2], t[1]], [t[2], 0, -t[0]], [-t[1], t[0], 0]], dtype=torch.float64)
        back = torch.linalg.inv(scene.intrinsics[row].double())
        fundamental = back.T @ cross @ scene.camera[row].double() @ back
        a, b = (
            torch.cat([part[row][sure].double(), torch.ones(int(sure.sum()), 1)], dim=1) for part in (xy, points.there)
        )
        line = a @ fundamental.T
        assert ((line * b).sum(dim=1).abs() / line[:, :2].norm(dim=1)).max() < 0.05
        if len(a) > 20:
            matrix, _ = cv2.findHomography(a[:, :2].numpy(), b[:, :2].numpy(), cv2.RANSAC, 1.0)
            error = np.linalg.norm(
                cv2.perspectiveTransform(a[:, None, :2].numpy(), matrix)[:, 0] - b[:, :2].numpy(), axis=1
            )
            bent += (error > 3).mean() > 0.1
    assert bent >= 4


def test_what_is_hidden_is_not_seen(scenes):
    """A point is hidden where following comes to another plane; some are, and all of them lie inside the picture."""
    scene, *_ = scenes
    xy = torch.rand(8, 500, 2) * torch.tensor([159.0, 119.0])
    points = layered.follow(scene, 0, xy, VIEW_HW)
    inside = ((points.there >= 0) & (points.there <= torch.tensor([159.0, 119.0]))).all(dim=-1)
    hidden = inside & ~points.seen & layered.look_at(scene, 0, xy).shown
    assert 0.01 < hidden.float().mean() < 0.5
    there = layered.look_at(scene, 1, points.there)
    here = layered.look_at(scene, 0, xy)
    assert ((there.plane != here.plane) | ~there.shown)[hidden].all()


# --------------------------------------------------------------------------------------------------------------- labels


def truth(there, seen=None, unsure=None) -> Truth:
    there = torch.tensor([there])
    everything = torch.ones(there.shape[:2], dtype=torch.bool)
    return Truth(
        there,
        everything if seen is None else torch.tensor([seen]),
        ~everything if unsure is None else torch.tensor([unsure]),
    )


def test_labels_of_known_points():
    """A partner within 3 px, none within 5 px, in between nothing; the padding never counts."""
    first = torch.tensor([[[10.0, 10], [50, 50], [90, 90], [120, 20], [0, 0]]])
    second = torch.tensor([[[52.0, 50], [11, 10], [94, 90], [150, 60], [0, 0]]])
    real = (torch.tensor([[1, 1, 1, 1, 0]]).bool(), torch.tensor([[1, 1, 1, 1, 0]]).bool())
    partner, alone0, alone1 = label(first, second, real, (truth(first[0].tolist()), truth(second[0].tolist())))
    assert partner.tolist() == [[1, 0, -1, -1, -1]]
    assert alone0.tolist() == [[False, False, False, True, False]], "the third lies 4 px away"
    assert alone1.tolist() == [[False, False, False, True, False]]


def test_hidden_points_have_no_partner():
    first = second = torch.tensor([[[10.0, 10], [50, 50]]])
    real = (torch.ones(1, 2).bool(),) * 2
    same = first[0].tolist()
    there = truth(same, [False, True]), truth(same)
    partner, alone0, alone1 = label(first, second, real, there)
    assert (partner.tolist(), alone0.tolist(), alone1.tolist()) == ([[-1, 1]], [[True, False]], [[True, False]])
    there = truth(same, [False, True], [True, False]), truth(same)
    assert not label(first, second, real, there)[1].any(), "near a silhouette nobody knows"


def test_only_mutual_nearest_are_partners():
    first = torch.tensor([[[10.0, 10], [12, 10]]])
    second = torch.tensor([[[11.9, 10], [100, 100]]])
    real = (torch.ones(1, 2).bool(),) * 2
    partner, alone0, _ = label(first, second, real, (truth(first[0].tolist()), truth(second[0].tolist())))
    assert partner.tolist() == [[-1, 0]]
    assert alone0.tolist() == [[False, False]], "a point lies near, and is another's"


def known_batch() -> Batch:
    descriptors = F.one_hot(torch.tensor([[0, 1, 2, 3]]), 8).float()
    xy, scores, size = torch.rand(1, 4, 2), torch.ones(1, 4), torch.tensor([[160.0, 120]])
    first = PointSets(xy, scores, descriptors, torch.tensor([4]), size)
    second = PointSets(xy, scores, descriptors[:, [1, 0, 3, 2]], torch.tensor([3]), size)
    alone = torch.tensor([[False, False, True, False]])
    return Batch(first, second, torch.tensor([[1, 0, -1, -1]]), alone, torch.zeros(1, 4, dtype=torch.bool))


def test_nearest_neighbors_and_their_figures():
    batch = known_batch()
    found = nearest(batch)
    assert found[0].tolist() == [[1, 0, -1, 2]], "the last row of the second picture is padding"
    got = {key: int(value) for key, value in figures(found, batch, slice(0, 1)).items() if value.ndim == 0}
    assert got == {"true": 2, "hit": 2, "known": 2, "all": 3}


def test_the_area_is_average_precision():
    hits, scores = torch.tensor([True, False, True]), torch.tensor([0.9, 0.8, 0.1])
    assert area(hits, scores, 2) == pytest.approx((1 + 2 / 3) / 2)
    assert area(hits, scores, 4) == pytest.approx((1 + 2 / 3) / 4)
    assert area(hits[:0], scores[:0], 3) == 0


def test_precision_of_as_many_right_matches_as_nearest_neighbors_find():
    plain = [{"hit": torch.tensor(2)}]
    learned = [{"hits": torch.tensor([True, True, False, True]), "scores": torch.tensor([0.3, 0.9, 0.8, 0.2])}]
    found = _as_many("changed", learned, plain)
    assert found["changed_precision_of_as_many"] == pytest.approx(2 / 3, abs=1e-4)
    assert found["changed_score_of_as_many"] == pytest.approx(0.3)
    fewer = _as_many("changed", learned, [{"hit": torch.tensor(4)}])
    assert fewer == {"changed_precision_of_as_many": 0, "changed_score_of_as_many": 0}


def test_the_loss_is_least_for_the_truth():
    batch = known_batch()
    right = torch.full((1, 4, 4), -20.0)
    right[0, [0, 1], [1, 0]] = 20
    sure = Assignment(right, torch.tensor([[20.0, 20, -20, 0]]), torch.full((1, 4), 20.0))
    matched, alone = loss_of(sure, batch)
    assert matched < 0.01 and alone < 0.01
    wrong = sure._replace(matchable0=-sure.matchable0)
    assert all(part > 4 for part in loss_of(wrong, batch))
    assert loss_of(sure._replace(similarity=right.flip(2)), batch)[0] > 10


# ----------------------------------------------------------------------------------------------------------------- runs


def call(folder, output, *words):
    words = ["--photos", str(folder), "--features", str(packaged.WEIGHTS), "--output", str(output), *words]
    done = CliRunner().invoke(main, [*words, "--device", "cpu", "--smoke", "--set", "pairs=4", "--set", "points=32"])
    assert done.exit_code == 0, done.output + repr(done.exception)
    return done.output


def test_a_run_from_start_to_end_and_on(folder, tmp_path):
    said = call(folder, tmp_path / "run", "--steps", "2", "--pause", "0.0001")
    assert "paused; the same command goes on" in said
    said = call(folder, tmp_path / "run", "--steps", "2")
    assert "trained: " in said
    weights = load_matcher(tmp_path / "run" / "matcher.safetensors")
    assert weights.shape.descriptor_dims == (256,) and weights.shape.layers == SMOKE.layers
    assert len(weights.features[256]) == 64, "the card knows which features it belongs to"
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert any(line.get("resumed") for line in lines)
    judged = json.loads((tmp_path / "run" / "development.json").read_text())
    assert set(judged) == {"learned", "nearest"}
    assert set(judged["nearest"]) == {
        *(f"{kind}_{what}" for kind in ("changed", "layered") for what in ("precision", "recall", "area")),
        "unrelated_matches",
    }
    call(folder, tmp_path / "more", "--steps", "1", "--go-on", str(tmp_path / "run"))


def test_a_run_says_when_it_ends(folder, tmp_path):
    words = ["--photos", str(folder), "--features", str(packaged.WEIGHTS), "--output", str(tmp_path), "--device", "cpu"]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 2 and "--minutes or --steps says when" in done.output
    done = CliRunner().invoke(main, [*words, "--smoke", "--set", "colour=1"])
    assert done.exit_code == 2 and "expected one of pairs" in done.output


@pytest.mark.exhaustive
def test_everything_compiles_in_one_graph(folder):
    """torch.compile takes each of the three parts whole, and once."""
    from training.matcher import Run, draw, extractor, find, objective

    plan = replace(SMOKE, pairs=4, points=32)
    bank = photos.load(sorted(folder.iterdir()), CPU, plan.canvas_px)
    net, dim, digest = extractor(str(packaged.WEIGHTS), CPU)
    run = Run(plan, folder / "run", bank, bank, [net], {dim: digest}, CPU, 60.0)
    torch._dynamo.reset()
    run._draw, run._find, run._objective = (
        torch.compile(part, backend="aot_eager", dynamic=False, fullgraph=True) for part in (draw, find, objective)
    )
    for number in range(3):
        run._step(number)
    run.judge()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 3
