"""Stored results of the benchmarks as HTML: what `vision-attn bench table` prints, group by group."""

import html
import re
from collections.abc import Sequence
from pathlib import Path

from vision_attn.bench.run import table_of


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
    """Escape, and show `code` as code."""
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text, quote=False))
    return re.sub(r"\*\*([^*]+)\*\*", r"<strong>\1</strong>", text)
