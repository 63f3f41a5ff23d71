"""Many images to one file: equal to `SuperPoint.extract`, failures reported, taken up again, shared, never mixed."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import cv2
import numpy as np
import pytest
from conftest import photograph
from PIL import Image
from pipeline.features import assert_equal, content, write_photographs
from pipeline.videos import write_video

from superpoint_trt import SuperPoint, SuperPointError
from superpoint_trt.cli.main import cli, run
from superpoint_trt.core.orientation import ORIENTATIONS
from superpoint_trt.pipeline import extract as extract_module
from superpoint_trt.pipeline import workers
from superpoint_trt.pipeline.extract import ExtractOptions, extract
from superpoint_trt.pipeline.feature_files import FeatureFile, FeatureWriter
from superpoint_trt.pipeline.inputs import InputOptions
from superpoint_trt.pipeline.merge import MadeBy, merge
from superpoint_trt.pipeline.shards import CHECKPOINT, DESCRIPTORS_OF, Manifest, ShardFolder, range_of

pytest.importorskip("h5py", reason="feature files in HDF5 need h5py: pip install '.[bulk]'")

COUNT = 23


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photographs")
    return folder, write_photographs(folder, COUNT)


@pytest.fixture(scope="module")
def options(exported):
    """Small shards, so that there are several."""
    return ExtractOptions(exported("v6", dynamic=True, max_batch_size=4), {"max_keypoints": 60}, shard_size=5)


@pytest.fixture(scope="module")
def expected(photographs, options, tmp_path_factory):
    """The content of an uninterrupted run."""
    path = tmp_path_factory.mktemp("expected") / "features.h5"
    extract([photographs[0]], path, options)
    return content(path)


def files(folder):
    return sorted(path.name for path in folder.iterdir())


# ------------------------------------------------------------------------------------------------------------ one run


@pytest.mark.parametrize("output", ["features.h5", "features"])
def test_entries_are_what_extract_finds(photographs, options, tmp_path, output):
    folder, names = photographs
    told = []
    summary = extract([folder], tmp_path / output, options, lambda *step: told.append(step))
    assert (summary.images, summary.done, summary.skipped, summary.failed) == (COUNT, COUNT, 0, ())
    assert summary.unfinished_shards == 0 and "onnxruntime" in summary.ran_on
    assert ("extracting", COUNT, COUNT) in told and told[-1][0] == "merging"
    assert files(tmp_path) == [output]
    with FeatureFile(tmp_path / output) as features, SuperPoint(options.model, **options.settings) as superpoint:
        assert features.names() == names
        for name in names:
            found, alone = features[name], superpoint.extract(folder / name)
            assert found.image_size == alone.image_size and len(found) == len(alone) > 10
            np.testing.assert_allclose(found.keypoints, alone.xy, atol=1e-3)
            np.testing.assert_allclose(found.scores, alone.scores, atol=1e-5)
            np.testing.assert_allclose(found.descriptors.astype(np.float32), alone.descriptors, atol=2e-3)
            assert found.descriptors.dtype == (np.float16 if output.endswith(".h5") else np.float32)
            assert found.uncertainty == 2.0


def test_a_networks_threads_leave_the_cpus_to_the_files(options):
    """By default onnxruntime's threads wait for each other in a loop."""
    with options.work().open() as superpoint:
        session = superpoint._backend._session.get_session_options()
        assert session.get_session_config_entry("session.intra_op.allow_spinning") == "0"


def test_shrunk_images_are_less_certain(photographs, options, tmp_path):
    folder, names = photographs
    name = next(name for name in names if cv2.imread(str(folder / name)).shape[:2] == (96, 128))
    extract([folder / name], tmp_path / "f.h5", replace(options, settings={"max_side_px": 64}))
    with FeatureFile(tmp_path / "f.h5") as features:
        entry = features[name.split("/")[1]]
    assert entry.uncertainty == 4.0 and entry.image_size == (128, 96) and entry.keypoints[:, 0].max() > 64


