"""Imports point one way, `import vision_attn` is light, and files keep the house's limits."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from layers import LEVELS

TESTS = Path(__file__).parent
PACKAGE = TESTS.parent / "vision_attn"
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def imports(path):
    """Yield the dotted names that a file imports, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def upward(package):
    """Return (file, folder) of each import that does not point down."""
    found = []
    for path in sorted(package.rglob("*.py")):
        own = path.relative_to(package).parts[0].removesuffix(".py")
        if own != "__init__":  # its names are looked up when they are asked for
            below = {own, *(name for name, level in LEVELS.items() if level < LEVELS[own])}
            places = [name.split(".")[1] for name in imports(path) if name.startswith("vision_attn.")]
            found += [(str(path.relative_to(package)), place) for place in places if place not in below]
    return found


def borrowing(tests):
    """Return (file, module) of each test file that imports another: what they share belongs to tests/support."""
    return [
        (str(path.relative_to(tests)), name.split(".")[0])
        for path in sorted(tests.rglob("*.py"))
        for name in imports(path)
        if name.startswith("test_")
    ]


def test_imports_point_down():
    assert not upward(PACKAGE)


@pytest.mark.parametrize("name", ["from vision_attn.conversion import convert", "import vision_attn.hosts.dit"])
def test_an_upward_import_is_caught(tmp_path, name):
    bad = tmp_path / "kernels" / "bad.py"
    bad.parent.mkdir()
    bad.write_text(f"def f():\n    {name}\n")
    assert upward(tmp_path) == [("kernels/bad.py", "conversion" if "conversion" in name else "hosts")]


def test_no_test_file_imports_another():
    assert not borrowing(TESTS)


@pytest.mark.parametrize("statement", ["import test_hosts", "from test_hosts import run"])
def test_a_test_file_that_imports_another_is_caught(tmp_path, statement):
    (tmp_path / "test_bad.py").write_text(f"def test_something():\n    {statement}\n")
    assert borrowing(tmp_path) == [("test_bad.py", "test_hosts")]


def test_every_folder_has_its_place():
    assert {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in FILES} == set(LEVELS)


def test_files_are_as_long_as_their_idea_and_say_what_it_is():
    texts = {str(path.relative_to(PACKAGE)): path.read_text() for path in FILES}
    assert not [name for name, text in texts.items() if not text.startswith('"""')]
    assert not [name for name, text in texts.items() if text.count("\n") > 450]


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_import_is_light():
    out = run(
        "import time, torch, sys; t = time.process_time(); import vision_attn; print(time.process_time() - t)\n"
        "vision_attn.convert, vision_attn.Clear\n"
        "print(sorted(n for n in ('diffusers', 'timm', 'xformers', 'accelerate', 'transformers') if n in sys.modules))"
    )
    seconds, loaded = out.splitlines()
    assert float(seconds) < 2
    assert loaded == "[]"


def test_public_names_exist_and_are_few():
    import vision_attn

    assert len(vision_attn.__all__) <= 28 and set(vision_attn.__all__) == set(vision_attn._PLACE)
    assert all(getattr(vision_attn, name) is not None for name in vision_attn.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Clera'"):
        _ = vision_attn.Clera


@pytest.mark.slow  # starts a process; the whole suite imports timm after the stand-in
def test_timm_imports_after_the_stand_in_only_where_torchvision_is_broken():
    out = run(
        "from vision_attn._compat import ensure_torchvision\n"
        "import importlib, sys\n"
        "try:\n"
        "    import torchvision\n"
        "    works = True\n"
        "except RuntimeError:\n"
        "    works = False\n"
        "    [sys.modules.pop(name) for name in list(sys.modules) if name.startswith('torchvision')]\n"
        "print(works, ensure_torchvision(), ensure_torchvision())\n"
        "import timm\n"
    ).split()
    assert out in (["True", "False", "False"], ["False", "True", "True"])
