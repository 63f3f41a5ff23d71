"""Databases and maps: of points seen by known cameras, of rendered pictures, and of surveyed scenes."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import SHARED
from faults.processes import assert_refused, call, finish, start
from pipeline.scene import PARAMS, SIZE_WH, cameras, center_errors, render

from superpoint_trt.cli.main import cli, run
from superpoint_trt.core.types import Keypoints, SuperPointError
from superpoint_trt.match.nearest import Matches
from superpoint_trt.pipeline.feature_files import FeatureWriter
from superpoint_trt.pipeline.locks import only_one
from superpoint_trt.pipeline.match_files import MatchWriter, to_stored

pycolmap = pytest.importorskip("pycolmap", reason="maps need pycolmap (extra colmap)")
pytest.importorskip("h5py", reason="feature files need h5py (extra bulk)")

from superpoint_trt.pipeline.colmap_map import CameraSharing, ColmapOptions, MapReport, make_map  # noqa: E402
from superpoint_trt.pipeline.colmap_process import MapKind  # noqa: E402
from superpoint_trt.pipeline.map_picture import MapPoints, draw_map, seen_from_above  # noqa: E402

COUNT, POINTS, WRONG = 5, 200, 40
CALIBRATED = {"cameras": CameraSharing.SINGLE, "camera_model": "PINHOLE", "camera_params": PARAMS}
CAMERAS = cameras(COUNT)
NAMES = [f"views/{i}.png" for i in range(COUNT)]
CENTERS = {name: camera.center for name, camera in zip(NAMES, CAMERAS)}


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    """Blank pictures, 200 points where the cameras see them, and matches of which 40 of each pair are wrong."""
    folder, rng = tmp_path_factory.mktemp("known"), np.random.default_rng(0)
    points = rng.uniform(0.2, 1.8, (POINTS, 3))
    (folder / "images" / "views").mkdir(parents=True)
    with FeatureWriter(folder / "features.h5") as writer:
        for name, camera in zip(NAMES, CAMERAS):
            assert cv2.imwrite(str(folder / "images" / name), np.full(SIZE_WH[::-1], 128, np.uint8))
            xy = camera.project(points).astype(np.float32)
            found = Keypoints(xy, np.ones(POINTS, np.float32), np.ones((POINTS, 4), np.float32) / 2, SIZE_WH)
            writer.write(name, found, SIZE_WH)
    with MatchWriter(folder / "matches.h5") as writer:
        for pair in itertools.combinations(NAMES, 2):
            to = np.arange(POINTS)
            to[:WRONG] = rng.permutation(to[:WRONG])
            found = Matches(np.stack([np.arange(POINTS), to], axis=1), np.zeros(POINTS, np.float32))
            writer.write(pair, to_stored(found, POINTS, POINTS))
    return folder


def map_of(folder, output, **options):
    return make_map(
        folder / "images",
        folder / "features.h5",
        folder / "matches.h5",
        output,
        ColmapOptions(**{**CALIBRATED, **options}),
    )


def centers(output):
    model = pycolmap.Reconstruction(output / "sparse" / "0")
    return {image.name: image.projection_center() for image in model.images.values() if image.has_pose}


@pytest.mark.parametrize("kind", [MapKind.INCREMENTAL, MapKind.GLOBAL])
def test_known_cameras_are_found(known, tmp_path, kind):
    report = map_of(known, tmp_path, map=kind)
    assert (report.images, report.registered, report.models, report.left_out) == (COUNT, COUNT, 1, ())
    assert report.matched_pairs == 10 and report.matches == 10 * POINTS
    assert report.points >= POINTS - WRONG and report.reprojection_px < 0.1 and report.track_length > 4
    assert center_errors(centers(tmp_path), CENTERS).max() < 0.002, "half a pixel off would be more"
    assert MapReport.read(tmp_path / "report.json") == report
    picture = cv2.imread(str(tmp_path / "map.png"))
    assert picture.shape[1] == 1200 or 1200 < picture.shape[0] < 1300, "and its caption"
    assert (picture != 255).any(axis=2).mean() > 0.001


def test_geometry_is_verified_without_being_asked_for(known, tmp_path):
    """Wrong matches are in the database's matches, and not in its inliers; keypoints are COLMAP's pixels."""
    report = map_of(known, tmp_path, map=None)
    assert report.verified_pairs == 10 and report.map is None and not (tmp_path / "sparse").exists()
    assert 10 * (POINTS - WRONG) <= report.verified_matches < 10 * (POINTS - WRONG / 2)
    with pycolmap.Database.open(tmp_path / "database.db") as database:
        ids = {image.name: image.image_id for image in database.read_all_images()}
        import h5py

        with h5py.File(known / "features.h5") as features:
            stored = features[NAMES[2]]["keypoints"].__array__()
        np.testing.assert_allclose(database.read_keypoints(ids[NAMES[2]])[:, :2], stored + 0.5, atol=1e-4)
        assert len(database.read_matches(ids[NAMES[0]], ids[NAMES[1]])) == POINTS
        assert database.num_cameras() == 1


def test_a_run_replaces_an_older_one_but_no_map_of_others(known, tmp_path):
    (tmp_path / "sparse" / "7").mkdir(parents=True)
    with pytest.raises(SuperPointError, match="has a sparse that superpoint colmap did not make"):
        map_of(known, tmp_path)
    assert (tmp_path / "sparse" / "7").is_dir()
    map_of(known, tmp_path / "own", map=None)
    (tmp_path / "own" / "sparse" / "7").mkdir(parents=True)
    assert map_of(known, tmp_path / "own").registered == COUNT
    assert [path.name for path in (tmp_path / "own" / "sparse").iterdir()] == ["0"]


def test_pictures_that_match_nothing_have_no_map(known, tmp_path):
    with MatchWriter(tmp_path / "none.h5") as writer:
        nothing = Matches(np.zeros((0, 2), np.int64), np.zeros(0, np.float32))
        for pair in itertools.combinations(NAMES, 2):
            writer.write(pair, to_stored(nothing, POINTS, POINTS))
    report = make_map(known / "images", known / "features.h5", tmp_path / "none.h5", tmp_path / "map")
    assert (report.registered, report.models, report.reprojection_px) == (0, 0, None)
    assert report.left_out == tuple(NAMES) and not (tmp_path / "map" / "map.png").exists()
    assert dict(report.rows())["images in the map"] == f"0 of {COUNT} (incremental)"


def test_files_that_do_not_belong_together(known, tmp_path):
    files = (known / "features.h5", known / "matches.h5")
    with pytest.raises(SuperPointError, match=r"has no 'views/0\.png' \(5 of 5 images"):
        make_map(tmp_path, *files, tmp_path / "map")
    with MatchWriter(tmp_path / "other.h5") as writer:
        beyond = Matches(np.array([[0, POINTS]]), np.zeros(1, np.float32))
        writer.write((NAMES[0], NAMES[1]), to_stored(beyond, POINTS, POINTS + 1))
    with pytest.raises(SuperPointError, match=r"matches keypoints .* does not have; match these features again"):
        make_map(known / "images", files[0], tmp_path / "other.h5", tmp_path / "map")


@pytest.mark.parametrize(
    ("options", "words"),
    [({"camera_model": "NO_SUCH"}, "NO_SUCH"), ({"camera_params": (1.0,)}, "PINHOLE")],
    ids=["model", "parameters"],
)
def test_cameras_that_make_no_sense(known, tmp_path, capfd, options, words):
    with pytest.raises(SuperPointError, match=f"COLMAP does not take the images.*{words}"):
        map_of(known, tmp_path, **options)
    assert capfd.readouterr().err == "", "COLMAP's own lines"


def test_a_run_that_fails_leaves_the_old_map(known, tmp_path):
    map_of(known, tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert {"database.db", "report.json", "map.png", "points3D.bin"} <= {path.name for path in before}
    with pytest.raises(SuperPointError, match="COLMAP does not take the images"):
        map_of(known, tmp_path, camera_model="NO_SUCH")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_the_command_prints_the_report(known, tmp_path, capsys):
    files = f"--images {known / 'images'} --features {known / 'features.h5'} --matches {known / 'matches.h5'}"
    camera = f"--cameras single --camera-model PINHOLE --camera-params {','.join(map(str, PARAMS))}"
    assert run(cli, ["colmap", *files.split(), "--output", str(tmp_path), "--map", "global", *camera.split()]) == 0
    told = capsys.readouterr().out
    assert "5 of 5 (global)" in told and "reprojection error" in told and "track length" in told
    assert json.loads((tmp_path / "report.json").read_text())["registered"] == COUNT
    assert run(cli, ["colmap", *files.split(), "--output", str(tmp_path), "--camera-params", "a,b"]) == 2
    assert "expected numbers with commas" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------- processes


@pytest.fixture
def stopped(known, tmp_path):
    """`superpoint colmap` over an older map, whose COLMAP process stands still; and that process's id."""
    map_of(known, tmp_path / "map", map=None)
    files = f"--images {known / 'images'} --features {known / 'features.h5'} --matches {known / 'matches.h5'}"
    process = start(["colmap", *files.split(), "--map", "incremental", "--output", "map"], tmp_path)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    child = 0
    while not child:
        assert process.poll() is None, finish(process)
        begun = [int(number) for number in children.read_text().split()]
        child = next((number for number in begun if is_at_work(number)), 0)
    os.kill(child, signal.SIGSTOP)
    yield process, child
    with suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
    process.kill()
    process.wait()


