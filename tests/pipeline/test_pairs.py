"""Pairs of images by hand, and pairs files with names that others stumble over."""

from __future__ import annotations

import pytest

from superpoint_trt.cli.main import cli, run
from superpoint_trt.core.types import SuperPointError
from superpoint_trt.pipeline.pairs import PairOptions, in_sequence, make_pairs, read_pairs, with_spaces, write_pairs

NAMES = ["f10.png", "f9.png", "f1.png", "f2.png"]
IN_ORDER = ["f1.png", "f2.png", "f9.png", "f10.png"]


def test_sequences_count_as_people_do():
    assert in_sequence(NAMES) == IN_ORDER
    mixed = ["b/1.png", "a/10.png", "a/9.png", "a/09.png", "10", "9", "x"]
    assert in_sequence(mixed) == ["9", "10", "a/09.png", "a/9.png", "a/10.png", "b/1.png", "x"]
    assert in_sequence(reversed(mixed)) == in_sequence(mixed)


def test_every_image_with_every_other():
    a, b, c, d = IN_ORDER
    assert make_pairs(NAMES, PairOptions(exhaustive=True)) == [(a, b), (a, c), (a, d), (b, c), (b, d), (c, d)]
    for few in ([], ["one"]):
        with pytest.raises(SuperPointError, match=f"two images; there are features of {len(few)}"):
            make_pairs(few, PairOptions(exhaustive=True))


def test_each_with_the_next():
    a, b, c, d = IN_ORDER
    assert make_pairs(NAMES, PairOptions(sequential=1)) == [(a, b), (b, c), (c, d)]
    assert make_pairs(NAMES, PairOptions(sequential=2)) == [(a, b), (a, c), (b, c), (b, d), (c, d)]
    assert make_pairs(NAMES, PairOptions(sequential=99)) == make_pairs(NAMES, PairOptions(exhaustive=True))


def test_loops_are_closed_and_no_pair_is_made_twice():
    names = [f"{i}" for i in range(7)]
    found = make_pairs(names, PairOptions(sequential=1, loop_every=3))
    assert found[6:] == [("0", "3"), ("0", "6"), ("3", "6")]
    assert len(make_pairs(names, PairOptions(sequential=3, loop_every=3))) == len(
        {frozenset(pair) for pair in make_pairs(names, PairOptions(sequential=3, loop_every=3))}
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "not said which images to pair; .*--exhaustive, --sequential K and --list FILE"),
        ({"exhaustive": True, "sequential": 2}, "several ways"),
        ({"exhaustive": True, "loop_every": 2}, "give --sequential K, too"),
        ({"sequential": 0}, "following images is 0"),
        ({"sequential": 2, "loop_every": -1}, "loop images is -1"),
    ],
    ids=str,
)
def test_options_that_make_no_sense(options, words):
    with pytest.raises(SuperPointError, match=words):
        PairOptions(**options)


def test_a_file_is_read_as_written(tmp_path):
    pairs = [("a/1.png", "a/2.png"), ("b c.png", "a/1.png"), ("ä.png", "b c.png")]
    names = ["a/1.png", "a/2.png", "b c.png", "ä.png", "c.png"]
    path = write_pairs(tmp_path / "pairs.txt", pairs)
    assert path.read_text(encoding="utf-8") == "a/1.png a/2.png\nb c.png a/1.png\nä.png b c.png\n"
    assert read_pairs(path, names) == pairs
    assert make_pairs(names, PairOptions(listed=path)) == pairs
    assert with_spaces(names) == ["b c.png"]


def test_lists_of_others(tmp_path):
    """Tabs, empty lines, Windows line ends; the same pair in both orders counts once."""
    path = tmp_path / "pairs.txt"
    path.write_bytes(b"\xef\xbb\xbfa\tb\r\n\r\nb a\n  c   a\n")
    assert read_pairs(path, "abc") == [("a", "b"), ("c", "a")]


def test_names_that_begin_or_end_with_a_space(tmp_path):
    names = [" a", "b ", "c"]
    path = write_pairs(tmp_path / "pairs.txt", made := make_pairs(names, PairOptions(exhaustive=True)))
    assert read_pairs(path, names) == made


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"a b\na x\n", "line 2 .*no features of 'x'"),
        (b"a\n", "line 1 .*'a' is not two different names"),
        (b"a b 0.83\n", "line 1 .*is not two different names"),
        (b" " * 300_000 + b"a b x\n", "line 1 .*is not two different names"),
        (b"a a\n", "two different names"),
        (b"a b c\n", "line 1"),
        (b"p q r\n", "2 ways"),
        (b"\xff\xfe\n", "no UTF-8 text"),
        (b"", "is empty"),
    ],
)
def test_lists_that_cannot_be_read(tmp_path, text, words):
    path = tmp_path / "pairs.txt"
    path.write_bytes(text)
    with pytest.raises(SuperPointError, match=words):
        read_pairs(path, ["a", "b", "c", "p", "p q", "q r", "r"])


def test_names_with_line_breaks_are_refused(tmp_path):
    with pytest.raises(SuperPointError, match="line break"):
        write_pairs(tmp_path / "pairs.txt", [("a\nb", "c")])
    assert not (tmp_path / "pairs.txt").exists()


def test_the_command(tmp_path, capsys):
    pytest.importorskip("h5py", reason="feature files need h5py (extra bulk)")
    from pipeline.hand_made import orthogonal, write_features

    features = write_features(tmp_path / "f.h5", {name: orthogonal([1]) for name in ("a 1", "b", "c")})
    pairs = tmp_path / "pairs.txt"
    assert run(cli, ["pairs", str(features), "--output", str(pairs), "--sequential", "1"]) == 0
    told = capsys.readouterr()
    assert "2 in" in told.out and "hloc does not" in told.err
    assert pairs.read_text() == "a 1 b\nb c\n"
    assert run(cli, ["pairs", str(features), "--output", str(pairs)]) == 2
    assert "not said which images" in capsys.readouterr().err
    assert run(cli, ["pairs", str(features), "--output", str(features), "--exhaustive"]) == 2
    assert "would overwrite" in capsys.readouterr().err
