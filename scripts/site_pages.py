"""mkdocs hooks: pages that live outside docs/, the API reference, and links that work both here and on the site.

mkdocs.yml names this file. A page is written with links relative to its place in the repository, so that a code
browser can follow them; here they are turned into links of the site. A link to a file that does not exist is a
warning, which `mkdocs build --strict` turns into an error.
"""

from __future__ import annotations

import logging
import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "superpoint_trt"

PAGES = {
    "README.md": "index.md",
    "README.zh-CN.md": "index.zh-CN.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
    "LICENSE": "license.md",
    "training/README.md": "training.md",
    "training/states/README.md": "training-states.md",
    "src/superpoint_trt/packaged/MODEL_CARD.md": "model-card.md",
    "src/superpoint_trt/packaged/MODEL_CARD_small.md": "model-card-small.md",
    "src/superpoint_trt/packaged/MODEL_CARD_v1.md": "model-card-v1.md",
    "src/superpoint_trt/packaged/MODEL_CARD_matcher.md": "model-card-matcher.md",
    "src/superpoint_trt/packaged/PHOTOGRAPHS.md": "photographs.md",
}
"""Files of the repository -> pages of the site."""

EXAMPLES_PAGE = "examples.md"
FOLDERS = ("run", "match", "pipeline", "convert", "prove", "checkpoint", "core", "gpu")
"""Folders of the package with a page of API reference each; `cli` has no API of its own."""

_LINK = re.compile(r"(?<=\]\()([^()\s]+)(?=\))")
_CODE = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)
_log = logging.getLogger("mkdocs.hooks.site_pages")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that are not in docs/."""
    generated = {page: (ROOT / source).read_text(encoding="utf-8") for source, page in PAGES.items()}
    generated[EXAMPLES_PAGE] = _examples()
    generated.update(_reference())
    for page, text in generated.items():
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns links between files of the repository into links between pages; code blocks stay as they are."""
    here = page.file.src_uri
    sources = {target: source for source, target in PAGES.items()}
    source = sources.get(here, f"docs/{here}")

    def rewrite(found: re.Match[str]) -> str:
        return _site_link(found[1], source, here)

    parts = _CODE.split(markdown)
    return "".join(part if part.startswith("```") else _LINK.sub(rewrite, part) for part in parts)


def _site_link(link: str, source: str, page: str) -> str:
    """A link in the file `source`, as it is written -> the same link on the site's `page`."""
    path, _, anchor = link.partition("#")
    if not path or "://" in link or link.startswith("mailto:"):
        return link
    target = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
    if page == EXAMPLES_PAGE or page.startswith("reference/"):
        return link
    if not (ROOT / target).exists():
        _log.warning("%s links to %s, which does not exist", source, link)
        return link
    if target in PAGES:
        target = PAGES[target]
    elif target.startswith("examples"):
        target, anchor = EXAMPLES_PAGE, Path(target).stem if target != "examples" else ""
    elif target.startswith("docs/"):
        target = target[len("docs/") :]
    else:
        _log.warning(
            "%s links to %s, which is no page of the site: add it to PAGES, or name it without a link", source, link
        )
    relative = posixpath.relpath(target, posixpath.dirname(page) or ".")
    return relative + (f"#{anchor}" if anchor else "")


def _examples() -> str:
    parts = ["# Examples\n\nEach is under 60 lines and run by `tests/examples`.\n"]
    for path in sorted((ROOT / "examples").iterdir()):
        if path.suffix in (".py", ".cpp"):
            language = {".py": "python", ".cpp": "cpp"}[path.suffix]
            code = path.read_text(encoding="utf-8")
            parts.append(f"## {path.name} {{#{path.stem}}}\n\n```{language}\n{code}```\n")
    return "\n".join(parts)


def _reference() -> dict[str, str]:
    """One page for what a user imports, and one for each folder, with every public module in it."""
    start = [
        "# API reference",
        "From the docstrings. Most programs need these:",
        "- [SuperPoint][superpoint_trt.run.extractor.SuperPoint] finds the keypoints of images.\n"
        "- [Keypoints][superpoint_trt.core.types.Keypoints] is what it returns.\n"
        "- [SuperPointError][superpoint_trt.core.types.SuperPointError] is every error that a user can mend.",
        "By folder: " + ", ".join(f"[{folder}]({folder}.md)" for folder in FOLDERS) + ".",
    ]
    if (PACKAGE / "int8.py").is_file():
        start.append("::: superpoint_trt.int8")
    pages = {"reference/index.md": "\n\n".join(start) + "\n"}
    for folder in FOLDERS:
        text = [f"# {folder}", f"`superpoint_trt.{folder}`"]
        for path in sorted((PACKAGE / folder).rglob("*.py")):
            name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
            text.append(f"::: {name}")
        pages[f"reference/{folder}.md"] = "\n\n".join(text) + "\n"
    return pages