def is_at_work(number):
    """Whether a process is COLMAP's, and has read what it is to do: then it has a thread more."""
    try:
        line = Path(f"/proc/{number}/cmdline").read_bytes()
        return b"colmap_process" in line and len(os.listdir(f"/proc/{number}/task")) > 1
    except OSError:  # it has ended
        return False


needs_proc = pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="this system lists no child processes")


def files_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@needs_proc
def test_an_interrupt_ends_colmap_whatever_it_does(stopped, tmp_path):
    process, child = stopped
    before = {path: data for path, data in files_of(tmp_path / "map").items() if not path.match("*unfinished*/*")}
    process.send_signal(signal.SIGINT)
    done = finish(process)
    assert (done.code, done.err.strip()) == (130, ""), "and no traceback"
    assert not Path(f"/proc/{child}").exists()
    del before[Path(".superpoint-colmap.lock")]
    assert files_of(tmp_path / "map") == before and "database.db" in map(str, before)
    assert not (tmp_path / "map" / ".superpoint-colmap.unfinished").exists()


@needs_proc
def test_colmap_ends_with_the_process_that_began_it(stopped):
    process, child = stopped
    process.kill()
    process.wait()
    os.kill(child, signal.SIGCONT)
    while Path(f"/proc/{child}").exists() and Path(f"/proc/{child}/stat").read_text().split()[2] != "Z":
        time.sleep(0.01)


