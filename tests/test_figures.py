"""`make figures`: every picture of the pages has a script, and the scripts draw what their figures say."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from superpoint_trt import SuperPointError, packaged
from superpoint_trt.core.image import load_image
from superpoint_trt.pipeline.colmap_map import MapReport

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "scripts")]

import figures  # noqa: E402
import map_matchers  # noqa: E402
import matcher_figures  # noqa: E402
import network_chart  # noqa: E402

IMAGES = ROOT / "docs" / "images"


def test_every_picture_of_the_pages_has_a_script():
    pages = [ROOT / "README.md", ROOT / "README.zh-CN.md", *(ROOT / "docs").rglob("*.md")]
    shown = {name for page in pages for name in re.findall(r"!\[[^\]]*\]\([^)]*?images/([^)]+)\)", page.read_text())}
    assert shown and shown <= set(figures.FIGURES)
    assert set(figures.FIGURES) == {path.name for path in IMAGES.iterdir()} - {"stress.json", "networks.csv"}


def test_a_picture_without_its_photographs_is_left_out(tmp_path):
    names = ["maps.jpg", "matcher_changed.webp"]
    ran = CliRunner().invoke(figures.main, [*names, "--output", str(tmp_path), "--shared", str(tmp_path / "none")])
    assert ran.exit_code == 0 and "maps.jpg: left out, needs the frames of TUM RGB-D" in ran.output
    assert "matcher_changed.webp: left out, needs kodim07.png" in ran.output
    assert not list(tmp_path.iterdir())


def test_the_camera_moves_on_a_closed_path():
    """The step from the last view to the first is like the others; every view differs from the one before it."""
    views = list(figures.camera_views(load_image(packaged.PHOTO)))
    assert len(views) == figures.VIEWS and views[0].shape == (figures.VIEW_WH[1], figures.VIEW_WH[0], 3)
    steps = [np.abs(a.astype(int) - b).mean() for a, b in zip(views, [*views[1:], views[0]])]
    assert min(steps) > 1 and steps[-1] < 1.5 * max(steps[:-1])


def test_networks_are_read(tmp_path):
    rows = {row.name: row for row in network_chart.read_networks(IMAGES / "networks.csv")}
    assert rows["full"].is_ours and not rows["XFeat"].is_ours
    assert all(row.ms > 0 and 0 < row.h3 < 1 and row.source for row in rows.values())
    bad = (
        ("a,no,1,,MIT,x", "expected name"),
        ("a,no,,0.5,MIT,x", "expected name"),
        ("a,no,1,0.5,MIT,", "has no source"),
    )
    for line, words in bad:
        file = tmp_path / "bad.csv"
        file.write_text(f"name,ours,ms,h3,licence,source\n{line}\n")
        with pytest.raises(SuperPointError, match=f"line 2: .*{words}"):
            network_chart.read_networks(file)


def test_names_of_networks_do_not_cover_each_other():
    """Also if a still smaller one comes: its place is that of a first trial."""
    pytest.importorskip("matplotlib")
    rows = network_chart.read_networks(IMAGES / "networks.csv")
    rows.append(network_chart.NetworkRow("tiny", True, 25, 0.66, "x"))
    boxes = network_chart.chart(rows)[1]
    assert len(boxes) == len(rows)
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_the_chart_is_written(tmp_path):
    pytest.importorskip("matplotlib")
    path = network_chart.draw_chart(network_chart.read_networks(IMAGES / "networks.csv"), tmp_path / "n.png")
    assert load_image(path).shape == (750, 1050, 3)


def test_the_changed_copy_is_where_its_distances_say():
    """The middle of the photograph, marked, is found in the copy at the place that no distance separates."""
    photo = np.full((384, 512, 3), 90, np.uint8)
    photo[186:199, 250:263] = (255, 0, 0)  # around (256, 192)
    pair = matcher_figures.changed_pair(photo)
    red = pair.second[..., 0] > pair.second[..., 1].astype(int) + 60
    found = np.argwhere(red)[:, ::-1].mean(axis=0)
    assert pair.distances_px(np.float32([[256, 192]]), found[None])[0] < 1
    assert pair.distances_px(np.float32([[256, 192]]), found[None] + 5)[0] == pytest.approx(np.hypot(5, 5), abs=1)


def test_no_match_of_unrelated_pictures_is_right():
    photo = load_image(packaged.PHOTO)
    pair = matcher_figures.unrelated_pair(photo, photo[::-1])
    assert not (pair.distances_px(np.zeros((3, 2)), np.zeros((3, 2))) <= matcher_figures.RIGHT_PX).any()


def test_both_matchers_stand_one_above_the_other():
    photo = matcher_figures.cut(load_image(packaged.PHOTO))
    assert photo.shape[1] * 3 <= photo.shape[0] * 4
    picture = matcher_figures.draw_with_both(matcher_figures.changed_pair(photo))
    half = (len(picture) - matcher_figures.GAP_PX) // 2
    assert picture.shape[1] > 1.5 * matcher_figures.WIDTH_PX  # side by side
    assert np.abs(picture[:half].astype(int) - picture[-half:]).max() > 0


def test_rows_of_the_table_of_maps():
    report = MapReport(8, 900, 28, 700, 28, 600, "incremental", 1, 7, 1234, 3000, 0.716, 4.64)
    assert map_matchers.row("desk", "learned", report) == "| desk, learned | 7 of 8 | 1,234 | 0.72 | 4.64 |"
    none = MapReport(8, 900, 28, 700, 0, 0, "incremental")
    assert map_matchers.row("desk", "nearest", none) == "| desk, nearest | 0 of 8 | 0 | - | - |"
