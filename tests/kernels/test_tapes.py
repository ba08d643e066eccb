"""A repeated call launches what the recorded one did, on its own tensors; anything that could differ runs as ever.

Without a GPU Triton's interpreter stands in for it: memory, views and parameters are the same there.
"""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from interpreted import take

from vision_attn.conversion import answers
from vision_attn.grid import Grid
from vision_attn.kernels import eight_bits, tables, tapes
from vision_attn.kernels.eight_bits import Blocks
from vision_attn.kernels.launches import Launch
from vision_attn.kernels.local import Window
from vision_attn.kernels.multipole import Cells, cells, mean_blocks
from vision_attn.kernels.multipole import pyramid as multipole_pyramid
from vision_attn.kernels.multipole.mean_blocks import MeanBlocks
from vision_attn.kernels.multipole.pyramid import pyramid
from vision_attn.kernels.triton.launching import Kernel
from vision_attn.processors import (
    RALA,
    Agent,
    Clear,
    Halo,
    HiLo,
    InLine,
    LinearLocal,
    LinFusion,
    Multipole,
    Neighborhood,
    paro,
)
from vision_attn.processors.base import Layer, Processor
from vision_attn.processors.paro import orders_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [] if DEVICE == "cuda" else [pytest.mark.interpreter]
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]
ROWS = {
    "clear": (Clear(radius=2), Grid(6, 9, prefix=3)),
    "multipole": (Multipole(cell=4, pool=2, near=0, exact=1), Grid(8, 8)),
    "multipole-ragged": (Multipole(cell=4, pool=2, near=0, exact=1), Grid(9, 12, prefix=2)),
    "multipole-int8": (Multipole(near=0, exact=1, precision="int8"), Grid(9, 16, prefix=2)),
    "clear-int8": (Clear(radius=2, precision="int8"), Grid(6, 9, prefix=3)),
    "neighborhood": (Neighborhood(kernel_size=3), Grid(8, 8)),
    "linfusion": (LinFusion(mid_dim=-1), Grid(8, 8)),
    "rala": (RALA(kernel_size=3), Grid(6, 8, prefix=2)),
    "agent": (Agent(num_agents=(2, 3)), Grid(6, 8)),
}


QUICK = ("clear", "linfusion", "rala") if DEVICE == "cpu" else tuple(ROWS)


@pytest.fixture(autouse=True)
def inference(monkeypatch):
    monkeypatch.setattr(tapes, "DEVICES", (DEVICE,))
    monkeypatch.setattr(answers, "DEVICES", (DEVICE,))
    with torch.no_grad():
        yield


def built(name, dtype=torch.float32):
    spec, grid = ROWS[name]
    processor = spec.build(Layer("layer", 2, 16, backend="triton", dim=32)).to(DEVICE, dtype).eval()
    for number, parameter in enumerate(processor.parameters()):
        torch.nn.init.normal_(parameter, generator=torch.Generator(DEVICE).manual_seed(number), std=0.3)
    return processor, grid


def drawn(grid, seed, dtype=torch.float32):
    draw = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, grid.tokens, 2, 16, generator=draw).to(DEVICE, dtype) for _ in range(3))
    return q, k, v, grid, None, None


def kept(found):
    return [tape for tape in found.values() if tape]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param(name, dtype, marks=[] if name in QUICK and dtype is torch.float32 else [pytest.mark.slow])
        for name in ROWS
        for dtype in DTYPES
    ],
    ids=str,
)
def test_repeats_are_bit_equal(name, dtype):
    processor, grid = built(name, dtype)
    found = tapes.Tapes()
    calls = [drawn(grid, seed, dtype) for seed in range(4)]
    want = [processor(*args) for args in calls]
    got = [found.call(processor, args, processor) for args in calls]
    assert len(kept(found)) == 1
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert len({t.data_ptr() for t in got}) == len(got)


SEEN_BY_ALL = {  # attention that hands text keys, masks and sums to its kernels
    "hilo": HiLo(alpha=0.5, window_size=2),
    "halo": Halo(block=4, halo=1),
    "linear-local": LinearLocal(window_size=2),
    "agent": Agent(num_agents=4),
    "inline": InLine(),
    "rala": RALA(),
    "clear": Clear(radius=2),
    "clear-int8": Clear(radius=2, precision="int8"),
    "clear-pooled": Clear(radius=2, pool=2),
    "multipole": Multipole(cell=4, pool=2, near=0, exact=1),
    "linfusion": LinFusion(mid_dim=-1),
}