def test_images_that_cannot_be_read_are_reported(photographs, options, tmp_path, capsys):
    folder = shutil.copytree(photographs[0], tmp_path / "photos")
    (folder / "street/text.jpg").write_text("no image")
    (folder / "empty.png").write_bytes(b"")
    cv2.imwrite(str(folder / "tiny.png"), np.zeros((3, 3), np.uint8))
    summary = extract([folder], tmp_path / "f.h5", options)
    assert summary.done == COUNT and summary.images == COUNT + 3
    reasons = dict(summary.failed)
    assert set(reasons) == {"street/text.jpg", "empty.png", "tiny.png"}
    assert "not an image" in reasons["street/text.jpg"] and "smallest usable" in reasons["tiny.png"]
    table = summary.failures_file.read_text().splitlines()
    assert table[0] == "name\treason" and len(table) == 4 and all(line.count("\t") == 1 for line in table)
    with FeatureFile(tmp_path / "f.h5") as features:
        assert len(features) == COUNT
    # What failed is tried again; what is done is not.
    cv2.imwrite(str(folder / "tiny.png"), photograph(64, 64))
    again = extract([folder], tmp_path / "f.h5", options)
    assert (again.done, again.skipped, len(again.failed)) == (1, COUNT, 2)
    line = ["extract", str(folder), "--output", str(tmp_path / "f.h5"), "--model", str(options.model)]
    assert run(cli, [*line, "--max-keypoints", "60"]) == 1
    told = capsys.readouterr()
    assert "left out: street/text.jpg: " in told.err and "failed        2, listed in " in told.out
    (folder / "street/text.jpg").unlink()
    (folder / "empty.png").unlink()
    assert run(cli, [*line, "--max-keypoints", "60"]) == 0
    assert f"skipped       {COUNT + 1} that were done before" in capsys.readouterr().out
    assert not again.failures_file.exists()


def test_a_decoder_may_raise_what_it_likes(photographs, options, tmp_path, monkeypatch):
    real = workers.read_image_file

    def read(path, *rest):
        if path.endswith("003.png"):
            raise ZeroDivisionError("in a codec")
        if path.endswith("004.png"):
            raise MemoryError
        return real(path, *rest)

    monkeypatch.setattr(workers, "read_image_file", read)
    summary = extract([photographs[0]], tmp_path / "f.h5", options)
    assert summary.done == COUNT - 2
    reasons = dict(summary.failed)
    assert "ZeroDivisionError: in a codec" in reasons["street/003.png"] and "memory ran out" in reasons["park/004.png"]


def test_progress_begins_with_nothing_done(photographs, options, tmp_path):
    """The time of the first images counts in the speed that is told."""
    told = []
    extract([photographs[0]], tmp_path / "f.h5", options, lambda *step: told.append(step))
    assert told[0] == ("extracting", 0, COUNT)
    assert told[-1][0] == "merging" and ("extracting", COUNT, COUNT) in told


def test_nothing_but_failures(options, tmp_path):
    (tmp_path / "a.png").write_text("no image")
    summary = extract([tmp_path / "a.png"], tmp_path / "f.h5", options)
    assert summary.done == 0 and len(summary.failed) == 1
    with FeatureFile(tmp_path / "f.h5") as features:
        assert len(features) == 0


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_points_lie_in_the_pixels_of_the_stored_file(options, tmp_path, orientation):
    """One scene, stored in each of the eight ways. Pixel values at the keypoints are those of the upright scene."""
    scene = Image.fromarray(photograph(96, 128, "coffee"))
    turn = {
        1: lambda image: image,
        2: lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        3: lambda image: image.transpose(Image.Transpose.ROTATE_180),
        4: lambda image: image.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
        5: lambda image: image.transpose(Image.Transpose.TRANSPOSE),
        6: lambda image: image.transpose(Image.Transpose.ROTATE_90),
        7: lambda image: image.transpose(Image.Transpose.TRANSVERSE),
        8: lambda image: image.transpose(Image.Transpose.ROTATE_270),
    }
    exif = Image.Exif()
    exif[274] = orientation
    stored = turn[orientation](scene)
    stored.save(tmp_path / "turned.png", exif=exif)
    scene.save(tmp_path / "upright.png")
    whole = replace(options, settings={"max_keypoints": 60, "subpixel": False})
    extract([tmp_path], tmp_path / "f.h5", whole)
    with FeatureFile(tmp_path / "f.h5") as features:
        turned, upright = features["turned.png"], features["upright.png"]
    assert turned.image_size == stored.size and upright.image_size == scene.size
    np.testing.assert_array_equal(turned.descriptors, upright.descriptors)
    values = [np.asarray(image)[tuple(entry.keypoints.astype(int).T[::-1])]
              for image, entry in ((stored, turned), (scene, upright))]  # fmt: skip
    np.testing.assert_array_equal(values[0], values[1])
    # The way back by another road: a picture of every pixel's own number, turned as the file was.
    numbers = Image.fromarray(np.arange(96 * 128, dtype=np.int32).reshape(96, 128))
    x, y = turned.keypoints.astype(int).T
    np.testing.assert_array_equal(np.asarray(turn[orientation](numbers))[y, x] % 128, upright.keypoints[:, 0])


