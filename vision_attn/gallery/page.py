"""The gallery's page: one HTML file, no scripts, paths relative, readable on a phone, light and dark."""

import html
import re
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

from vision_attn.gallery.example import Shown
from vision_attn.gallery.results import results_html

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
    page.write_text(_PAGE.format(style=_styles(), contents=links, sections="\n".join(sections)))
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


def _inline(text: str) -> str:
    """Escape; show `code` as code and addresses as links."""
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text, quote=False))
    return re.sub(r"https://[\w./-]*[\w/-]", lambda m: f'<a href="{m[0]}">{m[0].removeprefix("https://")}</a>', text)


def _styles() -> str:
    """Return the style sheet, with pygments' colours for light and dark."""
    light, dark = (HtmlFormatter(style=name).get_style_defs(".code") for name in ("xcode", "github-dark"))
    return f"{light}\n@media (prefers-color-scheme: dark) {{\n{dark}\n}}\n{_STYLE.read_text()}"
