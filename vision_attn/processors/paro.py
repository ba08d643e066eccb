"""PARO: each head puts the tokens into an order in which its attention is made of blocks, and keeps the best blocks.

    o_i = softmax_j(scale * q_i . k_j) v_j,    j in the kept blocks of the block of i + tokens outside the grid

The order of a head is one of six, and both it and the kept blocks are chosen offline from a few forwards of the dense
model (`calibrating`) and stored. For an order, a block of queries keeps the blocks of keys that hold most of its
attention, and its own; the head takes the order whose kept blocks hold most. Until then all heads have Hilbert's order
and keep the blocks nearest in it. Tokens outside the grid attend densely.

The paper permutes the axes of frames, rows and columns, which are six orders for a video; for an image only rows and
columns are left. The six here cut the grid into blocks of equal size and of another shape: strips of rows, wide
rectangles, squares, tall rectangles, strips of columns, and pieces of Hilbert's curve. Where the paper keeps the blocks
above a threshold, here each block of queries keeps equally many: shapes are known beforehand, and no row of blocks is
longer than another. A grid is cut into the same number of blocks at any size, so a choice can be used at all of them.
Its 8-bit products are not here.

Paper: 'PAROAttention: Pattern-Aware ReOrdering for Efficient Sparse and Quantized Attention in Visual Generation
Models' - https://arxiv.org/abs/2506.16054
"""

import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vision_attn._checks import check_int, check_number
from vision_attn.grid import Grid
from vision_attn.kernels.backend import full_precision, passing
from vision_attn.kernels.block_sparse import Blocks, block_sparse_attention
from vision_attn.kernels.dense import dense_attention, full_mask
from vision_attn.kernels.tables import lasting
from vision_attn.processors.base import AttnSpec, Layer, Processor, register

ORDERS = ("rows", "wide", "squares", "tall", "columns", "hilbert")
_MOST = 1 << 24  # logits at a time in the calibration: 64 MiB in float32


@register(
    tests={"paro": dict(density=0.25, blocks=8), "paro-few": dict(density=0.5, blocks=3)},
    bench={"paro": {}},
    draws_untrained=True,
)
@dataclass(frozen=True)
class Paro(AttnSpec):
    """A quarter of the blocks of the attention matrix, chosen offline. Needs no training, but a calibration.

    Args:
        density: Share of the blocks of keys that a block of queries keeps; at least its own is kept.
        blocks: Into how many blocks the grid is cut. FlexAttention skips squares of 128 tokens, so on a GPU blocks
            should have at least 128.
    """

    density: float = 0.25
    blocks: int = 64

    def __post_init__(self) -> None:
        check_int("blocks", self.blocks, 1)
        check_number("density", self.density)
        if not 0 < self.density <= 1:
            raise ValueError(f"density must be above 0 and at most 1, got {self.density}")

    @property
    def kept(self) -> int:
        """How many blocks of keys a block of queries keeps."""
        return max(1, round(self.density * self.blocks))

    def build(self, layer: Layer) -> "ParoAttention":
        """Return the processor of one layer."""
        return ParoAttention(self, layer)

    def attended(self, grid: Grid) -> float:
        """Return the mean share of tokens that one token attends to."""
        rest = grid.prefix + grid.suffix
        seen = max(1.0, grid.image_tokens * self.kept / self.blocks)
        return (grid.image_tokens * (seen + rest) + rest * grid.tokens) / grid.tokens**2

    @property
    def passes(self) -> float:
        """Those of an H200, which puts tokens into order, and back, one by one."""
        return 40.0

    @property
    def calls(self) -> float:
        """Tokens into order and back, and FlexAttention, whose guards take as long as some operations."""
        return 30.0


