"""The public checkpoints: what is said of them, and how a download is verified. Servers here are on 127.0.0.1."""

from __future__ import annotations

import dataclasses
import http.server
import socket
import subprocess
import threading
from pathlib import Path

import pytest
from conftest import REAL

from superpoint_trt.checkpoint import public
from superpoint_trt.cli.main import cli, run
from superpoint_trt.core.files import git_blob_id
from superpoint_trt.core.types import SuperPointError

CONTENT = bytes(range(256)) * 1000  # several chunks
OTHER = b"<html><body>Sign in to the network</body></html>"


# -------------------------------------------------------------------------------------------------------------- blob id


def git_hash_object(data: bytes) -> str:
    """What git itself says."""
    done = subprocess.run(["git", "hash-object", "--stdin"], input=data, capture_output=True, check=True)
    return done.stdout.decode().strip()


@pytest.mark.parametrize(
    ("data", "blob"),
    [
        (b"", "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"),  # known to every git user
        (b"hello\n", "ce013625030ba8dba906f756967f9e9ca394464a"),
    ],
)
def test_git_blob_id_of_famous_files(data, blob):
    assert git_blob_id(data) == blob


@pytest.mark.parametrize("data", [b"\0", CONTENT, b"a\r\nb\r\n"], ids=["nul", "binary", "crlf"])
def test_git_blob_id_is_gits(data):
    assert git_blob_id(data) == git_hash_object(data)


# ----------------------------------------------------------------------------------------------------------------- list


def test_list_says_where_whose_and_what(capsys):
    assert run(cli, ["weights", "list"]) == 0
    first, second = capsys.readouterr().out.split("magicleap: ")
    for words in (
        "v6: ",
        "MIT",
        "f645e8db1b10a7be84d4e50d67a3c64dd240a49a",
        "https://raw.githubusercontent.com/rpautrat/SuperPoint/",
        "superpoint_v6_from_tf.pth",
    ):
        assert words in first
    for words in (
        "non-commercial",
        "107a444ca318d487390137d619d49f2f0a3b1ad8",
        "https://raw.githubusercontent.com/magicleap/SuperPointPretrainedNetwork/",
        "superpoint_v1.pth",
    ):
        assert words in second


def test_find():
    assert public.find("v6").filename == "superpoint_v6_from_tf.pth"
    assert public.find("v6").commercial_use and not public.find("magicleap").commercial_use
    with pytest.raises(SuperPointError, match=r"'v7'.*v6, magicleap"):
        public.find("v7")


# ---------------------------------------------------------------------------------------------------------------- fetch


class Server(http.server.ThreadingHTTPServer):
    """Answers every GET with `content`, or with `status`, or with `raw` bytes; remembers what was asked for."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.status, self.raw, self.asked = CONTENT, 200, None, []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append(self.path)
        if self.server.raw is not None:
            self.wfile.write(self.server.raw)
            self.close_connection = True
            return
        self.send_response(self.server.status)
        self.send_header("Content-Length", str(len(self.server.content)))
        self.end_headers()
        self.wfile.write(self.server.content)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture
def publish(monkeypatch, tmp_path):
    """Puts the public checkpoints at another address, with CONTENT's blob id; works in an empty folder."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.chdir(tmp_path)
    blob = git_hash_object(CONTENT)

    def at(address: str) -> public.PublicWeights:
        entries = [
            dataclasses.replace(entry, url=f"{address}/some/folder/{entry.filename}", git_blob=blob)
            for entry in public.PUBLIC
        ]
        monkeypatch.setattr(public, "PUBLIC", tuple(entries))
        return entries[0]

    return at


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def refused(capfd, *arguments: str) -> str:
    """The one line that the command refuses with."""
    capfd.readouterr()
    assert run(cli, ["weights", "fetch", *arguments]) == 2
    err = capfd.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n"), err
    return err


def test_fetch_to_a_file(server, publish, tmp_path, capsys):
    publish(server.address)
    assert run(cli, ["weights", "fetch", "v6", "--output", "mine.pth"]) == 0
    assert (tmp_path / "mine.pth").read_bytes() == CONTENT
    assert files(tmp_path) == ["mine.pth"]
    assert server.asked == ["/some/folder/superpoint_v6_from_tf.pth"]
    assert "mine.pth: verified" in capsys.readouterr().out


def test_fetch_to_the_usual_place(server, publish, tmp_path):
    publish(server.address)
    assert run(cli, ["weights", "fetch", "v6"]) == 0
    assert files(tmp_path) == ["weights/superpoint_v6_from_tf.pth"]
    assert (tmp_path / "weights/superpoint_v6_from_tf.pth").read_bytes() == CONTENT


def test_fetched_file_is_readable_as_any_new_file(server, publish, tmp_path):
    public.fetch(publish(server.address), "mine.pth")
    (tmp_path / "new").touch()
    assert (tmp_path / "mine.pth").stat().st_mode == (tmp_path / "new").stat().st_mode


def test_progress_counts_up_to_the_whole(server, publish):
    seen = []
    public.fetch(publish(server.address), "mine.pth", lambda done, total: seen.append((done, total)))
    counts = [done for done, _ in seen]
    assert counts == sorted(counts) and counts[-1] == len(CONTENT) and len(counts) > 1
    assert {total for _, total in seen} == {len(CONTENT)}


def test_what_is_verified_already_is_not_downloaded_again(server, publish, tmp_path):
    publish(server.address)
    (tmp_path / "mine.pth").write_bytes(CONTENT)
    assert run(cli, ["weights", "fetch", "v6", "--output", "mine.pth"]) == 0
    assert server.asked == []


