"""FlexAttention with CLEAR's mask: over the raster sequence as CLEAR's authors run it, and over 2-D tiles of tokens.

The block mask is built once and is not timed. Tiles need q, k, v and o permuted: that is part of the operator, compiled
with it and timed.

`FlexClear` puts it into whole models. https://github.com/Huage001/CLEAR compiles `flex_attention` alone and leaves the
rest of the model eager; `FlexClear` runs it the same way, in the place of the host's attention, as a processor does. It
shares no code with theirs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from vision_attn.bench.candidate import AbsentError, Candidate, Prepared
from vision_attn.bench.local.problem import LOCAL, LocalProblem
from vision_attn.grid import Grid
from vision_attn.kernels.local import Window
from vision_attn.processors.base import AttnSpec, Layer, Processor

BLOCK = 128
TILE = (8, 16)
MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def disc_mask(problem: LocalProblem, tile: tuple[int, int]) -> MaskMod:
    """Return the mask of CLEAR, https://arxiv.org/abs/2412.16112, for grid tokens in tiles of `tile`.

    Tiles of one row and the grid's width are raster order.

    Raises:
        AbsentError: If the window is not a disc, or the grid is not made of whole tiles.
    """
    grid, radius = problem.grid, problem.window.radius
    if radius is None:
        raise AbsentError("FlexAttention is given the mask of a disc here, and no other")
    if grid.suffix or grid.height % tile[0] or grid.width % tile[1]:
        raise AbsentError(f"{grid} is not made of whole tiles of {tile[0]} x {tile[1]} after a prefix")
    prefix, across, (tall, wide) = grid.prefix, grid.width // tile[1], tile

    def place(index: Tensor) -> tuple[Tensor, Tensor]:
        n = index - prefix
        if tall == 1:
            return n // wide, n % wide
        block, inside = n // (tall * wide), n % (tall * wide)
        return block // across * tall + inside // wide, block % across * wide + inside % wide

    def mask(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        (qy, qx), (ky, kx) = place(q), place(k)
        near = (qy - ky) ** 2 + (qx - kx) ** 2 < radius**2
        return (q < prefix) | (k < prefix) | near

    return mask


def block_mask(mask: MaskMod, tokens: int, device: torch.device) -> BlockMask:
    """Return what `create_block_mask` returns, without compiling and without a mask of `tokens` x `tokens`."""
    every = torch.arange(tokens, device=device, dtype=torch.int32)
    blocks = -(-tokens // BLOCK)
    zero = every[:1]
    kept, full = (torch.zeros(blocks, blocks, dtype=torch.bool, device=device) for _ in range(2))
    for block in range(blocks):
        queries = every[block * BLOCK : (block + 1) * BLOCK, None]
        seen = torch.zeros(BLOCK, blocks * BLOCK, dtype=torch.bool, device=device)
        seen[: len(queries), :tokens] = mask(zero, zero, queries, every[None])
        count = seen.view(BLOCK, blocks, BLOCK).sum((0, 2))
        kept[block], full[block] = count > 0, count == BLOCK * BLOCK
    partial = _ordered(kept & ~full)
    return BlockMask.from_kv_blocks(
        *partial, *_ordered(full), BLOCK_SIZE=BLOCK, mask_mod=mask, seq_lengths=(tokens, tokens)
    )


def _ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Return the number of kept blocks in each row, `[1, 1, Q]`, and all places, the kept first, `[1, 1, Q, K]`."""
    places = blocks.int().sort(dim=1, descending=True, stable=True).indices.int()
    return blocks.sum(1).int()[None, None], places[None, None]


def kept_pairs(mask: BlockMask) -> int:
    """Count the pairs of one head that the kept blocks hold."""
    full = mask.full_kv_num_blocks
    return (int(mask.kv_num_blocks.sum()) + (0 if full is None else int(full.sum()))) * BLOCK**2