def test_frames_of_a_video(options, tmp_path):
    video = write_video(tmp_path / "video.mp4", range(0, 1200, 40))
    summary = extract([video], tmp_path / "f.h5", replace(options, inputs=InputOptions(every=3)))
    assert summary.done == 10
    with FeatureFile(tmp_path / "f.h5") as features:
        assert features.names()[1] == "video.mp4/000003_0.120s" and len(features) == 10
        assert features["video.mp4/000003_0.120s"].image_size == (160, 96)
        entries = [features[name].descriptors.tobytes() for name in features]
    assert len(set(entries)) == 10


def test_names_with_spaces_are_noted(options, tmp_path):
    cv2.imwrite(str(tmp_path / "a b.png"), photograph(64, 64))
    summary = extract([tmp_path], tmp_path / "f.h5", options)
    assert summary.done == 1 and "'a b.png'" in summary.notes[0]


# ------------------------------------------------------------------------------------------------------- taken up again


def test_new_images_are_added(photographs, options, expected, tmp_path):
    folder, names = photographs
    some = tmp_path / "some"
    for name in names[:9]:
        (some / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / name, some / name)
    first = extract([some], tmp_path / "f.h5", options)
    shutil.copytree(folder, some, dirs_exist_ok=True)
    second = extract([some], tmp_path / "f.h5", options)
    assert (first.done, second.done, second.skipped) == (9, COUNT - 9, 9)
    found = content(tmp_path / "f.h5")
    assert list(found) == list(expected)
    for name, arrays in expected.items():  # batches differ, so the last bits may
        np.testing.assert_allclose(found[name][0], arrays[0], atol=1e-3)


def test_processes_share_the_work(photographs, options, expected, tmp_path):
    folder, _ = photographs
    path = tmp_path / "f.h5"
    left, done = [], 0
    for part in (3, 1, 2):
        assert not path.exists()
        summary = extract([folder], path, replace(options, part=part, parts=3))
        left.append(summary.unfinished_shards)
        done += summary.done
        assert summary.done == summary.images > 0
    assert left == [3, 2, 0] and done == COUNT
    assert_equal(content(path), expected)
    assert files(tmp_path) == ["f.h5"]


def test_more_processes_than_shards(photographs, options, expected, tmp_path):
    folder, _ = photographs
    for part in range(1, 9):
        extract([folder], tmp_path / "f.h5", replace(options, part=part, parts=8))
    assert_equal(content(tmp_path / "f.h5"), expected)


def test_parts_cover_every_shard_once():
    for parts in (1, 2, 3, 7, 20):
        for shards in (0, 1, 5, 19, 40):
            numbers = [number for part in range(1, parts + 1) for number in range_of(part, parts, shards)]
            assert numbers == list(range(shards))


