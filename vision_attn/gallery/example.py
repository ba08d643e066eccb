"""An example program of the gallery: what its file says of itself, and running it.

    main(pipe=None, out=FOLDER) -> {file in FOLDER: caption}

The first line of its docstring is its title. `WEIGHTS`, if it has that, names what it loads from the hub; an example
without needs nothing but the package, and takes an emoji pipeline for `pipe`.
"""

import ast
import importlib.util
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_FIRST = ("emoji_highres", "own_processor", "vit_attention")


@dataclass(frozen=True)
class Example:
    """One file.

    Attributes:
        path: Of the program.
        title: First line of its docstring.
        text: The rest of its docstring, by paragraphs.
        code: The program without its docstring.
        weights: Names on the hub.
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
        seconds: That it ran.
        reason: Why it did not draw, empty if it did.
    """

    example: Example
    captions: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    reason: str = ""


def find_examples(folder: Path | None = None) -> list[Example]:
    """Return the programs of a folder, those that run offline first.

    Args:
        folder: Where they are; `examples/gallery` of the clone that the package is imported from, or else of the
            working directory, if None.

    Raises:
        OSError: If the folder does not exist or has no programs; how to get them is said.
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
    """Read what a program says of itself, without running it.

    Raises:
        ValueError: If it has no docstring.
    """
    source = path.read_text()
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
        pipe: What it draws with, instead of what it would load.

    Returns:
        Its captions; or the reason with which a program that needs weights stopped.

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
