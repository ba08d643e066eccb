"""The API reference: a page for every public module, and no link inside it that leads nowhere."""

import importlib.util
import os
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent


class Links(HTMLParser):
    """The links and the anchors of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        self.anchors |= {given["id"] or ""} if "id" in given else set()
        self.links += [value for key in ("href", "src") if (value := given.get(key))]


def broken(folder: Path) -> list[str]:
    """Return the links between the pages of a folder that lead nowhere."""
    pages = {path: Links(path.read_text()) for path in folder.rglob("*.html")}
    found = []
    for path, page in pages.items():
        for link in page.links:
            if link.startswith(("https:", "http:", "data:")):
                continue
            file, _, anchor = link.partition("#")
            target = (path.parent / file).resolve() if file else path
            if not target.is_file() or (anchor and anchor not in pages[target].anchors):
                found.append(f"{path.relative_to(folder)}: {link}")
    return found


@pytest.fixture(scope="module")
def api() -> ModuleType:
    spec = importlib.util.spec_from_file_location("api", ROOT / "docs" / "api.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_public_module_is_named(api: ModuleType) -> None:
    names = api.modules()
    files = (ROOT / "vision_attn").rglob("[!_]*.py")
    assert {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in files} <= set(names)
    assert {"vision_attn", "vision_attn.processors", "vision_attn.gallery"} <= set(names)


def write(out: Path, *only: str, **environment: str) -> None:
    """Run the script; in a process of its own, as it imports every module."""
    options = ["--only", *only] if only else []
    command = [sys.executable, str(ROOT / "docs" / "api.py"), str(out), *options]
    subprocess.run(command, check=True, env={**os.environ, **environment}, cwd=out)


def test_a_few_pages(tmp_path: Path) -> None:
    """Of the package beside the script: another checkout may be installed, and is not what the pages describe."""
    other, out = tmp_path / "other" / "vision_attn", tmp_path / "out"
    other.mkdir(parents=True)
    (other / "__init__.py").write_text("raise ImportError('this is the other checkout')")
    paths = os.pathsep.join([str(other.parent), os.environ.get("PYTHONPATH", "")])
    out.mkdir()
    names = ("vision_attn", "vision_attn.grid", "vision_attn.processors.clear", "vision_attn.adapters")
    write(out, *names, PYTHONPATH=paths)
    page = (out / "vision_attn" / "processors" / "clear.html").read_text()
    assert "native_tokens" in page and "Arguments" in page
    grid = (out / "vision_attn" / "grid.html").read_text()
    assert "Where the grid lies in the sequence." in grid and "legend of every axis letter" in grid
    index = (out / "index.html").read_text()
    assert "vision_attn/processors/clear.html" in index and "CLEAR: each grid token attends to a disc" in index
    assert broken(out) == []


def test_a_broken_link_is_found(tmp_path: Path, api: ModuleType) -> None:
    (tmp_path / "a.html").write_text('<p id="x"></p><a href="#x">x</a><a href="#y">y</a><a href="b.html">b</a>')
    assert broken(tmp_path.resolve()) == ["a.html: #y", "a.html: b.html"]
    assert api.unlinked('<p id="x"><a href="#x">x</a><a href="#y">y</a>') == '<p id="x"><a href="#x">x</a>y'


@pytest.mark.slow
def test_all_pages(api: ModuleType, tmp_path: Path) -> None:
    write(tmp_path)
    names = api.modules()
    assert all((tmp_path / f"{name.replace('.', '/')}.html").is_file() for name in names)
    assert broken(tmp_path) == []
