"""`linear_local_attention` in Triton: the operator on the grid's tokens, and its gradient.

The kernels are in `forward.py` and `backward.py`; triton is imported when they first run.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vision_attn.grid import Grid
from vision_attn.kernels.backend import custom_op
from vision_attn.kernels.dense import outside
from vision_attn.kernels.triton.launching import aligned, floats_of


def linear_local_attention_triton(
    v: Tensor, q: tuple[Tensor, Tensor], k: tuple[Tensor, Tensor], grid: Grid, cell: tuple[int, int], gate: Tensor,
    far: tuple[Tensor, Tensor] | None, mask: Tensor | None, scale: float,
) -> Tensor:  # fmt: skip
    """Run `linear_local_attention` on checked inputs."""
    image, size = grid.image, [grid.height, grid.width]
    small = [min(c, s) for c, s in zip(cell, size, strict=True)]
    shared: list[Tensor | None] = [None, None]
    if grid.prefix + grid.suffix:
        shared = [outside(t, grid) for t in (k[0], v)]
    inner = [t[:, image] for t in (q[0], k[0], v, q[1], k[1])]
    state, norm = (None, None) if far is None else (t.float().contiguous() for t in far)
    return _linear_local(*inner, *shared, state, norm, mask, gate.float(), size, small, scale)[0]


@custom_op("vision_attn::linear_local_triton", repeats=True)
def _linear_local(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, shared_k: Tensor | None, shared_v: Tensor | None,
    state: Tensor | None, norm: Tensor | None, mask: Tensor | None, gate: Tensor, size: Sequence[int],
    cell: Sequence[int], scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Output of the grid's tokens; for the backward lse, shares, and the sums over the grid if none were given."""
    from vision_attn.kernels.linear import linear_state  # noqa: PLC0415
    from vision_attn.kernels.linear_local.forward import forward  # noqa: PLC0415

    call, a, b = _call(q, k, v, a, b, shared_k, shared_v, mask, size, cell, scale)
    if state is not None and norm is not None:
        own = state.new_empty(0), norm.new_empty(0)
        return *forward(call, a, b, gate.contiguous(), state, norm, True), *own
    (B, _, H, D), F = q.shape, a.shape[-1]
    if q.numel():
        own = linear_state(b, call.v)
    else:
        own = q.new_zeros((B, H, F, D), dtype=torch.float32), q.new_zeros((B, H, F), dtype=torch.float32)
    return *forward(call, a, b, gate.contiguous(), *own, call.count > 1), *own


@_linear_local.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, shared_k: Tensor | None, shared_v: Tensor | None,
    state: Tensor | None, *args: object,
) -> tuple[Tensor, ...]:  # fmt: skip
    (B, n, H, D), F = q.shape, a.shape[-1]
    shares = q.new_empty((B, H, n), dtype=torch.float32)
    sums = ((B, H, F, D), (B, H, F)) if state is None else ((0,), (0,))
    own = (shares.new_empty(shape) for shape in sums)
    return q.new_empty(q.shape), shares.new_empty((floats_of(q), B, H, n)), shares, *own


@custom_op("vision_attn::linear_local_triton_backward")
def _linear_local_backward(
    do: Tensor, o: Tensor, lse: Tensor, shares: Tensor, state: Tensor, norm: Tensor, q: Tensor, k: Tensor, v: Tensor,
    a: Tensor, b: Tensor, shared_k: Tensor | None, shared_v: Tensor | None, mask: Tensor | None, gate: Tensor,
    size: Sequence[int], cell: Sequence[int], scale: float, whole: bool,
) -> list[Tensor]:  # fmt: skip
    """Gradients of q, k, v, a, b, shared_k, shared_v, state, norm and gate; empty for what is None.

    `whole` is whether the state was given, and so has a gradient.
    """
    from vision_attn.kernels.linear_local.backward import backward  # noqa: PLC0415

    call, a, b = _call(q, k, v, a, b, shared_k, shared_v, mask, size, cell, scale)
    return backward(call, a, b, gate.contiguous(), state, norm, whole, aligned(do), o, lse, shares)


@_linear_local_backward.register_fake
def _(
    do: Tensor, o: Tensor, lse: Tensor, shares: Tensor, state: Tensor, norm: Tensor, q: Tensor, k: Tensor, v: Tensor,
    a: Tensor, b: Tensor, shared_k: Tensor | None, shared_v: Tensor | None, mask: Tensor | None, gate: Tensor,
    size: Sequence[int], cell: Sequence[int], scale: float, whole: bool,
) -> list[Tensor]:  # fmt: skip
    optional = (q.new_empty((0,) if t is None else t.shape) for t in (shared_k, shared_v))
    sums = (t.new_empty(t.shape if whole else (0,)) for t in (state, norm))
    return [*(t.new_empty(t.shape) for t in (q, k, v, a, b)), *optional, *sums, gate.new_empty(gate.shape)]


def _call(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, shared_k: Tensor | None, shared_v: Tensor | None,
    mask: Tensor | None, size: Sequence[int], cell: Sequence[int], scale: float,
) -> tuple[Any, Tensor, Tensor]:  # fmt: skip
    """Return the cells as the kernels take them, and the features."""
    from vision_attn.kernels.triton.cells import cells_of  # noqa: PLC0415

    v, a, b = aligned(v), aligned(a), aligned(b)  # as the sums of linear attention ask
    mask = mask if shared_k is not None else None
    return cells_of(q, k, v, shared_k, shared_v, mask, size, cell, scale), a, b


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:11], *output)
    ctx.rest = inputs[11:]


def _backward(ctx: Any, do: Tensor | None, *unused: object) -> tuple:
    q, k, v, a, b, shared_k, shared_v, state, norm, mask, gate, o, lse, shares, *own = ctx.saved_tensors
    do = torch.zeros_like(o) if do is None else do
    whole = state is not None
    sums = (state, norm) if whole else own
    inputs = q, k, v, a, b, shared_k, shared_v
    *grads, d_state, d_norm, d_gate = _linear_local_backward(
        do, o, lse, shares, *sums, *inputs, mask, gate, *ctx.rest, whole
    )
    given = (None if t is None else g for t, g in zip(inputs, grads, strict=True))
    return *given, *((d_state, d_norm) if whole else (None, None)), None, d_gate, None, None, None


_linear_local.register_autograd(_backward, setup_context=_save)