@needs_proc
def test_a_colmap_that_crashes_is_one_line(stopped, tmp_path):
    process, child = stopped
    os.kill(child, signal.SIGKILL)
    assert_refused(finish(process), "COLMAP ended with exit code -9", "too little memory")


@needs_proc
def test_two_maps_at_once(stopped, known, tmp_path):
    """The second is refused; the first comes to its end."""
    process, child = stopped
    with pytest.raises(SuperPointError, match=r"another process works on .*map \(its lock is .*\.lock\)"):
        map_of(known, tmp_path / "map")
    os.kill(child, signal.SIGCONT)
    assert finish(process).code == 0
    assert MapReport.read(tmp_path / "map" / "report.json").registered == COUNT
    assert not list((tmp_path / "map").glob(".*lock"))


def test_two_reconstructions_at_once(room, tmp_path):
    """The lock is held by this process, as by a first command."""
    folder = tmp_path / "map"
    with only_one(folder, ".superpoint-reconstruct.lock"):
        done = call(["reconstruct", str(room), "--output", str(folder)], tmp_path)
        assert_refused(done, "another process works on", "superpoint-reconstruct.lock")
    assert not folder.exists(), "it is empty"


def test_a_reconstruction_that_is_refused_makes_nothing(room, tmp_path, capsys):
    for line in (["--max-keypoints", "0"], ["--fps", "0"], ["--verify-px", "0"], ["--model", "missing.onnx"]):
        assert run(cli, ["reconstruct", str(room), "--output", str(tmp_path / "map"), *line]) == 2
        assert capsys.readouterr().err.startswith("error: ") and not list(tmp_path.iterdir()), line
    assert run(cli, ["reconstruct", str(tmp_path / "missing"), "--output", str(tmp_path / "map")]) == 2
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------------------- picture


