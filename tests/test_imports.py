"""Imports point one way, `import vision_attn` is light, and files keep the house's limits."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "vision_attn"
# From the ground up: a module may import from its own line and from lines above it in this list.
ORDER = (
    "_compat",
    "grid",
    "kernels",
    "processors",
    "backbones",
    "cost",
    "grid_context",
    "layer_state",
    "key_padding",
    "projections",
    "situation",
    "intercept",
    "watching",
    "families",
    "model_state",
    "policy",
    "plan",
    "published",
    "adapter",
    "adapter_writing",
    "layer_table",
    "targets",
    "estimate_table",
    "estimation",
    "converted",
    "conversion",
    "chunked_feed_forward",
    "positions",
    "redraw",
    "highres_options",
    "highres_specs",
    "highres",
    "pipelines",
    "demo",
    "call_arguments",
    "generation",
    "inspection",
    "distill",
    "bench",
    "gallery",
    "cli",
)


def level(module):
    """Return the place of 'vision_attn.x.y' in the order; the package itself is above all."""
    parts = module.split(".")
    return ORDER.index(parts[1]) if len(parts) > 1 else len(ORDER)


def imports(path):
    """Yield all modules of the package that a file imports, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names = [node.module]
        else:
            names = []
        yield from (name for name in names if name.split(".")[0] == "vision_attn")


FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def upward(path):
    own = level(".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"))
    return [name for name in imports(path) if level(name) > own]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path):
    assert not upward(path)


def test_an_upward_import_is_caught(tmp_path, monkeypatch):
    bad = tmp_path / "vision_attn" / "kernels" / "bad.py"
    bad.parent.mkdir(parents=True)
    bad.write_text("def f():\n    from vision_attn.conversion.conversion import convert\n")
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path / "vision_attn")
    assert upward(bad) == ["vision_attn.conversion.conversion"]


def test_every_module_has_its_place():
    names = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in FILES}
    assert names <= set(ORDER)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_are_short_and_say_what_they_are(path):
    lines = path.read_text().splitlines()
    assert len(lines) <= (420 if path.stem.endswith("_triton") else 220)
    assert lines[0].startswith('"""')


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_import_is_light():
    out = run(
        "import time, torch, sys; t = time.perf_counter(); import vision_attn; print(time.perf_counter() - t)\n"
        "vision_attn.convert, vision_attn.Clear\n"
        "print(sorted(n for n in ('diffusers', 'timm', 'xformers', 'accelerate', 'transformers') if n in sys.modules))"
    )
    seconds, loaded = out.splitlines()
    assert float(seconds) < 2
    assert loaded == "[]"


def test_public_names_exist_and_are_few():
    import vision_attn

    assert len(vision_attn.__all__) <= 16
    assert all(getattr(vision_attn, name) is not None for name in vision_attn.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Clera'"):
        _ = vision_attn.Clera


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
