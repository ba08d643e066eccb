"""Replicas whose parameters are plain tensors: DataParallel, `functional_call`, several models at once by `vmap`."""

import copy
from itertools import product
from typing import Any

import pytest
import torch
from covering import quick
from host_runs import run
from processor_table import PROCESSORS
from tiny_hosts import HOST, noise
from torch import nn
from torch.func import functional_call, stack_module_state, vmap

from vision_attn import convert

SIZE = (16, 16)  # the lowest level of the UNet is then 4 x 4


def trained(host_id: str, name: str, seed: int = 0) -> nn.Module:
    model = HOST[host_id].build()
    convert(model, PROCESSORS[name])
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            parameter.add_(0.02 * noise(*parameter.shape, seed=seed + i))
    return model


def replica(model: nn.Module) -> nn.Module:
    """Return what `nn.DataParallel` makes of a model on another GPU: plain tensors in the place of parameters."""
    copies = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, other in copies.items():
        for name, child in module._modules.items():
            setattr(other, name, copies[child]) if child is not None else other._modules.update({name: None})
        for name, parameter in module._parameters.items():
            if parameter is None:
                other._parameters[name] = None
            else:
                setattr(other, name, parameter.detach().clone())
    return copies[model]


ROWS = quick(
    list(product(PROCESSORS, ("vit", "sd15-unet"))),
    (lambda name, host_id: name if host_id == "vit" else "any", 1),
    (lambda name, host_id: host_id, 4),
)


@pytest.mark.parametrize("name, host_id", ROWS)
def test_data_parallel(host_id: str, name: str) -> None:
    model = trained(host_id, name)
    want = run(HOST[host_id], model, *SIZE)
    for _ in range(2):
        torch.testing.assert_close(run(HOST[host_id], replica(model), *SIZE), want, rtol=0, atol=1e-5)
    assert torch.equal(run(HOST[host_id], model, *SIZE), want)


@pytest.mark.parametrize("name, host_id", ROWS)
def test_functional_call(host_id: str, name: str) -> None:
    model, other = trained(host_id, name), trained(host_id, name, seed=1)
    inputs = HOST[host_id].inputs(*SIZE, 2, 7)
    with torch.no_grad():
        output = HOST[host_id].output(functional_call(model, dict(other.named_parameters()), kwargs=inputs))
    torch.testing.assert_close(output, run(HOST[host_id], other, *SIZE), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", PROCESSORS)
def test_several_models_at_once(name: str) -> None:
    models: list[Any] = [trained("vit", name, seed) for seed in (0, 1)]
    x = HOST["vit"].inputs(*SIZE, 2, 7)["x"]
    parameters, buffers = stack_module_state(models)
    base = copy.deepcopy(models[0]).to("meta")
    with torch.no_grad():
        output = vmap(lambda p, b: functional_call(base, (p, b), (x,)))(parameters, buffers)
    want = torch.stack([run(HOST["vit"], model, *SIZE) for model in models])
    torch.testing.assert_close(output, want, rtol=0, atol=1e-4)
