"""CLEAR: each grid token attends to a disc around it, all text, and optionally pooled keys of the whole grid.

    o_i = softmax_j(scale * q_i . k_j) v_j,    j in {dy^2 + dx^2 < radius^2} + tokens outside the grid + pooled keys

The border cuts the disc. Tokens outside the grid (text, reference images) are seen by everything and see everything
but the pooled keys. With `pool` f > 1 the keys and values of each f x f cell, taken after the host's normalisation and
rotation, are summed with a learned weight that starts at 1 / f^2, and every grid token sees all cells. There a cell
counts as one token, also one that lies in the disc. With `counted`, which is not the paper's, it counts as its tokens
outside the disc: the logarithm of their number is added to its logit, and no token is counted twice.

Paper: 'CLEAR: Conv-Like Linearization Revs Pre-Trained Diffusion Transformers Up' - https://arxiv.org/abs/2412.16112
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vision_attn._checks import check_bool, check_int
from vision_attn.grid import Grid
from vision_attn.kernels.eight_bits import EIGHT_BIT_CALLS, EIGHT_BIT_PASSES
from vision_attn.kernels.local import Window, biased_attention, local_attention
from vision_attn.processors.base import AttnSpec, Layer, Processor, register


@register(
    tests={
        "clear": dict(radius=2),
        "clear-pool": dict(radius=2, pool=2),
        "clear-counted": dict(radius=2, pool=2, counted=True),
    },
    demo=[dict(radius=8)],
    bench={"clear r16": dict(radius=16), "clear r8": dict(radius=8)},
    draws_untrained=True,
)
@dataclass(frozen=True)
class Clear(AttnSpec):
    """A disc of `radius` tokens, and with `pool` > 1 one key for each `pool` x `pool` cell of the grid.

    At radius 16 a pretrained DiT keeps most of its quality without training; a short distillation (the authors: 10K
    steps) makes it good. `pool` adds one learned `pool` x `pool` weight per layer.

    Args:
        radius: Radius of the disc in tokens, above 0; the inequality is strict.
        pool: Side of a pooled cell in tokens; 1 for none. Height and width of the grid must divide by it.
        native_tokens: If given, logits are scaled by `sqrt(log(L) / log(native_tokens))` with L the number of tokens
            (10 L with pooling, as the authors have it): the proportional scale for sizes above the training size, 4608
            for FLUX.1 at 1024 px (512 text tokens and 64 x 64).
        counted: Whether a pooled key counts as the tokens of its cell outside the disc, and not as one token; for
            `pool` > 1. It runs without the Triton kernel.
        precision: 'int8' or 'fp8' for products in 8 bits (SageAttention 2, https://arxiv.org/abs/2411.10958), in
            inference alone and without `pool`; None for those of the model's dtype, which train.
    """

    radius: float = 16
    pool: int = 1
    native_tokens: int | None = None
    counted: bool = False
    precision: str | None = None

    def __post_init__(self) -> None:
        Window(radius=self.radius, precision=self.precision)
        for name, least in (("pool", 1), ("native_tokens", 2)):
            value = getattr(self, name)
            if value is None and name == "native_tokens":
                continue
            check_int(name, value, least)
        check_bool("counted", self.counted)
        if self.counted and self.pool == 1:
            raise ValueError("counted=True counts the tokens of pooled keys: give pool, the side of their cells")
        if self.precision is not None and self.pool > 1:
            raise ValueError(f"precision={self.precision!r} is for CLEAR without pooled keys: give pool=1")

    def build(self, layer: Layer) -> "ClearAttention":
        """Return the processor of one layer."""
        return ClearAttention(self, layer)

    def attended(self, grid: Grid) -> float:
        """Return the mean share of tokens that one token attends to, including pooled keys."""
        self.check(grid)
        cells = grid.image_tokens // self.pool**2 if self.pool > 1 else 0
        return Window(radius=self.radius).share(grid) + grid.image_tokens * cells / grid.tokens**2

    @property
    def passes(self) -> float:
        """In 8 bits tokens are read for their scales, read and written, and read in half of the bytes."""
        return EIGHT_BIT_PASSES if self.precision else 1.0

    @property
    def calls(self) -> float:
        """One kernel, and pooling or what quantises if there is any."""
        return EIGHT_BIT_CALLS if self.precision else 3.0 if self.pool == 1 else 15.0

    def check(self, grid: Grid) -> None:
        """Refuse a grid that `pool` does not divide.

        Raises:
            ValueError: If height or width is not a multiple of `pool`.
        """
        if grid.height % self.pool or grid.width % self.pool:
            raise ValueError(f"pool {self.pool} must divide the height and width of {grid}")

    def native(self, grid: Grid) -> int | None:
        """Return the tokens of a sequence at the training size, None to leave the logits as they are."""
        return self.native_tokens

    def scale(self, head_dim: int, grid: Grid, scale: float | None) -> float:
        """Return the factor of the logits."""
        scale = head_dim**-0.5 if scale is None else scale
        native = self.native(grid)
        if native is None:
            return scale
        tokens = grid.tokens * (10 if self.pool > 1 else 1)
        return scale * math.sqrt(math.log(tokens) / math.log(native))


class ClearAttention(Processor):
    """`local_attention` over a disc and pooled keys.

    Attributes:
        spatial_weight: Weight of a cell's tokens `[1, 1, 1, pool, 1, pool, 1]`, the shape of the released weights.
    """

    heads_alike = True

    def __init__(self, spec: Clear, layer: Layer) -> None:
        super().__init__()
        self.spec, self.backend = spec, layer.backend
        self.window = Window(radius=spec.radius, precision=spec.precision)
        if spec.pool > 1:
            f = spec.pool
            self.spatial_weight = nn.Parameter(torch.full((1, 1, 1, f, 1, f, 1), 1 / f**2))

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, mask: Tensor | None = None, scale: float | None = None
    ) -> Tensor:
        """Attend locally: see `Processor.forward`.

        Raises:
            ValueError: If `pool` does not divide the grid.
        """
        self.spec.check(grid)
        window = self.window
        if self.spec.pool > 1:
            pooled = self._pool(k, grid), self._pool(v, grid)
            window = Window(radius=self.spec.radius, pooled=pooled, cell=self.spec.pool if self.spec.counted else 0)
        scale = self.spec.scale(q.shape[-1], grid, scale)
        return local_attention(q, k, v, grid, window, mask=mask, scale=scale, backend=self.backend)

    def biased(self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, bias: Tensor, scale: float | None = None) -> Tensor:
        """Attend locally, with a bias for each pair of tokens: see `Processor.biased`."""
        if self.spec.pool > 1:
            return super().biased(q, k, v, grid, bias, scale)
        return biased_attention(q, k, v, grid, self.window, bias, scale=self.spec.scale(q.shape[-1], grid, scale))

    def _pool(self, t: Tensor, grid: Grid) -> Tensor:
        """Sum each cell with its weights: `[B, N, H, D]` to `[B, cells, H, D]`."""
        f = self.spec.pool
        cells = t[:, grid.image].unflatten(1, (grid.height // f, f, grid.width // f, f))
        weight = self.spatial_weight.reshape(f, f).to(t)  # offloading may have parked it elsewhere
        return torch.einsum("byixjhd,ij->byxhd", cells, weight).flatten(1, 2)
