"""Agent attention in Triton: the operator of both stages, its gradient, and the two calls.

The kernels are in `forward.py` and `backward.py`; triton is imported when they first run.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vision_attn.kernels.backend import custom_op
from vision_attn.kernels.triton.launching import bytes_of_mask, floats_of, packed


def agent_attention_triton(
    q: Tensor, k: Tensor, v: Tensor, agents: Any, mask: Tensor | None, direct: Any, scale: float
) -> Tensor:
    """Run `agent_attention` on checked inputs."""
    a = agents.tokens
    M = k.shape[1]
    gathered = _attend(a, k, v, agents.key_bias, mask, M, [scale, scale])[0]
    return read_agents_triton(q, gathered, agents, direct, scale)


def read_agents_triton(q: Tensor, gathered: Tensor, agents: Any, direct: Any, scale: float) -> Tensor:
    """Run `read_agents`."""
    a = agents.tokens
    A = a.shape[1]
    first = scale if agents.query_scale is None else agents.query_scale
    if direct is None:
        return _attend(q, a, gathered, agents.query_bias, None, A, [first, first])[0]
    both = direct.mask
    if both is not None:
        both = torch.cat([both.new_ones(both.shape[0], A), both], 1)
    keys, values = torch.cat([a, direct.k], 1), torch.cat([gathered, direct.v], 1)
    return _attend(q, keys, values, agents.query_bias, both, A, [first, scale])[0]


@custom_op("vision_attn::few_triton", repeats=True)
def _attend(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None, first: int, scales: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp in base 2, `[floats, B, H, N]`.

    The first keys have a bias `[H, N, first]` and a scale of their own.
    """
    from vision_attn.kernels.agent.forward import forward  # noqa: PLC0415

    return forward(pairs_of(q, k, v, bias, mask, first, scales))


@_attend.register_fake
def _(q: Tensor, *args: object) -> tuple[Tensor, Tensor]:
    B, N, H, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((floats_of(q), B, H, N), dtype=torch.float32)


@custom_op("vision_attn::few_triton_backward")
def _attend_backward(
    do: Tensor, o: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None,
    first: int, scales: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v and bias; empty for what is None."""
    from vision_attn.kernels.agent.backward import backward  # noqa: PLC0415

    return backward(pairs_of(q, k, v, bias, mask, first, scales), packed(do), o, lse)


@_attend_backward.register_fake
def _(
    do: Tensor, o: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, *args: object
) -> tuple[Tensor, ...]:
    return *(t.new_empty(t.shape) for t in (q, k, v)), q.new_empty(0) if bias is None else bias.new_empty(bias.shape)


def pairs_of(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None, first: int, scales: Sequence[float]
) -> Any:
    """Return the inputs of a call as the kernels take them."""
    from vision_attn.kernels.triton.pairs import Pairs  # noqa: PLC0415

    return Pairs(packed(q), packed(k), packed(v), bias, bytes_of_mask(mask), first, (scales[0], scales[1]))


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:5], *output)
    ctx.rest = inputs[5:]


def _backward(ctx: Any, do: Tensor | None, unused: object) -> tuple:
    q, k, v, bias, mask, o, lse = ctx.saved_tensors
    do = torch.zeros_like(o) if do is None else do
    dq, dk, dv, dbias = _attend_backward(do, o, lse, q, k, v, bias, mask, *ctx.rest)
    return dq, dk, dv, None if bias is None else dbias, None, None, None


_attend.register_autograd(_backward, setup_context=_save)