@pytest.mark.parametrize("masked", [False, True], ids=["all-words", "padded-words"])
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "halo" else [pytest.mark.slow]) for name in SEEN_BY_ALL]
)
def test_repeated_calls_see_their_own_text(name, masked, monkeypatch):
    """Each call has tensors of its own: queries, keys, the words among them, and which words are padding."""
    grid = Grid(8, 8, prefix=3)
    processor = SEEN_BY_ALL[name].build(Layer("layer", 2, 16, backend="triton", dim=32)).to(DEVICE).eval()
    calls = [drawn(grid, seed)[:4] for seed in range(4)]
    draw = torch.Generator().manual_seed(7)
    masks = [torch.rand(1, 3, generator=draw).to(DEVICE) < 0.6 if masked else None for _ in calls]
    got = [processor(*args, mask) for args, mask in zip(calls, masks, strict=True)]
    monkeypatch.setattr(tapes, "DEVICES", ())
    want = [processor(*args, mask) for args, mask in zip(calls, masks, strict=True)]
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_views_of_one_memory_keep_their_roles():
    processor, grid = built("clear")
    found = tapes.Tapes()
    for seed in range(4):
        whole = torch.randn(1, grid.tokens, 2, 3, 16, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
        args = *whole.unbind(3), grid, None, None
        assert torch.equal(found.call(processor, args, processor), processor(*args))
    assert len(kept(found)) == 1


def test_one_tensor_twice_is_not_recorded():
    """Later calls of the same layouts may have two."""
    processor, grid = built("clear")
    found = tapes.Tapes()
    for seed in range(4):
        q, k, v, *rest = drawn(grid, seed)
        args = (q, k, k, *rest) if seed < 2 else (q, k, v, *rest)
        assert torch.equal(found.call(processor, args, processor), processor(*args))
    assert not kept(found)


CHANGES = {
    "in place": lambda p: p.mass.add_(0.5),
    "through data": lambda p: p.mass.data.mul_(-2),
    "other memory": lambda p: setattr(p.mass, "data", p.mass.data * 3),
    "another parameter": lambda p: setattr(p, "mass", torch.nn.Parameter(p.mass * 2 + 1)),
    "behind the module's back": lambda p: p._parameters.update(mass=torch.nn.Parameter(p.mass * 2 + 1)),
    "another dtype": lambda p: p.half(),
    "attribute": lambda p: setattr(p, "spec", Multipole(cell=4, pool=2, near=0, exact=0)),
    "hook": lambda p: p.register_forward_hook(lambda module, args, output: output * 2),
    "forward": lambda p: setattr(p, "forward", lambda q, *args: q * 2),
}


def negative(module):
    other = copy.deepcopy(module)
    for parameter in other.parameters():
        parameter.data.neg_()
    return other


CHANGES_INSIDE = {
    "other memory": lambda p: setattr(p.lepe.weight, "data", p.lepe.weight.data * 3),
    "hook": lambda p: p.lepe.register_forward_hook(lambda module, args, output: output * 2),
    "forward": lambda p: setattr(p.lepe, "forward", lambda o, v, grid, gate: o * 2),
    "behind the module's back": lambda p: p._modules.update(lepe=negative(p.lepe)),
}


@pytest.mark.parametrize(
    "change", [pytest.param(c, marks=[] if c in ("attribute", "other memory") else [pytest.mark.slow]) for c in CHANGES]
)
def test_a_changed_processor_is_seen(change):
    check_change("multipole", CHANGES[change])


@pytest.mark.parametrize(
    "change", [pytest.param(c, marks=[] if c.startswith("behind") else [pytest.mark.slow]) for c in CHANGES_INSIDE]
)
def test_a_changed_module_inside_a_processor_is_seen(change):
    check_change("rala", CHANGES_INSIDE[change])


def check_change(name, change):
    processor, grid = built(name)
    found, args = tapes.Tapes(), drawn(grid, 0)
    before = [found.call(processor, args, processor) for _ in range(3)][-1]
    assert len(kept(found)) == 1
    change(processor)
    for _ in range(3):
        now = found.call(processor, args, processor)
        assert torch.equal(now, processor(*args))
    assert not torch.equal(now, before) or next(processor.parameters()).dtype == torch.float16


class Around(Processor):
    """Lets another processor attend."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args):
        return self.inner(*args)


def test_a_changed_processor_inside_another_is_seen():
    inner, grid = built("clear")
    processor, found, args = Around(inner), tapes.Tapes(), drawn(grid, 0)
    before = [found.call(processor, args, processor) for _ in range(3)][-1]
    assert len(kept(found)) == 1
    inner.window = Window(radius=3)
    now = found.call(processor, args, processor)
    assert torch.equal(now, processor(*args)) and not torch.equal(now, before)


NETWORKS = {
    "in place": lambda f: f[0].weight.mul_(-2),
    "other memory": lambda f: setattr(f[3].weight, "data", f[3].weight.data * -3),
    "another parameter": lambda f: f[1].register_parameter("bias", torch.nn.Parameter(f[1].bias + 1)),
    "behind the module's back": lambda f: f._modules.update({"3": negative(f[3])}),
    "number": lambda f: setattr(f[2], "negative_slope", 0.9),
    "hook": lambda f: f[3].register_forward_hook(lambda module, args, output: output * 2),
}


@pytest.mark.parametrize("one_memory", [False, True], ids=["apart", "one-memory"])
@pytest.mark.parametrize("change", NETWORKS)
def test_changed_networks_of_linfusion_are_seen(change, one_memory):
    """Also where all weights are parts of one memory, as some loaders leave them."""
    grid = Grid(5, 7)
    processor = LinFusion(mid_dim=24).build(Layer("layer", 2, 16, backend="triton", dim=32)).to(DEVICE, torch.float16)
    for number, parameter in enumerate(processor.parameters()):
        torch.nn.init.normal_(parameter, generator=torch.Generator(DEVICE).manual_seed(number), std=0.3)
    if one_memory:
        flat = torch.cat([parameter.flatten() for parameter in processor.parameters()])
        parts = flat.split([parameter.numel() for parameter in processor.parameters()])
        for parameter, part in zip(processor.parameters(), parts, strict=True):
            parameter.data = part.view_as(parameter)
    x = torch.randn(2, grid.tokens, 32).to(DEVICE, torch.float16)

    def sums():
        return processor.add_residuals(x, ["q", "k"]) or [x + f(x) for f in processor.residuals().values()]

    before = [sums() for _ in range(4)]
    assert all(torch.equal(a, b) for again in before for a, b in zip(again, before[0], strict=True))
    (tape,) = kept(processor._tapes)
    assert len(tape.steps) == 2 and len({t.data_ptr() for again in before for t in again}) == 8
    NETWORKS[change](processor.to_k_)
    for _ in range(3):
        q, k = sums()
        torch.testing.assert_close(q, before[0][0], atol=4e-3, rtol=4e-3)
        torch.testing.assert_close(k, x + processor.to_k_(x), atol=4e-3, rtol=4e-3)
        assert (k - before[0][1]).abs().max() > 0.1


def test_launches_that_are_planned_anew_are_recorded_anew(monkeypatch):
    """`vision-attn tune` compares launches of calls alike: each has to run with its own."""
    processor, grid = built("clear")
    found, args, rows, run = tapes.Tapes(), drawn(grid, 0), [], Kernel.run

    def seen(self, *args, **named):
        rows.append(named["TALL"])
        return run(self, *args, **named)

    monkeypatch.setattr(Kernel, "run", seen)
    for tall in (4, 8, 4):
        take(monkeypatch, local__forward=Launch((tall, 8), (8, 8), 4))
        for _ in range(3):
            found.call(processor, args, processor)
        assert len(kept(found)) == 1
        assert rows == [tall] * (3 if DEVICE == "cpu" else 1)  # on a GPU what was compiled runs straight away
        rows.clear()


def test_what_does_more_than_launch_is_not_recorded():
    spec, grid = HiLo(), Grid(8, 8)
    processor, found = spec.build(Layer("layer", 2, 16, backend="triton", dim=32)).to(DEVICE), tapes.Tapes()
    for seed in range(4):
        args = drawn(grid, seed)
        assert torch.equal(found.call(processor, args, processor), processor(*args))
    assert list(found.values()) == [False]


def test_a_processor_that_does_more_repeats_its_launches_itself():
    grid, processor = Grid(8, 6), HiLo(alpha=0.5).build(Layer("layer", 2, 16, backend="triton", dim=32)).to(DEVICE)
    for seed in range(4):
        args = drawn(grid, seed)
        assert torch.equal(processor(*args), copy.deepcopy(processor)(*args))
    assert len(kept(processor._tapes)) == 1
    assert not copy.deepcopy(processor)._tapes and not pickle.loads(pickle.dumps(processor))._tapes


def test_modules_with_hooks_inside_a_processor_run_as_ever():
    grid = Grid(4, 4)
    processor = LinFusion(feature_map="hedgehog", mid_dim=-1).build(Layer("layer", 2, 16, backend="triton", dim=32))
    processor, found, ran = processor.to(DEVICE).eval(), tapes.Tapes(), []
    processor.features_q.register_forward_hook(lambda *args: ran.append(1) and None)
    for seed in range(3):
        found.call(processor, drawn(grid, seed), processor)
    assert len(ran) == 3 and not found


def test_gradients_and_modes_run_as_ever():
    from torch.utils.flop_counter import FlopCounterMode

    processor, grid = built("clear")
    found, args = tapes.Tapes(), drawn(grid, 0)
    with torch.enable_grad():
        q = args[0].clone().requires_grad_()
        for _ in range(3):
            found.call(processor, (q, *args[1:]), processor).sum().backward()
    with FlopCounterMode(display=False):
        found.call(processor, args, processor)
    assert not found
    with torch.inference_mode():
        for _ in range(3):
            assert torch.equal(found.call(processor, args, processor), processor(*args))
    assert len(kept(found)) == 1


TABLES = {
    "pyramid": lambda: pyramid([24, 16, 0, 0, 4, 0, 2]).table(torch.device(DEVICE)),
    "means-in-tiles": lambda: MeanBlocks(pyramid([24, 16, 0, 0, 4, 0, 2])).met(torch.device(DEVICE)),
    "blocks": lambda: Blocks((9, 7, 3, 0), (1, 1)).places(torch.device(DEVICE)),
    "cells": lambda: Cells(cell=4).layout(Grid(9, 11), torch.device(DEVICE)).near,
    "orders": lambda: orders_of(Grid(5, 7), 4, torch.device(DEVICE)),
}


def drop_tables():
    """Drop what other sizes would drive out of the caches."""
    kept = multipole_pyramid._table, mean_blocks._tables, eight_bits._kept_places, cells._kept_layout, paro._kept_orders
    for cache in kept:
        cache.cache_clear()
    gc.collect()


@pytest.mark.parametrize("captures", [False, True], ids=["eager", "captured"])
@pytest.mark.parametrize("name", TABLES)
def test_tables_that_a_graph_reads_outlive_their_cache(name, captures, monkeypatch):
    drop_tables()
    monkeypatch.setattr(tables, "_captured", {})
    monkeypatch.setattr(tables, "_captures", lambda t: captures)
    place = weakref.ref(TABLES[name]())
    drop_tables()
    assert (place() is not None) == captures


def test_tables_of_a_repeated_call_outlive_its_tape(monkeypatch):
    processor, grid = built("multipole")
    found, args = tapes.Tapes(), drawn(grid, 0)
    for _ in range(3):
        found.call(processor, args, processor)
    (tape,) = kept(found)
    monkeypatch.setattr(tables, "_captured", {})
    monkeypatch.setattr(tables, "_captures", lambda t: True)
    found.call(processor, args, processor)
    assert tape.tables and {id(t) for t in tape.tables} == set(tables._captured)


@pytest.mark.slow
def test_a_converted_model_repeats_and_its_copies_begin_anew():
    from tiny_hosts import HOST

    from vision_attn import convert
    from vision_attn.conversion.state import LAYER

    model, inputs = HOST["sd15-unet"].build().to(DEVICE), HOST["sd15-unet"].inputs(4, 4, 1, 5)
    inputs = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    convert(model, Clear(radius=1), backend="triton")
    outputs = [model(**inputs)[0] for _ in range(4)]
    assert all(torch.equal(o, outputs[0]) for o in outputs)
    states = [vars(m)[LAYER] for m in model.modules() if LAYER in vars(m)]
    assert states and all(kept(state.tapes) for state in states)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not any(vars(m)[LAYER].tapes for m in other.modules() if LAYER in vars(m))
        assert torch.equal(other(**inputs)[0], outputs[0])


@pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter has no compiled kernels")
def test_launches_are_taken_apart_needs_a_gpu():
    """Triton's launcher is built as `direct.py` knows it; where it is not, launches go the slower public way."""
    processor, grid = built("clear", torch.bfloat16)
    found = tapes.Tapes()
    for seed in range(3):
        found.call(processor, drawn(grid, seed, torch.bfloat16), processor)
    (tape,) = kept(found)
    assert all("_taken_apart" in step._launch.__qualname__ for step in tape.steps)
