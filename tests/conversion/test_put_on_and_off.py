"""Hooks, caches, guiders and parametrizations are put on and taken off before and after us, in any order."""

import contextlib
from functools import cache
from typing import Any

import pytest
import torch
from converted_hosts import CLEAR, SIZE
from covering import quick
from diffusers.hooks import HookRegistry
from host_runs import FROM_A_FILE, run
from put_on_things import THINGS, each
from tiny_hosts import HOST
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import parametrizations, parametrize, remove_spectral_norm, spectral_norm
from untouched import assert_untouched, state

from vision_attn import Conversion, Softmax, convert

ORDERS = (
    "convert on off revert",
    "convert on revert off",
    "on convert off revert",
    "on convert revert off",
    "on off convert revert",
    "convert revert on off convert",
)


def _output(host_id: str, model: Any) -> Tensor:
    """Run a model once; a cache then computes everything."""
    HookRegistry.check_if_exists_or_initialize(model).reset_stateful_hooks()
    context = getattr(model, "cache_context", lambda name: contextlib.nullcontext())
    with context("test"):
        return run(HOST[host_id], model, *SIZE)


@cache
def _wanted(host_id: str, name: str, done: frozenset[str]) -> Tensor:
    """Return what a new model computes that was converted first."""
    model = HOST[host_id].build()
    if "convert" in done:
        convert(model, CLEAR)
    if "on" in done:
        THINGS[name].on(model)
    return _output(host_id, model)


def _assert_same(name: str, output: Tensor, want: Tensor) -> None:
    """Compare bits, or the values if weights were moved: matrix products at other addresses may round differently."""
    torch.testing.assert_close(output, want, **FROM_A_FILE if "offload" in name else dict(rtol=0, atol=0))


CASES = [(host_id, name, order) for name, thing in THINGS.items() for host_id in thing.hosts for order in ORDERS]


@pytest.mark.parametrize(
    "host_id, name, order",
    quick(CASES, (lambda host_id, name, order: name, 3), (lambda host_id, name, order: order, 6)),
)
def test_any_order(host_id: str, name: str, order: str) -> None:
    model = HOST[host_id].build()
    before, classes = state(model), [type(module) for module in model.modules()]
    done: set[str] = set()
    for step in order.split():
        if step == "convert":
            convert(model, CLEAR)
        elif step == "revert":
            Conversion.of(model).revert()
        else:
            getattr(THINGS[name], step)(model)
        done = done | {step} if step in ("convert", "on") else done - {{"revert": "convert", "off": "on"}[step]}
        _assert_same(name, _output(host_id, model), _wanted(host_id, name, frozenset(done)))
    if "convert" in done:
        Conversion.of(model).revert()
    _assert_same(name, _output(host_id, model), _wanted(host_id, name, frozenset()))
    assert_untouched(model, {name: before[name] for name in model.state_dict()})
    assert [type(module) for module in model.modules()] == classes


def test_the_things_do_something() -> None:
    for name, host_id in (("layer-skip", "sd15-unet"), ("weight", "flux"), ("bias", "eva02")):
        for done in (frozenset(), frozenset({"convert"})):
            assert not torch.allclose(_wanted(host_id, name, done), _wanted(host_id, name, done | {"on"}), atol=1e-3)


@pytest.mark.parametrize("norm", [parametrizations.weight_norm, parametrizations.spectral_norm, spectral_norm])
def test_norms_of_weights(norm: Any) -> None:
    models = [HOST["flux"].build() for _ in range(2)]
    with torch.random.fork_rng(devices=[]):
        for model in models:
            torch.manual_seed(0)
            each(".to_q", norm)(model)
    conversion = convert(models[1], Softmax())
    assert torch.equal(run(HOST["flux"], models[1], *SIZE), run(HOST["flux"], models[0], *SIZE))
    for model in models:
        if norm is spectral_norm:
            each(".to_q", remove_spectral_norm)(model)
        else:
            each(".to_q", lambda linear: parametrize.remove_parametrizations(linear, "weight"))(model)
    assert torch.equal(run(HOST["flux"], models[1], *SIZE), run(HOST["flux"], models[0], *SIZE))
    conversion.revert()
    assert torch.equal(run(HOST["flux"], models[1], *SIZE), run(HOST["flux"], models[0], *SIZE))


@pytest.fixture
def mesh(tmp_path: Any) -> Any:
    """A process group of one process, on the CPU."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("before", [True, False], ids=["sharded-first", "converted-first"])
@pytest.mark.parametrize("host_id", ["vit", "eva02", "flux"])
def test_fully_sharded(host_id: str, before: bool, mesh: Any) -> None:
    model = HOST[host_id].build()
    shard = each(".attn", lambda attn: fully_shard(attn, mesh=mesh))
    steps = [lambda: shard(model), lambda: convert(model, CLEAR)]
    for step in steps if before else steps[::-1]:
        step()
    nothing = frozenset[str]()
    assert torch.equal(_output(host_id, model), _wanted(host_id, "accelerate", nothing | {"convert"}))
    for _ in range(2):
        Conversion.of(model).revert()
        assert torch.equal(_output(host_id, model), _wanted(host_id, "accelerate", nothing))
        convert(model, CLEAR)
        assert torch.equal(_output(host_id, model), _wanted(host_id, "accelerate", nothing | {"convert"}))
