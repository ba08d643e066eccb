"""`vision-attn bench pipelines` on a CPU: small twins of every architecture, extrapolation, failures and plots."""

import json
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from quantised_hosts import row as installed

from vision_attn import Clear, convert
from vision_attn.bench.candidate import AbsentError
from vision_attn.bench.document import read_document, write_document
from vision_attn.bench.entries import pipelines
from vision_attn.bench.overview import Must
from vision_attn.bench.pipelines import steps
from vision_attn.bench.pipelines.architectures import ARCHITECTURES
from vision_attn.bench.pipelines.attention import STOCK, WAYS, Way
from vision_attn.bench.pipelines.steps import PipelineCase, pipeline_row, refuse_endless
from vision_attn.bench.plot import plot_document, series
from vision_attn.cli import main
from vision_attn.estimation.cost import H200
from vision_attn.processors import Softmax

CPU, CUDA, META = torch.device("cpu"), torch.device("cuda"), torch.device("meta")


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Return the file of a run of FLUX and SDXL, and of one candidate in compiled FLUX, which takes seconds."""
    out = tmp_path_factory.mktemp("results")
    command = ["bench", "pipelines", "--device", "cpu", "--out", str(out)]
    assert main([*command, "--only=flux-64", "--only=sdxl-*"]) == 0
    assert main([*command, "--only=flux-64-compiled", "--candidates", "clear r16"]) == 0
    return out / "pipelines_cpu.json"


def test_a_run_stores_what_it_measured(stored):
    eager, compiled, sdxl = read_document(stored)["rows"]
    assert [row["case"] for row in (eager, compiled, sdxl)] == ["flux-64", "flux-64-compiled", "sdxl-64"]
    found = {c["name"]: c for c in eager["candidates"]}
    assert set(found) == {*STOCK, "clear r16", "multipole", "linfusion", "flex r16"}
    clear, stock = found["clear r16"]["forward"], found["stock sdpa"]["forward"]
    assert clear["speedup"] == pytest.approx(stock["median_ms"] / clear["median_ms"], rel=2e-3)
    assert clear["layers"] == dict(rerouted=5, of=5) and clear["extrapolated"] is False
    assert clear["samples"] == 15 and clear["turns"] == 3 and "turns" not in compiled["candidates"][0]["forward"]
    assert set(clear["blocks_ms"]) == {"transformer_blocks", "single_transformer_blocks"}
    assert "CUDA only" in found["stock cudnn"]["reason"]
    assert eager["shape"]["source"] == "black-forest-labs/FLUX.1-dev" and eager["shape"]["parameters"] > 1e4
    (alone,) = compiled["candidates"]
    assert compiled["shape"]["mode"] == "compiled" and alone["name"] == "clear r16"
    assert alone["forward"]["median_ms"] > 0 and alone["forward"]["speedup"] is None
    assert sdxl["candidates"][2]["forward"]["blocks_ms"] is None


def test_tables_and_plots(stored, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert main(["bench", "table", str(stored)]) == 0
    table = capsys.readouterr().out
    assert "#### 64 px (native), 16 tokens, compiled" in table and "| clear r16 | 0." in table
    assert main(["bench", "plot", str(stored), "--out", str(tmp_path)]) == 0
    written = [tmp_path / f"pipelines_{name}.svg" for name in ("flux", "sdxl")]
    assert capsys.readouterr().out.split() == [str(path) for path in written]
    assert all("<svg" in path.read_text() for path in written)


def test_an_extrapolated_step_is_marked(stored, tmp_path, capsys):
    document = json.loads(stored.read_text())
    document["rows"] = document["rows"][:2]
    timed = document["rows"][0]["candidates"][0]["forward"]
    timed |= dict(
        extrapolated=True, memory=dict(bytes=3 * 2**30, above=2**30), median_ms=20.0, graphs=dict(median_ms=8.0)
    )
    document["rows"][0]["musts"] = [dict(text="a is fast", value=0.5, needed=1.0, holds=False)]
    path = tmp_path / "x.json"
    path.write_text(json.dumps(document))
    assert main(["bench", "table", str(path)]) == 0
    table = capsys.readouterr().out
    assert (
        " (extrapolated) | 1.00x | 0.0080 (2.50x) | 3.00 GiB | 1.00 GiB | - |" in table
        and "- **missed**: a is fast: 0.50x" in table
    )
    lines = series(document["rows"], lambda candidate: candidate["forward"]["median_ms"])
    assert lines["stock sdpa", False][0][::2] == (64, True) and ("clear r16", True) in lines
    pytest.importorskip("matplotlib")
    (picture,) = plot_document(path, tmp_path)
    assert picture.exists()


def test_a_candidate_looks_alike_in_all_plots(tmp_path):
    pytest.importorskip("matplotlib")
    document = read_document(Path(__file__).parents[2] / "bench" / "results" / "pipelines_h200.json")
    document["rows"] = [row for row in document["rows"] if row["shape"]["architecture"] in ("flux", "sdxl")]
    write_document(tmp_path / "two.json", document)
    plot_document(tmp_path / "two.json", tmp_path)
    drawn = {name: (tmp_path / f"pipelines_{name}.svg").read_text().lower() for name in ("flux", "sdxl")}
    flex, linfusion = "#0072b2", "#e69f00"
    assert all(linfusion in picture for picture in drawn.values())
    assert flex in drawn["flux"] and flex not in drawn["sdxl"]


def test_what_has_no_resolution_has_no_plot(tmp_path, capsys):
    head = dict(schema=1, entry="kernels_x", title="T", device="CPU", versions=dict(torch="2"), timing="t", rows=[])
    path = tmp_path / "x.json"
    path.write_text(json.dumps(head))
    assert main(["bench", "plot", str(path), "--out", str(tmp_path)]) == 2
    assert "kernels_x has no plot" in capsys.readouterr().err


def test_flux_is_extrapolated_where_asked_and_names_it():
    case = PipelineCase("flux", 64, ("stock sdpa", "clear r16"), small=True)
    stock, clear = pipeline_row(case, CPU, longest_s=0.0)["candidates"]
    assert stock["forward"]["extrapolated"] and clear["forward"]["extrapolated"] and clear["forward"]["layers"] is None
    blocks = stock["forward"]["blocks_ms"]
    least = 2 * blocks["transformer_blocks"] + 3 * blocks["single_transformer_blocks"]
    assert stock["forward"]["median_ms"] > 0.5 * least


def test_whatever_fails_is_a_result(monkeypatch):
    @contextmanager
    def too_large(model, grid, device):
        raise torch.OutOfMemoryError("CUDA out of memory\nin detail")
        yield

    @contextmanager
    def one_level_only(model, grid, device):
        conversion = convert(model, Clear(radius=8), min_tokens=10)
        try:
            yield conversion
        finally:
            conversion.revert()

    monkeypatch.setitem(WAYS, "large", Way("large", "x", too_large, Softmax()))
    monkeypatch.setitem(WAYS, "partly", Way("partly", "x", one_level_only, Softmax()))
    names = ("stock sdpa", "large", "partly", "neighborhood k33", "clear r8")
    musts = (Must("clear r8", STOCK, 1e-9), Must("large", STOCK), Must("linfusion", STOCK))
    row = pipeline_row(PipelineCase("sdxl", 64, names, musts=musts, small=True), CPU)
    reasons = [candidate["reason"] for candidate in row["candidates"]]
    assert reasons[0] is None and reasons[4] is None
    assert reasons[1] == "out of memory: CUDA out of memory"
    assert "layers were not rerouted" in reasons[2] and "10" in reasons[2]
    assert "nothing was rerouted" in reasons[3] or "not rerouted" in reasons[3]
    assert [must["holds"] for must in row["musts"]] == [True, False]
    whole = row["candidates"][4]["forward"]["layers"]
    assert whole["rerouted"] == whole["of"] > 4


def test_levels_too_small_for_a_window_keep_their_attention():
    case = PipelineCase("sd15", 256, ("neighborhood k13",), small=True)  # levels of 32 x 32, 16 x 16 and 8 x 8
    (candidate,) = pipeline_row(case, CPU)["candidates"]
    layers = candidate["forward"]["layers"]
    assert 0 < layers["rerouted"] < layers["of"]


def test_a_model_that_cannot_be_built_is_a_result(monkeypatch):
    broken = replace(ARCHITECTURES["flux"], small=dict(num_layers=-1.5))
    monkeypatch.setitem(ARCHITECTURES, "flux", broken)
    row = pipeline_row(PipelineCase("flux", 64, STOCK, small=True), CPU)
    assert all(c["reason"].startswith("cannot run: TypeError") for c in row["candidates"])


def test_what_was_measured_outlives_a_lost_device(monkeypatch):
    calls = []

    def lost(device):
        calls.append(device)
        if len(calls) == 2:  # after the first candidate
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(steps, "free", lost)
    first, second = pipeline_row(PipelineCase("pixart", 64, ("stock sdpa", "linfusion"), small=True), CPU)["candidates"]
    assert first["forward"] and first["reason"] is None
    assert second["forward"] is None and "illegal memory access" in second["reason"]


def test_a_step_of_minutes_is_not_begun(monkeypatch):
    monkeypatch.setattr(steps, "machine_of", lambda device: H200)  # the GPU here may be busy, or another one
    model = ARCHITECTURES["sdxl"].build(META, torch.bfloat16)
    with pytest.raises(AbsentError, match=r"would take 1\.\d minutes"):
        refuse_endless(WAYS["stock cudnn"], PipelineCase("sdxl", 16384, ()), model, CUDA)
    refuse_endless(WAYS["linfusion"], PipelineCase("sdxl", 16384, ()), model, CUDA)
    refuse_endless(WAYS["stock cudnn"], PipelineCase("sdxl", 8192, ()), model, CUDA)


def test_a_candidate_of_trainings_alone_is_refused(tmp_path, capsys):
    command = ["bench", "pipelines", "--device", "cpu", "--only", "flux-64", "--out", str(tmp_path)]
    assert main([*command, "--candidates", "stock flash"]) == 2
    assert "unknown candidate 'stock flash'" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_the_cases_are_the_issues():
    every = pipelines.cases(CUDA)
    found = {case.name: case for case in every}
    assert len(found) == len(every) and list(found)[:4] == [f"flux-{px}" for px in (1024, 2048, 4096, 8192)]
    needed = {
        name: eager
        for name, case in found.items()
        if (eager := [(m.subject, m.against, m.factor) for m in case.musts if not m.graphs])
    }
    graphs = {name: [m.factor for m in case.musts if m.graphs] for name, case in found.items()}
    assert {name: both for name, both in graphs.items() if both} == {
        "sdxl-1024": [2.2, 2.2],
        "sd15-512": [2.7, 2.7],
        "pixart-1024": [1.7, 1.7],
        "sd35-1024": [1.33, 1.33],
        "flux-1024": [1.09, 1.09],
    }
    assert needed == {
        "flux-1024": [("clear r16", STOCK, 1.0)],
        "flux-2048": [("clear r16", STOCK, 1.38), ("multipole", STOCK, 1.35)],
        "flux-4096": [("clear r16", STOCK, 2.8), ("multipole", STOCK, 2.8)],
        "flux-8192": [("clear r16", STOCK, 8.5), ("clear r16", ("flex r16",), 1.5), ("multipole", STOCK, 9.0)],
        "flux-2048-compiled": [("clear r16", STOCK, 1.6), ("multipole", STOCK, 1.5)],
        "flux-4096-compiled": [("clear r16", STOCK, 3.8), ("multipole", STOCK, 3.4)],
        "flux-8192-compiled": [("clear r16", STOCK, 11.0), ("multipole", STOCK, 12.0)],
        "sdxl-4096": [("linfusion", STOCK, 2.0), ("multipole", STOCK, 2.1)],
        "sdxl-16384": [("linfusion", (), 1.0)],
    }
    assert set(needed) | {name for name, both in graphs.items() if both} == set(pipelines.MUSTS)
    assert all(set(STOCK) <= set(case.ways) <= set(WAYS) for case in every)
    native = {(case.architecture, case.pixels) for case in every}
    assert all((name, model.native) in native for name, model in ARCHITECTURES.items())


@pytest.mark.parametrize("ways", [installed(("stock sdpa", "clear r16", "linfusion"), package="torchao")])
def test_weights_in_float8(ways):
    case = PipelineCase("flux", 64, ways, small=True, float8=True)
    assert case.name == "flux-float8-64" and case.group == "FLUX.1-dev, small, weights in float8"
    found = pipeline_row(case, CPU)
    assert found["shape"]["architecture"] == "flux-float8"
    assert all(c["reason"] is None and c["forward"]["median_ms"] > 0 for c in found["candidates"])
    assert type(case.build(CPU).transformer_blocks[0].attn.to_q.weight).__name__ == "Float8Tensor"
