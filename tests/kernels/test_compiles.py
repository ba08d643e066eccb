"""Kernels compile for GPUs that are not there, by `tests/gpu/compile_matrix.py`; the interpreter types no integers."""

import subprocess
import sys
from pathlib import Path

import pytest

MATRIX = Path(__file__).parents[1] / "gpu" / "compile_matrix.py"
triton = pytest.importorskip("triton")


def compile_matrix(tmp_path, *options):
    """Run the matrix in a process without the interpreter, whose cache of compiled code is empty."""
    import os

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
        ("sm_120", "local-disc bfloat16 64"),
    ],
)
def test_the_launches_of_a_call_compile_and_fit(tmp_path, architecture, rows):
    done = compile_matrix(tmp_path, architecture, "--only", rows)
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("ok  ") >= 5


@pytest.mark.slow
def test_a_launch_that_does_not_fit_is_found(tmp_path):
    done = compile_matrix(tmp_path, "sm_89", "--only", "local-disc bfloat16 256")
    assert done.returncode == 1 and "BAD sm_89 local-disc bfloat16 256" in done.stdout
