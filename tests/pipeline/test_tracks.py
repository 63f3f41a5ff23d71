"""Tracks by hand, and of a photograph that is shifted by known steps."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from conftest import photograph
from PIL import Image
from pipeline.hand_made import orthogonal

from superpoint_trt import SuperPoint
from superpoint_trt.cli.main import cli, run
from superpoint_trt.core.types import SuperPointError
from superpoint_trt.pipeline.track_video import SourceOptions, TrackOutputs, track
from superpoint_trt.pipeline.tracks import PointTracker, TrackOptions, TrackRecord, draw_tracks, save_tracks

STEP = np.array([16, 8])  # whole cells, so that the network sees the same
FRAMES = 6
SIZE_WH = (320, 240)


def test_tracks_by_hand():
    """Descriptor k is point k. Point 2 is lost in the third image, so it is a new track in the fourth."""
    tracker = PointTracker(TrackOptions(max_length=3))
    seen = [tracker.update(orthogonal(points)) for points in ([1, 2], [2, 1, 3], [3, 1], [2, 1, 3])]
    assert [now.numbers.tolist() for now in seen] == [[0, 1], [1, 0, 2], [2, 0], [3, 0, 2]]
    assert [now.lengths.tolist() for now in seen] == [[1, 1], [2, 2, 1], [2, 3], [1, 4, 3]]
    np.testing.assert_array_equal(seen[1].paths[0], [[np.nan] * 2, [2, 20], [2, 20]])
    np.testing.assert_array_equal(seen[3].paths[0], [[np.nan] * 2, [np.nan] * 2, [2, 20]])


def test_images_without_points_end_all_tracks():
    tracker = PointTracker()
    numbers = [tracker.update(orthogonal(points)).numbers.tolist() for points in ([1], [], [1])]
    assert numbers == [[0], [], [1]]


def test_a_record_keeps_what_lasts_and_numbers_it_anew(tmp_path):
    tracker, record = PointTracker(), TrackRecord()
    for index, points in enumerate(([1, 2], [2, 3], [4, 2, 3])):
        record.add(f"{index}", index / 10, tracker.update(orthogonal(points)))
    tracks = record.tracks(min_length=2)
    assert len(tracks) == 2 and tracks.lengths.tolist() == [3, 2]
    assert tracks.track.tolist() == [0, 0, 1, 0, 1] and tracks.frame.tolist() == [0, 1, 1, 2, 2]
    assert tracks.xy[:, 0].tolist() == [2, 2, 3, 2, 3]
    with np.load(save_tracks(tmp_path / "tracks.npz", tracks)) as saved:
        assert saved["names"].tolist() == ["0", "1", "2"] and saved["times_s"].tolist() == [0, 0.1, 0.2]
        assert saved["track"].tolist() == tracks.track.tolist()
    assert len(record.tracks(min_length=9)) == 0
    assert len(TrackRecord().tracks(1)) == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_distance": 0}, "largest distance is 0"),
        ({"min_length": 0}, "is 0 images"),
        ({"max_length": 1}, "through 1"),
    ],
    ids=str,
)
def test_options_that_make_no_sense(options, words):
    with pytest.raises(SuperPointError, match=words):
        TrackOptions(**options)


def test_paths_are_drawn_where_points_went():
    tracker = PointTracker()
    for points in ([1, 5], [1, 7]):
        now = tracker.update(orthogonal(points))
    blank = np.zeros((100, 100, 3), np.uint8)
    picture = draw_tracks(blank, now, TrackOptions())
    assert picture[10, 1].any(), "the point that was followed"
    assert not picture[70, 7].any(), "a point that is new"
    assert not blank.any()


@pytest.fixture(scope="module")
def shifted(tmp_path_factory):
    """A folder of views of one photograph; what is at x in one is at x - STEP in the next."""
    folder = tmp_path_factory.mktemp("shifted")
    whole = photograph(480, 640, "astronaut")
    for index in range(FRAMES):
        x, y = 40 + index * STEP
        assert cv2.imwrite(str(folder / f"{index}.png"), whole[y : y + SIZE_WH[1], x : x + SIZE_WH[0]])
    return folder


@pytest.fixture(scope="module")
def superpoint():
    with SuperPoint(max_keypoints=300, device="cpu") as opened:
        yield opened


def test_a_photograph_that_moves(shifted, superpoint, tmp_path):
    found = track(shifted, superpoint, TrackOutputs(pictures=tmp_path / "pictures"))
    tracks = found.tracks
    assert found.frames == FRAMES and tracks.names == tuple(f"{i}.png" for i in range(FRAMES)) and not found.left_out
    moved = []
    for number in range(len(tracks)):
        rows = tracks.track == number
        assert (np.diff(tracks.frame[rows]) == 1).all(), "a track has no gaps"
        moved.append(np.diff(tracks.xy[rows], axis=0))
    errors = np.linalg.norm(np.concatenate(moved) + STEP, axis=1)
    assert (errors < 1).mean() > 0.9 and np.median(errors) < 0.1
    assert (tracks.lengths == FRAMES).sum() > 30
    pictures = sorted((tmp_path / "pictures").iterdir())
    assert [path.name for path in pictures] == [f"frame_{i:05}.png" for i in range(FRAMES)]
    assert (cv2.imread(str(pictures[-1])) != cv2.imread(str(shifted / f"{FRAMES - 1}.png"))).any()


def test_some_of_the_images(shifted, superpoint):
    assert track(shifted, superpoint, TrackOutputs(), source_options=SourceOptions(every=2)).frames == FRAMES // 2
    one = track(shifted, superpoint, TrackOutputs(), source_options=SourceOptions(image_glob="[012].png"))
    assert one.tracks.names == ("0.png", "1.png", "2.png")
    with pytest.raises(SuperPointError, match=r"no image whose name is '\*\.jpg'"):
        track(shifted, superpoint, TrackOutputs(), source_options=SourceOptions(image_glob="*.jpg"))


def test_an_image_that_cannot_be_read_is_left_out(shifted, superpoint, tmp_path):
    for path in shifted.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "1.png").write_bytes(b"no picture")
    found = track(tmp_path, superpoint, TrackOutputs())
    assert found.frames == FRAMES - 1 and len(found.left_out) == 1 and "1.png" in found.left_out[0]
    assert run(cli, ["track", str(tmp_path), "--no-display", "--device", "cpu"]) == 1
    for path in tmp_path.iterdir():
        path.write_bytes(b"no picture")
    with pytest.raises(SuperPointError, match="has no image that can be read"):
        track(tmp_path, superpoint, TrackOutputs())


def test_images_of_different_sizes_are_refused_before_the_work(shifted, superpoint, tmp_path, capsys):
    """The last one is turned by EXIF, so that its pixels as stored have the size of the others."""
    pytest.importorskip("av", reason="videos need PyAV (extra bulk)")
    folder = tmp_path / "photos"
    folder.mkdir()
    exif = Image.Exif()
    exif[274] = 6
    for path in shifted.iterdir():
        turned = {"exif": exif} if path.name == f"{FRAMES - 1}.png" else {}
        Image.open(path).save(folder / path.name, **turned)
    told = []
    outputs = TrackOutputs(tmp_path / "t.mp4", tmp_path / "t.npz", tmp_path / "pictures")
    width, height = SIZE_WH
    words = f"{FRAMES - 1}.png has {height}x{width} px, 0.png {width}x{height}; .*--img-glob"
    with pytest.raises(SuperPointError, match=words):
        track(folder, superpoint, outputs, progress=lambda phase, *_: told.append(phase))
    assert set(told) <= {"looking at sizes"} and [path.name for path in tmp_path.iterdir()] == ["photos"]
    line = ["track", str(folder), "--output", str(tmp_path / "t.mp4"), "--device", "cpu"]
    assert run(cli, line) == 2
    assert capsys.readouterr().err.count("\n") == 1 and [path.name for path in tmp_path.iterdir()] == ["photos"]


def test_two_videos_of_different_sizes_leave_no_file(superpoint, tmp_path):
    """Their frames have no headers to look at; the video of the tracks is not half there."""
    pytest.importorskip("av", reason="videos need PyAV (extra bulk)")
    from superpoint_trt.pipeline.video_writer import VideoWriter

    (tmp_path / "videos").mkdir()
    for name, side in (("a.mp4", 96), ("b.mp4", 128)):
        with VideoWriter(tmp_path / "videos" / name) as video:
            for index in range(3):
                video.write(np.full((side, 128, 3), 40 * index, np.uint8), index / 10)
    (tmp_path / "list.txt").write_text(f"{tmp_path}/videos/a.mp4\n{tmp_path}/videos/b.mp4\n")
    with pytest.raises(SuperPointError, match=r"b\.mp4/000000_0\.000s has 128x128 px, .* 128x96"):
        track(f"@{tmp_path}/list.txt", superpoint, TrackOutputs(tmp_path / "t.mp4"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["list.txt", "videos"]


def test_a_video_in_and_out(shifted, superpoint, tmp_path):
    """With the source's times: images are not evenly spaced."""
    pytest.importorskip("av", reason="videos need PyAV (extra bulk)")
    from superpoint_trt.pipeline.video import list_frames
    from superpoint_trt.pipeline.video_writer import VideoWriter

    times = [2.0, 2.1, 2.5, 2.6, 3.0, 3.1]
    with VideoWriter(tmp_path / "in.mp4") as video:
        for index, time_s in enumerate(times):
            video.write(cv2.imread(str(shifted / f"{index}.png"))[..., ::-1], time_s)
    assert [frame.time_s for frame in list_frames(tmp_path / "in.mp4")] == pytest.approx(
        [t - 2 for t in times], abs=1e-4
    )
    found = track(tmp_path / "in.mp4", superpoint, TrackOutputs(video=tmp_path / "out.mp4"))
    assert found.frames == FRAMES and (found.tracks.lengths == FRAMES).sum() > 20
    written = list_frames(tmp_path / "out.mp4")
    assert [frame.time_s for frame in written] == pytest.approx(found.tracks.times_s, abs=1e-4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.mp4", "out.mp4"]


def test_videos_that_cannot_be_written(tmp_path):
    pytest.importorskip("av", reason="videos need PyAV (extra bulk)")
    from superpoint_trt.pipeline.video_writer import VideoWriter

    with pytest.raises(SuperPointError, match=r"name that ends in \.mp4"):
        VideoWriter(tmp_path / "tracks.gif")
    picture = np.zeros((63, 65, 3), np.uint8)
    with pytest.raises(SuperPointError, match="one size"), VideoWriter(tmp_path / "tracks.mp4") as video:
        video.write(picture, 0)
        video.write(picture[:40], 1)
    assert not list(tmp_path.iterdir())


def test_a_window_needs_a_screen(shifted, superpoint, monkeypatch):
    def fails(*_):
        raise cv2.error("no screen")

    monkeypatch.setattr(cv2, "namedWindow", fails)
    with pytest.raises(SuperPointError, match=r"cannot show a window .*--output tracks\.mp4"):
        track(shifted, superpoint, TrackOutputs(window=True))


class Camera:
    """Shows the files of a folder, then the user presses Ctrl-C."""

    def __init__(self, folder, opened=True):
        self.paths, self.opened, self.released = iter(sorted(folder.iterdir())), opened, False

    def isOpened(self):
        return self.opened

    def read(self):
        for path in self.paths:
            return True, cv2.imread(str(path))
        raise KeyboardInterrupt

    def release(self):
        self.released = True


def test_a_camera_is_followed_until_it_is_interrupted(shifted, superpoint, tmp_path, monkeypatch):
    """What was followed until then is written, and equal to that of the files."""
    camera = Camera(shifted)
    monkeypatch.setattr(cv2, "VideoCapture", lambda number: camera)
    found = track("camera", superpoint, TrackOutputs(tracks=tmp_path / "tracks.npz"))
    expected = track(shifted, superpoint, TrackOutputs()).tracks
    assert found.frames == FRAMES and camera.released
    # Gray of color is rounded, so two points of nearly one score may change places.
    same = found.tracks.track == expected.track
    assert same.mean() > 0.99
    np.testing.assert_allclose(found.tracks.xy[same], expected.xy[same], atol=0.05)
    assert (tmp_path / "tracks.npz").exists()
    camera = Camera(shifted, opened=False)
    with pytest.raises(SuperPointError, match="camera 3 cannot be opened"):
        track("camera", superpoint, TrackOutputs(), source_options=SourceOptions(camera=3))


def test_the_command_takes_the_original_demos_flags(shifted, tmp_path, capsys):
    flags = "--nn_thresh 0.6 --max_length 4 --min_length 3 --conf_thresh 0.01 --nms_dist 5 --skip 2 --img_glob *.png"
    flags += f" --camid 1 --no_display --write_dir {tmp_path / 'frames'} --device cpu --save {tmp_path / 'tracks.npz'}"
    assert run(cli, ["track", str(shifted), *flags.split()]) == 0
    assert "tracks" in capsys.readouterr().out
    assert len(list((tmp_path / "frames").iterdir())) == FRAMES // 2
    with np.load(tmp_path / "tracks.npz") as saved:
        assert (np.bincount(saved["track"]) == 3).all()
