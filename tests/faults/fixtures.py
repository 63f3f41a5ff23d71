"""A desk with small good files. Test modules here name this module in `pytest_plugins`.

No conftest.py: a second one would take the name of tests/conftest.py, which tests import from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fuzz import corpus
from fuzz.judge import Case, Judge


@pytest.fixture(scope="session")
def small_stock() -> dict[str, bytes]:
    """Good files by name (`fuzz.corpus`)."""
    return corpus.stock()


@pytest.fixture
def small_desk(tmp_path: Path, small_stock: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with the good files."""
    for name, content in small_stock.items():
        (tmp_path / name).write_bytes(content)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def judge(tmp_path_factory: pytest.TempPathFactory, small_stock: dict[str, bytes]) -> Iterator[Judge]:
    """Runs commands in one process, under limits of memory and time (`fuzz.judge`)."""
    made = Judge(tmp_path_factory.mktemp("judge"), small_stock, most_seconds=20.0)
    yield made
    made.close()


@pytest.fixture
def refuse_case(judge: Judge) -> Callable[..., None]:
    """Asserts that a case ends with exit code 2 and one line that says certain words."""

    def check(case: Case, *says: str) -> None:
        finding = judge.judge(case)
        assert judge.last is not None
        assert judge.last.code != 0, f"exit 0\n{judge.last.out}{judge.last.err}"
        assert finding is None, f"{finding.kind}\n{finding.detail[-1500:]}"
        assert judge.last.code == 2, f"exit {judge.last.code}\n{judge.last.out}{judge.last.err}"
        for words in says:
            assert words in judge.last.err, f"{words!r} is not in: {judge.last.err}"

    return check


@pytest.fixture
def accept_case(judge: Judge) -> Callable[..., str]:
    """Asserts that a case ends with exit code 0 and nothing strange; returns what was printed."""

    def check(case: Case) -> str:
        finding = judge.judge(case)
        assert finding is None, f"{finding.kind}\n{finding.detail[-1500:]}"
        assert judge.last is not None
        assert judge.last.code == 0, judge.last.err
        return judge.last.out

    return check
