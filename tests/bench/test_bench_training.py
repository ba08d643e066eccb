"""`vision-attn bench training` on a CPU: what learns, what is extrapolated, what fits in which GPU."""

import sys
from dataclasses import replace

import pytest
import torch
from quantised_hosts import row as installed
from torch import nn

from vision_attn.bench.entries import training as entry
from vision_attn.bench.pipelines import training
from vision_attn.bench.pipelines.attention import FLASH, WAYS
from vision_attn.bench.pipelines.training import Fits, TrainingCase, build, in_float8, smallest_card, training_row

CPU = torch.device("cpu")
SMALL = TrainingCase(64, ("stock sdpa", "stock cudnn", "clear r16"), small=True)


def test_a_step_is_whole_or_extrapolated(monkeypatch):
    monkeypatch.setattr(training, "_BUILT", {})
    row = training_row(SMALL, CPU, whole_s=1e3)
    stock, cudnn, clear = row["candidates"]
    assert not stock["forward"]["extrapolated"] and "CUDA only" in cudnn["reason"]
    assert clear["forward"]["layers"] == dict(rerouted=5, of=5) and clear["forward"]["samples"] in (1, 3)
    assert row["shape"]["trained"] > 1000 and row["shape"]["float8"] is None and row["musts"] == []
    extrapolated = training_row(SMALL, CPU, chosen=("clear r16",), whole_s=0)["candidates"][0]["forward"]
    assert extrapolated["extrapolated"] and extrapolated["median_ms"] > 0 and extrapolated["layers"] is None
    assert "(extrapolated)" in entry.table(document([{**row, "candidates": [dict(clear, forward=extrapolated)]}]))


def test_dense_attention_by_any_backend_is_what_speedups_refer_to(monkeypatch):
    """It compiles nothing, so its first step is not run twice."""
    monkeypatch.setattr(training, "_BUILT", {})
    monkeypatch.setitem(WAYS, FLASH, replace(WAYS[FLASH], use=WAYS["stock sdpa"].use))  # there is none on a CPU
    steps, compiles = training.train_steps, []

    def noted(*given, **options):
        compiles.append(options["compiles"])
        return steps(*given, **options)

    monkeypatch.setattr(training, "train_steps", noted)
    row = training_row(TrainingCase(64, (FLASH, "clear r16"), small=True), CPU, whole_s=1e3)
    flash, clear = (candidate["forward"] for candidate in row["candidates"])
    assert flash["speedup"] == 1 and clear["speedup"] == pytest.approx(flash["median_ms"] / clear["median_ms"])
    assert compiles == [False, True]


def document(rows):
    head = dict(schema=1, entry="training", title="T", device="CPU", versions={}, timing="t")
    return head | dict(rows=[row | dict(date="2026-11-30", command="c") for row in rows])


class Slow(nn.Module):
    """A model whose step takes 10 ms, and 20 and 50 ms for each block of two kinds."""

    def __init__(self):
        super().__init__()
        self.a, self.b = (nn.ModuleList(nn.Identity() for _ in range(count)) for count in (3, 4))


def test_a_long_step_follows_from_three_short_ones(monkeypatch):
    model, now = Slow(), [0.0]
    monkeypatch.setattr(training.Clock, "now", lambda self: now[0])
    monkeypatch.setattr(training.Clock, "ms", lambda self, begin, end: 1e3 * (end - begin))

    def step():
        now[0] += 0.01 + 0.02 * len(model.a) + 0.05 * len(model.b)

    found = training.train_steps(step, model, ("a", "b"), CPU, whole_s=0.1)
    assert found["extrapolated"] and found["median_ms"] == pytest.approx(10 + 3 * 20 + 4 * 50)
    whole = training.train_steps(step, model, ("a", "b"), CPU, whole_s=1)
    assert not whole["extrapolated"] and whole["median_ms"] == pytest.approx(270) and whole["samples"] == 3
    assert (len(model.a), len(model.b)) == (3, 4)
    begun = now[0]
    training.train_steps(step, model, ("a", "b"), CPU, whole_s=0.1)
    assert now[0] - begun == pytest.approx(4 * 0.08 + 2 * 0.1 + 2 * 0.13)  # twice, but for the run that compiles
    assert training._linear(5, dict(a=7, b=11), dict(a=3, b=4)) == 5 + 2 * 2 + 3 * 6


def test_only_lora_learns_and_the_inputs_of_blocks_may_wait_elsewhere():
    torch.manual_seed(0)
    model = build(SMALL, CPU).model
    before = {name: p.clone() for name, p in model.named_parameters()}
    arguments = SMALL.model.arguments(64, CPU, torch.float32)
    gradients = []
    for keeping in (torch.autograd.graph.save_on_cpu, training.nullcontext):
        with keeping():
            loss = model(**arguments)[0].square().mean()
        loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        model.zero_grad()
    assert set(gradients[0]) == {name for name in before if "lora_" in name}
    names = {name.rpartition(".lora_")[0].rpartition(".")[2] for name in gradients[0]}
    assert names == {"to_q", "to_k", "to_v", "0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"}
    # the last joint block's text and the single blocks' first inputs reach the loss: every layer learns
    assert all(g.abs().max() > 0 for g in gradients[0].values())
    assert all(torch.allclose(g, gradients[1][name]) for name, g in gradients[0].items())


KINDS = [pytest.param(False, id="cast"), installed(True, package="torchao")]


@pytest.mark.parametrize("with_torchao", KINDS)
def test_frozen_weights_in_float8_give_near_outputs_and_gradients(with_torchao, monkeypatch):
    if not with_torchao:
        monkeypatch.setitem(sys.modules, "torchao", None)
    torch.manual_seed(0)
    model = build(SMALL, CPU).model
    arguments = SMALL.model.arguments(64, CPU, torch.float32)
    with torch.no_grad():
        wanted = model(**arguments)[0]
    kind = in_float8(model)
    assert ("torchao" in kind) == with_torchao
    output = model(**arguments)[0]
    error = (output - wanted).norm() / wanted.norm()
    assert 1e-4 < error < 0.2
    output.square().mean().backward()
    learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert learning and all("lora_" in name and p.grad is not None for name, p in learning.items())
    frozen = model.transformer_blocks[0].attn.to_q.base_layer.weight
    assert with_torchao or frozen.dtype == torch.float8_e4m3fn


def test_what_fits_in_which_gpu():
    gib = 2**30
    assert [smallest_card(size * gib) for size in (20, 23, 40, 60, 100, 140)] == [24, 48, 48, 80, 141, None]
    timed = dict(median_ms=1.0, memory=dict(bytes=40 * gib, above=gib))
    found = [dict(name="a", forward=timed), dict(name="b", forward=None), dict(name="c", forward={"memory": None})]
    assert Fits("a", 48).judge(found)["holds"] and not Fits("a", 24).judge(found)["holds"]
    assert Fits("b", 48).judge(found)["holds"] is False and Fits("c", 48).judge(found) is None
    assert entry.fitting(timed) == "48 GB" and entry.fitting(dict(memory=dict(bytes=200 * gib))) == "none"


def test_the_cases_are_the_issues():
    found = {case.name: case for case in entry.cases(torch.device("cuda"))}
    assert {f"flux{kind}-{size}" for kind in ("", "-float8") for size in (1024, 2048, 4096, 8192)} <= set(found)
    assert {type(must).__name__ for must in found["flux-4096"].musts} == {"Must", "Fits"}
    assert set(found["flux-8192"].ways) == {"stock cudnn", "clear r16", "multipole", "linear local"}
    assert [case.name for case in entry.cases(CPU, True)] == ["flux-64"]
