"""`vision-attn bench kernels_multipole` on a CPU: its check of long sequences, and its cases."""

from dataclasses import replace

import pytest
import torch

from vision_attn.bench.document import read_document
from vision_attn.bench.entries import kernels_multipole
from vision_attn.bench.multipole import SAME, MultipoleProblem
from vision_attn.cli import main
from vision_attn.grid import Grid
from vision_attn.kernels.multipole import multipole_attention
from vision_attn.processors.multipole import Multipole

CPU = torch.device("cpu")


def test_the_small_case_is_checked_and_timed(tmp_path):
    assert main(["bench", "kernels_multipole", "--device", "cpu", "--quick", "--out", str(tmp_path)]) == 0
    (row,) = read_document(tmp_path / "kernels_multipole_cpu.json")["rows"]
    assert row["case"] == "multipole-32-c8-n1-p4-e4-fp32"
    ours, int8, fp8, dense = row["candidates"]
    assert ours["name"] == "ours" and set(ours["errors"]["twin"]) == set("oqkv") and ours["backward"]
    assert [one["name"] for one in (int8, fp8)] == ["int8", "fp8"] and set(fp8["errors"]["twin"]) == {"o"}
    assert dense["name"] == "SDPA" and dense["forward"]["ratio"] > 0


@pytest.mark.parametrize("side", [24, 48], ids=["whole", "sampled rows"])
@pytest.mark.parametrize(
    "wrong",
    [None, dict(near=2), dict(pool=2), dict(exact=0), dict(spread=1.0)],
    ids=["right", "near", "pool", "exact", "spread"],
)
def test_a_wrong_operator_is_caught(side, wrong):
    spec = Multipole(cell=4, near=1, pool=4, exact=2)
    problem = MultipoleProblem("", Grid(side, side + 2, prefix=5), spec, heads=2, head_dim=32, dtype="float32")
    cells = replace(spec.cells(), **wrong or {})

    def run(q, k, v):
        return multipole_attention(q, k, v, problem.grid, cells, backend="torch")

    shares = problem.errors(SAME, run, problem.inputs(CPU), gradients=side == 24)
    assert (max(shares.values()) <= 1) == (wrong is None)
    assert set(shares) == (set("oqkv") if side == 24 else {"o"})


@pytest.mark.parametrize("side", [24, 48], ids=["whole", "sampled rows"])
def test_eight_bits_are_held_to_a_cosine(side):
    spec = Multipole(cell=4, near=1, pool=4, exact=2)
    problem = MultipoleProblem("", Grid(side, side + 2, prefix=5), spec, heads=2, head_dim=32, dtype="float32")
    inputs = problem.inputs(CPU)
    (int8,) = (c for c in kernels_multipole.CANDIDATES if c.name == "int8")
    run = int8.prepare(problem, CPU).run
    assert 0.05 < problem.errors(int8.computes, run, inputs, gradients=True)["o"] < 0.6
    wrong = replace(problem, spec=replace(spec, exact=0))
    assert problem.errors(int8.computes, int8.prepare(wrong, CPU).run, inputs, gradients=True)["o"] > 2


def test_numbers_with_a_bit_less_than_e4m3_are_wrong():
    """The bound follows from e4m3's three bits and from the inputs: keys that stand out have larger errors."""
    problem = MultipoleProblem("", Grid(24, 26, prefix=5), Multipole(cell=4), heads=2, head_dim=64, dtype="float32")
    inputs = problem.inputs(CPU)
    (fp8,) = (c for c in kernels_multipole.CANDIDATES if c.name == "fp8")
    run = fp8.prepare(problem, CPU).run
    assert 0.4 < problem.errors(fp8.computes, run, inputs, gradients=False)["o"] < 0.7

    def two_bits(*tensors):
        return run(*(t.to(torch.float8_e5m2).to(t.dtype) for t in tensors))

    assert problem.errors(fp8.computes, two_bits, inputs, gradients=False)["o"] > 1.5


def test_the_cases_are_the_issues():
    found = {case.name: case for case in kernels_multipole.cases(torch.device("cuda"))}
    for side, exact in ((128, 0), (128, 4), (256, 0), (256, 4), (512, 4)):
        assert found[f"multipole-{side}-c8-n1-p4-e{exact}"].peers == ("int8", "fp8", "clear r16", "cuDNN")
    assert found["multipole-256-c8-n1-p2-e4"].peers == ("clear r16", "cuDNN")
    assert {"multipole-128-c8-n1-p2-e0", "multipole-256-c8-n1-p2-e0"} <= set(found)
    assert all(case.grid.prefix == 512 and case.heads == 24 and case.head_dim == 128 for case in found.values())
    assert "ours" in found["multipole-256-c8-n1-p4-e4"].backward
