"""`vision-attn bench quality_*` on a CPU: what is measured, what must hold, and the tables."""

import pytest
import torch

from vision_attn import Clear, LinFusion, Multipole, Neighborhood, Softmax, convert
from vision_attn.bench.document import check_document, merged, read_document
from vision_attn.bench.entries import quality_teachers
from vision_attn.bench.measure import Measurement
from vision_attn.bench.quality.contenders import CURVES, DEFAULT, DISCS, EVERY, MULTIPOLES, Contender, distilled
from vision_attn.bench.quality.drawing import DrawingCase
from vision_attn.bench.quality.fidelity import Bound, fidelity_row
from vision_attn.bench.quality.plot import COLOURS, MARKERS, plot_fidelity, series
from vision_attn.bench.workers import Workers
from vision_attn.cli import main
from vision_attn.demo import load_teacher

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Return the file of one quick run."""
    out = tmp_path_factory.mktemp("results")
    assert main(["bench", "quality_teachers", "--device", "cpu", "--quick", "--out", str(out)]) == 0
    return out / "quality_teachers_cpu.json"


def test_the_small_set_runs_and_multipole_is_the_nearest(stored, capsys):
    (row,) = read_document(stored)["rows"]
    found = {c["name"]: c["quality"] for c in row["candidates"]}
    assert set(found) == {DEFAULT.name, *(disc.name for disc in DISCS)} and row["case"] == "nano-128"
    assert found[DEFAULT.name]["kd_error"] < 0.1 * found["clear r16"]["kd_error"] < 0.1 * found["clear r8"]["kd_error"]
    assert found[DEFAULT.name]["psnr_db"] > found["clear r16"]["psnr_db"] + 5
    assert found["clear r8"]["keys"] < found["clear r16"]["keys"] < found[DEFAULT.name]["keys"] < 1032
    assert main(["bench", "table", str(stored)]) == 0
    table = capsys.readouterr().out
    assert "### FLUX type, nano" in table and "| attention | 128 px, keys | 128 px, KD | 128 px, PSNR |" in table


def test_the_error_is_drawn_against_the_keys(stored, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert main(["bench", "plot", str(stored), "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / "quality_teachers_128.svg")]
    assert "<svg" in (tmp_path / "quality_teachers_128.svg").read_text()
    (row,) = read_document(stored)["rows"]
    lines = series(row, "kd_error")
    assert list(lines) == ["Multipole, cells of 8", "CLEAR"] and len(lines["CLEAR"]) == 2
    assert lines["CLEAR"] == sorted(lines["CLEAR"])
    row["candidates"].append({**row["candidates"][0], "name": "clear r8 distilled"})
    assert series(row, "kd_error")["CLEAR distilled"] == lines["CLEAR"][:1]


def test_every_curve_is_drawn_and_looks_different(tmp_path):
    pytest.importorskip("matplotlib")
    found = [dict(name=curve[0].name, quality=dict(keys=10.0, error=0.1)) for curve in CURVES.values()]
    rows = [dict(group="A model", label="1 px", case="a-1", candidates=found)]
    (path,) = plot_fidelity(dict(entry="x", device="CPU", rows=rows), "error", "error", tmp_path)
    assert all(name in path.read_text() for name in CURVES)
    looks = [(COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]) for i in range(len(CURVES))]
    assert len(set(looks)) == len(CURVES)


def test_dense_attention_has_no_error_and_what_fails_has_a_reason():
    bounds = (Bound("dense", "kd_error", most=1e-9), Bound("dense", "psnr_db", least=101), Bound("absent", "keys", 1))
    contenders = (Contender("dense", Softmax()), Contender("wide", Neighborhood(kernel_size=33)))
    row = fidelity_row(DrawingCase("nano", 128, contenders, prompts=1, steps=1, bounds=bounds), Measurement(CPU))
    dense, wide = row["candidates"]
    assert dense["quality"] == dict(kd_error=pytest.approx(0, abs=1e-9), psnr_db=100, keys=1032)
    assert wide["quality"] is None and "33" in wide["reason"]
    assert [verdict["holds"] for verdict in row["musts"]] == [True, False]


def test_adapters_take_part_with_their_weights(tmp_path):
    pipe = load_teacher("nano")
    spec = LinFusion(mid_dim=4)
    conversion = convert(pipe, spec)
    conversion.save(tmp_path / "nano" / "linfusion_small")
    (found,) = distilled(tmp_path, "nano")
    assert (found.name, found.spec) == ("linfusion small distilled", spec)
    assert not distilled(tmp_path, "dinov2") and not distilled(None, "nano")
    fresh = load_teacher("nano")
    loaded = found.put_into(fresh)
    pairs = zip(conversion.parameters(), loaded.parameters(), strict=True)
    assert all(torch.equal(own, theirs) for own, theirs in pairs)


def test_each_processor_has_one_curve():
    names = [contender.name for contender in EVERY]
    specs = {type(contender.spec).__name__ for contender in EVERY}
    assert specs == {
        "Multipole",
        "Clear",
        "Neighborhood",
        "Agent",
        "HiLo",
        "LinearLocal",
        "LinFusion",
        "RALA",
        "Halo",
        "InLine",
        "SuperToken",
        "MoH",
    }
    assert len(set(names)) == len(names) and DEFAULT in CURVES["Multipole, cells of 8"]


@pytest.mark.slow
def test_processes_measure_what_one_measures():
    contenders = (*DISCS, Contender("clear r4", Clear(radius=4)))
    case = DrawingCase("nano", 128, contenders, prompts=1, steps=1)
    with Workers(2) as workers:
        two = fidelity_row(case, Measurement(CPU, workers=workers, chosen=("clear r4", "clear r8")))
    one = fidelity_row(case, Measurement(CPU, chosen=("clear r4", "clear r8")))
    errors = [[c["quality"]["kd_error"] for c in row["candidates"]] for row in (one, two)]
    assert errors[1] == pytest.approx(errors[0], rel=1e-3) and errors[0][1] > errors[0][0]
    with pytest.raises(ValueError, match="workers must be at least 1, got 0"):
        Workers(0)


def test_the_cases_are_the_issues():
    found = {case.name: case for case in quality_teachers.cases(torch.device("cuda"))}
    assert set(found) == {f"{teacher}-{pixels}" for teacher in ("flux", "unet") for pixels in (128, 256, 512)}
    assert DEFAULT.spec == Multipole() and len({c.name for c in quality_teachers.CANDIDATES}) >= len(MULTIPOLES) + 2
    bounds = {(name, b.measure): b.most or b.least for name, case in found.items() for b in case.bounds}
    assert bounds == {
        ("flux-128", "kd_error"): 3e-4, ("flux-128", "psnr_db"): 33,
        ("flux-256", "kd_error"): 6e-3, ("flux-256", "psnr_db"): 18.5, ("unet-256", "psnr_db"): 23.5,
    }  # fmt: skip


def test_a_second_run_keeps_what_it_does_not_measure(stored, tmp_path):
    path = tmp_path / stored.name
    path.write_text(stored.read_text())
    before = read_document(path)["rows"][0]
    command = ["bench", "quality_teachers", "--device", "cpu", "--quick", "--out", str(tmp_path)]
    assert main([*command, "--candidates", "clear r8"]) == 0
    (after,) = read_document(path)["rows"]
    assert [c["name"] for c in after["candidates"]] == [c["name"] for c in before["candidates"]]
    assert after["candidates"][1:] == before["candidates"][1:] and "clear r8" in after["command"]
    other = {**after, "shape": {}, "candidates": after["candidates"][:1]}
    assert len(merged([before], [other], [before["case"]])[0]["candidates"]) == 1  # another problem
    one, two = ({**before, "shape": before["shape"] | dict(onnxruntime=near)} for near in ("2e-6", "3e-6"))
    two["candidates"] = after["candidates"][:1]
    (both,) = merged([one], [two], [before["case"]])
    assert len(both["candidates"]) == len(before["candidates"])  # another processor


def test_a_candidate_needs_measures_or_a_reason(stored):
    document = read_document(stored)
    document["rows"][0]["candidates"][0]["quality"]["psnr_db"] = "good"
    with pytest.raises(ValueError, match=r"clear r8: quality.psnr_db is str"):
        check_document(document)
    document["rows"][0]["candidates"][0]["quality"] = None
    with pytest.raises(ValueError, match="needs either times or a reason"):
        check_document(document)
