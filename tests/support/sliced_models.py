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
    x = inputs["sample" if "sample" in inputs else "hidden_states"].requires_grad_(gradients)
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


def in_turn(rank, name, sizes, spec):
    """Return the outputs of one model for several sizes."""
    from vision_attn.parallel import enable

    case = HOST[name]
    model, _ = built(case, sizes[0])
    vision_attn.convert(model, spec)
    with patch("torch.accelerator.device_count", lambda: 1):
        enable(model)
    return [results(case, model, case.inputs(*size), False)[0] for size in sizes]


def paired(rank, name, sizes, spec):
    """Return the output of two processes of four, which draw the picture of this size together."""
    from vision_attn.parallel import enable

    case = HOST[name]
    model, inputs = built(case, sizes[rank // 2])
    vision_attn.convert(model, spec)
    with patch("torch.accelerator.device_count", lambda: 1):
        enable(model, share=2)
    return results(case, model, inputs, False)[0]


def refused(rank, name, share):
    """Return what `enable` says of a share."""
    from vision_attn.parallel import enable

    try:
        enable(HOST[name].build(), share=share)
    except ValueError as error:
        return str(error)


def dies(rank, name, size, spec, ways):
    """Kill rank 1 inside a layer: rank 0 must not wait for ever."""
    import os
    import signal

    from vision_attn.parallel import local

    if rank == 1:
        local.Halo.wait = lambda self: os.kill(os.getpid(), signal.SIGKILL)
    return over(rank, name, size, spec, {}, ways)


def enabled(rank, name, size, spec, gradients=False):
    """Return the same of a model without a plan of diffusers, cut by `enable`; it can be taken back."""
    from vision_attn.parallel import enable

    case = HOST[name]
    model, inputs = built(case, size)
    conversion = vision_attn.convert(model, spec)
    with patch("torch.accelerator.device_count", lambda: 1):
        cut = enable(model)
    found = *results(case, model, inputs, gradients), conversion.status
    for g in found[2].values():
        dist.all_reduce(g)
    if found[1] is not None:
        dist.all_reduce(found[1])
    refused = []
    for call in (conversion.revert, conversion.bypassed().__enter__):
        try:
            call()
        except ValueError as error:
            refused.append(str(error))
    cut.disable()
    conversion.revert()
    model(**inputs)
    return *found, refused


def dense(rank, name, size):
    """Return what a cut model says whose layers stay dense."""
    from vision_attn.parallel import enable

    model, inputs = built(HOST[name], size)
    vision_attn.convert(model, vision_attn.Softmax())
    with patch("torch.accelerator.device_count", lambda: 1):
        enable(model)
    try:
        model(**inputs)
    except ValueError as error:
        return str(error)


def cached(rank, name, size, spec, cache):
    """Return what a cut model with a cache computes in two steps, or says."""
    from diffusers import ContextParallelConfig

    model, inputs = built(HOST[name], size)
    with patch("torch.accelerator.device_count", lambda: 1):
        model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=dist.get_world_size()))
    vision_attn.convert(model, spec)
    model.enable_cache(cache)
    try:
        with torch.no_grad(), model.cache_context("cond"):
            return [model(**inputs, return_dict=False)[0] for _ in range(2)]
    except ValueError as error:
        return str(error)


def decoded(rank, rows):
    """Return a picture that all processes decode, and the same of one."""
    from diffusers import AutoencoderKL

    from vision_attn.parallel import shared_decoding

    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=4,
        sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )
    z = torch.randn(2, 4, rows, 21)
    with torch.no_grad():
        with shared_decoding(vae):
            together = vae.decode(z).sample
        vae.enable_tiling()
        return together, vae.decode(z).sample


def compiled(rank, name, size, spec):
    """Return outputs before and after the blocks are compiled."""
    from diffusers import ContextParallelConfig

    case = HOST[name]
    model, inputs = built(case, size)
    with patch("torch.accelerator.device_count", lambda: 1):
        model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=dist.get_world_size()))
    vision_attn.convert(model, spec)
    with torch.no_grad():
        before = model(**inputs, return_dict=False)[0]
        for block in (*model.transformer_blocks, *getattr(model, "single_transformer_blocks", ())):
            block.compile(backend="eager")
        return before, model(**inputs, return_dict=False)[0], model(**inputs, return_dict=False)[0]


def sharded(rank, name, size, spec):
    """Return output and the mean gradients of blocks that FSDP shards over the same processes."""
    from diffusers import ContextParallelConfig
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    case = HOST[name]
    model, inputs = built(case, size)
    with patch("torch.accelerator.device_count", lambda: 1):
        model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=dist.get_world_size()))
    vision_attn.convert(model, spec)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in (*model.transformer_blocks, *model.single_transformer_blocks, model):
        fully_shard(block, mesh=mesh)
    output, _, grads = results(case, model, inputs, True)
    return output, {n: g.full_tensor() for n, g in grads.items() if hasattr(g, "full_tensor")}
