"""`vision-attn gallery`: what the page has and links to, and how it reads in a browser, on a phone and in the dark."""

import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chromium import PROGRAM, browser
from gallery_case import EXAMPLES, FOLDER, ROOT, SMALL, program
from PIL import Image

from vision_attn.cli import main
from vision_attn.conversion.state import is_converted
from vision_attn.demo import load_teacher
from vision_attn.gallery.build import build_gallery, find_examples, read_example, run_example
from vision_attn.gallery.page import Shown, html_of, write_page

VOID = {"meta", "img", "br", "hr", "link", "input"}
LOOKS = [
    pytest.param(
        width, dark, id=f"{width}px-{'dark' if dark else 'light'}" + ("" if PROGRAM else "-skipped-no-chromium-here"),
        marks=pytest.mark.skipif(not PROGRAM, reason="no Chromium on this machine"),
    )
    for width in (390, 1280) for dark in (False, True)
]  # fmt: skip


class Page(HTMLParser):
    """What a page refers to, and whether its elements are closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.files, self.addresses, self.anchors, self.names = [], [], [], set()
        self.images, self.scripts, self.stack, self.shown = [], 0, [], []
        self.feed(text)
        self.close()
        assert not self.stack, f"not closed: {self.stack}"

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        self.stack += [] if tag in VOID else [tag]
        self.scripts += tag == "script"
        self.names |= {given["id"]} if given.get("id") else set()
        self.images += [given] if tag == "img" else []
        for value in filter(None, (given.get("src"), given.get("href"))):
            if value.startswith("#"):
                self.anchors.append(value[1:])
            else:
                (self.addresses if ":" in value else self.files).append(value)

    def handle_endtag(self, tag: str) -> None:
        assert self.stack and self.stack.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        self.shown.append(data)


def check(page: Path) -> Page:
    """Fail if something the page refers to is not there, is not relative, or has no alternative text."""
    found = Page(page.read_text())
    assert found.files and not found.scripts
    for file in found.files:
        assert not file.startswith(("/", "~", "..")) and (page.parent / file).is_file(), file
    assert all(address.startswith("https://") for address in found.addresses)
    assert set(found.anchors) <= found.names
    assert all((image.get("alt") or "").strip() for image in found.images)
    return found


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, str]]]:
    """Return a folder, and captions by offline example: the nano teacher has drawn them there in a few steps."""
    out, pipe, captions = tmp_path_factory.mktemp("gallery"), load_teacher("nano"), {}
    pipe.set_progress_bar_config(disable=True)
    for name, small in SMALL.items():
        captions[name] = program(name).main(pipe=pipe, out=out / name, **small)
        assert not is_converted(pipe.transformer), name
    return out, captions


@pytest.fixture(scope="module")
def page(drawn: tuple[Path, dict[str, dict[str, str]]]) -> Path:
    """The page of all examples."""
    out, captions = drawn
    shown = [
        Shown(example, captions[name], 1.0) if name in captions
        else Shown(example, reason="It was not run for this page.")
        for name, example in EXAMPLES.items()
    ]  # fmt: skip
    return write_page(out, shown, sorted((ROOT / "bench" / "results").glob("*.json")), [])


@pytest.mark.parametrize("name", SMALL)
def test_offline_examples_draw_what_they_name(name: str, drawn: tuple[Path, dict[str, dict[str, str]]]) -> None:
    out, captions = drawn
    assert set(captions[name]) == {file.name for file in (out / name).iterdir()}
    assert all(np.asarray(Image.open(out / name / file)).std() > 1 for file in captions[name])


def test_it_has_everything_and_every_link_leads_somewhere(page: Path) -> None:
    found, text = check(page), page.read_text()
    assert set(EXAMPLES) | {"results"} <= found.names
    assert len(found.images) == sum(path.suffix == ".png" for path in page.parent.rglob("*"))
    assert "ours, ms" in text and "kernels_local_h200.json" in text and "check_local" not in text
    assert "s/step" in text and "#### " not in text  # the table of the entry itself
    assert all(weights in text for example in EXAMPLES.values() for weights in example.weights)
    shown = "".join(found.shown)
    for example in EXAMPLES.values():
        assert example.code.splitlines()[-1] in shown and example.title in shown


@pytest.mark.parametrize(
    "old, new",
    [
        ('src="', 'src="no-'), ('src="', 'src="/'), ('alt="', 'alt="" title="'), ('href="#', 'href="#no-'),
        ("</figure>", ""), ("<h1>", "<h1><script></script>"),
    ],
    ids=["missing", "absolute", "alt", "anchor", "unclosed", "script"],
)  # fmt: skip
def test_the_check_can_fail(old: str, new: str, page: Path) -> None:
    broken = page.with_name("broken.html")
    broken.write_text(page.read_text().replace(old, new, 1))
    with pytest.raises(AssertionError):
        check(broken)


CONTRAST = """
[...document.querySelectorAll('p, a, li, figcaption, td, th, summary, .code span, h2')].filter(
  e => e.offsetParent && e.textContent.trim()).map(e => {
  const numbers = c => c.match(/[\\d.]+/g).map(Number), light = c => c.slice(0, 3).map(v => (v /= 255) <= .03928 ?
    v / 12.92 : ((v + .055) / 1.055) ** 2.4).reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0)
  let back = e
  while (numbers(getComputedStyle(back).backgroundColor)[3] === 0) back = back.parentElement
  const [a, b] = [getComputedStyle(e).color, getComputedStyle(back).backgroundColor].map(c => light(numbers(c)))
  return [(Math.max(a, b) + .05) / (Math.min(a, b) + .05), e.className, e.textContent.slice(0, 30)]
}).filter(([ratio]) => ratio < 4.5).slice(0, 5)
"""


@pytest.mark.parametrize("width, dark", LOOKS)
def test_it_reads_well(width: int, dark: bool, page: Path, tmp_path: Path) -> None:
    with browser() as shown:
        shown.open(page, width, dark)
        shown.run("document.querySelectorAll('details').forEach(d => { d.open = true })")
        assert shown.run("[document.documentElement.scrollWidth, innerWidth]") == [width, width]
        assert shown.run(
            "[...document.images].every(i => i.naturalWidth > 0 && i.getBoundingClientRect().width >= 100)"
        )
        assert shown.run("parseFloat(getComputedStyle(document.querySelector('main p')).fontSize)") >= 14
        assert shown.run(CONTRAST) == [], "too little contrast"
        assert (shown.run("getComputedStyle(document.body).backgroundColor.match(/\\d+/g)[0] < 128")) == dark
        shown.screenshot(tmp_path / "top.png", height=900)
        assert shown.errors == []
    picture = Image.open(tmp_path / "top.png")
    assert picture.width == width * (2 if width < 600 else 1)
    assert (picture.convert("L").getpixel((2, 2)) < 128) == dark


PROGRAM_TEXT = '''"""A square.

