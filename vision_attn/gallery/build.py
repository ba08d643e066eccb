"""Runs the example programs of the gallery one after another and writes the page beside their pictures.

An example has a function

    main(pipe=None, out=FOLDER) -> {file in FOLDER: caption}

and a docstring, whose first line is its title. One that loads weights from the hub names them in `WEIGHTS`. One without
`WEIGHTS` needs nothing but the package, and takes an emoji pipeline for `pipe`.
"""

import ast
import importlib.util
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vision_attn.gallery.page import Example, Shown, write_page

_PLOTS = (".svg", ".png")
_FIRST = ("emoji_multipole", "emoji_highres", "own_processor", "vit_attention")


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
        pipe: The emoji pipeline with which the offline ones draw, the embedded teacher if None.
        hub: Also run those that load weights from the hub; where that fails, the page says why.
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


def find_examples(folder: Path | None = None) -> list[Example]:
    """Return the programs of a folder, those that run offline first.

    Args:
        folder: Where they are; `examples/gallery` of the clone that the package is imported from, or else of the
            working directory, if None.

    Raises:
        OSError: If the folder does not exist or has no programs; the message says how to get them.
    """
    places = (Path(__file__).parents[2], Path.cwd())
    candidates = [place / "examples" / "gallery" for place in places] if folder is None else [folder]
    found = next((place for place in candidates if any(place.glob("*.py"))), None)
    if found is None:
        raise FileNotFoundError(
            f"no programs in {' or '.join(map(str, dict.fromkeys(candidates)))}: examples/gallery is part of the"
            " repository, not of the installed package. Run vision-attn gallery in a clone, or give --examples FOLDER"
        )
    examples = [read_example(path) for path in sorted(found.glob("*.py"))]
    first = {name: place for place, name in enumerate(_FIRST)}
    return sorted(examples, key=lambda e: (bool(e.weights), first.get(e.name, len(first)), e.name))


def read_example(path: Path) -> Example:
    """Read the title, the text and the needs of a program, without running it.

    Raises:
        ValueError: If it has no docstring.
    """
    source = path.read_text("utf-8")
    tree = ast.parse(source)
    title, *text = (ast.get_docstring(tree) or "").split("\n\n")
    if not title:
        raise ValueError(f"{path} has no docstring: its first line is the title in the gallery")
    code = "\n".join(source.splitlines()[tree.body[0].end_lineno or 0 :]).strip() + "\n"
    weights: tuple[str, ...] = ()
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "WEIGHTS" for t in node.targets):
            weights = tuple(ast.literal_eval(node.value))
    return Example(path, title.rstrip("."), tuple(" ".join(part.split()) for part in text), code, weights)


def run_example(example: Example, out: Path, pipe: Any = None) -> Shown:
    """Run a program, in this process.

    Args:
        example: The program.
        out: Folder of its pictures.
        pipe: The pipeline to draw with, in the place of the one that the program would load.

    Returns:
        Its captions; or, for a program that needs weights and stopped without them, the reason it gave.

    Raises:
        ValueError: If it names a picture that it did not draw.
    """
    spec = importlib.util.spec_from_file_location(f"gallery_{example.name}", example.path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    start = time.perf_counter()
    try:
        spec.loader.exec_module(module)
        captions = module.main(pipe=pipe, out=out)
    except SystemExit as stop:
        if not example.weights:
            raise
        return Shown(example, reason=str(stop.code))
    if missing := [file for file in captions if not (out / file).is_file()]:
        raise ValueError(f"{example.path} names {', '.join(missing)}, but did not draw it")
    return Shown(example, dict(captions), time.perf_counter() - start)
