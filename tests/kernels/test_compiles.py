"""Kernels compile for GPUs that are not there, by `tests/gpu/compile_matrix.py`; the interpreter types no integers.

The other programs of that folder need a GPU, and are imported here at least.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

MATRIX = Path(__file__).parents[1] / "gpu" / "compile_matrix.py"
triton = pytest.importorskip("triton")


def compile_matrix(tmp_path, *options):
    """Run the matrix in a process without the interpreter, whose cache of compiled code is empty."""
    root = str(MATRIX.parents[2])
    environment = {**os.environ, "PYTHONPATH": root, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(MATRIX), *options, "--jobs", "1"]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "rows"),
    [
        ("sm_89", "multipole-narrow bfloat16 64"),
        ("sm_90", "multipole-pool2 bfloat16 64"),
        ("sm_90", "multipole-small bfloat16 64"),
        ("sm_90", "agent-options bfloat16 64"),
        ("sm_120", "local-disc bfloat16 64"),
        ("gfx1100", "multipole-narrow bfloat16 64"),
    ],
)
def test_the_launches_of_a_call_compile_and_fit(tmp_path, architecture, rows):
    done = compile_matrix(tmp_path, architecture, "--only", rows)
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("ok  ") >= 5


def program(path):
    """Return the module of a program."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", sorted(MATRIX.parent.glob("*.py")), ids=lambda path: path.stem)
def test_a_program_for_a_gpu_finds_what_it_imports(path):
    assert callable(program(path).main)


@pytest.mark.parametrize(
    ("name", "shared", "sign"),
    [
        ("_forward", 101376, "ok "),
        ("_forward", 101377, "BAD"),
        ("_forward", "RuntimeError: PassManager::run failed", "BAD"),
        ("host", "launched nothing", "BAD"),
        ("refused", "no launch of local.forward fits", "no "),
    ],
)
def test_what_does_not_fit_or_compile_is_bad_and_what_is_refused_is_not(name, shared, sign):
    matrix = program(MATRIX)
    assert matrix.sign_of(name, shared, matrix.LIMITS["sm_89"]) == sign


def test_an_outcome_is_kept_beside_those_of_other_runs(tmp_path):
    rows = [("_forward", 70, 4, 1), ("_merge", 8, 4, 1), ("refused", "no gradient", 0, 0), ("_keys", 101, 4, 1)]
    found = program(MATRIX).outcome(rows, 100)
    assert found == dict(kernels=2, shared=70, refused="no gradient", bad="_keys: 101")
    path = tmp_path / "kept.json"
    for architecture, operator in (("sm_90", "window"), ("sm_89", "window"), ("sm_90", "agent"), ("sm_90", "window")):
        program(MATRIX).keep(path, architecture, 100, {(operator, "bfloat16", 64): found})
    kept = json.loads(path.read_text())
    assert sorted(kept) == ["sm_89", "sm_90"]
    assert kept["sm_90"]["rows"] == {"bfloat16 64": dict(window=found, agent=found)}


@pytest.mark.slow
def test_a_gpu_with_little_shared_memory_is_refused_before_a_launch(tmp_path):
    done = compile_matrix(tmp_path, "sm_89", "--only", "window bfloat16 256", "--shared", "4096")
    assert done.returncode == 0, done.stdout
    assert "no  sm_89 window bfloat16 256 refused no launch of window.forward fits sm_89" in done.stdout


COUNT = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("compile_matrix", sys.argv[1])
matrix = importlib.util.module_from_spec(spec)
spec.loader.exec_module(matrix)
matrix.prepare("sm_90")
import torch
from triton.runtime.jit import JITFunction
compiled, real = [], JITFunction._do_compile
def counting(self, *args):
    compiled.append(self.fn.__name__)
    return real(self, *args)
JITFunction._do_compile = counting
for matrix.SIZE in ((64, 64), (48, 88), (128, 96)):  # sides that 16 divides, and does not; more levels
    compiled.clear()
    with torch.set_grad_enabled(sys.argv[3] == "gradients"):
        output = matrix._call(sys.argv[2], torch.bfloat16, 64)
    if output.requires_grad:
        output.sum().backward()
    print(len(compiled), compiled)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "operator",
    [
        "local-disc", "local-square", "local-pooled", "local-bias", "multipole", "multipole-cell4", "multipole-narrow",
        "linear", "linear-features", "rala", "injective", "agent", "window", "window-halo", "linear_local",
    ],
)  # fmt: skip
def test_a_second_size_of_a_picture_compiles_nothing(tmp_path, operator):
    assert compiled_at_three_sizes(tmp_path, operator, "gradients") >= 3


@pytest.mark.slow
@pytest.mark.parametrize("operator", ["local-int8", "local-fp8", "multipole-int8", "means", "depthwise", "residual"])
def test_a_second_size_compiles_nothing_without_gradients(tmp_path, operator):
    assert compiled_at_three_sizes(tmp_path, operator, "inference") >= 1


def compiled_at_three_sizes(tmp_path, operator, what):
    """Return how many kernels the first size compiles, where the others compile none."""
    environment = {**os.environ, "PYTHONPATH": str(MATRIX.parents[2]), "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-c", COUNT, str(MATRIX), operator, what]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    first, *others = done.stdout.splitlines()
    assert [line.split()[0] for line in others] == ["0", "0"], done.stdout
    return int(first.split()[0])
