"""One call of local attention's Triton backend: its inputs, and what its kernels ask of them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from vision_attn.kernels.triton.launching import layout, multiprocessors, next_power


@dataclass(frozen=True)
class Tiles:
    """A launch: query tile and key tile as (rows, columns), warps, pipeline stages."""

    queries: tuple[int, int]
    keys: tuple[int, int]
    warps: int
    stages: int


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
        """All that a launch depends on but what the tensors hold."""
        tensors = self.q, self.k, self.v, self.pooled_k, self.pooled_v, self.bias, self.mask
        about = *self.size, self.radius, *self.kernel, *self.steps, self.scale
        return self.q.device, *about, *map(layout, tensors)

    @cached_property
    def block_d(self) -> int:
        """Channels of a tile: the next power of two."""
        return max(16, next_power(self.q.shape[-1]))

    @property
    def bias_block(self) -> int:
        """Entries of a head's bias, up to the next power of two, at least 16; 0 for none."""
        return 0 if self.bias is None else max(16, next_power(self.bias.shape[1] * self.bias.shape[2]))

    @property
    def outside(self) -> int:
        """Tokens outside the grid."""
        return self.size[2] + self.size[3]

    @property
    def precision(self) -> str:
        """Three TF32 products keep float32's accuracy on tensor cores; other dtypes ignore it."""
        return "tf32x3"

    @property
    def together(self) -> int:
        """How many heads take turns in the launch at each tile of the grid.

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
        """The geometry, by the names of the kernels' arguments."""
        height, width, prefix, _ = self.size
        disc = self.radius > 0
        return dict(
            N=self.q.shape[1], heads=self.q.shape[2], prefix=prefix, height=height, width=width, outside=self.outside,
            limit=float(self.limit) if disc else 0.0, reach=math.isqrt(self.limit) if disc else 0,
            KY=self.kernel[0], KX=self.kernel[1], step_y=self.steps[0], step_x=self.steps[1],
            scale=self.scale, DISC=disc, D=self.q.shape[-1], BLOCK_D=self.block_d, PRECISION=self.precision,
        )  # fmt: skip

    def tiles(self, tile: tuple[int, int]) -> int:
        """Tiles of `tile` rows x columns that cover every sub-grid."""
        sides = [math.ceil(math.ceil(s / d) / t) for s, d, t in zip(self.size[:2], self.steps, tile, strict=True)]
        return math.prod(sides) * math.prod(self.steps)

    def work(self, tile: tuple[int, int]) -> int:
        """About how many tokens one tile of the grid meets."""
        columns = [self.kernel[i] if self.radius == 0 else 2 * int(self.radius) for i in (0, 1)]
        near = math.prod(min(c + t, s) for c, t, s in zip(columns, tile, self.size[:2], strict=True))
        return near + self.outside + (0 if self.pooled_k is None else self.pooled_k.shape[1])

    def splits(self, programs: int, length: int, others: int, block: int) -> tuple[int, int]:
        """Into how many parts, and of what length, the long loop of the tokens outside the grid is cut.

        Their programs start first, so they may run for half of the launch; where they would run longer they are cut.

        Args:
            programs: Programs with a long loop.
            length: Tokens of a long loop.
            others: Tokens met by all other programs together.
            block: Tokens of one step.
        """
        share = max((programs * length + others) / multiprocessors(self.q) / 2, 4 * block)
        parts = max(1, min(math.ceil(length / share), 32))
        return parts, math.ceil(length / parts / block) * block

    def put_outside(self, t: Tensor, rows: Tensor) -> None:
        """Write the tokens outside the grid, `rows` `[B, prefix + suffix, H, D]`, to `t` `[B, N, H, D]`."""
        height, width, prefix, _ = self.size
        t[:, :prefix] = rows[:, :prefix]
        t[:, prefix + height * width :] = rows[:, prefix:]


def packed(t: Tensor) -> Tensor:
    """`t` with neighbouring channels in memory; a copy only where they are not."""
    return t if t.stride(-1) == 1 else t.contiguous()


def token_strides(t: Tensor) -> tuple[int, int, int]:
    """Strides of batch, token and head."""
    return t.stride(0), t.stride(1), t.stride(2)
