"""Tables of several models in Markdown, CSV and LaTeX."""

from __future__ import annotations

import csv

import pytest

from superpoint_trt import SuperPointError
from superpoint_trt.prove.tables import Column, Table, to_csv, to_latex, to_markdown, write_table

TABLE = Table(
    (Column("model"), Column("pairs"), Column("loc. px", "low"), Column("H@3", "high")),
    [("a_b|c", 30, 0.99949, 0.8371), ("50% & $1", 30, None, 0.8374), ("orb", 30, 1.25, 0.5)],
)


def test_markdown():
    """The best are bold: the lowest distance, and both of what prints as 0.837."""
    assert to_markdown(TABLE) == (
        "| model | pairs | loc. px | H@3 |\n"
        "| --- | ---: | ---: | ---: |\n"
        "| a_b\\|c | 30 | **0.999** | **0.837** |\n"
        "| 50% & $1 | 30 | - | **0.837** |\n"
        "| orb | 30 | 1.250 | 0.500 |\n"
    )


def test_csv_is_read_back():
    rows = list(csv.reader(to_csv(TABLE).splitlines()))
    assert rows[0] == ["model", "pairs", "loc. px", "H@3"]
    assert rows[1] == ["a_b|c", "30", "0.999490", "0.837100"]
    assert rows[2] == ["50% & $1", "30", "", "0.837400"]


def test_latex():
    lines = to_latex(TABLE).splitlines()
    assert lines[1:4] == [r"\begin{tabular}{lrrr}", r"\toprule", r"model & pairs & loc. px & H@3 \\"]
    assert lines[5] == r"a\_b|c & 30 & \textbf{0.999} & \textbf{0.837} \\"
    assert lines[6] == r"50\% \& \$1 & 30 & - & \textbf{0.837} \\"
    assert lines[-2:] == [r"\bottomrule", r"\end{tabular}"]


def test_one_row_has_no_best():
    assert "**" not in to_markdown(Table(TABLE.columns, TABLE.rows[:1]))


def test_the_ending_decides(tmp_path):
    for suffix, start in ((".md", "| model"), (".csv", "model,"), (".TEX", "% needs")):
        assert write_table(tmp_path / f"t{suffix}", TABLE).read_text().startswith(start)
    with pytest.raises(SuperPointError, match=r"ends in \.md"):
        write_table(tmp_path / "t.xlsx", TABLE)
