"""Serves the page of web/ on this machine, or writes it for other servers: points and matches in a browser."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from superpoint_trt import packaged
from superpoint_trt.convert.default_model import model_path
from superpoint_trt.convert.onnx_file import read_onnx
from superpoint_trt.core.files import PathLike, make_folder, write_atomically
from superpoint_trt.core.networks import packaged_network
from superpoint_trt.core.types import CELL_PX, OutputType, SuperPointError

HOST = "127.0.0.1"
"""No other machine reaches the page."""

_MODEL, _MATCHER, _DESCRIPTION = "model.onnx", "matcher.onnx", "model.json"

_HEADERS = {
    # A page that is isolated from other origins may use threads in WebAssembly.
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}

_TYPES = {
    # Python takes the types of endings from the machine, which may name others.
    ".css": "text/css",
    ".html": "text/html",
    ".js": "text/javascript",
    ".json": "application/json",
    ".mjs": "text/javascript",
    ".onnx": "application/octet-stream",
    ".txt": "text/plain",
    ".wasm": "application/wasm",
}


@dataclass(frozen=True)
class WebOptions:
    """Which network the page gets, and where it is served."""

    model: str = packaged.PAGE_NETWORK
    """Name of a packaged network, or a dynamic fp32 `dense` .onnx."""
    port: int = 8765
    """0: any free one."""
    page: Path = packaged.PAGE
    """Folder of the built page."""
    matcher: PathLike | None = None
    """A learned matcher's .onnx for any number of keypoints; None: mutual nearest neighbors."""


class PageServer(ThreadingHTTPServer):
    """The page and its network, at `address`. `serve_forever` serves until it is interrupted."""

    daemon_threads = True

    def __init__(self, options: WebOptions | None = None) -> None:
        """Exports the network if it must, and takes the port.

        Raises:
            SuperPointError: the page is not built, model or matcher is not fit for it, or the port cannot be had.
        """
        options = options or WebOptions()
        self.page, self.models, self.description = _page_and_models(options)
        try:
            super().__init__((HOST, options.port), _Handler)
        except (OSError, OverflowError) as error:
            raise SuperPointError(
                f"port {options.port} cannot be had ({error}); choose another with --port, or any free one: --port 0."
            ) from error

    @property
    def address(self) -> str:
        """Where a browser on this machine finds the page."""
        return f"http://{HOST}:{self.server_port}/"


def save_page(folder: PathLike, options: WebOptions | None = None) -> Path:
    """Writes the page and its network to a folder, as plain files that any web server can send.

    Args:
        folder: made if it is not there; files of the same names are replaced.
        options: the port is not used.

    Raises:
        SuperPointError: the page is not built, model or matcher is not fit for it, or the folder cannot be written.
    """
    page, models, description = _page_and_models(options or WebOptions())
    target = make_folder(folder)
    for file in filter(Path.is_file, page.rglob("*")):
        make_folder((target / file.relative_to(page)).parent)
        write_atomically(target / file.relative_to(page), file.read_bytes())
    for name, model in models.items():
        write_atomically(target / name, model.read_bytes())
    write_atomically(target / _DESCRIPTION, json.dumps(description).encode())
    return target


def _page_and_models(options: WebOptions) -> tuple[Path, dict[str, Path], dict[str, Any]]:
    """The page's folder, the models' files by their names in the page, and what the page must know about them."""
    page, model = _built(options.page), model_path(options.model)
    network = packaged_network(options.model)
    description = _describe(model, network.name if network else model.name)
    if options.matcher is None:
        return page, {_MODEL: model}, {**description, "matcher": None}
    matcher = Path(options.matcher)
    described = _describe_matcher(matcher, read_onnx(model).description.descriptor_dim)
    return page, {_MODEL: model, _MATCHER: matcher}, {**description, "matcher": described}


def _built(page: Path) -> Path:
    """The folder, if the built page is in it.

    Raises:
        SuperPointError: it is not.
    """
    if not (page / "index.html").is_file():
        raise SuperPointError(
            f"the page is not in {page}: this copy was installed without it. In a clone of the repository, with "
            "Node.js 20 or newer: make web, then pip install . again."
        )
    return page


def _describe(model: Path, name: str) -> dict[str, Any]:
    """What the page must know about a model.

    Raises:
        SuperPointError: the page cannot run it.
    """
    description = read_onnx(model).description
    fits = description.type is OutputType.DENSE and description.dynamic and description.stride_px == CELL_PX
    if not fits:
        size = "any size" if description.dynamic else f"{description.width_px}x{description.height_px} px"
        raise SuperPointError(
            f"{model} is a {description.type.value} model for {size} with cells of {description.stride_px} px; "
            f"the page takes dense models for any size with cells of {CELL_PX} px: superpoint export --dynamic."
        )
    return {
        "name": name,
        "file": _MODEL,
        "bytes": model.stat().st_size,
        "sampling": description.sampling.value,
        "stridePx": description.stride_px,
        "subpixel": description.subpixel,
    }


def _describe_matcher(matcher: Path, descriptor_dim: int) -> dict[str, Any]:
    """What the page must know about a matcher.

    Raises:
        SuperPointError: the page cannot run it, or it is for descriptors of another length.
    """
    from superpoint_trt.match.learned import LearnedMatcher

    if matcher.suffix.lower() != ".onnx":
        raise SuperPointError(f"{matcher}: the page takes a matcher's .onnx: superpoint matcher export.")
    with LearnedMatcher(matcher, "cpu") as opened:
        description = opened.description
    if description.rows is not None or description.batch != 1 or description.descriptor_dim != descriptor_dim:
        raise SuperPointError(
            f"{matcher} takes {description.batch} x {description.rows or 'any'} keypoints with descriptors of "
            f"{description.descriptor_dim} numbers; the page takes 1 x any with the network's {descriptor_dim}."
        )
    return {
        "name": matcher.stem,
        "file": _MATCHER,
        "bytes": matcher.stat().st_size,
        "minScore": description.min_score,
    }


class _Handler(SimpleHTTPRequestHandler):
    """Answers with the page's files, the model and its description."""

    server: PageServer

    def __init__(self, request: Any, client_address: Any, server: PageServer) -> None:
        super().__init__(request, client_address, server, directory=str(server.page))

    def send_head(self) -> Any:
        """Sends the headers of one file, and returns the file; the model's description is made here."""
        if self.path.partition("?")[0] != f"/{_DESCRIPTION}":
            return super().send_head()
        body = json.dumps(self.server.description).encode()
        self.send_response(200)
        self.send_header("Content-Type", _TYPES[".json"])
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        return io.BytesIO(body)

    def translate_path(self, path: str) -> str:
        """The file of an address: the models lie elsewhere than the page."""
        model = self.server.models.get(path.partition("?")[0].lstrip("/"))
        return super().translate_path(path) if model is None else str(model)

    def guess_type(self, path: Any) -> str:
        """The type of a file, by its ending."""
        return _TYPES.get(Path(path).suffix.lower()) or super().guess_type(path)

    def end_headers(self) -> None:
        """Adds the headers that every answer has."""
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        super().end_headers()

    def list_directory(self, path: Any) -> None:
        """No folder is listed."""
        self.send_error(404)

    def log_message(self, format: str, *args: Any) -> None:
        """Prints no line for each file."""
