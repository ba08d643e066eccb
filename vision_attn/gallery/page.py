"""The gallery's page: one HTML file without scripts, with relative paths, for phones too, light and dark.

It shows the examples, plots, and the stored results of the benchmarks as `vision-attn bench table` prints them.
"""

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

from vision_attn.bench.run import table_of

_STYLE = Path(__file__).with_name("style.css")
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>vision_attn gallery</title>
<style>
{style}
</style>
</head>
<body>
<header>
<h1>vision_attn gallery</h1>
<p>Each example is a short program in <code>examples/gallery</code>. The first ones need nothing but the package and
were run for this page; the others load weights from the hub.</p>
<nav aria-label="examples"><ul>
{contents}
</ul></nav>
</header>
<main>
{sections}
</main>
</body>
</html>
"""


@dataclass(frozen=True)
class Example:
    """One program.

    Attributes:
        path: Its file.
        title: First line of its docstring.
        text: The rest of its docstring, by paragraphs.
        code: The program without its docstring.
        weights: Names of the weights that it loads from the hub.
    """

    path: Path
    title: str
    text: tuple[str, ...]
    code: str
    weights: tuple[str, ...]

    @property
    def name(self) -> str:
        """Name of the program and of its folder of pictures."""
        return self.path.stem


@dataclass(frozen=True)
class Shown:
    """What became of an example: captions by file, or the reason why there are none.

    Attributes:
        example: The program.
        captions: By file, relative to the example's folder.
        seconds: How long it ran.
        reason: Why it did not draw, empty if it did.
    """

    example: Example
    captions: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    reason: str = ""


def write_page(out: Path, shown: Sequence[Shown], results: Sequence[Path], plots: Sequence[str]) -> Path:
    """Write `index.html`.

    Args:
        out: Folder of the page; the pictures of an example lie in the folder of its name.
        shown: The examples in their order.
        results: Stored results of the benchmarks.
        plots: Pictures, relative to `out`.
    """
    sections = [section(out, one) for one in shown]
    contents = [(one.example.name, one.example.title) for one in shown]
    if plots:
        figures = "\n".join(_figure(out, plot, Path(plot).stem.replace("_", " ")) for plot in plots)
        sections.append(f'<section id="plots"><h2>Plots</h2>\n<div class="plots">{figures}</div></section>')
        contents.append(("plots", "Plots"))
    if tables := results_html(results):
        sections.append(f'<section id="results"><h2>Measured</h2>\n{tables}</section>')
        contents.append(("results", "Measured"))
    links = "\n".join(f'<li><a href="#{name}">{html.escape(title)}</a></li>' for name, title in contents)
    page = out / "index.html"
    page.write_text(_PAGE.format(style=_styles(), contents=links, sections="\n".join(sections)), "utf-8")
    return page


def section(out: Path, one: Shown) -> str:
    """Return the part of the page about one example."""
    example = one.example
    text = "\n".join(f"<p>{_inline(paragraph)}</p>" for paragraph in example.text)
    if one.reason:
        needed = " and ".join(f"<code>{html.escape(name)}</code>" for name in example.weights)
        note = f'<p class="note">Needs {needed} from the hub. {html.escape(one.reason)}</p>'
    else:
        note = f'<p class="note">Ran in {one.seconds:.0f} s.</p>'
    figures = "\n".join(
        _figure(out, f"{example.name}/{file}", caption, f"{example.title}: ") for file, caption in one.captions.items()
    )
    code = highlight(example.code, PythonLexer(), HtmlFormatter(cssclass="code"))
    lines = len(example.code.splitlines())
    command = f"python examples/gallery/{example.name}.py --out {example.name}"
    return f"""<section id="{example.name}">
<h2>{html.escape(example.title)}</h2>
{text}
<div class="row">{figures}</div>
{note}
<p class="command"><code>{html.escape(command)}</code></p>
<details><summary>The program, {lines} lines</summary>
<div class="scroll" tabindex="0">{code}</div>
</details>
</section>"""


def _figure(out: Path, file: str, caption: str, context: str = "") -> str:
    """Return a figure; small pictures are enlarged without blur, and wide ones take two places."""
    classes, size = [], ""
    if not file.endswith(".svg"):
        with Image.open(out / file) as image:
            width, height = image.size
        classes += ["pixels"] * (width <= 256) + ["wide"] * (width >= 1.5 * height)
        size = f' width="{width}" height="{height}"'
    alt = html.escape(f"{context}{caption}")
    return (
        f'<figure class="{" ".join(classes)}"><a href="{html.escape(file)}"><img src="{html.escape(file)}" alt="{alt}"'
        f'{size} loading="lazy"></a><figcaption>{html.escape(caption)}</figcaption></figure>'
    )


def results_html(paths: Sequence[Path]) -> str:
    """Return the tables of all stored results; a file that is not of the benchmarks' schema is left out."""
    parts = []
    for path in paths:
        try:
            text = table_of(path)
        except ValueError:
            continue
        parts.append(f"<h3><code>{html.escape(path.name)}</code></h3>\n{html_of(text)}")
    return "\n".join(parts)


def html_of(text: str) -> str:
    """Turn the Markdown of a result's tables into HTML: paragraphs, lists, tables; each `###` can be opened."""
    parts, opened = [], False
    for block in text.strip().split("\n\n"):
        lines = block.splitlines()
        if block.startswith("### "):
            parts.append(
                f"{'</details>' * opened}<details{' open' * (not opened)}><summary>{_inline(block[4:])}</summary>"
            )
            opened = True
        elif block.startswith("#### "):
            parts.append(f"<h4>{_inline(block[5:])}</h4>")
        elif block.startswith("|"):
            parts.append(_table(lines))
        elif block.startswith("- "):
            parts.append("<ul>" + "".join(f"<li>{_inline(line[2:])}</li>" for line in lines) + "</ul>")
        else:
            parts.append(f"<p>{_inline(' '.join(lines))}</p>")
    return "\n".join([*parts, "</details>" * opened])


def _table(lines: Sequence[str]) -> str:
    head, _, *body = ([_inline(cell.strip()) for cell in line.strip("|").split("|")] for line in lines)
    columns = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    rows = (
        f'<tr><th scope="row">{first}</th>' + "".join(f"<td>{c}</td>" for c in rest) + "</tr>" for first, *rest in body
    )
    return (
        f'<div class="scroll" tabindex="0"><table><thead><tr>{columns}</tr></thead>\n'
        + "<tbody>" + "\n".join(rows) + "</tbody></table></div>"
    )  # fmt: skip


def _inline(text: str) -> str:
    """Escape; show `code` as code, **words** as strong, and addresses as links."""
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text, quote=False))
    text = re.sub(r"\*\*([^*]+)\*\*", r"<strong>\1</strong>", text)
    return re.sub(r"https://[\w./-]*[\w/-]", lambda m: f'<a href="{m[0]}">{m[0].removeprefix("https://")}</a>', text)


def _styles() -> str:
    """Return the style sheet, with pygments' colours for light and dark."""
    light, dark = (HtmlFormatter(style=name).get_style_defs(".code") for name in ("xcode", "github-dark"))
    return f"{light}\n@media (prefers-color-scheme: dark) {{\n{dark}\n}}\n{_STYLE.read_text('utf-8')}"
