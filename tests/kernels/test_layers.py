"""Operators share `kernels/triton/`, and take no more from each other than what is public."""

import ast
from pathlib import Path

import pytest

KERNELS = Path(__file__).parents[2] / "vision_attn" / "kernels"
SHARED = ("triton", "launches", "backend", "dense")


def imports(path):
    """Yield (module, name) of what a file imports, also inside functions; the name is empty for a module."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            yield from ((node.module, alias.name) for alias in node.names)


def trespasses(kernels):
    """Return (file, import) of each import that takes a private name or a building block of a sibling operator."""
    folders = {path.parent.name for path in kernels.glob("*/__init__.py")}
    found = []
    for path in sorted(kernels.rglob("*.py")):
        own = path.relative_to(kernels).parts[0].removesuffix(".py")
        for module, name in imports(path):
            parts = module.split(".")
            if parts[:2] != ["vision_attn", "kernels"]:
                continue
            # `from vision_attn.kernels import linear` names the sibling last
            place = parts[2:] if len(parts) > 2 else [name]
            if place[0] == own or (place[0] in SHARED and own not in ("backend", "dense")):
                continue
            public = len(place) == 1 and len(parts) > 2 and bool(name) and not name.startswith("_")
            if (own in SHARED and place[0] in folders) or not public:
                found.append((str(path.relative_to(kernels)), f"{module} {name}".strip()))
    return found


def test_operators_take_only_what_is_public_of_each_other():
    assert not trespasses(KERNELS)


WRONG = {
    "private-name": "from vision_attn.kernels.linear import _torch",
    "submodule": "from vision_attn.kernels.linear.forward import state_parts",
    "whole-submodule": "import vision_attn.kernels.linear.tiles",
    "whole-sibling": "from vision_attn.kernels import linear",
}


@pytest.mark.parametrize("id", WRONG)
def test_a_trespass_is_caught(id, tmp_path):
    for name in ("linear", "agent", "triton"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("")
    (tmp_path / "agent" / "op.py").write_text(f"def f():\n    {WRONG[id]}\n")
    (tmp_path / "agent" / "fine.py").write_text(
        "from vision_attn.kernels.linear import linear_state\nfrom vision_attn.kernels.triton.rows import load_rows\n"
    )
    assert [file for file, _ in trespasses(tmp_path)] == ["agent/op.py"]


def test_the_shared_layer_knows_no_operator(tmp_path):
    (tmp_path / "linear").mkdir()
    (tmp_path / "linear" / "__init__.py").write_text("")
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "rows.py").write_text("from vision_attn.kernels.linear import linear_attention\n")
    assert trespasses(tmp_path) == [("triton/rows.py", "vision_attn.kernels.linear linear_attention")]
