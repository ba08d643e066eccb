"""The benchmarks' own formulas of the linear family, its floor, and its entry on a CPU."""

import pytest
import torch

from vision_attn.bench.candidate import Prepared
from vision_attn.bench.document import read_document
from vision_attn.bench.entries import kernels_linear
from vision_attn.bench.linear import CANDIDATES, COPY, DENSE, LOOSE, SAME, LinearProblem
from vision_attn.bench.run import run_benchmarks
from vision_attn.bench.table import markdown

CPU = torch.device("cpu")
PROBLEMS = kernels_linear.cases(CPU, quick=True)


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.name)
def test_candidates_compute_what_they_say(problem):
    inputs, found = problem.inputs(CPU), {}
    for candidate in CANDIDATES:
        if candidate.name not in ("compiled", "fbi_la"):
            run = candidate.prepare(problem, CPU).run
            gradients = candidate.name in problem.backward
            found[candidate.name] = problem.errors(candidate.computes, run, inputs, gradients)
    assert all(share <= 1 for shares in found.values() for share in shares.values()), found


@pytest.mark.parametrize("computes", [SAME, LOOSE, DENSE, COPY])
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.name)
def test_another_function_is_caught(problem, computes):
    wrong = Prepared(lambda q, k, v, *rest: (q + v).roll(1, 1))
    assert problem.errors(computes, wrong.run, problem.inputs(CPU), False)["o"] > 1


def test_the_floor_counts_bytes():
    problem = LinearProblem("t", "linear", 256)
    assert problem.moved(False) == 4 * 65536 * 640 * 2 and problem.moved(True) == 7 * 65536 * 640 * 2
    assert LinearProblem("t", "rala", 256).tensors_moved(False) == 5
    assert problem.needed_flop(False) == 4 * 65536 * 10 * 64 * 64


def test_the_cases_are_the_issues():
    every = kernels_linear.cases(torch.device("cuda"))
    found = {case.name: case for case in every}
    assert len(found) == len(every)
    linear = [f"linear-{side}-h10-d64" for side in (64, 128, 256, 512, 1024)]
    others = ["linear-256-h24-d128", "linear-256-h10-d64-fp16", "rala-256-h10-d64", "agent-256-a49-h10-d64"]
    assert set([*linear, *others, "agent-256-a256-h10-d64", "hilo-256-h10-d64"]) <= set(found)
    assert all({"copy", "compiled"} <= set(found[name].peers) for name in linear)
    assert "SDPA" in found["hilo-256-h10-d64"].peers
    assert len(kernels_linear.cases(torch.device("cuda"), quick=True)) == 5


def test_the_entry_runs_on_a_cpu(tmp_path):
    (path,) = run_benchmarks("kernels_linear", tmp_path, device="cpu", quick=True, only=["linear-*", "hilo-*"])
    document = read_document(path)
    assert [row["case"] for row in document["rows"]] == ["linear-16-h2-d32-fp32", "hilo-16-h2-d32-fp32"]
    ours, copy = document["rows"][0]["candidates"][:2]
    assert ours["backward"]["median_ms"] > 0 and copy["forward"]["ratio"] > 0
    assert "### HiLo, forward" in markdown(document)