def test_another_file_is_replaced(server, publish, tmp_path):
    publish(server.address)
    (tmp_path / "mine.pth").write_bytes(CONTENT[:-1])
    assert run(cli, ["weights", "fetch", "v6", "--output", "mine.pth"]) == 0
    assert (tmp_path / "mine.pth").read_bytes() == CONTENT


def answer(status=200, content=CONTENT, raw=None):
    return {"status": status, "content": content, "raw": raw}


HEAD = b"HTTP/1.1 200 OK\r\n"
BAD_ANSWERS = {
    # What the server does -> what the message must say.
    "a-page": (answer(content=OTHER), "other content", git_hash_object(OTHER), git_hash_object(CONTENT), "48 bytes"),
    "one-bit": (answer(content=b"\x01" + CONTENT[1:]), "other content"),
    "one-byte-more": (answer(content=CONTENT + b"\n"), "other content"),
    "nothing": (answer(content=b""), "other content", "0 bytes"),
    "404": (answer(404, b"404: Not Found"), "404"),
    "404-with-the-right-content": (answer(404), "404"),
    "403": (answer(403, OTHER), "403"),
    "500": (answer(500, OTHER), "500"),
    "cut-off": (answer(raw=HEAD + b"Content-Length: 256000\r\n\r\n" + CONTENT[:1000]), "superpoint_v6_from_tf.pth"),
    "cut-off-chunk": (
        answer(raw=HEAD + b"Transfer-Encoding: chunked\r\n\r\n10000\r\n" + CONTENT[:1000]),
        "superpoint_v6_from_tf.pth",
    ),
    "no-http": (answer(raw=b"SSH-2.0-OpenSSH_9.6\r\n"), "superpoint_v6_from_tf.pth"),
    "no-answer": (answer(raw=b""), "superpoint_v6_from_tf.pth"),
    "length-in-words": (answer(raw=HEAD + b"Content-Length: many\r\n\r\n"), "superpoint_v6_from_tf.pth"),
}


@pytest.mark.parametrize("what", BAD_ANSWERS)
@pytest.mark.parametrize("before", [None, b"precious"], ids=["no-file", "old-file"])
def test_bad_answer_changes_nothing(server, publish, tmp_path, capfd, what, before):
    behavior, *says = BAD_ANSWERS[what]
    publish(server.address)
    vars(server).update(behavior)
    if before:
        (tmp_path / "mine.pth").write_bytes(before)
    message = refused(capfd, "v6", "--output", "mine.pth")
    for words in (server.address, *says):
        assert words in message
    assert files(tmp_path) == (["mine.pth"] if before else [])
    assert not before or (tmp_path / "mine.pth").read_bytes() == before


@pytest.mark.parametrize("what", ["a-page", "404"])
def test_bad_answer_leaves_the_usual_place_empty(server, publish, tmp_path, capfd, what):
    publish(server.address)
    vars(server).update(BAD_ANSWERS[what][0])
    refused(capfd, "v6")
    assert files(tmp_path) == []


def test_offline(publish, tmp_path, capfd):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound but not listening: nobody answers there
        publish(f"http://127.0.0.1:{taken.getsockname()[1]}")
        message = refused(capfd, "v6", "--output", "mine.pth")
    assert "cannot be reached" in message and "refused" in message and "network" in message
    assert files(tmp_path) == []


def test_a_silent_server_is_given_up(publish, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(public, "TIMEOUT_S", 0.2)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        publish(f"http://127.0.0.1:{silent.getsockname()[1]}")
        assert "timed out" in refused(capfd, "v6", "--output", "mine.pth")
    assert files(tmp_path) == []


def test_a_name_that_does_not_resolve(publish, capfd):
    publish("http://no-such-host.invalid")
    assert "no-such-host.invalid" in refused(capfd, "v6", "--output", "mine.pth")


@pytest.mark.parametrize("output", ["nowhere/mine.pth", "taken"])
def test_output_is_checked_before_the_download(server, publish, tmp_path, capfd, output):
    (tmp_path / "taken").mkdir()
    publish(server.address)
    refused(capfd, "v6", "--output", output)
    assert server.asked == []


@pytest.mark.parametrize(
    ("name", "says", "warned"), [("magicleap", "non-commercial research only", True), ("v6", "MIT", False)]
)
def test_the_license_comes_before_the_download(publish, monkeypatch, capsys, name, says, warned):
    printed_before = []

    def no_network(*_, **__):
        printed_before.append(capsys.readouterr().out)
        raise OSError("no network in this test")

    publish("http://127.0.0.1:9")
    monkeypatch.setattr("urllib.request.urlopen", no_network)
    assert run(cli, ["weights", "fetch", name, "--output", "mine.pth"]) == 2
    (said,) = printed_before
    assert says in said
    assert ("NON-COMMERCIAL" in said) == warned


# ---------------------------------------------------------------------------------------------------------- is_verified


def test_is_verified(publish, tmp_path):
    entry = publish("http://127.0.0.1:9")
    assert not public.is_verified(entry, tmp_path / "missing.pth")
    assert not public.is_verified(entry, tmp_path)
    (tmp_path / "mine.pth").write_bytes(CONTENT)
    assert public.is_verified(entry, tmp_path / "mine.pth")
    (tmp_path / "mine.pth").write_bytes(CONTENT + b" ")
    assert not public.is_verified(entry, tmp_path / "mine.pth")


def test_a_changed_copy_of_the_real_weights_is_not_verified():
    """shared/ holds v6 after an int8 round trip: nearly the published weights, and not them."""
    if not REAL["v6"].exists():
        pytest.skip(f"{REAL['v6']} is not here")
    assert not public.is_verified(public.find("v6"), REAL["v6"])