It is `blue` & flat.
"""

from PIL import Image

{weights}

def main(pipe=None, out=None):
    {stop}
    out.mkdir()
    Image.new("RGB", (8, 8), "blue").save(out / "square.png")
    return {{"{file}": "a <square>"}}
'''


def write(folder: Path, name: str, weights: str = "", stop: str = "pass", file: str = "square.png") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.py").write_text(PROGRAM_TEXT.format(weights=weights, stop=stop, file=file))
    return folder / f"{name}.py"


def test_it_runs_the_programs_and_takes_plots_along(tmp_path: Path) -> None:
    folder, out, lines = tmp_path / "examples" / "gallery", tmp_path / "out", []
    write(folder, "a_hub", 'WEIGHTS = ("some/weights",)', 'raise SystemExit("needs some/weights")')
    write(folder, "b_square")
    (tmp_path / "docs" / "plots").mkdir(parents=True)
    Image.new("RGB", (40, 20)).save(tmp_path / "docs" / "plots" / "speed_up.png")
    text = build_gallery(out, examples=folder, say=lines.append).read_text()
    assert [line.split(":")[0] for line in lines] == ["b_square"] and "It was not run for this page." in text
    found = check(out / "index.html")
    assert {"b_square/square.png", "plots/speed_up.png"} <= set(found.files)
    assert "a &lt;square&gt;" in text and "<code>blue</code> &amp; flat." in text and "speed up" in text
    text = build_gallery(tmp_path / "again", examples=folder, hub=True, say=lines.append).read_text()
    assert "needs some/weights" in text and "not run" not in text


def test_what_is_refused(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    with pytest.raises(ValueError, match=r"names round\.png, but did not draw it"):
        run_example(read_example(write(tmp_path, "liar", file="round.png")), tmp_path / "liar")
    with pytest.raises(SystemExit, match="no reason"):
        run_example(read_example(write(tmp_path, "quits", stop='raise SystemExit("no reason")')), tmp_path / "quits")
    (tmp_path / "silent.py").write_text("x = 1\n")
    with pytest.raises(ValueError, match="has no docstring"):
        find_examples(tmp_path)
    assert main(["gallery", "--examples", str(tmp_path / "empty"), "--out", str(tmp_path / "out")]) == 2
    assert "Run vision-attn gallery in a clone, or give --examples FOLDER" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_clone_is_found_beside_the_package_or_here(tmp_path: Path, monkeypatch: Any) -> None:
    assert [e.path for e in find_examples()] == [e.path for e in find_examples(FOLDER)]
    installed = tmp_path / "site-packages" / "vision_attn" / "gallery" / "build.py"
    monkeypatch.setattr("vision_attn.gallery.build.__file__", str(installed))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OSError, match="part of the repository, not of the installed package"):
        find_examples()
    shutil.copytree(FOLDER, tmp_path / "examples" / "gallery")
    assert len(find_examples()) == len(EXAMPLES)


def test_markdown_as_html() -> None:
    text = html_of(
        "A `B < C`.\n\n### One\n\n| a | b |\n| --- | --- |\n| 1 | 2 < 3 |\n\n- x is left out\n\n### Two\n\nEnd.\n"
    )
    assert "<code>B &lt; C</code>" in text and text.count("<details") == 2 == text.count("</details>")
    assert '<th scope="row">1</th><td>2 &lt; 3</td>' in text and "<li>x is left out</li>" in text
    Page(text)


@pytest.mark.parametrize(
    "own, images", [pytest.param(True, 1, id="a-square"), pytest.param(False, 16, id="all", marks=pytest.mark.slow)]
)
def test_the_command(own: bool, images: int, tmp_path: Path, capsys: Any) -> None:
    write(tmp_path / "examples" / "gallery", "square")
    programs = ["--examples", str(tmp_path / "examples" / "gallery")] if own else []
    assert main(["gallery", "--teacher", "nano", *programs, "--out", str(tmp_path / "out")]) == 0
    assert "Page: " in capsys.readouterr().out
    assert len(check(tmp_path / "out" / "index.html").images) >= images
