"""What the demo shows of its rows: a page that opens from disk, a contact sheet, and a table for the terminal."""

import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

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
<code>vision_attn.convert</code>. Untrained attention uses the teacher's weights as they are: multipole attention and
local windows draw well with them, linear attention needs a distillation first. At 256 px each attention redraws the
dense 128 px picture.</p>
{state}<div class="scroll"><table>
<thead><tr>{head}</tr></thead>
<tbody>
{body}
</tbody>
</table></div>
{pictures}
</html>
"""
_UNFINISHED = """<p><b>{drawn} of {planned} pictures are drawn; this page reloads itself.</b></p>
<script>setTimeout(() => location.reload(), 5000)</script>
"""


@dataclass(frozen=True)
class Row:
    """One row of the demo's table: some prompts drawn with one attention at one size.

    Attributes:
        pixels: Side of the images.
        processor: The spec.
        training: 'none needed', 'untrained' or 'distilled'.
        tokens: Image and text tokens of the first attention layer.
        attended: Mean share of those tokens that one token sees.
        seconds: Time that drawing the row took.
        psnr: Mean PSNR in dB to the pictures of dense attention from the same noise; None for dense attention itself.
        files: A picture for each prompt, in their order; fewer while the row is drawn.
    """

    pixels: int
    processor: str
    training: str
    tokens: int
    attended: float
    seconds: float
    psnr: float | None
    files: tuple[str, ...]


def cells(row: Row) -> tuple[str, ...]:
    """Return the table's cells for one row."""
    psnr = "-" if row.psnr is None else f"{row.psnr:.1f} dB"
    side, share = f"{row.pixels} px", f"{row.attended:.1%}"
    return side, row.processor, row.training, str(row.tokens), share, f"{row.seconds:.1f}", psnr


def text_table(rows: Sequence[Row]) -> str:
    """Return the rows as a table for the terminal."""
    lines = [_COLUMNS, *map(cells, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(_COLUMNS))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def contact_sheet(out: Path, prompts: Sequence[str], rows: Sequence[Row]) -> Path:
    """Write `sheet.png`: a row for each size and attention, a column for each prompt."""
    font = ImageFont.load_default(14)
    sheet = Image.new("RGB", (_CELL * len(prompts), (_CELL + _LABEL) * len(rows)), "white")
    pen = ImageDraw.Draw(sheet)
    for i, row in enumerate(rows):
        top = i * (_CELL + _LABEL)
        pen.text((6, top + 5), f"{row.pixels} px  {row.processor}  ({row.training})", "black", font)
        for column, file in enumerate(row.files):
            image = Image.open(out / file).resize((_CELL, _CELL), Image.Resampling.LANCZOS)
            sheet.paste(image, (column * _CELL, top + _LABEL))
    sheet.save(out / "sheet.png", optimize=True)
    return out / "sheet.png"


def write_page(out: Path, prompts: Sequence[str], rows: Sequence[Row], *, teacher: str = "base", planned: int) -> Path:
    """Write `index.html` beside the pictures.

    Args:
        out: The folder of the pictures.
        prompts: What the pictures show.
        rows: The rows drawn so far; the last one may lack pictures.
        teacher: The teacher that drew.
        planned: Number of pictures in the end. While there are fewer, the page says so and reloads itself.
    """
    head = "".join(f"<th>{name}</th>" for name in _COLUMNS)
    body = "\n".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in cells(row)) + "</tr>" for row in rows)
    pictures = []
    for row in rows:
        figures = "".join(
            f'<figure><img src="{html.escape(file)}" alt="{html.escape(prompt)}" loading="lazy">'
            f"<figcaption>{html.escape(prompt)}</figcaption></figure>"
            for file, prompt in zip(row.files, prompts, strict=False)
        )
        title = html.escape(f"{row.pixels} px, {row.processor}, training: {row.training}")
        pictures.append(f'<h2>{title}</h2>\n<div class="row">{figures}</div>')
    drawn = sum(len(row.files) for row in rows)
    state = _UNFINISHED.format(drawn=drawn, planned=planned) if drawn < planned else ""
    drawer = "A small Stable Diffusion UNet" if teacher == "unet" else "A small FLUX transformer"
    page = out / "index.html"
    page.write_text(
        _PAGE.format(teacher=drawer, state=state, head=head, body=body, pictures="\n".join(pictures)), "utf-8"
    )
    return page
