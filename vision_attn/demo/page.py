"""What the demo shows: a contact sheet, a table for the terminal, and a page that opens from disk."""

import html
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from vision_attn.demo.compare import Result

_CELL, _LABEL = 192, 26
_COLUMNS = ("size", "attention", "training", "tokens", "attended", "seconds", "PSNR to dense")

_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>vision_attn demo</title>
<style>
  :root {{ color-scheme: light dark; --line: color-mix(in srgb, currentColor 20%, transparent); }}
  body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }}
  table {{ border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }}
  .scroll {{ overflow-x: auto; }}
  th, td {{ text-align: right; padding: .35rem .6rem; border-bottom: 1px solid var(--line); white-space: nowrap; }}
  th:nth-child(-n+3), td:nth-child(-n+3) {{ text-align: left; }}
  .row {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(7rem, 1fr)); gap: .75rem; }}
  figure {{ margin: 0; }}
  img {{ width: 100%; border-radius: .5rem; background: white; display: block; }}
  figcaption {{ font-size: .85rem; opacity: .75; }}
</style>
<h1>One teacher, several attentions</h1>
<p>{teacher} draws emoji with its own dense attention and with others, converted by
<code>vision_attn.convert</code>. Untrained ones keep the teacher's weights as they are: local windows bear that, linear
attention needs a distillation first. At 256 px each redraws the dense 128 px picture.</p>
<div class="scroll"><table>
<thead><tr>{head}</tr></thead>
<tbody>
{body}
</tbody>
</table></div>
{pictures}
</html>
"""


def cells(result: "Result") -> tuple[str, ...]:
    """Return the table's cells for one result."""
    psnr = "-" if result.psnr is None else f"{result.psnr:.1f} dB"
    side, share = f"{result.pixels} px", f"{result.attended:.1%}"
    return side, result.processor, result.training, str(result.tokens), share, f"{result.seconds:.1f}", psnr


def text_table(results: Sequence["Result"]) -> str:
    """Return the results as a table for the terminal."""
    rows = [_COLUMNS, *(cells(result) for result in results)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_COLUMNS))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def contact_sheet(out: Path, prompts: Sequence[str], results: Sequence["Result"]) -> Path:
    """Write `sheet.png`: a row for each size and attention, a column for each prompt."""
    font = ImageFont.load_default(14)
    sheet = Image.new("RGB", (_CELL * len(prompts), (_CELL + _LABEL) * len(results)), "white")
    pen = ImageDraw.Draw(sheet)
    for row, result in enumerate(results):
        top = row * (_CELL + _LABEL)
        pen.text((6, top + 5), f"{result.pixels} px  {result.processor}  ({result.training})", "black", font)
        for column, file in enumerate(result.files):
            image = Image.open(out / file).resize((_CELL, _CELL), Image.Resampling.LANCZOS)
            sheet.paste(image, (column * _CELL, top + _LABEL))
    sheet.save(out / "sheet.png", optimize=True)
    return out / "sheet.png"


def write_page(out: Path, prompts: Sequence[str], results: Sequence["Result"], teacher: str = "base") -> Path:
    """Write `index.html` beside the pictures."""
    head = "".join(f"<th>{name}</th>" for name in _COLUMNS)
    body = "\n".join(
        "<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in cells(result)) + "</tr>" for result in results
    )
    pictures = []
    for result in results:
        figures = "".join(
            f'<figure><img src="{html.escape(file)}" alt="{html.escape(prompt)}" loading="lazy">'
            f"<figcaption>{html.escape(prompt)}</figcaption></figure>"
            for file, prompt in zip(result.files, prompts, strict=True)
        )
        title = html.escape(f"{result.pixels} px, {result.processor}, training: {result.training}")
        pictures.append(f'<h2>{title}</h2>\n<div class="row">{figures}</div>')
    page = out / "index.html"
    drawer = "A small Stable Diffusion UNet" if teacher == "unet" else "A small FLUX transformer"
    page.write_text(_PAGE.format(teacher=drawer, head=head, body=body, pictures="\n".join(pictures)))
    return page
