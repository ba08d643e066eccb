"""`linear_local_attention` in Triton, for inference; the portable implementation has the gradients.

The kernel is in `forward.py`; triton is imported when it first runs.
"""

from collections.abc import Sequence

from torch import Tensor

from vision_attn.grid import Grid
from vision_attn.kernels.backend import custom_op
from vision_attn.kernels.dense import outside
from vision_attn.kernels.triton.launching import aligned


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
    return _linear_local(*inner, *shared, state, norm, mask, gate.float(), size, small, scale)


@custom_op("vision_attn::linear_local_triton", repeats=True)
def _linear_local(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, shared_k: Tensor | None, shared_v: Tensor | None,
    state: Tensor | None, norm: Tensor | None, mask: Tensor | None, gate: Tensor, size: Sequence[int],
    cell: Sequence[int], scale: float,
) -> Tensor:  # fmt: skip
    """Output of the grid's tokens."""
    from vision_attn.kernels.linear_local.forward import forward  # noqa: PLC0415
    from vision_attn.kernels.triton.cells import cells_of  # noqa: PLC0415

    v, a, b = aligned(v), aligned(a), aligned(b)  # as the sums of linear attention ask
    call = cells_of(q, k, v, shared_k, shared_v, mask if shared_k is not None else None, size, cell, scale)
    return forward(call, a, b, gate.contiguous(), state, norm)


@_linear_local.register_fake
def _(q: Tensor, *args: object) -> Tensor:
    return q.new_empty(q.shape)