def test_above_is_where_the_tops_of_pictures_point():
    """Cameras that look along the world's third axis, whose second points down."""
    right, up = seen_from_above(np.stack([np.eye(3)] * 3))
    np.testing.assert_allclose(right, [1, 0, 0], atol=1e-12)
    np.testing.assert_allclose(up, [0, 0, 1], atol=1e-12)


@pytest.mark.parametrize("angles", [[0, 180], [0, 120, 240]])
def test_cameras_that_look_all_around(angles):
    turns = [cv2.Rodrigues(np.array([0.0, np.radians(a), 0]))[0] for a in angles]
    axes = seen_from_above(np.stack(turns))
    np.testing.assert_allclose(axes @ axes.T, np.eye(2), atol=1e-9)
    np.testing.assert_allclose(axes[:, 1], 0, atol=1e-9)


def test_what_lies_ahead_is_drawn_above_the_camera():
    """One camera at the origin; a green point ahead to the left, a blue one ahead to the right."""
    colors = np.array([[0, 255, 0], [0, 0, 255]], np.uint8)
    scene = MapPoints(np.array([[-2.0, 0, 4], [2, 0, 4]]), colors, np.zeros((1, 3)), np.eye(3)[None])
    picture = draw_map(scene, 400).astype(int)
    green = np.argwhere((picture[..., 1] > 150) & (picture[..., [0, 2]].max(axis=2) < 60))
    blue = np.argwhere((picture[..., 2] > 150) & (picture[..., :2].max(axis=2) < 60))
    assert len(green) and len(blue) and green[:, 1].max() < blue[:, 1].min()
    assert green[:, 0].max() < picture.shape[0] / 2


def test_a_map_without_points_is_drawn():
    empty = MapPoints(np.zeros((0, 3)), np.zeros((0, 3), np.uint8), np.zeros((1, 3)), np.eye(3)[None])
    assert draw_map(empty, 300).ndim == 3


# -------------------------------------------------------------------------------------------------------------- scenes


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    folder = tmp_path_factory.mktemp("room")
    for index, camera in enumerate(cameras(4)):
        assert cv2.imwrite(str(folder / f"{index}.png"), render(camera))
    return folder


def test_rendered_pictures_are_mapped_and_a_second_run_does_nothing_twice(room, tmp_path, capsys):
    arguments = ["reconstruct", str(room), "--output", str(tmp_path / "map"), "--device", "cpu"]
    arguments += ["--max-keypoints", "700", "--cameras", "single", "--camera-model", "PINHOLE"]
    arguments += ["--camera-params", ",".join(map(str, PARAMS))]
    assert run(cli, arguments) == 0
    told = capsys.readouterr().out
    assert "4 of 4" in told
    report = MapReport.read(tmp_path / "map" / "report.json")
    assert report.registered == 4 and report.reprojection_px < 1 and report.points > 150
    true = {f"{index}.png": camera.center for index, camera in enumerate(cameras(4))}
    assert center_errors(centers(tmp_path / "map"), true).max() < 0.02, "of a room of 2"
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "map").rglob("*") if path.name != "pairs.txt"}
    assert run(cli, arguments) == 0
    assert "map of the last run was kept" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert run(cli, [*arguments, "--max-keypoints", "600"]) == 2
    assert "max_keypoints" in capsys.readouterr().err


