"""Tiny hosts converted to CLEAR, with added parameters as if they had been trained, and what they compute."""

from functools import cache
from typing import Any

import pytest
import torch
from host_runs import TEXT, run
from tiny_hosts import HOST, noise
from torch import Tensor, nn

from vision_attn import Clear, convert

SIZE = (16, 8)  # in tokens; the lower levels of a UNet still divide by the pool
CLEAR, POOLED = Clear(radius=2), Clear(radius=2, pool=2)

specs = pytest.mark.parametrize("spec", [CLEAR, POOLED], ids=["clear", "pooled"])


def hosts(*names: str) -> Any:
    """Run a test for each of these hosts."""
    return pytest.mark.parametrize("host_id", names)


def converted(host_id: str, spec: Any) -> nn.Module:
    """Return a converted host whose added parameters are not zero."""
    model = HOST[host_id].build()
    conversion = convert(model, spec)
    with torch.no_grad():
        for i, parameter in enumerate(conversion.parameters()):
            parameter.add_(0.1 * noise(*parameter.shape, seed=i))
    return model


@cache
def expected(host_id: str, spec: Any) -> Tensor:
    """Return the output of `converted(host_id, spec)` at `SIZE`."""
    return run(HOST[host_id], converted(host_id, spec), *SIZE)


def call(host_id: str, model: Any, size: tuple[int, int] = SIZE, **more: Any) -> Tensor:
    """Return the output of a model, with gradients."""
    return HOST[host_id].output(model(**HOST[host_id].inputs(*size, 2, TEXT), **more))
