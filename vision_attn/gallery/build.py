"""Runs the examples one after another and writes the page beside their pictures."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vision_attn.gallery.example import Shown, find_examples, run_example
from vision_attn.gallery.page import write_page

_PLOTS = (".svg", ".png")


def build_gallery(
    out: Path,
    *,
    examples: Path | None = None,
    pipe: Any = None,
    hub: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Path:
    """Run the examples that need no download, and write `out / index.html`.

    Args:
        out: Folder of the page; each example gets a folder in it.
        examples: Where the programs are, see `find_examples`.
        pipe: The emoji pipeline that the offline ones draw with, the embedded teacher if None.
        hub: Also run those that load weights from the hub; one that cannot says why on the page.
        say: Receives a line as each example ends.

    Returns:
        The page.

    Raises:
        OSError: If there are no programs.
    """
    found = find_examples(examples)
    out.mkdir(parents=True, exist_ok=True)
    shown = []
    for example in found:
        if example.weights and not hub:
            shown.append(Shown(example, reason="It was not run for this page."))
            continue
        shown.append(run_example(example, out / example.name, None if example.weights else pipe))
        say(f"{example.name}: {shown[-1].reason or f'{shown[-1].seconds:.0f} s'}")
    root = found[0].path.parents[2]
    return write_page(out, shown, sorted((root / "bench" / "results").glob("*.json")), _copy_plots(root, out))


def _copy_plots(root: Path, out: Path) -> list[str]:
    """Copy `docs/plots` of the repository into the page's folder."""
    plots = sorted(path for path in (root / "docs" / "plots").glob("*") if path.suffix in _PLOTS)
    if plots:
        (out / "plots").mkdir(exist_ok=True)
    return [f"plots/{Path(shutil.copy(path, out / 'plots')).name}" for path in plots]