def to_tiles(t: Tensor, grid: Grid, tile: tuple[int, int], inverse: bool = False) -> Tensor:
    """Reorder the grid tokens of `[B, N, H, D]` from raster order to tiles of `tile`, or back."""
    shape = grid.height // tile[0], grid.width // tile[1], *tile
    if not inverse:
        shape = shape[0], shape[2], shape[1], shape[3]
    image = t[:, grid.prefix :].unflatten(1, shape).transpose(2, 3).flatten(1, 4)
    return torch.cat([t[:, : grid.prefix], image], 1)


def flex_operator(
    problem: LocalProblem, device: torch.device, tile: tuple[int, int], options: Any = None
) -> tuple[Prepared, BlockMask]:
    """Return the operator, not compiled, and its block mask; a tile of one whole row is raster order.

    `options` are FlexAttention's `kernel_options`.
    """
    grid = problem.grid
    blocks = block_mask(disc_mask(problem, tile), grid.tokens, device)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if tile[0] > 1:
            q, k, v = (to_tiles(t, grid, tile) for t in (q, k, v))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        o = flex_attention(q, k, v, block_mask=blocks, kernel_options=options)
        assert isinstance(o, Tensor)
        o = o.transpose(1, 2)
        return to_tiles(o, grid, tile, inverse=True) if tile[0] > 1 else o

    return Prepared(run, 4 * problem.head_dim * problem.heads * kept_pairs(blocks)), blocks


def compiled(problem: LocalProblem, device: torch.device, tile: tuple[int, int], options: Any = None) -> Prepared:
    """Return what `flex_operator` does, compiled.

    Raises:
        AbsentError: If the device is no GPU.
    """
    if device.type != "cuda":
        raise AbsentError("FlexAttention is compared compiled, on CUDA")
    prepared, _ = flex_operator(problem, device, tile, options)
    operator = torch.compile(prepared.run, dynamic=False, fullgraph=True)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch._dynamo.config.patch(recompile_limit=256):  # every case is compiled anew
            return operator(q, k, v)

    return Prepared(run, prepared.visited_flop)


def _raster(problem: LocalProblem, device: torch.device) -> Prepared:
    return compiled(problem, device, (1, problem.grid.width))


def _tiles(problem: LocalProblem, device: torch.device) -> Prepared:
    return compiled(problem, device, TILE)


FLEX = (Candidate("Flex raster", LOCAL, _raster), Candidate("Flex tiles", LOCAL, _tiles))


@dataclass(frozen=True, eq=False)
class FlexClear(AttnSpec):
    """A disc by FlexAttention, for one grid.

    Args:
        radius: Radius of the disc in tokens.
        blocks: The mask of the grid.
        run: `flex_attention`, compiled or not.
    """

    radius: float
    blocks: BlockMask
    run: Callable[..., Any]

    @classmethod
    def on(cls, grid: Grid, radius: float, device: torch.device) -> "FlexClear":
        """Build the mask; FlexAttention is compiled on CUDA. On a CPU it is eager: slow, and its mask is dense."""
        problem = LocalProblem("mask", grid, Window(radius=radius))
        blocks = block_mask(disc_mask(problem, (1, grid.width)), grid.tokens, device)
        run = torch.compile(flex_attention, dynamic=False) if device.type == "cuda" else flex_attention
        return cls(radius, blocks, run)

    def build(self, layer: Layer) -> "FlexClearAttention":
        """Return the processor of one layer."""
        return FlexClearAttention(self)

    def attended(self, grid: Grid) -> float:
        """Return the mean share of tokens that one token attends to."""
        return Window(radius=self.radius).share(grid)


class FlexClearAttention(Processor):
    """One call of FlexAttention."""

    def __init__(self, spec: FlexClear) -> None:
        super().__init__()
        self.spec = spec

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, mask: Tensor | None = None, scale: float | None = None
    ) -> Tensor:
        """Attend inside the disc: see `Processor.forward`.

        Raises:
            ValueError: If there is padding: the block mask was built without it.
        """
        if mask is not None:
            raise ValueError("FlexAttention's mask was built without padding")
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return self.spec.run(q, k, v, block_mask=self.spec.blocks, scale=scale).transpose(1, 2)
