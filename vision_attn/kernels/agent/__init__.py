"""Agent attention: a few agent tokens gather from all keys, and each query reads from the agents.

    V_a = softmax(scale * a k^T + B_1) v
    o   = softmax([query_scale * q a^T + B_2,  scale * q k_d^T]) [V_a, v_d]

`a` are the agents, `k_d, v_d` keys that queries may also see directly (text beside an image); there are none in the
paper. Two softmaxes over A agents cost O(N A).

Paper: 'Agent Attention: On the Integration of Softmax and Linear Attention' - https://arxiv.org/abs/2312.08874
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vision_attn.kernels.agent.op import agent_attention_triton, read_agents_triton
from vision_attn.kernels.backend import Implementation, full_precision, pick, refuse_unlike
from vision_attn.kernels.dense import dense_attention
from vision_attn.kernels.triton.launching import triton_reasons


@dataclass(frozen=True)
class Agents:
    """The agent tokens, and what is added to the logits of the two softmaxes.

    Args:
        tokens: Agents a `[B, A, H, D]`.
        key_bias: B_1 `[H, A, M]`, added to the logits of agents and keys.
        query_bias: B_2 `[H, N, A]`, added to the logits of queries and agents.
        query_scale: Factor of the logits of queries and agents, `scale` if None.
    """

    tokens: Tensor
    key_bias: Tensor | None = None
    query_bias: Tensor | None = None
    query_scale: float | None = None


class Direct(NamedTuple):
    """Keys and values `[B, E, H, D]` that every query sees beside the agents; `mask` is bool `[B, E]`."""

    k: Tensor
    v: Tensor
    mask: Tensor | None = None


def agent_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    agents: Agents,
    *,
    mask: Tensor | None = None,
    direct: Direct | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attend from each query to the agents, which attend to all keys.

    Args:
        q: Queries `[B, N, H, D]`, any strides.
        k: Keys `[B, M, H, D]` of the agents.
        v: Values `[B, M, H, D]` of the agents.
        agents: The agents and the biases.
        mask: Bool `[B, M]` (or batch 1): False hides a key from the agents.
        direct: Further keys that the queries see, in one softmax with the agents.
        scale: Factor of the logits, `D ** -0.5` if None.
        backend: 'triton' (CUDA, fused), 'torch' (any device), 'reference' (dense, small inputs), or 'auto' for the
            fastest that can run.

    Returns:
        `[B, N, H, D]` in the dtype of `q`.

    Raises:
        TypeError: If dtypes differ or are not floating point.
        ValueError: If shapes or devices do not fit each other, or a named backend cannot run (every reason is listed).
    """
    _check(q, k, v, agents, mask, direct)
    implementations = {
        "triton": Implementation(agent_attention_triton, triton_reasons(q, auto=backend == "auto")),
        "torch": Implementation(_torch),
        "reference": Implementation(_reference),
    }
    run = pick("agent_attention", backend, implementations)
    return run(q, k, v, agents, mask, direct, q.shape[-1] ** -0.5 if scale is None else scale)


def _check(q: Tensor, k: Tensor, v: Tensor, agents: Agents, mask: Tensor | None, direct: Direct | None) -> None:
    extra = {} if direct is None else {"direct.k": direct.k, "direct.v": direct.v}
    refuse_unlike(q, k=k, v=v, agents=agents.tokens, **extra)
    B, N, H, D = q.shape
    A, M = agents.tokens.shape[1], k.shape[1]
    for name, t in {"k": k, "v": v, "agents": agents.tokens, **extra}.items():
        if (t.shape[0], t.shape[2], t.shape[3]) != (B, H, D):
            raise ValueError(f"{name} must be [{B}, tokens, {H}, {D}] like q {tuple(q.shape)}, got {tuple(t.shape)}")
    if v.shape != k.shape or (direct is not None and direct.v.shape != direct.k.shape):
        raise ValueError("keys and values must have one shape")
    if A < 1:
        raise ValueError("there must be at least one agent")
    for name, bias, want in (("key_bias", agents.key_bias, (H, A, M)), ("query_bias", agents.query_bias, (H, N, A))):
        if bias is not None and tuple(bias.shape) != want:
            raise ValueError(f"{name} must be {want}, got {tuple(bias.shape)}")
    masks = [("mask", mask, M)]
    if direct is not None:
        masks.append(("direct.mask", direct.mask, direct.k.shape[1]))
    for name, m, length in masks:
        if m is not None and (m.dtype != torch.bool or m.shape[-1] != length or m.shape[0] not in (1, B)):
            raise ValueError(f"{name} must be bool [{B}, {length}], got {m.dtype} {tuple(m.shape)}")


