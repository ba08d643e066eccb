"""Write the API reference from the docstrings, with pdoc: one page a module, and a search that works from disk.

python docs/api.py build/docs

The pages describe the package beside this folder, whichever one is installed.
"""

import argparse
import pkgutil
import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import pdoc
import pdoc.render

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import vision_attn
from vision_attn._compat import ensure_torchvision


def modules() -> list[str]:
    """Return the names of the package and of all its public modules."""
    ensure_torchvision()
    found = pkgutil.walk_packages(vision_attn.__path__, "vision_attn.")
    return ["vision_attn", *sorted(module.name for module in found if "._" not in module.name)]


def write(out: Path, names: Sequence[str]) -> None:
    """Write the pages of modules, the index and the search."""
    pdoc.render.configure(
        docformat="google", template_directory=Path(__file__).parent / "templates", footer_text=vision_attn.__version__
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*has already been added")  # a package brings its modules along
        pdoc.pdoc(*names, r"!.*\._.*", output_directory=out)  # private modules may need what is not installed
    for page in out.rglob("*.html"):
        page.write_text(unlinked(page.read_text()))


def unlinked(text: str) -> str:
    """Return a page without links to what is not on it: pdoc links inherited methods, which it does not show."""
    known = set(re.findall(r' id="([^"]+)"', text))
    return re.sub(r'<a href="#([^"]+)">([^<]*)</a>', lambda m: m[0] if m[1] in known else m[2], text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, nargs="?", default=Path("build", "docs"))
    parser.add_argument("--only", nargs="+", help="modules, all public ones by default")
    options = parser.parse_args()
    write(options.out, options.only or modules())