def test_the_file_says_which_checkpoint_found_its_points(photographs, options, tmp_path):
    """So a learned matcher notices those of another network. A file of an earlier version, which is silent, grows."""
    folder, names = photographs
    first, second = (folder / name for name in names[:2])
    path, rooted = tmp_path / "f.h5", replace(options, inputs=InputOptions(root=folder))
    extract([first], path, rooted)
    made_by = MadeBy.read(path)
    with SuperPoint(options.model) as superpoint:
        known = superpoint.description.checkpoint_sha256
    assert known and made_by.settings[CHECKPOINT] == known and made_by.settings[DESCRIPTORS_OF] is None
    earlier = {name: value for name, value in made_by.settings.items() if name not in (CHECKPOINT, DESCRIPTORS_OF)}
    with FeatureWriter(path, append=True) as writer:
        writer.describe(MadeBy(made_by.run_id, earlier).to_json())
    assert extract([first, second], path, rooted).done == 1


@pytest.fixture
def half(photographs, options, tmp_path):
    """An output of which two of five shards are finished."""
    folder, _ = photographs
    path = tmp_path / "f.h5"
    summary = extract([folder], path, replace(options, part=1, parts=2))
    assert summary.unfinished_shards == 3 and not path.exists()
    return path


def test_an_unfinished_run_is_finished_by_one(half, photographs, options, expected):
    before = {path: path.stat().st_mtime_ns for path in half.with_name("f.h5.shards").glob("0*")}
    assert len(before) == 4
    seen = {}

    def note(phase, done, total):
        seen.update({path: path.stat().st_mtime_ns for path in before if path.exists()})

    summary = extract([photographs[0]], half, options, note)
    assert (summary.done, summary.skipped) == (COUNT - 10, 10) and seen == before
    assert_equal(content(half), expected)


def test_other_settings_are_refused(half, photographs, options, exported, tmp_path):
    folder, _ = photographs
    for changed, told in (
        ({"settings": {"max_keypoints": 61}}, "unfinished run with max_keypoints 60, not 61"),
        ({"settings": {}}, "max_keypoints 60, not none"),
        ({"settings": {"max_keypoints": 60, "threshold": 0.1}}, "threshold 0.005, not 0.1"),
        ({"dtype": "float32"}, "dtype float16, not float32"),
        ({"model": exported("v6", dynamic=True)}, "unfinished run with another model"),
    ):
        with pytest.raises(SuperPointError, match=told):
            extract([folder], half, replace(options, **changed))
    extract([folder], half, options)
    with pytest.raises(SuperPointError, match=r"f.h5 was made with max_keypoints 60, not 61; .*--overwrite"):
        extract([folder], half, replace(options, settings={"max_keypoints": 61}))
    extract([folder], half, replace(options, settings={"max_keypoints": 5}, overwrite=True))
    assert {len(entry[0]) for entry in content(half).values()} == {5}


def test_other_images_are_refused(half, photographs, options):
    folder, names = photographs
    with pytest.raises(SuperPointError, match=r"over other images; .*superpoint merge .*f.h5 --unfinished"):
        extract([folder / name for name in names[:3]], half, replace(options, inputs=InputOptions(root=folder)))


def test_a_run_without_a_finished_shard_stands_in_nobodys_way(photographs, options, tmp_path, monkeypatch):
    def stop(*_):
        raise ZeroDivisionError("at the first shard")

    folder, names = photographs
    monkeypatch.setattr(extract_module, "take_part", stop)
    with pytest.raises(ZeroDivisionError):
        extract([folder], tmp_path / "f.h5", options)
    assert (tmp_path / "f.h5.shards/manifest.json").exists()
    monkeypatch.undo()
    other = replace(options, settings={"max_keypoints": 5}, inputs=InputOptions(root=folder))
    assert extract([folder / name for name in names[:3]], tmp_path / "f.h5", other).done == 3


def test_additions_to_a_folder_survive_a_kill(photographs, options, expected, tmp_path):
    """A folder of .npz has entries of the unfinished run in it, and of an earlier one."""
    folder, names = photographs
    whole = replace(options, inputs=InputOptions(root=folder))
    extract([folder / name for name in names[:3]], tmp_path / "out", whole)
    assert extract([folder], tmp_path / "out", replace(options, part=1, parts=2)).done == 10
    summary = extract([folder], tmp_path / "out", options)
    assert (summary.done, summary.skipped) == (COUNT - 13, 13) and files(tmp_path) == ["out"]
    assert list(content(tmp_path / "out")) == list(expected)