def _torch(
    q: Tensor, k: Tensor, v: Tensor, agents: Agents, mask: Tensor | None, direct: Direct | None, scale: float
) -> Tensor:
    """Two calls of `scaled_dot_product_attention`, the second over agents and direct keys side by side."""
    a = agents.tokens
    gathered = dense_attention(a, k, v, mask=_bias_and_mask(a, agents.key_bias, mask), scale=scale)
    return _read(q, gathered, agents, direct, scale)


def read_agents(
    q: Tensor, gathered: Tensor, agents: Agents, *, direct: Direct | None, scale: float, backend: str
) -> Tensor:
    """Read from the agents what they gathered: the second softmax of `agent_attention`, alone.

    Args:
        q: Queries `[B, N, H, D]`.
        gathered: V_a `[B, A, H, D]`.
        agents: The agents; B_1 is not used.
        direct: As for `agent_attention`.
        scale: Factor of the logits.
        backend: As for `agent_attention`; 'reference' is 'torch' here.

    Returns:
        `[B, N, H, D]`.
    """
    implementations = {
        "triton": Implementation(read_agents_triton, triton_reasons(q, auto=backend == "auto")),
        "torch": Implementation(_read),
        "reference": Implementation(_read),
    }
    return pick("read_agents", backend, implementations)(q, gathered, agents, direct, scale)


def _read(q: Tensor, gathered: Tensor, agents: Agents, direct: Direct | None, scale: float) -> Tensor:
    a = agents.tokens
    query_scale = scale if agents.query_scale is None else agents.query_scale
    if direct is None:
        return dense_attention(q, a, gathered, mask=_bias_and_mask(q, agents.query_bias, None), scale=query_scale)
    # one factor for both groups of keys: the agents' own is moved into them
    keys = torch.cat([a * (query_scale / scale) if query_scale != scale else a, direct.k], 1)
    values = torch.cat([gathered, direct.v], 1)
    bias = agents.query_bias
    if bias is not None:
        bias = F.pad(bias, (0, direct.k.shape[1]))
    both = direct.mask
    if both is not None:
        both = torch.cat([both.new_ones(both.shape[0], a.shape[1]), both], 1)
    return dense_attention(q, keys, values, mask=_bias_and_mask(q, bias, both), scale=scale)


def _bias_and_mask(q: Tensor, bias: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """Join a bias `[H, N, M]` and a bool mask `[B, M]` to what `scaled_dot_product_attention` takes."""
    hidden = None if mask is None else mask[:, None, None]
    if bias is None:
        return hidden
    added = bias[None].to(q.dtype)
    return added if hidden is None else added.masked_fill(~hidden, -torch.inf)


@full_precision
def _reference(
    q: Tensor, k: Tensor, v: Tensor, agents: Agents, mask: Tensor | None, direct: Direct | None, scale: float
) -> Tensor:
    """The definition: two dense softmaxes, in float64 if q is, else float32."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    q_wide, k, v, a = (t.to(dtype) for t in (q, k, v, agents.tokens))
    first = scale * torch.einsum("bahd,bmhd->bham", a, k)
    if agents.key_bias is not None:
        first = first + agents.key_bias.to(dtype)
    if mask is not None:
        first = first.masked_fill(~mask[:, None, None], -torch.inf)
    gathered = torch.einsum("bham,bmhd->bahd", first.softmax(-1), v)
    second = (scale if agents.query_scale is None else agents.query_scale) * torch.einsum("bnhd,bahd->bhna", q_wide, a)
    if agents.query_bias is not None:
        second = second + agents.query_bias.to(dtype)
    if direct is not None:
        beside = scale * torch.einsum("bnhd,behd->bhne", q_wide, direct.k.to(dtype))
        if direct.mask is not None:
            beside = beside.masked_fill(~direct.mask[:, None, None], -torch.inf)
        second = torch.cat([second, beside], -1)
        gathered = torch.cat([gathered, direct.v.to(dtype)], 1)
    return torch.einsum("bhna,bahd->bnhd", second.softmax(-1), gathered).to(q.dtype)
