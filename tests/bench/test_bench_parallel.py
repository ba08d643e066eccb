"""`vision-attn bench parallel` in two processes on a CPU: every small case runs, and more processes are predicted."""

import json

import pytest
import torch
from processes import PRELOAD, Group

from vision_attn.bench.entries import parallel as entry
from vision_attn.bench.parallel import predict


@pytest.fixture(scope="module")
def pair():
    group = Group(2, [*PRELOAD, "benched"])
    yield group
    group.close()


@pytest.mark.slow
def test_every_small_case_runs(pair):
    for name, row in pair.run("benched:rows", seconds=280)[0].items():
        reasons = {c["name"]: c["reason"] for c in row["candidates"] if c["reason"]}
        assert all(way == "stock ring" and "return_lse" in why for way, why in reasons.items()), reasons  # on a CPU
        over = [c["forward"] for c in row["candidates"] if c["name"].endswith(entry.OVER)]
        assert over and all(0 < f["efficiency"] == pytest.approx(f["speedup"] / 2) for f in over)
        if not name.startswith("flux-train"):
            assert all(f["moved"]["bytes"] > 0 for f in over)
            assert all(predict(row, size) for size in (4, 8))
        json.dumps(row)


@pytest.mark.slow
def test_a_run_that_is_cut_off_leaves_the_candidates_before(pair):
    (first,), row = pair.run("benched:kept", seconds=280)[0]
    alone, over = first["candidates"]
    assert alone["forward"]["samples"] and over["forward"] is None and "cut off" in over["reason"]
    assert row["candidates"][0]["forward"] == alone["forward"] and row["candidates"][1]["forward"]["speedup"] > 0
    assert row["candidates"][1]["forward"]["retries"] == 0


@pytest.mark.slow
def test_a_step_over_processes_learns_what_one_process_learns(pair):
    """Adam's first steps have the sign of the gradient, which a gradient of one process alone would not have."""
    for alone, over in pair.run("benched:learned", seconds=280):
        assert alone.keys() == over.keys() and len(alone) > 20
        for name, moved in alone.items():
            same = torch.isclose(moved, over[name], rtol=1e-2, atol=2e-7)
            assert float(same.float().mean()) > 0.97, name


def stored(case, processes, **milliseconds):
    """Return a stored row with these times and 2 GB received in a step."""
    names = {f"{name} {kind}": time for name, times in milliseconds.items() for kind, time in times.items()}
    forwards = {name: dict(median_ms=time, moved=dict(bytes=2e9), efficiency=0.9) for name, time in names.items()}
    shape = dict(processes=processes, tokens=512**2, architecture="flux", bandwidth_gbs=200.0)
    return dict(case=case, shape=shape, candidates=[dict(name=n, forward=f) for n, f in forwards.items()])


def test_more_processes_are_predicted_from_two():
    """A halo has twice as many rows where both sides have a neighbour; linear attention has none, but UNets have."""
    row = stored("flux-8192", 2, linfusion=dict(alone=1000.0, over=520.0))
    for size in (4, 8):
        found = predict(row, size)["linfusion"]
        assert found["ms"] == pytest.approx(1000 / size + 2 * 20)
        assert found["efficiency"] == pytest.approx(1000 / found["ms"] / size)
    slow = stored("flux-8192", 2, linfusion=dict(alone=1000.0, over=501.0))
    slow["shape"]["bandwidth_gbs"] = 20.0
    assert predict(slow, 4)["linfusion"]["ms"] == pytest.approx(250 + 2 * 100)  # 4 GB at 20 GB/s


def test_predictions_stand_beside_what_was_measured():
    rows = [
        stored("flux-8192", 2, linfusion=dict(alone=1000.0, over=520.0)),
        stored("flux-8192-x4", 4, linfusion=dict(over=280.0)),
    ]
    text = entry.predictions(dict(rows=rows))
    assert "| flux-8192, linfusion | 4 | 0.290 | 3.45x | 86% | 0.280 s, 90% |" in text
    assert "| flux-8192, linfusion | 8 | 0.165 | 6.06x | 76% | - |" in text


def test_cases_are_named_after_their_processes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    cases = entry.cases(torch.device("cuda"))
    assert (
        {"flux-4096-x4", "flux-8192-x4", "flux-16384-x4", "sdxl-8192-x4", "flux-train-2048-x4"}
        <= {case.name for case in cases}
        <= set(entry.NAMES)
    )
