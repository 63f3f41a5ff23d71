"""The command web: points and matches in a browser, on this machine."""

from __future__ import annotations

import click

from superpoint_trt import packaged
from superpoint_trt.cli.matcher import NEAREST, matcher_file
from superpoint_trt.cli.options import NETWORKS
from superpoint_trt.cli.terminal import print_row


@click.command()
@click.option(
    "--model",
    default=packaged.PAGE_NETWORK,
    show_default=True,
    help=f"Packaged network ({NETWORKS}), or a dynamic dense .onnx.",
)
@click.option(
    "--matcher", default=NEAREST, metavar="nearest|learned|FILE", help="Mutual nearest neighbors, or a network."
)
@click.option("--port", type=click.IntRange(0, 65535), default=8765, show_default=True, help="0: any free one.")
@click.option("--open/--no-open", "open_page", default=True, show_default=True, help="Open the page in the browser.")
@click.option("--save", metavar="FOLDER", help="Write page and network there instead, for any web server.")
def web(model: str, matcher: str, port: int, open_page: bool, save: str | None) -> None:
    """Serve a page that finds and matches points in pictures and in the camera.

    The browser computes everything; the page is reached from this machine alone. Ctrl-C ends it.
    """
    import webbrowser

    from superpoint_trt.pipeline.web import PageServer, WebOptions, save_page

    options = WebOptions(model, port, matcher=None if matcher == NEAREST else matcher_file(matcher))
    if save is not None:
        print_row("page", save_page(save, options))
        return
    with PageServer(options) as server:
        print_row("model", f"{server.description['name']} ({server.description['bytes'] / 1e6:.1f} MB)")
        print_row("page", f"{server.address} (Ctrl-C ends it)")
        if open_page:
            webbrowser.open(server.address)
        server.serve_forever()
