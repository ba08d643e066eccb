"""The benchmark of host time: its rows, its table, and a candidate that cannot run."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from vision_attn import Neighborhood
from vision_attn.bench.entries import host
from vision_attn.bench.measure import Measurement

CPU = torch.device("cpu")


@pytest.fixture
def measurement() -> Measurement:
    return Measurement(CPU, rounds=1, chosen=("stock", "softmax", "left alone", "clear r8"))


def test_a_row_and_its_table(measurement: Measurement) -> None:
    case = host.cases(CPU, quick=True)[0]
    row = host.row(case, measurement)
    assert [candidate["name"] for candidate in row["candidates"]] == list(measurement.chosen)
    for candidate in row["candidates"]:
        assert candidate["reason"] is None and candidate["forward"]["samples"] == 3
        assert 0 < candidate["forward"]["min_ms"] <= candidate["forward"]["median_ms"]
    assert [must["text"].split()[0] for must in row["musts"]] == ["softmax", "left", "clear"]
    document = dict(title=host.TITLE, device="CPU", versions={}, timing=host.TIMING, rows=[row | dict(date="today")])
    table = host.table(document)
    assert "| candidate | host ms | best | of stock | speed-up |" in table and "| stock |" in table


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
