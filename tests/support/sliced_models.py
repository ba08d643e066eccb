"""Converted models of diffusers over processes, beside the same in one process."""

from unittest.mock import patch

import torch
import torch.distributed as dist

import vision_attn
from vision_attn._compat import ensure_torchvision

ensure_torchvision()  # before diffusers, in processes that have no conftest.py

from tiny_hosts import HOST  # noqa: E402


def built(case, size):
    """Return a tiny host and its inputs; its heads divide by 2, 3 and 4."""
    torch.manual_seed(0)
    model = case.build()
    return model, case.inputs(*size)


def forward(case, size, spec, options, gradients):
    """Return the output in one process and the gradients of its inputs and parameters."""
    model, inputs = built(case, size)
    if spec is not None:
        vision_attn.convert(model, spec, **options)
    return results(case, model, inputs, gradients)


def results(case, model, inputs, gradients):
    x = inputs["hidden_states"].requires_grad_(gradients)
    output = model(**inputs, return_dict=False)[0]  # diffusers' hooks take tensors only
    if not gradients:
        return output.detach(), None, {}
    (output * torch.randn(output.shape, generator=torch.Generator().manual_seed(3))).sum().backward()
    return output.detach(), x.grad, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def over(rank, name, size, spec, options, ways, gradients=False):
    """Return the same over all processes, and what became of the layers."""
    from diffusers import ContextParallelConfig

    case = HOST[name]
    model, inputs = built(case, size)
    with patch("torch.accelerator.device_count", lambda: 1):  # diffusers divides by it, and a CPU has none
        model.enable_parallelism(config=ContextParallelConfig(**ways))
    conversion = vision_attn.convert(model, spec, **options) if spec is not None else None
    output, grad, grads = results(case, model, inputs, gradients)
    for g in grads.values():
        dist.all_reduce(g)
    if grad is not None:
        dist.all_reduce(grad)
    return output, grad, grads, None if conversion is None else conversion.status


def dies(rank, name, size, spec, ways):
    """Kill rank 1 inside a layer: rank 0 must not wait for ever."""
    import os
    import signal

    from vision_attn.parallel import local

    if rank == 1:
        local.Halo.wait = lambda self: os.kill(os.getpid(), signal.SIGKILL)
    return over(rank, name, size, spec, {}, ways)