class ParoAttention(Processor):
    """`block_sparse_attention` with an order and kept blocks of each head.

    Attributes:
        order: The number of each head's order in `ORDERS`, `[H]`.
        kept: The kept blocks of keys of each block of queries, `[H, blocks, K]`.
        mass: Share of the calibrated attention that the kept blocks hold, `[H]`; NaN before a calibration.
    """

    order: Tensor
    kept: Tensor
    mass: Tensor

    def __init__(self, spec: Paro, layer: Layer) -> None:
        super().__init__()
        self.spec, self.backend = spec, layer.backend
        near = nearest(spec.blocks, spec.kept)
        self.register_buffer("order", torch.full((layer.num_heads,), ORDERS.index("hilbert")))
        self.register_buffer("kept", near.expand(layer.num_heads, -1, -1).clone())
        self.register_buffer("mass", torch.full((layer.num_heads,), math.nan))
        self.sums: Tensor | None = None

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, mask: Tensor | None = None, scale: float | None = None
    ) -> Tensor:
        """Attend in blocks: see `Processor.forward`. During a calibration it attends densely, and looks on."""
        if self.sums is not None:
            self.sums = self.sums.to(q.device) + block_sums(q, k, grid, self.spec.blocks, mask, scale)
            return dense_attention(q, k, v, mask=full_mask(mask, grid), scale=scale)
        tokens = orders_of(grid, self.spec.blocks, q.device)[self.order.to(q.device)]
        blocks = Blocks(tokens, self.kept.to(q.device))
        return block_sparse_attention(q, k, v, grid, blocks, mask=mask, scale=scale, backend=self.backend)

    def begin(self) -> None:
        """Attend densely from now on, and add up what blocks of each order hold `[6, H, blocks, blocks]`."""
        count = self.spec.blocks
        self.sums = torch.zeros(len(ORDERS), len(self.order), count, count, device=self.order.device)

    def choose(self) -> bool:
        """Choose order and kept blocks of each head; return whether there was anything to choose from."""
        sums, self.sums = self.sums, None
        if sums is None or not sums.any():
            return False
        own = torch.eye(self.spec.blocks, dtype=torch.bool, device=sums.device)
        kept = sums.masked_fill(own, torch.inf).topk(self.spec.kept, -1).indices
        held = sums.gather(-1, kept).sum((2, 3)) / sums.sum((2, 3))  # [6, H]
        best = held.argmax(0)
        heads = torch.arange(len(best), device=best.device)
        with torch.no_grad():
            self.order.copy_(best)
            self.kept.copy_(kept[best, heads].sort(-1).values)
            self.mass.copy_(held[best, heads])
        return True


@contextmanager
def calibrating(target: Any) -> Iterator[None]:
    """Let the PARO layers of a converted model look on inside the `with` block, and choose at its end.

        with calibrating(pipe):
            pipe("a lighthouse in a storm")

    Inside, the layers attend densely. A few pictures are enough: the choice is one for all steps of the denoising.

    Args:
        target: A converted model, or a pipeline of converted models.

    Raises:
        ValueError: If no layer has PARO attention, one is in such a block already, or none ran inside.
    """
    parts = getattr(target, "components", {"": target}).values()
    models = [part for part in parts if isinstance(part, nn.Module)]
    layers = [module for model in models for module in model.modules() if isinstance(module, ParoAttention)]
    if not layers:
        raise ValueError(f"no layer of this {type(target).__name__} has PARO attention: convert it to Paro() first")
    if any(layer.sums is not None for layer in layers):
        raise ValueError(f"this {type(target).__name__} is inside of a calibrating() block already")
    for layer in layers:
        layer.begin()
    finished = False
    try:
        yield
        finished = True
    finally:
        chose = [layer.choose() for layer in layers] if finished else []
        for layer in layers:
            layer.sums = None
    if not any(chose):
        raise ValueError("no layer with PARO attention ran inside the block: run the model there, and not bypassed")


