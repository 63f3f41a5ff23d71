"""Training of the matcher: scenes with known geometry, labels with known answers, and a run from start to end."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from conftest import photograph
from training import layered, matcher, pairs, photos
from training.bank import Bank
from training.layered import Worlds
from training.matcher import SMOKE, average, begin_with, main
from training.matching import _as_many, _together, area, figures, log_probability_of, loss_of, nearest, summary
from training.pairs import Batch, Plan, Pool, Truth, _different, _spoil, choose, draw, find, label, vary
from training.train import schedule

from superpoint_trt import packaged
from superpoint_trt.checkpoint.matcher import MatcherShape, load_matcher, save_matcher
from superpoint_trt.checkpoint.matcher_network import Assignment, MatcherNet, matches

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


def labelled(first, second, real, there) -> tuple[list, list]:
    """Of one pair: partners and lonely points of the first picture and of the second."""
    both = torch.tensor([[real, real]]).bool()
    partner, alone, _ = label(torch.tensor([[first, second]]), both, there)
    return partner[0].tolist(), alone[0].tolist()


def test_labels_of_known_points():
    """A partner within 3 px, or none; the padding never counts."""
    first = [[10.0, 10], [50, 50], [90, 90], [120, 20], [0, 0]]
    second = [[52.0, 50], [11, 10], [94, 90], [150, 60], [0, 0]]
    partner, alone = labelled(first, second, [1, 1, 1, 1, 0], (truth(first), truth(second)))
    assert partner == [[1, 0, -1, -1, -1]] * 2
    assert alone == [[False, False, True, True, False]] * 2, "the third lies 4 px away"


def test_partners_that_are_a_little_off_are_worth_less():
    first = [[10.0, 10], [50, 50], [90, 90], [120, 20]]
    second = [[10.5, 10], [52, 50], [92.9, 90], [150, 60]]
    batch = known_batch()
    labels = label(torch.tensor([[first, second]]), torch.ones(1, 2, 4).bool(), (truth(first), truth(second)))
    worth = batch._replace(**dict(zip(("partner", "alone", "apart"), labels))).worth(0.5)
    assert torch.allclose(worth, torch.tensor([[[1, 0.75, 0.525, 0]] * 2]))


def test_what_a_partner_is_not_worth_counts_as_alone():
    """At 3 px half of a point is a match, whose loss is log 16, and half has no partner, of which it is told 40."""
    batch = known_batch()
    batch.partner[0, :, 1] = -1
    batch.apart[0, :, 0] = 3
    plain = Assignment(torch.zeros(1, 4, 4), torch.full((1, 4), 40.0), torch.full((1, 4), 40.0))
    matched, alone = loss_of(plain, batch._replace(alone=torch.zeros_like(batch.alone)), batch.worth(0.5))
    assert matched.item() == pytest.approx(np.log(16) / 2, abs=1e-4), "weights below 1 in all are not blown up"
    assert alone.item() == pytest.approx(40)
    assert loss_of(plain, batch, batch.worth(1.0))[0].item() == pytest.approx(np.log(16), abs=1e-4)


def test_hidden_points_have_no_partner():
    same = [[10.0, 10], [50, 50]]
    there = truth(same, [False, True]), truth(same)
    assert labelled(same, same, [1, 1], there) == ([[-1, 1]] * 2, [[True, False]] * 2)
    there = truth(same, [False, True], [True, False]), truth(same)
    assert labelled(same, same, [1, 1], there)[1] == [[False, False], [True, False]], "near a silhouette nobody knows"


def test_only_mutual_nearest_are_partners():
    first, second = [[10.0, 10], [12, 10]], [[11.9, 10], [100, 100]]
    partner, alone = labelled(first, second, [1, 1], (truth(first), truth(second)))
    assert partner == [[-1, 0], [1, -1]]
    assert alone == [[False, False], [False, True]], "a point lies near, and is another's"


# ----------------------------------------------------------------------------------------------------------------- pool


def test_different_photographs_and_how_often():
    bank = Bank(torch.zeros(5, 3, 8, 8, dtype=torch.uint8), torch.full((5, 2), 8.0), torch.tensor([1.0, 1, 1, 1, 4]))
    index = _different(bank, 4000, 2)
    assert (index[:, 0] != index[:, 1]).all()
    assert abs((index[:, 0] == 4).float().mean() - 0.5) < 0.04
    assert _different(bank, 3, 7).shape == (3, 7), "more than there are: some come twice"


def test_every_so_many_pictures_are_spoiled():
    image = torch.rand(14, 1, 64, 64)
    changed = (_spoil(image, 5) != image).flatten(1).any(dim=1)
    assert changed.nonzero().flatten().tolist() == [0, 2, 5, 7, 10, 12]
    assert _spoil(image, 0) is image


def numbered(number: float) -> Batch:
    return Batch(*(torch.full(part.shape, number).to(part.dtype) for part in known_batch()))


def test_the_pool_replaces_its_oldest_batch():
    pool = Pool((numbered(i) for i in range(6)), 3)
    assert pool.pairs.rows[:, 0].tolist() == [0, 1, 2] and pool.pairs.descriptors.dtype is torch.float16
    pool.renew()
    pool.renew()
    assert pool.pairs.rows[:, 0].tolist() == [3, 4, 2]
    drawn = pool.sample(60)
    assert set(drawn.rows[:, 0].tolist()) == {2, 3, 4} and (drawn.xy[:, 0, 0, 0] == drawn.rows[:, 0]).all()


def test_varied_pairs_stay_true():
    """Half of them are mirrored, both pictures alike; a point whose partner is cut off is without one."""
    plan = Plan(points=4, fewer_share=0.0)
    batch = Batch(*(part.repeat(400, *[1] * (part.ndim - 1)) for part in known_batch()))
    varied = vary(plan, batch)
    mirrored = varied.xy[:, 0, 0, 0] != batch.xy[:, 0, 0, 0]
    assert 0.4 < mirrored.float().mean() < 0.6
    assert torch.allclose(varied.xy[..., 0][mirrored], 159 - batch.xy[..., 0][mirrored])
    assert torch.equal(varied.xy[~mirrored], batch.xy[~mirrored]) and torch.equal(varied.xy[..., 1], batch.xy[..., 1])
    assert torch.equal(varied.partner, batch.partner) and torch.equal(varied.alone, batch.alone)
    fewer = vary(Plan(points=4, fewer_share=1.0), batch)
    one = (fewer.rows[:, 0] >= 2) & (fewer.rows[:, 1] == 1)
    assert one.any()
    assert (fewer.partner[one, 0, :2] == torch.tensor([-1, 0])).all() and fewer.alone[one, 0, 0].all()
    assert (fewer.partner[one, 1] == torch.tensor([1, -1, -1, -1])).all()


# -------------------------------------------------------------------------------------------------------------- figures


def known_batch() -> Batch:
    """Points 0 and 1 of the first picture are 1 and 0 of the second, the next one is alone; the second has three."""
    descriptors = F.one_hot(torch.tensor([[0, 1, 2, 3], [1, 0, 3, 2]]), 8).float()
    alone = torch.zeros(1, 2, 4, dtype=torch.bool)
    alone[0, 0, 2] = True
    return Batch(
        torch.rand(1, 2, 4, 2),
        torch.ones(1, 2, 4),
        descriptors[None],
        torch.tensor([[4, 3]]),
        torch.tensor([[[160.0, 120]] * 2]),
        torch.tensor([[[1, 0, -1, -1]] * 2]),
        alone,
        torch.zeros(1, 2, 4),
    )


def test_nearest_neighbors_and_their_figures():
    batch = known_batch()
    found = nearest(batch)
    assert found[0].tolist() == [[1, 0, -1, 2]], "the last row of the second picture is padding"
    got = figures(found, batch, slice(0, 1))
    assert (int(got["true"]), got["right"].tolist(), len(got["all"])) == (2, [True, True], 3)


def test_a_summary_counts_sure_matches_alone():
    """Two pairs of one photograph, the second found with too small a score; one layered, two unrelated."""
    plan = Plan(pairs=5, layered_share=0.2, unrelated_share=0.4, min_score=0.1)
    batch = Batch(*(part.repeat(5, *[1] * (part.ndim - 1)) for part in known_batch()))
    there, score = nearest(batch)
    score[1] = 0.05
    rows = summary(plan, [batch], [(there, score)])
    assert rows["nearest"]["changed_recall"] == 1 and rows["learned"]["changed_recall"] == 0.5
    assert rows["learned"]["changed_precision_of_as_many"] == 1 and rows["learned"]["changed_score_of_as_many"] == 0.05
    assert rows["learned"]["layered_precision"] == 1 and rows["learned"]["unrelated_matches"] == 3


def test_the_area_is_average_precision():
    hits, scores = torch.tensor([True, False, True]), torch.tensor([0.9, 0.8, 0.1])
    assert area(hits, scores, 2) == pytest.approx((1 + 2 / 3) / 2)
    assert area(hits, scores, 4) == pytest.approx((1 + 2 / 3) / 4)
    assert area(hits[:0], scores[:0], 3) == 0


def test_precision_of_as_many_right_matches_as_nearest_neighbors_find():
    plain = {"right": torch.tensor([True, True])}
    learned = {"right": torch.tensor([True, True, False, True]), "scores": torch.tensor([0.3, 0.9, 0.8, 0.2])}
    found = _as_many("changed", learned, plain)
    assert found["changed_precision_of_as_many"] == pytest.approx(2 / 3, abs=1e-4)
    assert found["changed_score_of_as_many"] == pytest.approx(0.3)
    fewer = _as_many("changed", learned, {"right": torch.ones(4).bool()})
    assert fewer == {"changed_precision_of_as_many": 0, "changed_score_of_as_many": 0}
    together = _together([{"true": torch.tensor(2), "right": plain["right"]}] * 2)
    assert int(together["true"].sum()) == len(together["right"]) == 4


def test_the_loss_is_least_for_the_truth():
    batch = known_batch()
    right = torch.full((1, 4, 4), -20.0)
    right[0, [0, 1], [1, 0]] = 20
    sure = Assignment(right, torch.tensor([[20.0, 20, -20, 0]]), torch.full((1, 4), 20.0))
    matched, alone = loss_of(sure, batch, batch.worth(0.5))
    assert matched < 0.01 and alone < 0.01
    wrong = sure._replace(matchable0=-sure.matchable0)
    assert all(part > 4 for part in loss_of(wrong, batch, batch.worth(0.5)))
    assert loss_of(sure._replace(similarity=right.flip(2)), batch, batch.worth(0.5))[0] > 10


def test_every_match_counts_alike():
    """Of two pairs the first has two matches and the second one, and their losses are 0 and log 16."""
    batch = Batch(*(part.repeat(2, *[1] * (part.ndim - 1)) for part in known_batch()))
    batch.partner[1, :, 1] = -1
    similarity = torch.zeros(2, 4, 4)
    similarity[0, [0, 1], [1, 0]] = 40
    sure = Assignment(similarity, torch.full((2, 4), 40.0), torch.full((2, 4), 40.0))
    assert loss_of(sure, batch, batch.worth(0.5))[0].item() == pytest.approx(np.log(16) / 3, abs=1e-4)


def test_the_probability_at_a_partner_is_the_assignments():
    said = Assignment(torch.randn(2, 5, 5), torch.randn(2, 5), torch.randn(2, 5))
    partner = torch.tensor([[4, 3, 2, 1, 0], [0, 0, 1, 1, 2]])
    expected = said.log_probability().gather(2, partner[..., None])[..., 0]
    assert torch.allclose(log_probability_of(said, partner), expected, atol=1e-5)


# ----------------------------------------------------------------------------------------------------------------- runs


def test_a_matcher_begins_as_the_descriptors_nearest_neighbors(folder):
    """Descriptors that fill half of their dimensions lose nothing in the first map."""
    plan = Plan(pairs=5, points=64, height=120, width=160, canvas_px=240)
    bank = photos.load(sorted(folder.iterdir()), CPU, plan.canvas_px)
    from training.matcher import extractor

    batch = find(plan, extractor(str(packaged.WEIGHTS), CPU)[0], draw(plan, *choose(plan, bank)))
    basis = torch.linalg.qr(torch.randn(256, 32))[0]
    flat = F.normalize(batch.descriptors @ basis @ basis.T, dim=-1)
    batch = batch._replace(descriptors=flat)
    net = MatcherNet(MatcherShape((256,), 32, 2, 1))
    begin_with(net, flat)
    state = net.project["256"](torch.cat([flat, torch.zeros_like(flat[..., :1])], dim=-1))
    assert torch.allclose(state @ state.transpose(-1, -2) / 32, flat @ flat.transpose(-1, -2), atol=1e-4)
    found, expected = matches(net(*batch.sides())[-1], 0.0)[0], nearest(batch)[0]
    assert ((found == expected) | (expected < 0)).float().mean() > 0.9


def test_averaged_weights_follow():
    slow, quick = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    for net, value in ((slow, 0.0), (quick, 1.0)):
        for parameter in net.parameters():
            torch.nn.init.constant_(parameter, value)
    average(slow, quick, 0.75)
    assert slow.weight.item() == slow.bias.item() == pytest.approx(0.25)


def call(folder, output, *words, **options):
    words = ["--photos", str(folder), "--features", str(packaged.WEIGHTS), "--output", str(output), *words]
    done = CliRunner().invoke(
        main, [*words, "--device", "cpu", "--smoke", "--set", "pairs=5", "--set", "points=32"], **options
    )
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
    call(folder, tmp_path / "more", "--steps", "1", "--go-on", str(tmp_path / "run" / "matcher.safetensors"))


def test_a_run_that_was_cut_off_goes_on(folder, tmp_path, monkeypatch):
    """Steps, learning rate, optimizer and averages go on; what was done after the last state is done again."""
    steps = iter((average, average, None))
    monkeypatch.setattr(matcher, "average", lambda *args: next(steps)(*args))
    with pytest.raises(TypeError):
        call(folder, tmp_path / "run", "--steps", "4", catch_exceptions=False)
    monkeypatch.undo()
    before = torch.load(tmp_path / "run" / "state.pt", weights_only=True)
    assert before["step"] == 2 and before["optimizer"]["state"][0]["step"] == 2
    call(folder, tmp_path / "run", "--steps", "4")
    after = torch.load(tmp_path / "run" / "state.pt", weights_only=True)
    assert after["step"] == 4 and after["optimizer"]["state"][0]["step"] == 4
    assert after["optimizer"]["param_groups"][0]["lr"] == pytest.approx(SMOKE.learning_rate * schedule(3 / 4))
    saved = load_matcher(tmp_path / "run" / "matcher.safetensors").arrays["layers.0.cross.hidden.weight"]
    averaged, last = (after[name]["layers.0.cross.hidden.weight"].numpy() for name in ("average", "net"))
    np.testing.assert_allclose(saved, averaged, atol=1e-3)
    assert np.abs(averaged - last).max() > 0, "what is saved is the average"


def test_a_run_says_when_it_ends(folder, tmp_path):
    words = ["--photos", str(folder), "--features", str(packaged.WEIGHTS), "--output", str(tmp_path), "--device", "cpu"]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 2 and "--minutes, --within or --steps says when" in done.output
    done = CliRunner().invoke(main, [*words, "--smoke", "--set", "colour=1"])
    assert done.exit_code == 2 and "expected one of pairs" in done.output
    done = CliRunner().invoke(main, [*words, "--minutes", "1", "--within", "1"])
    assert done.exit_code == 2 and "--within is for a training of one call" in done.output


def test_a_training_of_one_call_ends_with_it(folder, tmp_path, monkeypatch):
    """On a clock that moves one second at each look: the learning rate falls to nothing in what ten steps leave."""
    clock = itertools.count()
    monkeypatch.setattr(matcher, "time", SimpleNamespace(perf_counter=lambda: float(next(clock))))
    rates = []
    monkeypatch.setattr(matcher, "schedule", lambda spent: rates.append(spent) or schedule(spent))
    assert "trained: " in call(folder, tmp_path / "run", "--within", "0.5", "--steps", "1000")
    rates = rates[::2]  # of both groups of parameters
    assert rates[:10] == pytest.approx([step / 1000 for step in range(10)]), "they compile: no time is counted"
    assert 0.85 < rates[-1] < 1 and len(rates) < 30
    state = torch.load(tmp_path / "run" / "state.pt", weights_only=True)
    assert state["step"] == len(rates) and state["optimizer"]["param_groups"][0]["lr"] < 0.1 * SMOKE.learning_rate


def test_weights_that_are_not_finite_are_not_saved(folder, tmp_path, monkeypatch):
    call(folder, tmp_path / "run", "--steps", "1")
    before = {name: (tmp_path / "run" / name).read_bytes() for name in ("state.pt", "matcher.safetensors")}
    broken = lambda averaged, net, kept: next(averaged.parameters()).fill_(float("nan"))  # noqa: E731
    monkeypatch.setattr(matcher, "average", broken)
    words = ["--photos", str(folder), "--features", str(packaged.WEIGHTS), "--output", str(tmp_path / "run")]
    done = CliRunner().invoke(main, [*words, "--device", "cpu", "--smoke", "--steps", "2"])
    assert done.exit_code == 2 and "a weight is not finite after 2 steps: lower learning_rate" in done.output
    assert before == {name: (tmp_path / "run" / name).read_bytes() for name in before}


def test_each_network_needs_an_input_of_its_own(folder, tmp_path):
    words = ["--photos", str(folder), "--output", str(tmp_path), "--device", "cpu", "--smoke"]
    done = CliRunner().invoke(main, [*words, "--features", "full", "--features", "full-v1"])
    assert done.exit_code == 2 and "two networks have descriptors of 256 numbers" in done.output
    start = save_matcher(MatcherNet(MatcherShape((256,), 16, 2, 1)).weights(), tmp_path / "start.safetensors")
    done = CliRunner().invoke(main, [*words, "--features", "small", "--go-on", str(start)])
    assert done.exit_code == 2 and "takes descriptors of 256 numbers; --features gives 64" in done.output


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("pairs=4", "pairs are 4 a step, 2 layered and 2 unrelated; expected more"),
        ("height=100", "pictures are 100 x 128 px; expected multiples of 8"),
        ("kept_batches=0", "kept_batches is too small"),
        ("learning_rate=-1", "learning_rate is too small"),
    ],
)
def test_numbers_that_cannot_be_used(folder, tmp_path, change, said):
    words = ["--photos", str(folder), "--features", "full", "--output", str(tmp_path), "--device", "cpu", "--smoke"]
    done = CliRunner().invoke(main, [*words, "--set", change])
    assert done.exit_code == 2 and said in done.output


def test_unrelated_pairs_are_of_two_photographs(monkeypatch):
    """However few a batch has: a picture and another view of itself would be told to have nothing in common."""
    plan = replace(SMOKE, pairs=5, unrelated_share=0.0)
    assert plan.kinds[2] == 2
    bank = Bank(torch.zeros(6, 3, 192, 192, dtype=torch.uint8), torch.full((6, 2), 190.0), torch.ones(6))
    for number in range(6):
        bank.images[number] = 40 * number + 20
    monkeypatch.setattr(pairs, "disturb", lambda image, *_: image)
    plain = replace(plan, spoiled_every=0)
    pictures = draw(plain, *choose(plain, bank))
    same = plan.kinds[0] + plan.kinds[1]
    first, second = (part[same:] for part in pictures.image.chunk(2))
    grays = [[round(float(view.median()) * 255) for view in side] for side in (first, second)]
    assert grays[0] == grays[1][::-1] and grays[0][0] != grays[0][1]


def test_compiled_pairs_are_those_that_are_not():
    """Torch 2.11 made a `Batch` without elements of `_replace`. Dynamo alone shows it."""
    plan = replace(SMOKE, pairs=5, points=32)
    shape = (plan.pairs, 2, plan.points)
    partner = torch.arange(plan.points).expand(shape)
    half = Batch(
        xy=torch.rand(*shape, 2) * 90,
        scores=torch.rand(shape),
        descriptors=torch.randn(*shape, 8).half(),
        rows=torch.full(shape[:2], 30, dtype=torch.int32),
        size=torch.tensor([128.0, 96.0]).expand(plan.pairs, 2, 2),
        partner=torch.where(partner < 20, partner, -1),
        alone=partner >= 20,
        apart=torch.rand(shape),
    )
    made = []
    for function in (vary, torch.compile(vary, backend="eager", dynamic=False, fullgraph=True)):
        torch.manual_seed(5)
        made.append(function(plan, half))
    assert len(made[1]) == len(Batch._fields)
    for name, plain, compiled in zip(Batch._fields, *made):
        torch.testing.assert_close(compiled, plain, rtol=0, atol=0, msg=name)


@pytest.mark.exhaustive
@pytest.mark.parametrize("names", [("full",), ("small",), ("full", "small")])
def test_everything_compiles_in_one_graph(folder, names):
    """torch.compile takes each of the four parts whole; pictures once, the others once for each network."""
    from training.matcher import Run, extractor, objective

    plan = replace(SMOKE, pairs=5, points=32)
    bank = photos.load(sorted(folder.iterdir()), CPU, plan.canvas_px)
    nets, dims, digests = zip(*(extractor(name, CPU) for name in names))
    run = Run(plan, folder / "run", bank, bank, list(nets), dict(zip(dims, digests)), CPU, 60.0)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    run._draw, run._find, run._vary, run._objective = (
        torch.compile(part, backend="aot_eager", dynamic=False, fullgraph=True)
        for part in (draw, find, vary, objective)
    )
    pools = [Pool(run._batches(bank, net), 2) for net in nets]
    for number in range(9):
        run._step(pools[number % len(pools)], number)
    run.judge()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1 + 3 * len(names)
