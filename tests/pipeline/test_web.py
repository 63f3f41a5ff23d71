"""The server of the page: what it sends, with which headers, and what it refuses. The page itself: tests/web."""

from __future__ import annotations

import json
import socket
import threading
from http.client import HTTPConnection

import pytest
from matchers import plain_matcher

from superpoint_trt import packaged
from superpoint_trt.checkpoint.matcher import MatcherShape, save_matcher
from superpoint_trt.cli.main import cli, run
from superpoint_trt.convert.export_matcher import MatcherExportOptions, export_matcher
from superpoint_trt.core.matcher import MIN_SCORE
from superpoint_trt.core.types import OutputType, SuperPointError
from superpoint_trt.pipeline.web import HOST, PageServer, WebOptions, save_page


@pytest.fixture
def page(tmp_path):
    """A folder that looks like a built page."""
    (tmp_path / "page" / "ort").mkdir(parents=True)
    (tmp_path / "page" / "index.html").write_text("<title>page</title>")
    (tmp_path / "page" / "worker.js").write_text("1")
    (tmp_path / "page" / "ort" / "runtime.wasm").write_bytes(b"\0asm")
    (tmp_path / "page" / "ort" / "runtime.mjs").write_text("1")
    (tmp_path / "secret.txt").write_text("secret")
    return tmp_path / "page"


@pytest.fixture
def ask(page, exported):
    """Path -> status, headers and body of the server's answer."""
    with PageServer(WebOptions(str(exported("compact", dynamic=True)), 0, page)) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()

        def get(path, method="GET"):
            connection = HTTPConnection(HOST, server.server_port, timeout=20)
            connection.request(method, path)
            answer = connection.getresponse()
            return answer.status, answer.headers, answer.read()

        yield get
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/", "text/html"),
        ("/?backend=wasm", "text/html"),
        ("/worker.js", "text/javascript"),
        ("/ort/runtime.mjs", "text/javascript"),
        ("/ort/runtime.wasm", "application/wasm"),
        ("/model.json", "application/json"),
        ("/model.onnx", "application/octet-stream"),
    ],
)
def test_every_answer_allows_threads_and_has_its_type(ask, path, kind):
    for method in ("GET", "HEAD"):
        status, headers, _ = ask(path, method)
        assert (status, headers["Content-Type"]) == (200, kind), method
        assert headers["Cross-Origin-Opener-Policy"] == "same-origin"
        assert headers["Cross-Origin-Embedder-Policy"] == "require-corp"


def test_the_model_is_sent_and_described(ask, exported):
    model = exported("compact", dynamic=True)
    _, _, body = ask("/model.json")
    assert json.loads(body) == {
        "name": model.name,
        "file": "model.onnx",
        "bytes": model.stat().st_size,
        "sampling": "half-pixel",
        "stridePx": 8,
        "subpixel": True,
        "matcher": None,
    }
    assert ask("/model.onnx")[2] == model.read_bytes()


@pytest.mark.parametrize(
    "path", ["/ort/", "/missing.js", "/../secret.txt", "/%2e%2e/secret.txt", "/ort/../../secret.txt"]
)
def test_nothing_else_is_sent(ask, path):
    status, _, body = ask(path)
    assert status == 404 and b"secret" not in body.replace(path.encode(), b"")


def test_a_packaged_network_has_its_name(page):
    with PageServer(WebOptions(port=0, page=page)) as server:
        assert server.description["name"] == packaged.PAGE_NETWORK
        assert server.address == f"http://127.0.0.1:{server.server_port}/"
    assert packaged.PAGE_NETWORK == "small"


def test_the_saved_page_holds_what_the_server_sends(page, ask, exported, tmp_path):
    model = str(exported("compact", dynamic=True))
    for _ in range(2):  # an older copy is replaced
        folder = save_page(tmp_path / "site", WebOptions(model, page=page))
        assert {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()} == {
            *("index.html", "worker.js", "ort/runtime.wasm", "ort/runtime.mjs", "model.json", "model.onnx")
        }
        for name in ("index.html", "ort/runtime.wasm", "model.json", "model.onnx"):
            assert (folder / name).read_bytes() == ask(f"/{name}")[2], name
    (tmp_path / "taken").write_text("")
    with pytest.raises(SuperPointError, match="taken"):
        save_page(tmp_path / "taken", WebOptions(model, page=page))


def test_models_that_the_page_cannot_run_are_refused(page, exported):
    for model in (exported("compact"), exported("compact", OutputType.KEYPOINTS, dynamic=True)):
        with pytest.raises(SuperPointError, match=r"takes dense models for any size.*superpoint export --dynamic"):
            PageServer(WebOptions(str(model), 0, page))
    with pytest.raises(SuperPointError, match="no packaged network"):
        PageServer(WebOptions("tiny", 0, page))


def test_a_matcher_is_sent_if_it_fits(page, exported, tmp_path):
    model = str(exported("compact", dynamic=True))
    fit, other = (
        save_matcher(plain_matcher(MatcherShape((d,), 64, 1, 2)), tmp_path / f"{d}.safetensors") for d in (64, 32)
    )
    matcher = export_matcher(fit, tmp_path / "fit.onnx")
    folder = save_page(tmp_path / "site", WebOptions(model, page=page, matcher=matcher))
    assert (folder / "matcher.onnx").read_bytes() == matcher.read_bytes()
    told = json.loads((folder / "model.json").read_text())["matcher"]
    assert told == {"name": "fit", "file": "matcher.onnx", "bytes": matcher.stat().st_size, "minScore": MIN_SCORE}
    fixed = export_matcher(fit, tmp_path / "fixed.onnx", MatcherExportOptions(50))
    for bad, words in (
        (fit, "superpoint matcher export"),
        (fixed, "takes 1 x 50 keypoints"),
        (export_matcher(other, tmp_path / "other.onnx"), "descriptors of 32 numbers; .* the network's 64"),
        (model, "not a matcher of this package"),
    ):
        with pytest.raises(SuperPointError, match=words):
            PageServer(WebOptions(model, 0, page, bad))


def test_a_page_that_is_not_built_says_how(tmp_path):
    with pytest.raises(SuperPointError, match=r"make web, then pip install . again"):
        PageServer(WebOptions(port=0, page=tmp_path))


def test_a_taken_port_is_said(page, exported):
    with socket.socket() as taken:
        taken.bind((HOST, 0))
        taken.listen()
        with pytest.raises(SuperPointError, match=r"port \d+ cannot be had .*--port 0"):
            PageServer(WebOptions(str(exported("compact", dynamic=True)), taken.getsockname()[1], page))


def test_a_bad_port_is_refused(capsys):
    assert run(cli, ["web", "--port", "70000", "--no-open"]) == 2
    assert "70000" in capsys.readouterr().err
