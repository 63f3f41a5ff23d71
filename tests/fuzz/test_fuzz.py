"""Every parser on damaged files: `make fuzz` tries thousands, the ordinary exhaustive run a hundred (README.md)."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path

import pytest

pytest.importorskip("hypothesis")

from fuzz import corpus
from fuzz.judge import Case, Finding, Judge
from fuzz.targets import TARGETS
from hypothesis import HealthCheck, Phase, configuration, given, seed, settings

INPUTS = int(os.environ.get("FUZZ_INPUTS", "60"))
"""For each target. `make fuzz` sets 2000."""
KEEP = os.environ.get("FUZZ_KEEP")
"""A folder in which the smallest file of each new finding is kept; failures/ once it is mended."""
FAILURES = Path(__file__).with_name("failures")
SEED = 16
configuration.set_hypothesis_home_dir(Path(tempfile.gettempdir()) / "superpoint-hypothesis")  # not in the checkout
LARGEST_KEPT = 20_000


@pytest.fixture(scope="module")
def stock() -> dict[str, bytes]:
    return corpus.stock()


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory, stock: dict[str, bytes]) -> Iterator[Judge]:
    made = Judge(tmp_path_factory.mktemp("fuzz"), stock)
    yield made
    made.close()


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", TARGETS)
def test_parser(judge: Judge, name: str) -> None:
    """All inputs are tried, whatever fails; of each kind of fault the smallest input is kept."""
    target = TARGETS[name]
    if target.needs:
        pytest.importorskip(target.needs)
    found: dict[str, tuple[int, Case, Finding]] = {}
    counts: dict[str, int] = {}
    tried = 0
    judge.endings.clear()

    @seed(SEED)
    @settings(
        max_examples=INPUTS,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(target.cases())
    def try_one(case: Case) -> None:
        nonlocal tried
        tried += 1
        finding = judge.judge(case, target.sound)
        if finding is None:
            return
        size = sum(map(len, case.files.values()))
        key = f"{case.arguments[0]}: {finding.kind}"
        counts[key] = counts.get(key, 0) + 1
        if key not in found or size < found[key][0]:
            found[key] = size, case, finding

    try_one()
    ended = ", ".join(f"exit {code}: {count}" for code, count in judge.endings.most_common())
    print(f"{name}: {tried} inputs ({ended}); {len(found)} kinds of fault in {sum(counts.values())} of them")
    lines = []
    for key, (_, case, finding) in sorted(found.items(), key=lambda item: -counts[item[0]]):
        where = keep(name, case, finding) if KEEP else "not kept: FUZZ_KEEP names no folder"
        lines.append(f"{counts[key]:5} x {key}\n        {where}\n        {' '.join(finding.detail.split())[-300:]}")
    if lines:
        pytest.fail(f"{tried} inputs, {len(found)} kinds of fault:\n" + "\n".join(lines), pytrace=False)


def keep(target: str, case: Case, finding: Finding) -> Path | str:
    """Writes a case as one JSON file, named by its content."""
    files = {name: base64.b64encode(zlib.compress(data, 9)).decode() for name, data in case.files.items()}
    record = {"target": target, "finding": finding.kind, **asdict(case), "files": files}
    text = json.dumps(record, indent=1)
    if len(text) > LARGEST_KEPT:
        return f"{len(text)} bytes, too large to keep"
    folder = Path(str(KEEP))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{target}-{hashlib.sha256(text.encode()).hexdigest()[:10]}.json"
    path.write_text(text + "\n")
    return path


def kept(path: Path) -> tuple[str, Case]:
    """What `keep` wrote."""
    record = json.loads(path.read_text())
    files: Mapping[str, str] = record["files"]
    fields = {name: record[name] for name in ("arguments", "program", "outputs", "special", "follow_up")}
    content = {name: zlib.decompress(base64.b64decode(text)) for name, text in files.items()}
    return record["target"], Case(content, **fields)


@pytest.mark.parametrize("path", sorted(FAILURES.glob("*.json")), ids=lambda path: path.stem)
def test_file_that_once_failed(judge: Judge, path: Path) -> None:
    name, case = kept(path)
    finding = judge.judge(case, TARGETS[name].sound)
    assert finding is None, f"{finding.kind}\n{finding.detail}"


def test_the_good_files_pass(judge: Judge) -> None:
    """The judge and the desk are sound: what is refused above is the damage."""
    commands = {
        ("infer", "--model", "dense.onnx", "--image", "good.png", "--save", "out.npz"): "image",
        ("infer", "--model", "keypoints.onnx", "--image", "good.png", "--save", "out.npz"): "image",
        ("infer", "--model", "checkpoint.safetensors", "--image", "good.png", "--save", "out.npz"): "image",
    }
    for arguments, target in commands.items():
        assert judge.judge(Case({}, arguments, outputs=("out.npz",)), TARGETS[target].sound) is None
    quantize = ("quantize", "--onnx", "heads.onnx", "--calibration", "ranges.calibration.json", "--no-verify")
    good = Case({}, (*quantize, "--output", "out.onnx"), outputs=("out.onnx",), follow_up=("info", "out.onnx"))
    assert judge.judge(good) is None
    files = {
        "odd.npz": corpus.npz(corpus.features()),
        "odd.engine": corpus.PLAN,
        "odd.engine.json": corpus.as_json(corpus.engine_metadata()),
        **{f"odd-{name}": data for name, data in corpus.checkpoints().items()},
    }
    for name in files:
        if not name.endswith(".json"):
            assert judge.judge(Case(files, ("info", name))) is None
            assert judge.last is not None and judge.last.code == 0, judge.last.err


@pytest.mark.parametrize(
    ("arguments", "kind"),
    [(("info", "nothing.onnx"), None), (("infer",), None), (("nothing",), None)],
)
def test_the_judge_accepts_one_line(judge: Judge, arguments: tuple[str, ...], kind: str | None) -> None:
    assert judge.judge(Case({}, arguments)) is kind