def test_photographs_that_cannot_be_read_are_told(room, tmp_path, capsys):
    folder = shutil.copytree(room, tmp_path / "photographs")
    (folder / "9.png").write_bytes(b"no picture")
    arguments = ["reconstruct", str(folder), "--output", str(tmp_path / "map"), "--max-side", "160", "--device", "cpu"]
    assert run(cli, arguments) == 1
    assert "left out: 9.png" in capsys.readouterr().err


def test_frames_of_a_video_are_written_once_and_mapped(tmp_path, capsys):
    pytest.importorskip("av", reason="videos need PyAV (extra bulk)")
    from superpoint_trt.pipeline.video_writer import VideoWriter

    with VideoWriter(tmp_path / "room.mp4") as video:
        for index, camera in enumerate(cameras(7)):
            video.write(np.repeat(render(camera)[..., None], 3, axis=2), index / 4)
    arguments = ["reconstruct", str(tmp_path / "room.mp4"), "--output", str(tmp_path / "map"), "--device", "cpu"]
    arguments += ["--max-keypoints", "500", "--max-side", "480", "--cameras", "single", "--camera-model", "PINHOLE"]
    arguments += ["--camera-params", ",".join(map(str, PARAMS))]
    assert run(cli, arguments) == 0
    assert "4 of 4" in capsys.readouterr().out, "two frames a second"
    frames = sorted((tmp_path / "map" / "images").iterdir())
    names = ["000000_0.000s.jpg", "000002_0.500s.jpg", "000004_1.000s.jpg", "000006_1.500s.jpg"]
    assert [path.name for path in frames] == names
    written = [path.stat().st_mtime_ns for path in frames]
    assert run(cli, arguments) == 0
    assert [path.stat().st_mtime_ns for path in frames] == written
    with VideoWriter(tmp_path / "other.mp4") as video:
        for index in range(7):
            video.write(np.full((*SIZE_WH[::-1], 3), 40 * index, np.uint8), index / 4)
    arguments[1] = str(tmp_path / "other.mp4")
    for changed in (arguments, [*arguments[:1], str(tmp_path / "room.mp4"), *arguments[2:], "--fps", "4"]):
        assert run(cli, changed) == 2
        assert "has frames of another video, or at other times" in capsys.readouterr().err
    assert [path.stat().st_mtime_ns for path in frames] == written
    run(cli, [*arguments, "--overwrite"])
    assert cv2.imread(str(frames[0])).max() < 5, "of the other video"


def test_maps_do_not_lie_among_the_photographs(room, capsys):
    assert run(cli, ["reconstruct", str(room), "--output", str(room / "map")]) == 2
    assert "lies in the folder of the photographs" in capsys.readouterr().err
    assert not (room / "map").exists()


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("scene", "points", "reprojection_px", "auc_1"),
    [("fountain-P11", 3000, 0.9, 0.90), ("Herz-Jesus-P8", 2200, 0.8, 0.90)],
)
def test_surveyed_scenes(tmp_path, scene, points, reprojection_px, auc_1):
    """About the figures that the packaged networks have; judged by a tool that shares no code."""
    folder, judge = SHARED / "data" / "sfm" / scene, SHARED / "tools" / "map_poses.py"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not here: the scenes are not part of this repository")
    assert run(cli, ["reconstruct", str(folder / "images"), "--output", str(tmp_path / "map")]) == 0
    report = MapReport.read(tmp_path / "map" / "report.json")
    assert not report.left_out and report.points > points and report.reprojection_px < reprojection_px
    files = [tmp_path / "map" / "features.h5", tmp_path / "map" / "matches.h5", tmp_path / "work"]
    done = subprocess.run([sys.executable, judge, folder, *files], capture_output=True, text=True, check=True)
    judged = json.loads(done.stdout)
    assert judged["points"] > points and judged["reprojection_px"] < reprojection_px
    assert judged["auc@1"] > auc_1 and judged["centre_error_mean_m"] < 0.008
