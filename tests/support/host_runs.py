"""Runs of the tiny hosts: the size that suits each, its output there, and the output before any conversion."""

from functools import cache
from typing import Any

import torch
from tiny_host_case import TEXT
from tiny_hosts import HOST, HostCase
from torch import Tensor, nn

BATCH = 2
# Weights that were read from a file lie at other addresses, where matrix products may round differently: 5e-6 was seen.
FROM_A_FILE = dict(rtol=0, atol=2e-5)


def size_of(case: HostCase) -> tuple[int, int]:
    """Return height and width in tokens; the lowest level of a UNet is then 3 x 3."""
    return (6, 6) if case.fixed_size else (12, 10)


def run(case: HostCase, model: nn.Module, height: int, width: int, batch: int = BATCH, text: int = TEXT) -> Tensor:
    """Return what a model answers to the inputs of its row, without gradients."""
    with torch.no_grad():
        return case.output(model(**case.inputs(height, width, batch, text)))


def on_gpu(tree: Any) -> Any:
    """Return tensors on the GPU, and floating ones in bfloat16."""
    if isinstance(tree, dict):
        return {name: on_gpu(value) for name, value in tree.items()}
    if isinstance(tree, list):
        return [on_gpu(value) for value in tree]
    if not isinstance(tree, Tensor):
        return tree
    return tree.to("cuda", torch.bfloat16 if tree.is_floating_point() else None)


def run_on_gpu(case: HostCase, model: nn.Module, height: int, width: int) -> Tensor:
    """Return what a model on the GPU answers in bfloat16."""
    with torch.no_grad():
        return case.output(model(**on_gpu(case.inputs(height, width, BATCH, TEXT))))


@cache
def stock(host_id: str, size: tuple[int, int] | None = None) -> Tensor:
    """Return the output of a host that nobody converted, at `size_of` it unless a size is given."""
    case = HOST[host_id]
    return run(case, case.build(), *(size or size_of(case)))


def distance(one: Tensor, other: Tensor) -> float:
    """Return the norm of the difference as a share of the norm of `other`."""
    return ((one - other).norm() / other.norm()).item()
