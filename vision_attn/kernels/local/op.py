"""Local attention in Triton: the inputs of a call, the operator, and its gradient.

The kernels are in `queries.py` and `key_gradients.py`; triton is imported when they first run.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vision_attn.grid import Grid
from vision_attn.kernels.backend import custom_op, upright
from vision_attn.kernels.triton.launching import (
    block_of,
    bytes_of_mask,
    floats_of,
    layout,
    next_power,
    packed,
    thrice,
)

if TYPE_CHECKING:
    from vision_attn.kernels.local import Window


@dataclass(frozen=True)
class Call:
    """The inputs of one call, checked; see `local_attention`. `size` is height, width, prefix, suffix."""

    q: Tensor
    k: Tensor
    v: Tensor
    pooled_k: Tensor | None
    pooled_v: Tensor | None
    bias: Tensor | None
    mask: Tensor | None
    size: Sequence[int]
    radius: float
    kernel: Sequence[int]
    steps: Sequence[int]
    scale: float

    @cached_property
    def key(self) -> tuple[Any, ...]:
        """Everything that a launch depends on, except the values of the tensors."""
        tensors = self.q, self.k, self.v, self.pooled_k, self.pooled_v, self.bias, self.mask
        about = *self.size, self.radius, *self.kernel, *self.steps, self.scale
        return self.q.device, *about, *map(layout, tensors)

    @cached_property
    def block_d(self) -> int:
        """Channels of a tile: the next power of two."""
        return block_of(self.q.shape[-1])

    @property
    def bias_block(self) -> int:
        """Entries of a head's bias, up to the next power of two, at least 16; 0 for none."""
        return 0 if self.bias is None else max(16, next_power(self.bias.shape[1] * self.bias.shape[2]))

    @property
    def outside(self) -> int:
        """Tokens outside the grid."""
        return self.size[2] + self.size[3]

    @property
    def together(self) -> int:
        """Heads that take turns in the launch at each tile of the grid.

        Tiles at the border have less work. With all heads in turn they end the launch and fill its last wave; where
        keys and values are more than a cache holds, one head after the other reuses them better.
        """
        B, N, H, D = self.q.shape
        return B * H if 2 * B * N * H * D * self.q.element_size() <= 2**26 else 1

    @property
    def span(self) -> int:
        """Columns of a window."""
        return self.kernel[1] if self.radius == 0 else 2 * int(self.radius) + 1

    @property
    def limit(self) -> int:
        """The largest dy^2 + dx^2 of the disc."""
        return math.ceil(self.radius**2) - 1

    def numbers(self) -> dict[str, Any]:
        """Return the geometry, by the names of the kernels' arguments."""
        height, width, prefix, _ = self.size
        disc = self.radius > 0
        return dict(
            N=self.q.shape[1], heads=self.q.shape[2], prefix=prefix, height=height, width=width, outside=self.outside,
            limit=float(self.limit) if disc else 0.0, reach=math.isqrt(self.limit) if disc else 0,
            KY=self.kernel[0], KX=self.kernel[1], step_y=self.steps[0], step_x=self.steps[1],
            scale=self.scale, DISC=disc, D=self.q.shape[-1], BLOCK_D=self.block_d, TWO=floats_of(self.q) == 2,
            PRECISION=thrice(self.q),
        )  # fmt: skip

    def tiles(self, tile: tuple[int, int]) -> int:
        """Return the number of tiles of `tile` rows x columns that cover every sub-grid."""
        sides = [math.ceil(math.ceil(s / d) / t) for s, d, t in zip(self.size[:2], self.steps, tile, strict=True)]
        return math.prod(sides) * math.prod(self.steps)

    def work(self, tile: tuple[int, int]) -> int:
        """Return about how many tokens one tile of the grid meets."""
        columns = [self.kernel[i] if self.radius == 0 else 2 * int(self.radius) for i in (0, 1)]
        near = math.prod(min(c + t, s) for c, t, s in zip(columns, tile, self.size[:2], strict=True))
        return near + self.outside + (0 if self.pooled_k is None else self.pooled_k.shape[1])

    def put_outside(self, t: Tensor, rows: Tensor) -> None:
        """Write the tokens outside the grid, `rows` `[B, prefix + suffix, H, D]`, to `t` `[B, N, H, D]`."""
        height, width, prefix, _ = self.size
        t[:, :prefix] = rows[:, :prefix]
        t[:, prefix + height * width :] = rows[:, prefix:]


def local_attention_triton(
    q: Tensor, k: Tensor, v: Tensor, grid: Grid, window: "Window", mask: Tensor | None, scale: float
) -> Tensor:
    """Run `local_attention` on checked inputs."""
    return _run(q, k, v, grid, window, mask, scale)[0]


