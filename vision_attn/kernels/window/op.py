"""Window attention in Triton: the operator on the grid's tokens, its gradient, and the dense rows of the others.

The kernels are in `forward.py` and `backward.py`; triton is imported when they first run.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vision_attn.grid import Grid
from vision_attn.kernels.backend import custom_op
from vision_attn.kernels.dense import outside, with_dense_rows
from vision_attn.kernels.triton.launching import floats_of, packed


def window_attention_triton(
    q: Tensor, k: Tensor, v: Tensor, grid: Grid, cell: tuple[int, int], halo: tuple[int, int], mask: Tensor | None,
    scale: float,
) -> Tensor:  # fmt: skip
    """Run `window_attention` on checked inputs."""
    image, size = grid.image, [grid.height, grid.width]
    cells = size, list(cell), list(halo)
    if not grid.prefix + grid.suffix:
        return _window(q, k, v, None, None, None, *cells, scale)[0]
    shared = [outside(t, grid) for t in (k, v)]
    o = _window(q[:, image], k[:, image], v[:, image], *shared, mask, *cells, scale)[0]
    return with_dense_rows(o, q, k, v, grid, mask=mask, scale=scale)


@custom_op("vision_attn::window_triton", repeats=True)
def _window(
    q: Tensor, k: Tensor, v: Tensor, shared_k: Tensor | None, shared_v: Tensor | None, mask: Tensor | None,
    size: Sequence[int], cell: Sequence[int], halo: Sequence[int], scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output and log-sum-exp in base 2 of the grid's tokens, `[floats, B, H, n]`."""
    from vision_attn.kernels.triton.cells import cells_of  # noqa: PLC0415
    from vision_attn.kernels.window.forward import forward  # noqa: PLC0415

    return forward(cells_of(q, k, v, shared_k, shared_v, mask, size, cell, scale, halo))


@_window.register_fake
def _(q: Tensor, *args: object) -> tuple[Tensor, Tensor]:
    B, N, H, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((floats_of(q), B, H, N), dtype=torch.float32)


@custom_op("vision_attn::window_triton_backward")
def _window_backward(
    do: Tensor, o: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, shared_k: Tensor | None,
    shared_v: Tensor | None, mask: Tensor | None, size: Sequence[int], cell: Sequence[int], halo: Sequence[int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v, shared_k and shared_v; empty for what is None."""
    from vision_attn.kernels.triton.cells import cells_of  # noqa: PLC0415
    from vision_attn.kernels.window.backward import backward  # noqa: PLC0415

    return backward(cells_of(q, k, v, shared_k, shared_v, mask, size, cell, scale, halo), packed(do), o, lse)


@_window_backward.register_fake
def _(
    do: Tensor, o: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, shared_k: Tensor | None,
    shared_v: Tensor | None, *args: object,
) -> tuple[Tensor, ...]:  # fmt: skip
    shared = (q.new_empty((0,) if t is None else t.shape) for t in (shared_k, shared_v))
    return *(t.new_empty(t.shape) for t in (q, k, v)), *shared


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:6], *output)
    ctx.rest = inputs[6:]


def _backward(ctx: Any, do: Tensor | None, unused: object) -> tuple:
    q, k, v, shared_k, shared_v, mask, o, lse = ctx.saved_tensors
    do = torch.zeros_like(o) if do is None else do
    grads = _window_backward(do, o, lse, q, k, v, shared_k, shared_v, mask, *ctx.rest)
    both = (None, None) if shared_k is None else grads[3:]
    return *grads[:3], *both, None, None, None, None, None


_window.register_autograd(_backward, setup_context=_save)
