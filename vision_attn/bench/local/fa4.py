"""FlashAttention-4 with CLEAR's mask: block-sparse over 2-D tiles of tokens, by itself and as FlexAttention's backend.

It needs `pip install flash-attn-4` (with nvidia-cutlass-dsl and its libraries for CUDA 13, quack-kernels,
apache-tvm-ffi and torch-c-dlpack-ext), and a Hopper or Blackwell GPU. Where packages are copied rather than installed,
`nvidia_cutlass_dsl/dsl_packages` belongs on PYTHONPATH.

By itself it is the strongest published way to run CLEAR: it gets tokens that are in the order of the tiles already, and
lists of the tiles that a mask cuts and of those it does not.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from vision_attn.bench.candidate import AbsentError, Arranged, Candidate, Prepared
from vision_attn.bench.local.candidates import imported
from vision_attn.bench.local.flex import BLOCK, TILE, block_mask, compiled, disc_mask, kept_pairs, to_tiles
from vision_attn.bench.local.problem import LOCAL, LocalProblem


def _refuse(problem: LocalProblem, device: torch.device) -> None:
    if device.type != "cuda":
        raise AbsentError("FlashAttention-4 runs on CUDA only")
    if problem.dtype == "float32":
        raise AbsentError("FlashAttention-4 takes 16 bits only")
    if problem.grid.prefix % BLOCK:
        raise AbsentError(f"{problem.grid.prefix} tokens before the grid are no whole blocks of {BLOCK}")


def lists(blocks: BlockMask, heads: int) -> tuple[list[Tensor], list[Tensor]]:
    """Return the kept blocks of a mask as FlashAttention-4 takes them, for queries and, for its backward, for keys.

    Both are numbers and places of cut blocks, numbers and places of whole ones: `[1, heads, blocks]` and
    `[1, heads, blocks, blocks]`.
    """
    of_queries = blocks.kv_num_blocks, blocks.kv_indices, blocks.full_kv_num_blocks, blocks.full_kv_indices
    of_keys = blocks.q_num_blocks, blocks.q_indices, blocks.full_q_num_blocks, blocks.full_q_indices
    found = []
    for side in (of_queries, of_keys):
        whole = [t for t in side if t is not None]
        assert len(whole) == len(side)
        found.append([t.expand(1, heads, *t.shape[2:]).contiguous() for t in whole])
    return found[0], found[1]


def _disc(problem: LocalProblem) -> Any:
    """Return the disc as a mask of CuTe, for tokens in the order of the tiles; text blocks are whole and never ask."""
    cute = imported("cutlass", "cute")
    (tall, wide), prefix, across = TILE, problem.grid.prefix, problem.grid.width // TILE[1]
    assert problem.window.radius is not None
    limit = math.ceil(problem.window.radius**2)

    @cute.jit
    def disc(b, h, query, key, info, aux):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
        q, k = query - prefix, key - prefix
        dy = q // BLOCK // across * tall + q % BLOCK // wide - k // BLOCK // across * tall - k % BLOCK // wide
        dx = q // BLOCK % across * wide + q % wide - k // BLOCK % across * wide - k % wide
        return dy * dy + dx * dx < limit

    return disc


def _fa4(problem: LocalProblem, device: torch.device) -> Prepared:
    _refuse(problem, device)
    attend = imported("flash_attn.cute.interface", "flash_attn_func")
    tensors_of = imported("flash_attn.cute.block_sparsity", "BlockSparseTensorsTorch")
    grid = problem.grid
    blocks = block_mask(disc_mask(problem, TILE), grid.tokens, device)
    queries, keys = (tensors_of(*side, block_size=(BLOCK, BLOCK)) for side in lists(blocks, problem.heads))
    mask = _disc(problem)

    def core(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        o = attend(q, k, v, mask_mod=mask, block_sparse_tensors=queries, block_sparse_tensors_bwd=keys)
        return o[0] if isinstance(o, tuple) else o

    def arrange(t: Tensor) -> Tensor:
        return to_tiles(t, grid, TILE).contiguous()

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return to_tiles(core(arrange(q), arrange(k), arrange(v)), grid, TILE, inverse=True)

    flop = 4 * problem.head_dim * problem.heads * kept_pairs(blocks)
    return Prepared(run, flop, Arranged(arrange, core))


def _flex(problem: LocalProblem, device: torch.device) -> Prepared:
    _refuse(problem, device)
    imported("flash_attn.cute.interface", "flash_attn_func")
    return compiled(problem, device, TILE, {"BACKEND": "FLASH"})


FA4 = (Candidate("Flex FLASH", LOCAL, _flex), Candidate("FA4 tiles", LOCAL, _fa4))
