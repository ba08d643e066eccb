"""HiLo: some heads attend inside small windows (high frequencies), the others to pooled keys (low frequencies).

    high heads: o_i = softmax_j(scale * q_i . k_j) v_j,    j in window(i) + tokens outside the grid
    low heads:  o_i = softmax_c(scale * q_i . k_c) v_c,    c in means of k and v over windows + tokens outside the grid

The last int(H * alpha) of the H heads are low. Tokens outside the grid see every token, on all heads. Where
`window_size` does not divide the grid, windows at the right and bottom border are smaller, and their means are over
fewer tokens.

Paper: 'Fast Vision Transformers with HiLo Attention' - https://arxiv.org/abs/2205.13213
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vision_attn._checks import check_int, check_number
from vision_attn.grid import Grid
from vision_attn.kernels.backend import for_inference
from vision_attn.kernels.dense import around, dense_attention, full_mask, outside, with_dense_rows
from vision_attn.kernels.image import Windows, means
from vision_attn.kernels.tapes import Tapes
from vision_attn.kernels.window import window_attention
from vision_attn.processors.base import AttnSpec, Layer, Processor, register


def low_heads(num_heads: int, alpha: float, window_size: int) -> int:
    """Return how many heads are low: all of them if the window is one token."""
    return num_heads if window_size == 1 else int(num_heads * alpha)


@register(tests={"hilo": dict(alpha=0.5)}, demo=[dict(alpha=0.5)], bench={"hilo": {}})
@dataclass(frozen=True)
class HiLo(AttnSpec):
    """High heads in windows, low heads over pooled keys. It has no parameters; a pretrained host needs training.

    Args:
        alpha: Share of low heads, 0 to 1. H * alpha is rounded down, as the authors do: 24 * 0.9 gives 21.
        window_size: Side of a window in tokens.
    """

    alpha: float = 0.9
    window_size: int = 2

    def __post_init__(self) -> None:
        check_number("alpha", self.alpha)
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha must be between 0 and 1, got {self.alpha}")
        check_int("window_size", self.window_size, 1)

    def build(self, layer: Layer) -> "HiLoAttention":
        """Return the processor of one layer."""
        return HiLoAttention(self, layer)

    def attended(self, grid: Grid) -> float:
        """Return the mean share of tokens, or of means of tokens, that one token attends to on one head."""
        rows, columns = (-(-side // self.window_size) for side in (grid.height, grid.width))
        outside = grid.tokens - grid.image_tokens
        low = rows * columns + outside
        high = grid.image_tokens / (rows * columns) + outside
        share = self.alpha if self.window_size > 1 else 1.0
        seen = grid.image_tokens * (share * low + (1 - share) * high) + outside * grid.tokens
        return seen / grid.tokens**2

    def flops(self, grid: Grid, layer: Layer) -> float:
        """Return the operations of dense attention over means, and what windows, means and joining take as long as."""
        kept = 100 + 13 * layer.head_dim  # keys of each token that an H200 attends to meanwhile
        return self.products(grid, layer) + 4 * grid.image_tokens * kept * layer.num_heads * layer.head_dim

    def products(self, grid: Grid, layer: Layer) -> float:
        """Return the operations of dense attention over means."""
        means = math.prod(-(-side // self.window_size) for side in (grid.height, grid.width))
        share, outside = self.alpha if self.window_size > 1 else 1.0, grid.tokens - grid.image_tokens
        pairs = share * grid.image_tokens * (means + outside) + outside * grid.tokens
        return 4 * pairs * layer.num_heads * layer.head_dim

    @property
    def calls(self) -> float:
        """Kernels of windows and of pooling, and dense attention and joining in PyTorch."""
        return 12.0


class HiLoAttention(Processor):
    """`window_attention` on the first heads, dense attention over pooled keys on the last."""

    repeats_itself = True

    def __init__(self, spec: HiLo, layer: Layer) -> None:
        super().__init__()
        self.spec, self.backend = spec, layer.backend
        self.high = layer.num_heads - low_heads(layer.num_heads, spec.alpha, spec.window_size)
        self.heads_alike = self.high in (0, layer.num_heads)
        self._tapes = Tapes()

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, mask: Tensor | None = None, scale: float | None = None
    ) -> Tensor:
        """Attend on both groups of heads: see `Processor.forward`."""
        h, heads = self.high, q.shape[2]
        found = self._tapes.call(self._high_and_means, (q, k, v, grid, mask, scale), self)
        if h == heads:
            return found[0]
        keys, values = found[-2:]
        low = self._low(q[:, :, h:], k[:, :, h:], v[:, :, h:], keys, values, grid, mask, scale)
        return torch.cat([found[0], low], 2) if h else low

    def _high_and_means(
        self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, mask: Tensor | None, scale: float | None
    ) -> tuple[Tensor, ...]:
        """Return the output of the high heads, and the pooled keys and values of the low ones, of those that exist."""
        h, size, found = self.high, self.spec.window_size, []
        if h:
            high = (q[:, :, :h], k[:, :, :h], v[:, :, :h], grid, size)
            found.append(window_attention(*high, mask=mask, scale=scale, backend=self.backend))
        if h < q.shape[2]:
            k, v = k[:, :, h:], v[:, :, h:]
            found += means(k, grid, Windows(size=size), and_of=v, backend=for_inference(self.backend, k, v))
        return tuple(found)

    def _low(
        self, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, grid: Grid, mask: Tensor | None,
        scale: float | None,
    ) -> Tensor:  # fmt: skip
        """Attend to pooled keys and values, and to the tokens outside the grid."""
        pooled = Grid(1, keys.shape[1], grid.prefix, grid.suffix)
        if grid.prefix + grid.suffix:
            keys, values = (around(outside(t, grid), own, grid) for t, own in ((k, keys), (v, values)))
        o = dense_attention(q[:, grid.image], keys, values, mask=full_mask(mask, pooled), scale=scale)
        return with_dense_rows(o, q, k, v, grid, mask=mask, scale=scale)
