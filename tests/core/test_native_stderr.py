"""Lines that libraries write to file descriptor 2: theirs are kept, others are passed on, none is lost."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest

from superpoint_trt.core.native_stderr import collect_stderr

WORDS = "lib: "


def is_theirs(line: str) -> bool:
    return line.startswith(WORDS)


def write(text: str) -> None:
    os.write(2, text.encode())


def test_lines_of_the_library_are_kept_and_others_passed_on(capfd):
    def work() -> int:
        write("ours\nlib: one\nlib: two\nunfinished")
        return 7

    assert collect_stderr(work, is_theirs) == (7, ["lib: one", "lib: two"])
    write(" and more\n")
    assert capfd.readouterr().err == "ours\nunfinished and more\n"


def test_an_exception_of_the_work_restores_stderr(capfd):
    def work() -> None:
        write("before\n")
        raise KeyError("x")

    with pytest.raises(KeyError):
        collect_stderr(work, is_theirs)
    write("after\n")
    assert capfd.readouterr().err == "before\nafter\n"


def test_work_beside_other_work_is_done_again_alone(capfd):
    """Two threads are inside, one of them is warned: both do it again, and only one is warned then."""
    both_inside, calls = threading.Barrier(2), []

    def work(name: str) -> None:
        is_first = name not in calls
        calls.append(name)
        if is_first:
            both_inside.wait(timeout=10)
        if name == "warned":
            write("lib: damaged\n")
        if is_first:
            both_inside.wait(timeout=10)

    found = {}

    def visit(name: str) -> None:
        found[name] = collect_stderr(lambda: work(name), is_theirs)[1]

    threads = [threading.Thread(target=visit, args=(name,)) for name in ("warned", "fine")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {"warned": ["lib: damaged"], "fine": []}
    assert capfd.readouterr().err == ""


def run_python(code: str, **how) -> subprocess.CompletedProcess:
    lead = "import os, sys\nfrom superpoint_trt.core.native_stderr import collect_stderr\n"
    return subprocess.run([sys.executable, "-c", lead + code], capture_output=True, text=True, timeout=60, **how)


def test_a_closed_stderr_does_no_harm():
    code = "os.close(2)\nfor _ in range(3): print(collect_stderr(lambda: os.write(2, b'lib\\n'), lambda line: True))"
    done = run_python(code)
    assert done.stdout == "(4, ['lib'])\n" * 3, done


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_starts_anew():
    """Its parent is inside, so its stderr is the parent's file."""
    code = """
def work():
    if os.fork() == 0:
        print(collect_stderr(lambda: os.write(2, b"lib: child\\n"), lambda line: True)[1], flush=True)
        os.write(2, b"the child's own\\n")
        os._exit(0)
    os.wait()
print(collect_stderr(work, lambda line: line.startswith("lib"))[1])
"""
    done = run_python(code)
    assert done.stdout == "['lib: child']\n[]\n" and done.stderr == "the child's own\n", done
