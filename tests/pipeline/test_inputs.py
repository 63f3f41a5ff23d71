"""What users name: images, folders, globs, lists, videos; names, and names that would collide."""

from __future__ import annotations

import os

import pytest
from pipeline.videos import write_video

from superpoint_trt import SuperPointError
from superpoint_trt.pipeline.inputs import InputOptions, find_items
from superpoint_trt.pipeline.pairs import with_spaces


@pytest.fixture
def tree(tmp_path, monkeypatch):
    for name in ("photos/b.JPG", "photos/a.png", "photos/sub/c.tif", "photos/.hidden.jpg", "photos/.thumbs/d.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "photos/notes.txt").write_text("no image")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def names(*inputs, **options):
    return [item.name for item in find_items(inputs, InputOptions(**options))]


def test_a_folder_with_its_subfolders(tree):
    assert names("photos") == ["a.png", "b.JPG", "sub/c.tif"]
    assert names(tree / "photos", root=tree) == ["photos/a.png", "photos/b.JPG", "photos/sub/c.tif"]
    assert [os.path.exists(item.path) for item in find_items(["photos"])] == [True] * 3


def test_one_image_and_several(tree):
    assert names("photos/b.JPG") == ["b.JPG"]
    assert names("photos/b.JPG", "photos/sub/c.tif", "photos/b.JPG") == ["b.JPG", "sub/c.tif"]
    assert names("photos/b.JPG", "photos/sub/../b.JPG", "./photos", os.path.abspath("photos/sub/c.tif")) == [
        "b.JPG",
        "a.png",
        "sub/c.tif",
    ]


def test_globs(tree):
    assert names("photos/*.[pJ]*", root="photos") == ["a.png", "b.JPG"]
    assert names("photos/**/*.tif") == ["c.tif"]


def test_a_list_is_relative_to_the_root_or_to_where_we_are(tree):
    (tree / "list.txt").write_text("sub/c.tif\n\n  a.png \nmissing.png\n")
    assert names("@list.txt", root="photos") == ["sub/c.tif", "a.png", "missing.png"]
    (tree / "list.txt").write_text("photos/sub/c.tif\nphotos/a.png\n")
    assert names("@list.txt") == ["sub/c.tif", "a.png"]


def test_a_video(tree):
    write_video(tree / "photos/video.mp4", [0, 40, 140, 200])
    expected = ["video.mp4/000000_0.000s", "video.mp4/000001_0.040s", "video.mp4/000002_0.140s"]
    assert names("photos/video.mp4")[:3] == expected
    assert names("photos/video.mp4", every=2) == expected[::2]
    assert names("photos/video.mp4", fps=10) == [expected[0], expected[2], "video.mp4/000003_0.200s"]
    assert names("photos") == ["a.png", "b.JPG", "sub/c.tif"]  # a folder means its images
    assert names("photos", "photos/video.mp4", root=".")[-4:][0] == "photos/video.mp4/000000_0.000s"


@pytest.mark.parametrize(
    ("inputs", "root", "told"),
    [
        (["missing.jpg"], None, "input missing.jpg does not exist"),
        (["photos/*.gif"], None, r"photos/\*.gif matches no file"),
        (["empty"], None, "empty holds no image"),
        (["photos"], "photos/sub", "lies outside the root"),
        (["photos"], "nowhere", "the root nowhere is no folder"),
        (["@missing.txt"], None, "list of images missing.txt does not exist"),
        (["@blank.txt"], None, "blank.txt names no image"),
        ([], None, "no input is given"),
    ],
)
def test_what_is_refused(tree, inputs, root, told):
    (tree / "empty").mkdir()
    (tree / "blank.txt").write_text("\n \n")
    with pytest.raises(SuperPointError, match=told):
        find_items(inputs, InputOptions(root=root))


def test_names_that_match_files_cannot_tell_apart(tree):
    (tree / "photos/sub-c.tif").write_bytes(b"x")
    with pytest.raises(SuperPointError, match=r"'sub-c.tif' and 'sub/c.tif' have the same name in a match file"):
        find_items(["photos"])


def test_spaces(tree):
    (tree / "photos/d e.jpg").write_bytes(b"x")
    assert with_spaces(names("photos")) == ["d e.jpg"]
