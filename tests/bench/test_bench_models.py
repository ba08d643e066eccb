"""`vision-attn bench models` on a CPU: dense twins, batches that do not fit, what must hold, tables and plots."""

from dataclasses import dataclass

import pytest
import timm
import torch
from torch import nn

from vision_attn import Clear, Multipole
from vision_attn.backbones.nat.attention import NeighborhoodAttention
from vision_attn.bench import models as bench_models
from vision_attn.bench.candidate import AbsentError
from vision_attn.bench.document import read_document
from vision_attn.bench.entries import models
from vision_attn.bench.models import DenseSelfAttention, Entrant, ModelCase, make_dense, model_row
from vision_attn.bench.overview import Must, add_speedups, images_table, judge
from vision_attn.bench.timing import Launch
from vision_attn.cli import main
from vision_attn.conversion.conversion import Conversion

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Return the file of one run of all cases for a CPU."""
    out = tmp_path_factory.mktemp("results")
    assert main(["bench", "models", "--device", "cpu", "--quick", "--out", str(out)]) == 0
    return out / "models_cpu.json"


def test_the_small_set_runs_and_says_what_it_measured(stored):
    (row,) = read_document(stored)["rows"]
    found = {c["name"]: c for c in row["candidates"]}
    ours, swin = found["nat_mini eager"]["forward"], found["swin_tiny_patch4_window7_224 eager"]["forward"]
    assert row["case"] == "nat-64" and row["subject"] is None and ours["batch"] == 2 and ours["launch"] == "cpu"
    assert ours["images_per_s"] == pytest.approx(2e3 / ours["median_ms"], rel=2e-3)
    assert ours["speedup"] == pytest.approx(swin["median_ms"] / ours["median_ms"], rel=2e-3) and swin["speedup"] == 1
    for mode in ("compiled", "eager graph", "compiled graph"):
        assert "CUDA only" in found[f"nat_mini {mode}"]["reason"]
    assert row["musts"] == []


def test_tables_and_plots(stored, tmp_path, capsys):
    assert main(["bench", "table", str(stored)]) == 0
    table = capsys.readouterr().out
    assert table == images_table(read_document(stored)) and "#### 64 px, batch 2, float32" in table
    assert "| nat_mini eager | " in table
    assert "- nat_mini compiled is left out: compiled and captured for CUDA only" in table
    pytest.importorskip("matplotlib")
    assert main(["bench", "plot", str(stored), "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / "models_nat.svg")]
    assert "<svg" in (tmp_path / "models_nat.svg").read_text()


def test_the_cases_are_the_issues():
    found = {case.name: case for case in models.cases(torch.device("cuda"))}
    vits = {name: case for name, case in found.items() if name.startswith("vit")}
    assert set(found) - set(vits) == {f"{group}-{size}" for group in ("nat", "linear") for size in (224, 384, 1024)}
    assert [case.size for case in vits.values()] == [518, 1036, 2072]
    assert all(
        set(case.models) == {models.VIT, f"{models.VIT} multipole", f"{models.VIT} clear r16"} for case in vits.values()
    )
    assert all(c.batch == (16 if c.size == 1024 else 128) for name, c in found.items() if name not in vits)
    swin = models.SWIN
    factors = {(m, size): f for size in (224, 384, 1024) for m, o, f in found[f"nat-{size}"].factors if o == swin}
    assert factors == {(f"{m}_tiny", s): f for m in ("nat", "dinat") for s, f in ((224, 1), (384, 1.3), (1024, 1.3))}
    twins = {m: o for name in ("nat-1024", "linear-1024") for m, o, _ in found[name].factors if "twin" in o}
    assert set(twins) == {
        "nat_tiny", "dinat_tiny", "agent_swin_tiny", "inline_swin_tiny", "litv2_small", "ravlt_small",
    }  # fmt: skip
    assert all(twin in (*found["nat-1024"].models, *found["linear-1024"].models) for twin in twins.values())
    assert twins["dinat_tiny"] == "nat_tiny dense twin"
    assert {e.name for case in found.values() for e in case.entrants} <= {c.name for c in models.CANDIDATES}


@pytest.mark.slow
def test_a_converted_transformer_attends_as_its_name_says():
    (case,) = (case for case in models.cases(CPU) if case.name == "vit-512")
    specs = [Conversion.of(case.build(name, CPU)).spec for name in case.models[1:]]
    assert specs == [Multipole(), Clear(radius=16)]
    row = model_row(case, CPU, rounds=1, chosen=tuple(f"{name} eager" for name in case.models))
    assert all(candidate["forward"]["speedup"] > 0 for candidate in row["candidates"]) and len(row["candidates"]) == 3


@pytest.mark.parametrize("name", ["nat_mini", "agent_swin_tiny", "inline_swin_tiny", "litv2_small", "ravlt_tiny"])
def test_a_dense_twin_attends_to_everything(name):
    model = timm.create_model(name).eval()
    before = sum(isinstance(m, NeighborhoodAttention) for m in model.modules())
    twin = make_dense(model)
    dense = [m for m in twin.modules() if isinstance(m, DenseSelfAttention)]
    switched = [m for m in twin.modules() if getattr(m, "linear", None) is False]
    assert not any(isinstance(m, NeighborhoodAttention) for m in twin.modules())
    assert len(dense) == before if before else dense or switched
    with torch.no_grad():
        assert twin(torch.randn(1, 3, 64, 96)).isfinite().all()


def test_dense_attention_is_softmax_over_all_cells():
    attn, x = DenseSelfAttention(8, 2), torch.randn(2, 3, 5, 8)
    q, k, v = attn.qkv(x.flatten(1, 2)).view(2, 15, 3, 2, 4).permute(2, 0, 3, 1, 4)
    o = ((q @ k.mT) / 2).softmax(-1) @ v
    assert torch.allclose(attn(x), attn.proj(o.transpose(1, 2).reshape(2, 3, 5, 8)), atol=1e-6)


def test_what_has_no_such_attention_has_no_twin():
    with pytest.raises(ValueError, match="ResNet has no local or linear attention"):
        make_dense(timm.create_model("resnet10t"))


class Fits(nn.Module):
    """A classifier for which memory ends at so many images."""

    def __init__(self, most):
        super().__init__()
        self.most = most

    def forward(self, x):
        if len(x) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB\nand more")
        return x.mean((1, 2, 3))


@dataclass(frozen=True)
class Small(ModelCase):
    """Models called by the number of images that fit."""

    def build(self, model, device):
        if model == "broken":
            raise KeyError(model)
        return Fits(int(model))


def test_a_batch_that_does_not_fit_is_halved():
    factors = (("3", "8", 1e-9), ("0", "8", 1.0))
    case = Small("Fit", 8, 8, ("8", "3", "0", "broken"), "8", factors, dtype="float32")
    row = model_row(case, CPU, rounds=2, chosen=tuple(f"{m} eager" for m in case.models))
    whole, part, none, broken = row["candidates"]
    assert (whole["forward"]["batch"], part["forward"]["batch"]) == (8, 2)
    assert part["forward"]["images_per_s"] == pytest.approx(2e3 / part["forward"]["median_ms"])
    speedup = part["forward"]["images_per_s"] / whole["forward"]["images_per_s"]
    assert part["forward"]["speedup"] == pytest.approx(speedup)
    assert [must["holds"] for must in row["musts"]] == [True, False]
    assert row["musts"][0]["value"] == pytest.approx(speedup)
    assert none["reason"] == "out of memory: CUDA out of memory. Tried to allocate 3 GiB" and none["forward"] is None
    assert broken["reason"] == "cannot run: KeyError: 'broken'"


@pytest.mark.parametrize("kind", ["graph", "eager"])
def test_a_mode_with_a_graph_is_captured_or_left_out(kind, monkeypatch):
    asked = []

    class Ready:
        def __init__(self, call, device, *, graph):
            asked.append(graph)
            self.kind = kind if graph else "eager"

    monkeypatch.setattr(bench_models, "Launch", Ready)
    monkeypatch.setattr(bench_models, "peak_memory", lambda call, device: None)
    gpu, images = torch.device("cuda"), torch.zeros(2, 3, 8, 8)
    assert bench_models._ready(Entrant("8", "eager"), Fits(8), images, gpu)[1]["batch"] == 2
    if kind == "graph":
        assert bench_models._ready(Entrant("8", "eager graph"), Fits(8), images, gpu)[0].kind == "graph"
    else:
        with pytest.raises(AbsentError, match="cannot be captured"):
            bench_models._ready(Entrant("8", "eager graph"), Fits(8), images, gpu)
    assert asked == [False, True]


def test_cudnn_stays_on_and_chooses(monkeypatch):
    seen = []
    monkeypatch.setattr(
        Fits, "forward", lambda self, x: seen.append((torch.backends.cudnn.enabled, torch.backends.cudnn.benchmark))
    )
    model_row(Small("Fit", 8, 8, ("8",), "8", dtype="float32"), CPU, rounds=2, chosen=("8 eager",))
    assert set(seen) == {(True, True)}


def test_a_whole_model_is_not_captured(monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(Launch, "burst", lambda self, count, lead=0: [1.0] * count)
    monkeypatch.setattr(Launch, "_capture", lambda self: True)
    assert Launch(lambda: None, torch.device("cuda"), graph=False).kind == "eager"
    assert Launch(lambda: None, torch.device("cuda")).kind == "graph"


def timed(name, ms, batch=1):
    return dict(name=name, forward=None if ms is None else dict(median_ms=ms, batch=batch))


@pytest.mark.parametrize(
    ("must", "value", "holds"),
    [
        (Must("ours", ("slow", "fast"), 2.0), 2.0, True),
        (Must("ours", ("slow", "fast"), 2.1), 2.0, False),
        (Must("ours", ("slow", "absent"), 5.0), 6.0, True),
        (Must("ours", ("failed",), 1.0), None, False),
        (Must("failed", ("slow",), 1.0), None, False),
        (Must("halved", ("ours",), 0.5), 0.5, True),
        (Must("ours"), None, True),
        (Must("failed"), None, False),
    ],
    ids=["reached", "missed", "one-absent", "other-failed", "failed", "half", "runs", "does-not-run"],
)
def test_what_must_hold(must, value, holds):
    measured = [timed("ours", 5.0), timed("slow", 30.0), timed("fast", 10.0), timed("failed", None)]
    (verdict,) = judge([must], [*measured, timed("halved", 40.0, 4)])
    assert (verdict["value"], verdict["holds"], verdict["needed"]) == (
        value,
        holds,
        must.factor if must.against else None,
    )
    assert must.subject in verdict["text"]


def test_what_took_no_part_is_not_judged():
    assert judge([Must("ours", ("absent",)), Must("absent")], [timed("ours", 5.0)]) == []


def test_speedups_refer_to_the_fastest_reference():
    measured = [timed("ours", 5.0), timed("slow", 30.0), timed("fast", 10.0), timed("failed", None)]
    add_speedups(measured, ["slow", "fast", "failed"])
    assert [m["forward"]["speedup"] for m in measured[:3]] == [2.0, pytest.approx(1 / 3), 1.0]
    add_speedups(measured, ["failed"])
    assert measured[0]["forward"]["speedup"] is None


def test_a_plot_leaves_replays_out():
    from vision_attn.bench.plot import series

    forward = dict(median_ms=2.0)
    names = ("nat_tiny eager", "nat_tiny compiled", "nat_tiny eager graph", "nat_tiny compiled graph")
    rows = [dict(shape=dict(size=64), candidates=[dict(name=name, forward=forward) for name in names])]
    lines = series(rows, lambda candidate: candidate["forward"]["median_ms"])
    assert set(lines) == {("nat_tiny", False), ("nat_tiny", True)}


def test_a_plot_leaves_out_what_is_compiled_at_one_size():
    from vision_attn.bench.plot import series

    def row(pixels, mode, *names):
        return dict(
            shape=dict(pixels=pixels, mode=mode), candidates=[dict(name=n, forward=dict(median_ms=1.0)) for n in names]
        )

    rows = [row(512, "eager", "a", "b"), row(512, "compiled", "a", "b"), row(1024, "compiled", "a")]

    def lines(rows):
        return set(series(rows, lambda candidate: candidate["forward"]["median_ms"]))

    assert lines(rows) == {("a", False), ("b", False), ("a", True)}
    assert lines(rows[:2]) == {(name, compiled) for name in "ab" for compiled in (False, True)}