def test_a_merge_of_what_there_is(half, photographs, options, expected, capsys):
    with pytest.raises(SuperPointError, match=r"3 of 5 shards of .* are not finished \(2, 3, 4\)"):
        merge(half)
    assert run(cli, ["merge", str(half), "--unfinished"]) == 0
    told = capsys.readouterr().out
    assert "merged        10 images\n" in told and "failed        0\n" in told
    assert len(content(half)) == 10
    summary = extract([photographs[0]], half, options)
    assert (summary.done, summary.skipped) == (COUNT - 10, 10)
    assert list(content(half)) == list(expected)
    with pytest.raises(SuperPointError, match="keeps no run"):
        merge(half)


def test_a_merge_ends_as_an_extraction_when_images_failed(photographs, options, tmp_path, capsys):
    """Both list them, name the .tsv, and have the exit code 1."""
    folder = shutil.copytree(photographs[0], tmp_path / "photos")
    (folder / "park" / "000.png").write_text("no image")
    line = ["extract", str(folder), "--output", str(tmp_path / "f.h5"), "--model", str(options.model)]
    assert run(cli, [*line, "--shard-size", "5", "--shard", "1/2"]) == 1
    capsys.readouterr()
    assert run(cli, ["merge", str(tmp_path / "f.h5"), "--unfinished"]) == 1
    told = capsys.readouterr()
    assert "left out: park/000.png: " in told.err and "f.h5.failed.tsv" in told.out
    assert (tmp_path / "f.h5.failed.tsv").read_text().startswith("name\treason\npark/000.png\t")


def test_pairs_are_not_merged_as_features(tmp_path):
    folder = ShardFolder(tmp_path / "m.h5")
    folder.begin(Manifest("id", {"features": "x"}, "0" * 64, 1, 1, False), [0])
    with pytest.raises(SuperPointError, match="a run of superpoint match-pairs; run that command again"):
        merge(tmp_path / "m.h5")


