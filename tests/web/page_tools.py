"""What the tests of the page need: Node.js, a browser, the built page. A test is skipped where one is missing."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

WEB = Path(__file__).resolve().parents[2] / "web"
CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
FIREFOX = ("firefox", "firefox-esr")


def needs_node() -> str:
    """The command node; skips without it."""
    found = shutil.which("node")
    if not found:
        pytest.skip("Node.js is not here (node)")
    return found


def needs_browser(commands: tuple[str, ...] = CHROMIUM) -> str:
    """Path of a browser; skips without it, without puppeteer-core, or without the built page."""
    from superpoint_trt import packaged

    browser = next(filter(None, map(shutil.which, commands)), None)
    if not browser:
        pytest.skip(f"none of {', '.join(commands)} is here (Debian's packages chromium, firefox-esr)")
    if not (WEB / "node_modules" / "puppeteer-core").is_dir() or not (packaged.PAGE / "index.html").is_file():
        pytest.skip(
            "the page is not built here, or puppeteer-core is missing (make web web/node_modules/puppeteer-core)"
        )
    return browser
