"""Processors over processes beside the same in one process: outputs and all gradients."""

from dataclasses import replace
from functools import partial

import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from vision_attn.grid import Grid
from vision_attn.parallel.processors import attend
from vision_attn.parallel.ranks import Cut, Ranks
from vision_attn.parallel.slabs import fits_slabs
from vision_attn.processors import Layer

HEADS, DIM, BATCH = 2, 8, 2


def build(spec):
    """Return a processor whose parameters are not at their start."""
    torch.manual_seed(1)
    processor = spec.build(Layer("layer", HEADS, DIM, dim=HEADS * DIM))
    for parameter in processor.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return processor


def inputs(grid, masked):
    """Return q, k, v of the whole sequence, the weights of a loss, and a mask."""
    draw = torch.Generator().manual_seed(2)
    q, k, v, w = torch.randn(4, BATCH, grid.tokens, HEADS, DIM, generator=draw)
    mask = torch.rand(BATCH, grid.prefix + grid.suffix, generator=draw) < 0.7 if masked else None
    return q, k, v, w, mask


def alone(spec, grid, masked=False):
    """Return output and gradients of q, k, v and the parameters, in one process."""
    processor, (q, k, v, w, mask) = build(spec), inputs(grid, masked)
    for t in (q, k, v):
        t.requires_grad_()
    o = processor(q, k, v, grid, mask)
    (o * w).sum().backward()
    grads = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in processor.named_parameters()}
    return o.detach(), q.grad, k.grad, v.grad, grads


def ranks_of(grid, cuts=None):
    """Return who holds what, with `cuts` (prefix, image, suffix) or as diffusers cuts."""
    cut = Cut.over(dist.group.WORLD)
    return cut.of(grid) if cuts is None else Ranks(grid, cut.group, cut.rank, *cuts)


def local(ranks, t):
    """Return the own slice of `[B, N, ...]`."""
    parts, first = [], 0
    for cuts in ranks.cuts:
        parts.append(t[:, first + cuts[ranks.rank] : first + cuts[ranks.rank + 1]])
        first += cuts[-1]
    return torch.cat(parts, 1)


def whole(parts, cuts):
    """Put the slices of all ranks together."""
    found = []
    for n in range(3):
        for rank, part in enumerate(parts):
            before = sum(c[rank + 1] - c[rank] for c in cuts[:n])
            found.append(part[:, before : before + cuts[n][rank + 1] - cuts[n][rank]])
    return torch.cat(found, 1)


def local_mask(ranks, grid, mask):
    """Return the own slice of a mask of the tokens outside the grid."""
    one = Grid(1, 1, grid.prefix, grid.suffix)
    outside = Ranks(one, ranks.group, ranks.rank, ranks.prefix, (0,) * ranks.size + (1,), ranks.suffix)
    padded = torch.cat([mask[:, : grid.prefix], mask[:, :1], mask[:, grid.prefix :]], 1)
    return outside.own_outside(local(outside, padded))


def over(rank, spec, grid, masked=False, cuts=None, gathers=False, backend="auto", again=False):
    """Return the same as `alone` of the own slice, and the bytes received; with `again` by gradient checkpointing."""
    ranks = replace(ranks_of(grid, cuts), gathers=gathers)
    processor = build(spec)
    processor.backend = backend
    q, k, v, w, mask = inputs(grid, masked)
    q, k, v, w = (local(ranks, t).contiguous() for t in (q, k, v, w))
    mask = None if mask is None else local_mask(ranks, grid, mask)
    for t in (q, k, v):
        t.requires_grad_()
    run = partial(checkpoint, attend, use_reentrant=False) if again else attend
    o = run(processor, q, k, v, ranks, mask, None)
    sent = dict(ranks.traffic.received)
    (o * w).sum().backward()
    grads = {}
    for name, p in processor.named_parameters():
        assert p.grad is not None or name not in ("mass", "pool_weight"), f"{name} has no gradient: DDP would wait"
        grads[name] = torch.zeros_like(p) if p.grad is None else p.grad
        dist.all_reduce(grads[name])
    return o.detach(), q.grad, k.grad, v.grad, grads, ranks.cuts, sent


def trained(rank, spec, grid, masked=False, cuts=None, gathers=False, again=False):
    """Return what `over` returns, in Triton by slabs. Memory that nobody has written to holds NaN."""
    torch.use_deterministic_algorithms(True)
    assert fits_slabs(torch.zeros(BATCH, 1, HEADS, DIM), ranks_of(grid, cuts), spec.cells(), "triton")
    return over(rank, spec, grid, masked, cuts, gathers, "triton", again)


def over_short(rank, spec, grid):
    """Return the same with slabs that are a row too short on one side."""
    from unittest.mock import patch

    from vision_attn.parallel import local

    def short(ranks, window, rank, unit=1, slab_of=local.slab_of):
        slab = slab_of(ranks, window, rank, unit)
        return local.Slab(ranks, slab.first, slab.stop - (rank == 0))

    with patch.object(local, "slab_of", short):
        return over(rank, spec, grid)


def close(found, expected, name, tolerance):
    """Compare, and name what differs."""
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance, msg=lambda m: f"{name}: {m}")


def compare(answers, expected, tolerance=2e-5):
    """Compare what all ranks returned with one process."""
    cuts = answers[0][5]
    for name, n in (("o", 0), ("dq", 1), ("dk", 2), ("dv", 3)):
        found = whole([answer[n] for answer in answers], cuts)
        close(found, expected[n], name, tolerance)
    for name, grad in expected[4].items():
        close(answers[0][4][name], grad, name, 10 * tolerance)


def inferred(rank, spec, grid, masked=False, gathers=False, cuts=None):
    """Return the output of the own slice without gradients, in Triton: all that `over` returns that others compare.

    Memory that nobody has written to holds NaN.
    """
    torch.use_deterministic_algorithms(True)
    cut = Cut.over(dist.group.WORLD)
    ranks = replace(ranks_of(grid, cuts), gathers=gathers)
    processor = build(spec)
    processor.backend = "triton"
    q, k, v, _, mask = inputs(grid, masked)
    q, k, v = (local(ranks, t) for t in (q, k, v))
    with torch.no_grad():
        assert fits_slabs(q, ranks, processor.spec.cells(), processor.backend) and cut.size == ranks.size
        o = attend(processor, q, k, v, ranks, None if mask is None else local_mask(ranks, grid, mask), None)
    return o, dict(ranks.traffic.received), ranks.cuts