@torch.no_grad()
@full_precision
def block_sums(q: Tensor, k: Tensor, grid: Grid, count: int, mask: Tensor | None, scale: float | None) -> Tensor:
    """Add up the attention weights of each pair of blocks in each order, some queries at a time.

    Args:
        q: Queries `[B, N, H, D]`.
        k: Keys, like `q`.
        grid: The sequence.
        count: Number of blocks.
        mask: Bool `[B or 1, prefix + suffix]`, or None.
        scale: Factor of the logits, `D ** -0.5` if None.

    Returns:
        `[6, H, count, count]` in float32, the blocks of queries first.
    """
    B, N, H, D = q.shape
    n, image = grid.image_tokens, grid.image
    tokens = orders_of(grid, count, q.device)
    block = torch.empty_like(tokens).scatter(1, tokens, torch.arange(n, device=q.device).expand_as(tokens)) * count // n
    which = torch.nn.functional.one_hot(block, count).float()  # [6, n, count]
    whole = full_mask(mask, grid)
    keys = k.float().transpose(1, 2).mT * (D**-0.5 if scale is None else scale)  # [B, H, D, N]
    sums = q.new_zeros(len(ORDERS), H, count, count, dtype=torch.float32)
    step = max(1, _MOST // (B * H * N))
    for first in range(0, n, step):
        part = slice(first, min(first + step, n))
        logits = q[:, image][:, part].float().transpose(1, 2) @ keys
        weights = logits if whole is None else logits.masked_fill(~whole, -torch.inf)
        weights = weights.softmax(-1)[..., image].sum(0) if B == 1 else weights.softmax(-1)[..., image].flatten(0, 1)
        for number, one in enumerate(which):
            met = (weights @ one).unflatten(0, (-1, H)).sum(0)  # [H, queries, count]
            sums[number] += one[part].T @ met
    return sums


def orders_of(grid: Grid, count: int, device: torch.device) -> Tensor:
    """Return the grid's token at each place of each order, `[6, n]`.

    Args:
        grid: Its height and width are used.
        count: Number of blocks, which decides about the sides of rectangles.
        device: Device of the result.
    """
    about = grid.height, grid.width, count, device
    return _orders(*about) if passing() else lasting(_kept_orders(*about))


def _orders(height: int, width: int, count: int, device: torch.device) -> Tensor:
    y, x = torch.meshgrid(torch.arange(height, device="cpu"), torch.arange(width, device="cpu"), indexing="ij")
    side = math.sqrt(height * width / count)  # of a square block
    square, flat = max(1, round(side)), max(1, round(side * 0.5**0.5))
    keys = [
        y * width + x,
        (y // flat * width + x) * flat + y % flat,
        (y // square * width + x) * square + y % square,
        (x // flat * height + y) * flat + x % flat,
        x * height + y,
        hilbert(y, x, max(height, width)),
    ]
    return torch.stack([key.flatten().argsort() for key in keys]).to(device)


_kept_orders = functools.lru_cache(maxsize=256)(_orders)


def hilbert(y: Tensor, x: Tensor, side: int) -> Tensor:
    """Return the place of each token on Hilbert's curve through a square of a power of two, at least `side`."""
    place, s = torch.zeros_like(y), 1 << max(side - 1, 0).bit_length()
    while s > 1:
        s //= 2
        down, right = (y & s) > 0, (x & s) > 0
        place = place + s * s * torch.where(right, torch.where(down, 2, 3), torch.where(down, 1, 0))
        flip = ~down & right
        y, x = (
            torch.where(flip, s - 1 - (y & (s - 1)), y & (s - 1)),
            torch.where(flip, s - 1 - (x & (s - 1)), x & (s - 1)),
        )
        y, x = torch.where(down, y, x), torch.where(down, x, y)
    return place


def nearest(count: int, kept: int) -> Tensor:
    """Return the `kept` blocks of Hilbert's order nearest to each block, in a square grid `[count, kept]`."""
    side = max(1, math.ceil(math.sqrt(count)))
    y, x = torch.meshgrid(torch.arange(4 * side, device="cpu"), torch.arange(4 * side, device="cpu"), indexing="ij")
    place = hilbert(y, x, 4 * side).flatten().argsort().argsort() * count // y.numel()
    which = torch.nn.functional.one_hot(place, count).double()
    centre = which.T @ torch.stack([y.flatten(), x.flatten()], 1).double() / which.sum(0)[:, None]
    return torch.cdist(centre, centre).topk(kept, largest=False).indices.sort(-1).values
