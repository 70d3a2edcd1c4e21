"""What mkdocs needs to know of this repository: pages and pictures outside docs/, and the links to them."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
# Page of the site -> its file in the repository.
OUTSIDE = {"readme.md": "README.md", "study.md": "benchmarks/study/README.md", "zoo.md": "recipes/zoo/README.md"}
OUTSIDE |= {f"{name.lower()}.md": f"{name}.md" for name in ("CONTRIBUTING", "SECURITY", "CHANGELOG")}
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)\s#]+)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages of OUTSIDE, and every other file that a page links to."""
    for uri, path in OUTSIDE.items():
        files.append(File.generated(config, uri, abs_src_path=str(ROOT / path)))
    pages = [file.src_uri for file in files if file.src_uri.endswith(".md")]
    for page in pages:  # grows while it is read
        for link in LINK.findall((ROOT / _in_repository(page)).read_text("utf-8")):
            uri, path = _target(page, link)
            if files.get_file_from_path(uri) is None and path.is_file():
                files.append(File.generated(config, uri, abs_src_path=str(path)))
                pages += [uri] if uri.endswith(".md") else []
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Links of the repository become links of the site."""
    here = page.file.src_uri
    return LINK.sub(lambda link: posixpath.relpath(_target(here, link[1])[0], posixpath.dirname(here) or "."), markdown)


def _in_repository(page: str) -> str:
    return OUTSIDE.get(page) or (page.removeprefix("files/") if page.startswith("files/") else f"docs/{page}")


def _target(page: str, link: str) -> tuple[str, Path]:
    """Where a page's link leads: as a file of the site and of the repository."""
    path = posixpath.normpath(posixpath.join(posixpath.dirname(_in_repository(page)), link))
    outside = {where: uri for uri, where in OUTSIDE.items()}
    inside = path.removeprefix("docs/") if path.startswith("docs/") else f"files/{path}"
    return outside.get(path, inside), ROOT / path