def local_attention_lse(
    q: Tensor, k: Tensor, v: Tensor, grid: Grid, window: "Window", mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Also return the log-sum-exp of the logits, `[B, H, N]` in float32, with which outputs can be merged."""
    o, lse = _run(q, k, v, grid, window, mask, scale)
    return o, lse[0] * math.log(2)


def _run(
    q: Tensor, k: Tensor, v: Tensor, grid: Grid, window: "Window", mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    size = [grid.height, grid.width, grid.prefix, grid.suffix]
    pooled = window.pooled or (None, None)
    return _local(q, k, v, *pooled, window.bias, mask, size, *window.geometry(grid), scale)


def eight_bit_attention_triton(
    q: Tensor, k: Tensor, v: Tensor, grid: Grid, window: "Window", mask: Tensor | None, scale: float
) -> Tensor:
    """Run `local_attention` with a `precision` on checked inputs."""
    size = [grid.height, grid.width, grid.prefix, grid.suffix]
    return _eight_bit(q, k, v, mask, size, *window.geometry(grid), scale, window.precision)


@custom_op("vision_attn::local_eight_bit", repeats=True)
def _eight_bit(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, size: Sequence[int], radius: float, kernel: Sequence[int],
    steps: Sequence[int], scale: float, precision: str,
) -> Tensor:  # fmt: skip
    """Output in 8 bits, see `_local`."""
    from vision_attn.kernels.local.eight_bit_queries import forward  # noqa: PLC0415

    q, scale = upright(q, scale)
    return forward(_call(q, k, v, None, None, None, mask, size, radius, kernel, steps, scale), precision)


@_eight_bit.register_fake
def _(q: Tensor, *args: object) -> Tensor:
    return q.new_empty(q.shape)


@custom_op("vision_attn::local_triton", repeats=True)
def _local(
    q: Tensor, k: Tensor, v: Tensor, pooled_k: Tensor | None, pooled_v: Tensor | None, bias: Tensor | None,
    mask: Tensor | None, size: Sequence[int], radius: float, kernel: Sequence[int], steps: Sequence[int], scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output and log-sum-exp in base 2; `size` is height, width, prefix, suffix, and radius 0 means a square.

    The log-sum-exp is `[floats, B, H, N]`, for the backward alone in all its floats: rounded, large logits would lose
    what float32 has.
    """
    from vision_attn.kernels.local.queries import forward  # noqa: PLC0415

    q, scale = upright(q, scale)
    return forward(_call(q, k, v, pooled_k, pooled_v, bias, mask, size, radius, kernel, steps, scale))


@_local.register_fake
def _(q: Tensor, *args: object) -> tuple[Tensor, Tensor]:
    B, N, H, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((floats_of(q), B, H, N), dtype=torch.float32)


@custom_op("vision_attn::local_triton_backward")
def _local_backward(
    do: Tensor, dlse: Tensor | None, o: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, pooled_k: Tensor | None,
    pooled_v: Tensor | None, bias: Tensor | None, mask: Tensor | None, size: Sequence[int], radius: float,
    kernel: Sequence[int], steps: Sequence[int], scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v, pooled_k, pooled_v and bias; empty for what is None."""
    from vision_attn.kernels.local.queries import backward  # noqa: PLC0415

    call = _call(q, k, v, pooled_k, pooled_v, bias, mask, size, radius, kernel, steps, scale)
    dq, dk, dv, pooled_dk, pooled_dv, dbias = backward(call, packed(do), dlse, o, lse)
    return dq, dk, dv, pooled_dk, pooled_dv, dbias


@_local_backward.register_fake
def _(
    do: Tensor, dlse: Tensor | None, o: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, pooled_k: Tensor | None,
    pooled_v: Tensor | None, bias: Tensor | None, *args: object,
) -> tuple[Tensor, ...]:  # fmt: skip
    optional = (q.new_empty(0) if t is None else t.new_empty(t.shape) for t in (pooled_k, pooled_v, bias))
    return *(t.new_empty(t.shape) for t in (q, k, v)), *optional


def _call(
    q: Tensor, k: Tensor, v: Tensor, pooled_k: Tensor | None, pooled_v: Tensor | None, bias: Tensor | None,
    mask: Tensor | None, *rest: Any,
) -> Call:  # fmt: skip
    pooled_k, pooled_v = (None if t is None else packed(t) for t in (pooled_k, pooled_v))
    if bias is not None:
        bias = bias.contiguous()
    return Call(packed(q), packed(k), packed(v), pooled_k, pooled_v, bias, bytes_of_mask(mask), *rest)


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:7], *output)
    ctx.rest = inputs[7:]


def _backward(ctx: Any, do: Tensor | None, dlse: Tensor | None) -> tuple:
    *inputs, o, lse = ctx.saved_tensors
    do = torch.zeros_like(o) if do is None else do
    grads = _local_backward(do, None if dlse is None else dlse[0], o, lse, *inputs, *ctx.rest)
    return *(None if t is None else g for g, t in zip(grads, inputs[:6], strict=True)), *[None] * 6


_local.register_autograd(_backward, setup_context=_save)