def test_spoiled_shards_are_found(half, photographs, options, expected):
    shards = half.with_name("f.h5.shards")
    data = bytearray((shards / "00001.packed").read_bytes())
    data[len(data) // 2] ^= 1
    (shards / "00001.packed").write_bytes(data)
    told = (
        r"shard 1 of .* has another 00001.packed than was written; remove .*00001.json and run superpoint extract again"
    )
    with pytest.raises(SuperPointError, match=told):
        extract([photographs[0]], half, options)
    assert not half.exists()
    (shards / "00001.json").unlink()
    extract([photographs[0]], half, options)
    assert_equal(content(half), expected)


def test_damaged_state_is_one_line(half, photographs, options):
    shards = half.with_name("f.h5.shards")
    for name, told in (("00000.json", "its shard is done again"), ("manifest.json", "start the run anew")):
        before = (shards / name).read_bytes()
        (shards / name).write_text("{")
        with pytest.raises(SuperPointError, match=f"{name} is damaged .*{told}"):
            extract([photographs[0]], half, options)
        (shards / name).write_bytes(before)
    (to_do,) = shards.glob("to-do.*.npz")
    for positions in (np.arange(COUNT) + 1, np.arange(COUNT) / 2, np.zeros(COUNT, int), np.arange(3), np.array(["a"])):
        np.savez(to_do, positions=positions)
        with pytest.raises(SuperPointError, match=rf"{to_do.name} is damaged .*start the run anew"):
            extract([photographs[0]], half, options)
    extract([photographs[0]], half, replace(options, overwrite=True))
    assert len(content(half)) == COUNT


def test_a_kill_between_the_merge_and_its_end(half, photographs, options, expected):
    """The output is complete, but the folder of shards is still there, without some of its files."""
    shards = half.with_name("f.h5.shards")
    kept = shutil.copytree(shards, half.with_name("kept"))
    extract([photographs[0]], half, options)
    (kept / "00000.packed").unlink()
    kept.rename(shards)
    summary = extract([photographs[0]], half, options)
    assert (summary.done, summary.skipped) == (0, COUNT) and files(half.parent) == ["f.h5"]
    assert_equal(content(half), expected)


def test_another_tools_file_is_left_alone(photographs, options, tmp_path):
    with FeatureWriter(tmp_path / "f.h5"):
        pass
    (tmp_path / "g.h5").write_text("no HDF5")
    for name in ("f.h5", "g.h5"):
        with pytest.raises(
            SuperPointError, match=f"{name} is there, and is damaged or was not made by superpoint extract"
        ):
            extract([photographs[0]], tmp_path / name, options)
        extract([photographs[0]], tmp_path / name, replace(options, overwrite=True))
        assert len(content(tmp_path / name)) == COUNT


def test_a_folder_that_is_replaced_keeps_no_old_entry(photographs, options, tmp_path):
    """Otherwise a later run would take an entry of another model for done."""
    path, folder = tmp_path / "npz", photographs[0]
    extract([folder], path, options)
    changed = replace(options, settings={**options.settings, "max_keypoints": 5}, overwrite=True)
    extract([folder / "street"], path, replace(changed, inputs=InputOptions(root=folder)))
    assert set(content(path)) == {name for name in photographs[1] if name.startswith("street/")}
    assert extract([folder], path, replace(changed, overwrite=False)).done == COUNT - len(
        list((folder / "street").iterdir())
    )
    assert max(len(entry[0]) for entry in content(path).values()) == 5


def test_npz_of_others_are_never_removed(photographs, options, tmp_path):
    (tmp_path / "npz" / "deep").mkdir(parents=True)
    (tmp_path / "npz" / "deep" / "data.npz").write_bytes(b"precious")
    with pytest.raises(SuperPointError, match=r"holds \.npz files that superpoint extract did not make"):
        extract([photographs[0]], tmp_path / "npz", replace(options, overwrite=True))
    assert (tmp_path / "npz" / "deep" / "data.npz").read_bytes() == b"precious"


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"part": 3, "parts": 2}, r"--shard is 3/2; expected i/n"),
        ({"shard_size": 0}, "--shard-size is 0"),
        ({"dtype": "float64"}, "expected float16 or float32"),
        ({"overwrite": True, "parts": 2}, "--overwrite with --shard"),
        ({"batch_size": 99}, "batch_size is 99"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"loaders": 0}, "loaders is 0"),
        ({"loaders": 99999}, "loaders is 99999"),
    ],
)
def test_options_out_of_range(photographs, options, tmp_path, changed, told):
    with pytest.raises(SuperPointError, match=told):
        extract([photographs[0]], tmp_path / "f.h5", replace(options, **changed))
    assert not list(tmp_path.iterdir())


def test_what_made_a_file_is_kept_in_it(photographs, options, tmp_path):
    for output in ("f.h5", "folder"):
        extract([photographs[0] / "street"], tmp_path / output, options)
        with FeatureFile(tmp_path / output) as features:
            made_by = json.loads(features.description)
        assert made_by["settings"]["max_keypoints"] == 60 and len(made_by["settings"]["model"]) == 64


def test_bad_command_lines(photographs, tmp_path, capsys):
    for line, told in (
        (["--shard", "1"], "'1' is not i/n"),
        (["--fps", "0"], "--fps is 0"),
        (["--fps", "nan"], "--fps is nan"),
        (["--every", "0"], "--every is 0"),
        (["--batch-size", "0"], "batch_size is 0"),
        (["--batch-size", "-1"], "batch_size is -1"),
        (["--max-keypoints", "0"], "is 0"),
        (["--threshold", "nan"], "is nan"),
        (["--max-side", "0"], "is 0"),
        (["--nms-radius", "-1"], "is -1"),
        (["--threads", "0"], "is 0"),
        (["--root", "nowhere"], "the root nowhere is no folder"),
    ):
        assert run(cli, ["extract", str(photographs[0]), "--output", str(tmp_path / "f.h5"), *line]) == 2
        assert told in capsys.readouterr().err
        assert not list(tmp_path.iterdir()), line
    assert run(cli, ["extract", "missing.jpg", "--output", str(tmp_path / "nowhere/f.h5")]) == 2
    assert "does not exist; create it" in capsys.readouterr().err
