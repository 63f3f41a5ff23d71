"""Frames of videos: which there are and when, also at a variable frame rate; their pixels; rotation."""

from __future__ import annotations

import random

import numpy as np
import pytest
from pipeline.videos import number_of, write_video

from superpoint_trt import SuperPointError
from superpoint_trt.pipeline.video import Frame, VideoReader, choose_frames, list_frames

pytest.importorskip("av", reason="videos need PyAV: pip install '.[bulk]'")

VARIABLE_MS = np.cumsum([0, *([40, 20, 100] * 13)]).tolist()
KINDS = {
    "b-frames.mp4": ("libx264", {"bf": "3", "g": "12"}),
    "short.mkv": ("libx264", {"bf": "2", "g": "10"}),
    "plain.mp4": ("mpeg4", {"g": "12"}),
    "vp9.webm": ("libvpx-vp9", {"g": "8", "deadline": "realtime"}),
    "stream.ts": ("libx264", {"bf": "2", "g": "10"}),
}


@pytest.fixture(scope="module", params=KINDS)
def video(request, tmp_path_factory):
    codec, options = KINDS[request.param]
    return write_video(tmp_path_factory.mktemp("video") / request.param, VARIABLE_MS, codec, **options)


def test_every_frame_has_its_time(video):
    frames = list_frames(video)
    assert [frame.number for frame in frames] == list(range(len(VARIABLE_MS)))
    start_s = 0.0 if video.suffix != ".ts" else frames[0].time_s  # a transport stream starts where it likes
    np.testing.assert_allclose([frame.time_s - start_s for frame in frames], np.array(VARIABLE_MS) / 1000, atol=6e-4)


def test_any_frame_can_be_read_in_any_order(video):
    frames = list_frames(video)
    some = random.Random(0).sample(frames, 15)
    with VideoReader(video) as reader:
        for frame in [*frames, *some, frames[0]]:
            assert number_of(reader.read(frame)) == frame.number
    for frame in some[:4]:  # a reader that is opened in the middle
        with VideoReader(video) as reader:
            assert number_of(reader.read(frame)) == frame.number


def test_a_container_whose_times_are_poor(tmp_path):
    """An AVI has no times of its own; with B-frames the last two are equal."""
    video = write_video(tmp_path / "old.avi", range(0, 1600, 40), "mpeg4", bf="2")
    frames = list_frames(video)
    assert len(frames) == 39
    with VideoReader(video) as reader:
        assert [number_of(reader.read(frame)) for frame in frames[7:20]] == list(range(7, 20))


def test_names():
    assert Frame(123, 4100, 4.1).name == "000123_4.100s"


def test_rotation_is_applied(tmp_path):
    for rotation in (0, 90, -90, 180):
        video = write_video(tmp_path / f"{rotation}.mp4", range(0, 400, 40), rotation=rotation)
        with VideoReader(video) as reader:
            image = reader.read(list_frames(video)[3])
        assert number_of(np.rot90(image, -rotation // 90)) == 3
        corner = {0: (0, 0), 90: (-24, 0), -90: (0, -24), 180: (-24, -24)}[rotation]  # counterclockwise
        assert image[corner[0] :, corner[1] :][:20, :20].min() > 200


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ({}, list(range(10))),
        ({"every": 4}, [0, 4, 8]),
        ({"fps": 10}, [0, 1, 2, 3, 5, 6, 8]),
        ({"fps": 1000}, list(range(10))),
        ({"fps": 1}, [0, 8]),
        ({"fps": 5, "every": 2}, [0, 2, 6, 8]),
    ],
)
def test_some_frames(how, expected):
    times = (5.0, 5.1, 5.2, 5.34, 5.38, 5.4, 5.5, 5.51, 6.0, 6.01)
    frames = [Frame(index, index, time_s) for index, time_s in enumerate(times)]
    assert [frame.number for frame in choose_frames(frames, **how)] == expected


@pytest.mark.parametrize(("how", "told"), [({"every": 0}, "--every is 0"), ({"fps": 0}, "--fps is 0")])
def test_numbers_out_of_range(how, told):
    with pytest.raises(SuperPointError, match=told):
        choose_frames([], **how)


def test_no_video(tmp_path):
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(SuperPointError, match=r"text\.mp4 cannot be opened as a video"):
        list_frames(tmp_path / "text.mp4")
    with pytest.raises(SuperPointError, match="does not exist"):
        list_frames(tmp_path / "missing.mp4")


def test_a_damaged_video_loses_single_frames(tmp_path):
    video = write_video(tmp_path / "damaged.mp4", range(0, 1600, 40), "mpeg4", g="10")
    frames = list_frames(video)
    data = bytearray(video.read_bytes())
    half = len(data) // 2
    data[half : half + 300] = bytes(300)
    video.write_bytes(data)
    read = 0
    with VideoReader(video) as reader:
        for frame in frames:
            try:
                reader.read(frame)
                read += 1
            except SuperPointError as error:
                assert "cannot be decoded" in str(error)
    assert read > len(frames) // 2
