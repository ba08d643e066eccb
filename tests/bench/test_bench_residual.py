"""`vision-attn bench kernels_residual` on a CPU: its entry, its cases, and its check of both networks."""

import pytest
import torch

from vision_attn.bench.document import read_document
from vision_attn.bench.entries import kernels_residual
from vision_attn.bench.residual import CANDIDATES, SAME, ResidualProblem
from vision_attn.cli import main

CPU = torch.device("cpu")
OURS = CANDIDATES[0].prepare(None, CPU).run


def test_the_small_case_is_checked_and_timed(tmp_path):
    assert main(["bench", "kernels_residual", "--device", "cpu", "--quick", "--out", str(tmp_path)]) == 0
    (row,) = read_document(tmp_path / "kernels_residual_cpu.json")["rows"]
    ours, eager = row["candidates"]
    assert row["case"] == "residual-16-fp32" and set(ours["errors"]["twin"]) == {"q", "k"}
    assert not ours["reason"] and eager["forward"]["ratio"] > 0


def test_the_cases_are_those_of_sdxl_and_flux():
    names = [case.name for case in kernels_residual.cases(torch.device("cuda"))]
    assert len(set(names)) == len(names) == 8
    assert {"residual-sdxl-32", "residual-sdxl-64", "residual-sdxl-128", "residual-sdxl-64-m40"} <= set(names)


def first_alone(x, *weights):
    return OURS(x, *weights[:6], *weights[:6])


def without_x(x, *weights):
    return OURS(x, *weights) - x


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("wrong", [None, first_alone, without_x])
def test_another_function_is_caught(wrong, dtype):
    problem = ResidualProblem("16", 77, 64, 24, dtype=dtype)
    shares = problem.errors(SAME, wrong or OURS, problem.inputs(CPU), False)
    assert set(shares) == {"q", "k"} and (max(shares.values()) <= 1 if wrong is None else min(shares.values()) > 1)
