"""The benchmark of host time: its rows, its table, what a run that is cut off leaves, and a candidate that fails."""

import gc
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from vision_attn import Neighborhood
from vision_attn.bench.document import read_document
from vision_attn.bench.entries import host
from vision_attn.bench.measure import Measurement
from vision_attn.bench.run import run_benchmarks

CPU = torch.device("cpu")


@pytest.fixture
def measurement() -> Measurement:
    return Measurement(CPU, rounds=1, chosen=("stock", "softmax", "left alone", "clear r8"))


def test_a_row_and_its_table(measurement: Measurement) -> None:
    case = host.cases(CPU, quick=True)[0]
    row = host.row(case, measurement)
    assert [candidate["name"] for candidate in row["candidates"]] == list(measurement.chosen)
    for candidate in row["candidates"]:
        assert candidate["reason"] is None and candidate["forward"]["samples"] == 2
        assert 0 < candidate["forward"]["min_ms"] <= candidate["forward"]["median_ms"]
    assert [must["text"].split()[0] for must in row["musts"]] == ["softmax", "left", "clear"]
    document = dict(title=host.TITLE, device="CPU", versions={}, timing=host.TIMING, rows=[row | dict(date="today")])
    table = host.table(document)
    assert "| candidate | host ms | wall ms | best | of stock | speed-up |" in table and "| stock |" in table
    old = [c | dict(forward={k: v for k, v in c["forward"].items() if k != "wall_ms"}) for c in row["candidates"]]
    assert " | - | " in host.table(
        document | dict(rows=[document["rows"][0] | dict(candidates=old)])
    )  # a row of before


def test_a_candidate_that_cannot_run_is_left_out_with_its_reason(measurement: Measurement, monkeypatch: Any) -> None:
    ways = [
        replace(way, spec=Neighborhood(kernel_size=99)) if way.name == "softmax" else way for way in host.CANDIDATES
    ]
    monkeypatch.setattr(host, "CANDIDATES", tuple(ways))
    row = host.row(host.cases(CPU, quick=True)[0], measurement)
    by_name = {candidate["name"]: candidate for candidate in row["candidates"]}
    assert by_name["softmax"]["forward"] is None and "does not fit" in by_name["softmax"]["reason"]
    assert by_name["clear r8"]["forward"] is not None


def test_every_denoiser_takes_part_at_its_own_size_on_a_gpu() -> None:
    cases = host.cases(torch.device("cuda"))
    assert [case.name for case in cases] == ["sdxl-1024", "sd15-512", "pixart-1024", "sd35-1024"]
    assert all(case.pixels == case.model.native for case in cases)


class Waiting(nn.Module):
    """A model that sleeps, as one whose processor others use."""

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        time.sleep(0.02)
        return sample


def test_what_others_compute_is_not_counted_but_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    one = host._least(Waiting(), dict(sample=torch.zeros(1)), CPU)
    assert one.thread < 10 and one.wall >= 20
    figures = host._figures([one, one], "thread")
    assert figures["median_ms"] == one.thread and figures["wall_ms"] == one.wall
    clock = iter(range(10**6))
    monkeypatch.setattr(time, "thread_time", lambda: next(clock) // 50 / 100)  # a system that counts in 10 ms
    row = host._row(host.cases(CPU, quick=True)[0], host.CANDIDATES[:1], dict(stock=[one, one]), {})
    figures = row["candidates"][0]["forward"]
    assert figures["clock"] == "wall" and figures["median_ms"] == one.wall


def test_every_way_is_converted_once_and_shares_the_weights(measurement: Measurement, monkeypatch: Any) -> None:
    made: list[nn.Module] = []
    of = host.Way.of

    def noted(way: host.Way, model: nn.Module) -> nn.Module:
        found = of(way, model)
        made.append(found)
        own = dict(found.named_parameters())
        assert all(own[name] is parameter for name, parameter in model.named_parameters()) and found is not model
        return found

    monkeypatch.setattr(host.Way, "of", noted)
    host.row(host.cases(CPU, quick=True)[0], measurement)
    assert len(made) == len(measurement.chosen) and gc.isenabled()


def test_a_run_that_is_cut_off_leaves_what_it_has(tmp_path: Path, monkeypatch: Any) -> None:
    least, calls, said = host._least, iter(range(100)), list[str]()

    def cut_off(*given: Any) -> Any:
        if next(calls) == 5:  # in the third turn of two candidates
            raise KeyboardInterrupt
        return least(*given)

    monkeypatch.setattr(host, "_least", cut_off)
    given: dict[str, Any] = dict(device="cpu", quick=True, candidates=("stock", "softmax"))
    with pytest.raises(KeyboardInterrupt):
        run_benchmarks("host", tmp_path, say=said.append, **given)
    (row,) = read_document(tmp_path / "host_cpu.json")["rows"]
    assert row["label"].endswith(", cut off after 2 of 4 turns") and row["date"] and gc.isenabled()
    assert [candidate["forward"]["samples"] for candidate in row["candidates"]] == [2, 2]
    assert said[0].startswith("sdxl-128: built in ") and said[1].startswith("  stock ready, after ")
    monkeypatch.setattr(host, "_least", least)
    run_benchmarks("host", tmp_path, **given)
    (row,) = read_document(tmp_path / "host_cpu.json")["rows"]
    assert "cut off" not in row["label"] and row["candidates"][0]["forward"]["samples"] == 4
    calls = iter(range(100))
    monkeypatch.setattr(host, "_least", cut_off)
    with pytest.raises(KeyboardInterrupt):
        run_benchmarks("host", tmp_path, **given)
    assert read_document(tmp_path / "host_cpu.json")["rows"] == [row]  # a whole row stays
