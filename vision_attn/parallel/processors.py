"""How each processor attends over processes. One that has no way here gathers the whole sequence on every process."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vision_attn.kernels.agent import Agents
from vision_attn.kernels.backend import full_precision
from vision_attn.kernels.linear import Features
from vision_attn.kernels.window import Haloed
from vision_attn.parallel.agent import attend_through_over, pool_agents_over
from vision_attn.parallel.linear import feature_mean_over, linear_attention_over, linear_local_attention_over
from vision_attn.parallel.local import local_attention_over
from vision_attn.parallel.multipole import multipole_attention_over
from vision_attn.parallel.outside import Outside
from vision_attn.parallel.ranks import Ranks
from vision_attn.parallel.transfers import apart, as_rows, gather
from vision_attn.parallel.windows import (
    PooledSums,
    add_depthwise_over,
    pooled_attention_over,
    window_attention_over,
)
from vision_attn.processors.agent import AgentAttention
from vision_attn.processors.base import Moment, Processor
from vision_attn.processors.clear import ClearAttention
from vision_attn.processors.halo import HaloAttention
from vision_attn.processors.hilo import HiLoAttention
from vision_attn.processors.linear_local import LinearLocalAttention
from vision_attn.processors.linfusion import LinFusionAttention
from vision_attn.processors.multipole import MultipoleAttention
from vision_attn.processors.neighborhood import NeighborhoodAttention
from vision_attn.processors.rala import RALAAttention

Way = Callable[[Any, Tensor, Tensor, Tensor, Ranks, Tensor | None, float | None], Tensor]


@torch.compiler.disable  # how much travels is known only when it runs
def attend(
    processor: Processor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ranks: Ranks,
    mask: Tensor | None = None,
    scale: float | None = None,
    moment: Moment | None = None,
) -> Tensor:
    """Attend as a processor does over the whole sequence, from the tokens that this process holds.

    All processes call it at once, with equal arguments but for the tokens.

    Args:
        processor: The processor, with the same parameters on all processes.
        q: Queries of the own slice `[B, tokens, H, D]`.
        k: Keys, like `q`.
        v: Values, like `q`.
        ranks: Who holds what.
        mask: Bool `[B, own prefix + own suffix]`, False for padding keys outside the grid; None on all or on none.
        scale: The host's factor of the logits, `D ** -0.5` if None.
        moment: What is known about the forward, for a processor that wants it; its tokens and its rotation are those of
            the own slice.

    Returns:
        `[B, tokens, H, D]` in the dtype of `q`.
    """
    way = next((_WAYS[cls] for cls in type(processor).__mro__ if cls in _WAYS), None)
    if way is None:
        return _whole(processor, q, k, v, ranks, mask, scale, moment)
    return way(processor, q, k, v, ranks, mask, scale)


def _whole(
    processor: Processor, q: Tensor, k: Tensor, v: Tensor, ranks: Ranks, mask: Tensor | None, scale: float | None,
    moment: Moment | None,
) -> Tensor:  # fmt: skip
    """Gather all tokens, run the processor over them, and keep the own ones."""
    counts = [ranks.tokens_of(rank) for rank in range(ranks.size)]
    tensors = [ranks.whole(t) for t in apart(gather(as_rows(q, k, v), counts, ranks, "everything").wait(), (q, k, v))]
    if mask is not None:
        rows = gather(mask.mT.to(torch.uint8), ranks.outside, ranks, "mask").wait()
        mask = ranks.whole(rows.mT.bool(), outside=True)
    more: tuple[Moment, ...] = ()
    if moment is not None:
        if moment.block_input is not None:
            tokens = moment.block_input
            image = tokens.shape[1] == ranks.count(ranks.image) != ranks.tokens
            spans = [ranks.count(ranks.image, rank) for rank in range(ranks.size)] if image else counts
            rows = gather(tokens.transpose(0, 1), spans, ranks, "block input").wait().transpose(0, 1)
            moment = replace(moment, block_input=rows if image else ranks.whole(rows))
        if moment.rotary is not None:
            own = torch.stack(moment.rotary, 1)  # [tokens, 2, D]
            found = ranks.whole(gather(own, counts, ranks, "rotation").wait()[None])[0]
            moment = replace(moment, rotary=(found[:, 0], found[:, 1]))
        more = (moment,)
    o = processor(*tensors, ranks.grid, mask, scale, *more)
    return ranks.slice(o)


def _neighborhood(
    processor: NeighborhoodAttention, q: Tensor, k: Tensor, v: Tensor, ranks: Ranks, mask: Tensor | None,
    scale: float | None,
) -> Tensor:  # fmt: skip
    window = processor.spec.window
    return local_attention_over(q, k, v, ranks, window, mask=mask, scale=scale, backend=processor.backend)


def _clear(
    processor: ClearAttention, q: Tensor, k: Tensor, v: Tensor, ranks: Ranks, mask: Tensor | None, scale: float | None
) -> Tensor:
    spec, window = processor.spec, processor.window
    spec.check(ranks.grid)
    pooled = None
    if spec.pool > 1:
        weight = processor.spatial_weight.reshape(spec.pool, spec.pool)
        pooled = PooledSums(k, v, ranks, weight.to(k.device), spec.counted)
    scale = spec.scale(q.shape[-1], ranks.grid, scale)
    return local_attention_over(
        q, k, v, ranks, window, pooled=pooled, mask=mask, scale=scale,
        backend=processor.backend,
    )  # fmt: skip


def _linfusion(
    processor: LinFusionAttention, q: Tensor, k: Tensor, v: Tensor, ranks: Ranks, mask: Tensor | None,
    scale: float | None,
) -> Tensor:  # fmt: skip
    _refuse_rotation(processor)
    features = Features()
    if processor.spec.feature_map == "hedgehog":
        q, k, features = processor.features_q(q), processor.features_k(k), Features("none")
    weight = _key_weight(mask, ranks, q)
    o = linear_attention_over(q, k, v, ranks, features, key_weight=weight, eps=1e-4, backend=processor.backend)
    if processor.spec.kernel_size:
        o = add_depthwise_over(o, v, ranks, processor.lepe.weight, processor.lepe.bias)
    return o


def _rala(
    processor: RALAAttention, q: Tensor, k: Tensor, v: Tensor, ranks: Ranks, mask: Tensor | None, scale: float | None
) -> Tensor:
    _refuse_rotation(processor)
    weight, features = _key_weight(mask, ranks, q), Features()
    mean = full_precision(feature_mean_over)(q, ranks, features, weight)
    g = mean * (q.shape[-1] ** -0.5 if scale is None else scale)
    y = linear_attention_over(
        q, k, v, ranks, features, key_weight=weight, global_query=g, eps=1e-6, backend=processor.backend
    )
    if processor.spec.kernel_size:
        y = add_depthwise_over(y, v, ranks, processor.lepe.weight, processor.lepe.bias)
    return y + y * torch.einsum("bnhd,hde->bnhe", v, processor.gate.to(v))


def _refuse_rotation(processor: LinFusionAttention | RALAAttention) -> None:
    if processor.spec.rotate:
        raise ValueError(
            f"{processor.spec} cannot attend over processes, which know the rotation of their own tokens only"
        )


def _key_weight(mask: Tensor | None, ranks: Ranks, q: Tensor) -> Tensor | None:
    """Turn a mask of the own tokens outside the grid into weights `[B, tokens, 1]` of the own keys."""
    if mask is None:
        return None
    image = mask.new_ones(mask.shape[0], ranks.count(ranks.image))
    return ranks.together(mask, image)[..., None].to(q.dtype)


def _linear_local(
    processor: LinearLocalAttention, q: Tensor, k: Tensor, v: Tensor, ranks: Ranks, mask: Tensor | None,
    scale: float | None,
) -> Tensor:  # fmt: skip
    return linear_local_attention_over(
        (q, processor.features_q(q)), (k, processor.features_k(k)), v, ranks, processor.spec.window_size,
        processor.gate.to(v.device).exp(), mask=mask, scale=scale, backend=processor.backend,
    )  # fmt: skip


def _agent(
    processor: AgentAttention, q: Tensor, k: Tensor, v: Tensor, ranks: Ranks, mask: Tensor | None, scale: float | None
) -> Tensor:
    spec, grid = processor.spec, ranks.grid
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    outside = Outside(q, k, v, ranks, mask, scale)
    pooled = pool_agents_over(q, ranks, spec.agent_grid)
    key_bias = query_bias = None
    if spec.biases:
        first, stop = ranks.span()
        whole_keys, whole_queries = processor.position((grid.height, grid.width), (grid.height, grid.width))
        key_bias = F.pad(whole_keys[..., first:stop], (ranks.count(ranks.prefix), ranks.count(ranks.suffix)))
        query_bias = whole_queries[:, first:stop]
    agents = Agents(pooled.wait().flatten(1, 2).to(q.dtype), key_bias, query_bias)
    o = attend_through_over(q, k, v, agents, ranks, outside, scale=scale, backend=processor.backend)
    return add_depthwise_over(o, v, ranks, processor.dwc.weight, processor.dwc.bias) if spec.dwc else o


def _hilo(
    processor: HiLoAttention, q: Tensor, k: Tensor, v: Tensor, ranks: Ranks, mask: Tensor | None, scale: float | None
) -> Tensor:
    h, size, cells = processor.high, processor.spec.window_size, Haloed(processor.spec.window_size)
    outside = Outside(q, k, v, ranks, mask, q.shape[-1] ** -0.5 if scale is None else scale).wait()
    outputs = []
    if h:
        part = outside.heads(slice(0, h))
        tensors = [t[:, :, :h] for t in (q, k, v)]
        outputs.append(window_attention_over(tensors, ranks, part, cells, scale=scale, backend=processor.backend))
    if h < q.shape[2]:
        part = outside.heads(slice(h, None))
        tensors = [t[:, :, h:] for t in (q, k, v)]
        outputs.append(pooled_attention_over(tensors, ranks, part, size, scale=scale))
    return ranks.together(outside.rows(), torch.cat(outputs, 2))


def _halo(
    processor: HaloAttention, q: Tensor, k: Tensor, v: Tensor, ranks: Ranks, mask: Tensor | None, scale: float | None
) -> Tensor:
    outside = Outside(q, k, v, ranks, mask, q.shape[-1] ** -0.5 if scale is None else scale).wait()
    part, cells = outside.heads(slice(None)), processor.spec.cells
    o = window_attention_over((q, k, v), ranks, part, cells, scale=scale, backend=processor.backend)
    return ranks.together(outside.rows(), o)


def _multipole(
    processor: MultipoleAttention, q: Tensor, k: Tensor, v: Tensor, ranks: Ranks, mask: Tensor | None,
    scale: float | None,
) -> Tensor:  # fmt: skip
    weights, mass = processor.pool_weight.to(q.device), processor.mass.to(q.device)
    cells = processor.spec.cells(mass=mass, weights=weights)
    o = multipole_attention_over(q, k, v, ranks, cells, mask=mask, scale=scale, backend=processor.backend)
    if torch.is_grad_enabled() and cells.covers(ranks.grid):  # training over processes waits for every gradient
        o = o + (0 * (mass.sum() + weights.sum())).to(o)
    return o


_WAYS: dict[type, Way] = {
    NeighborhoodAttention: _neighborhood,
    ClearAttention: _clear,
    LinFusionAttention: _linfusion,
    RALAAttention: _rala,
    LinearLocalAttention: _linear_local,
    AgentAttention: _agent,
    HaloAttention: _halo,
    HiLoAttention: _hilo,
    MultipoleAttention: _multipole,
}
