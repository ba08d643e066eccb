"""`vision-attn warm`: which layers are compiled, and that compiling fills Triton's cache and launches nothing."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_hosts import HOST

from vision_attn import Clear, Multipole
from vision_attn.bench.warming import layers_to_warm
from vision_attn.cli import main
from vision_attn.kernels.triton import launching

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("spec", [Clear(radius=2), Multipole(cell=2, pool=1)], ids=str)
def test_one_layer_of_each_kind_is_compiled(spec):
    model = HOST["flux"].build()
    found = layers_to_warm(model, spec, height=128, width=96)
    assert len({one.key for one in found}) == len(found) >= 1
    assert all(one.spec == spec and one.head_dim > 0 for one in found)
    again = layers_to_warm(model, spec, height=256, width=192)
    assert {one.key[:6] for one in again} == {one.key[:6] for one in found}


def test_without_a_gpu_the_command_says_so(tmp_path, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert main(["warm", "vit_tiny_patch16_224", "--height", "224", "--width", "224"]) == 2
    assert "none can be used here" in capsys.readouterr().err


def test_the_log_says_once_that_kernels_are_compiled(caplog):
    launching._announce.cache_clear()
    with caplog.at_level(logging.INFO):
        launching._announce()
        launching._announce()
    assert len(caplog.records) == 1 and "Triton compiles kernels for this GPU" in caplog.text


WARM = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("compile_matrix", sys.argv[1])
matrix = importlib.util.module_from_spec(spec)
spec.loader.exec_module(matrix)
matrix.prepare("sm_90")
import torch
from vision_attn import Clear
from vision_attn.bench.warming import Warmth, compile_layer
from vision_attn.grid import Grid
one = Warmth(Clear(radius=3), 2, 64, 128, Grid(16, 16, prefix=8))
print(compile_layer(one, torch.bfloat16, False, "cpu"), len(matrix.ROWS))
"""


@pytest.mark.slow
def test_compiling_fills_the_cache_and_launches_nothing(tmp_path):
    pytest.importorskip("triton")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-c", WARM, str(ROOT / "tests" / "gpu" / "compile_matrix.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.stdout.strip() == "Clear, 2 heads of 64, Grid(height=16, width=16, prefix=8, suffix=0): compiled 0", (
        done.stdout + done.stderr
    )
    assert list(tmp_path.rglob("_forward.cubin"))
