"""Block-sparse attention: PyTorch against its definition in float64, FlexAttention's squares, and what is refused."""

import pytest
import torch
from operator_cases import shares
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention.flex_attention import flex_attention

from vision_attn.grid import Grid
from vision_attn.kernels import block_sparse
from vision_attn.kernels.block_sparse import Blocks, block_sparse_attention, inverse, places
from vision_attn.kernels.block_sparse.flex import SQUARE, flex_block_attention, squares

H, D = 3, 4
ROWS = {
    "divides": (Grid(4, 6), 6, 2, False),
    "cut-text-mask": (Grid(5, 7, prefix=3, suffix=2), 4, 2, True),
    "more-blocks-than-tokens": (Grid(2, 3, prefix=1), 9, 4, False),
    "all-blocks": (Grid(3, 5, prefix=2), 4, 4, True),
    "one-block": (Grid(3, 5), 1, 1, False),
}


def drawn(grid: Grid, count: int, kept: int) -> Blocks:
    """Return a random order, and random kept blocks with the own one among them."""
    draw = torch.Generator().manual_seed(0)
    order = torch.rand(H, grid.image_tokens, generator=draw).argsort(1)
    wish = torch.rand(H, count, count, generator=draw) - 2 * torch.eye(count)
    return Blocks(order, wish.argsort(2)[..., :kept])


def tensors(grid: Grid, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(3, 2, grid.tokens, H, D, generator=torch.Generator().manual_seed(1), dtype=dtype)


def hidden(grid: Grid) -> Tensor:
    mask = torch.rand(2, grid.prefix + grid.suffix, generator=torch.Generator().manual_seed(2)) < 0.5
    mask[:, 0] = True
    return mask


def seen_pairs(grid: Grid, blocks: Blocks) -> Tensor:
    """Return which pairs of tokens see each other `[H, N, N]`, by loops over blocks."""
    n, count = grid.image_tokens, blocks.kept.shape[1]
    seen = torch.ones(H, grid.tokens, grid.tokens, dtype=torch.bool)
    seen[:, grid.image, grid.image] = False
    for h in range(H):
        of = [[] for _ in range(count)]
        for place, token in enumerate(blocks.order[h].tolist()):
            of[place * count // n].append(grid.prefix + token)
        for row in range(count):
            for column in blocks.kept[h, row].tolist():
                for i in of[row]:
                    seen[h, i, of[column]] = True
    return seen


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "cut-text-mask" else pytest.mark.slow) for name in ROWS]
)
def test_output_and_gradients_are_those_of_the_definition(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch` gathers one row of blocks at a time here, with checkpoints; the last row is FlexAttention, uncompiled."""
    grid, count, kept, masked = ROWS[name]
    monkeypatch.setattr(block_sparse, "_MOST", 1)
    blocks, leaves, mask = drawn(grid, count, kept), tensors(grid).requires_grad_(), hidden(grid) if masked else None
    seen = seen_pairs(grid, blocks).expand(2, -1, -1, -1)
    if mask is not None:
        seen = seen.clone()
        outside = [*range(grid.prefix), *range(grid.image.stop, grid.tokens)]
        seen[..., outside] = mask[:, None, None]
    q, k, v = leaves
    logits = torch.einsum("bnhd,bmhd->bhnm", q, k) * D**-0.5
    expected = torch.einsum("bhnm,bmhd->bnhd", logits.masked_fill(~seen, -torch.inf).softmax(-1), v)
    do = torch.randn_like(expected)
    (wanted,) = torch.autograd.grad(expected, leaves, do)
    for backend in ("reference", "torch"):
        o = block_sparse_attention(*leaves, grid, blocks, mask=mask, backend=backend)
        torch.testing.assert_close(o, expected, rtol=0, atol=1e-12)
        (got,) = torch.autograd.grad(o, leaves, do)
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)
    with torch.no_grad():
        single = (t.float() for t in leaves)
        o = flex_block_attention(*single, grid, blocks.order, blocks.kept, mask, D**-0.5)
    torch.testing.assert_close(o.double(), expected.detach(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_error_is_within_the_budget(dtype: torch.dtype) -> None:
    grid = Grid(6, 9, prefix=4)
    blocks, (q, k, v) = drawn(grid, 7, 3), tensors(grid, dtype)
    exact = block_sparse_attention(*(t.double() for t in (q, k, v)), grid, blocks, backend="reference")
    plain, ours = (block_sparse_attention(q, k, v, grid, blocks, backend=b) for b in ("reference", "torch"))
    assert max(shares([ours], [plain], [exact], dtype)) <= 1


@pytest.mark.parametrize(("n", "rest", "count"), [(1000, 70, 16), (900, 0, 7), (512, 128, 4), (100, 300, 64)], ids=str)
def test_the_squares_of_flex_attention_are_those_with_a_pair(n: int, rest: int, count: int) -> None:
    """A square is kept if a pair of it is seen, and full only if all pairs are."""
    kept = drawn(Grid(1, 8), count, max(1, count // 4)).kept
    mask = squares(kept, n, rest, None)
    tokens = rest + n
    place = torch.arange(-rest, n).clamp(min=0) * count // n
    allowed = torch.zeros(H, count, count, dtype=torch.bool).scatter(2, kept, True)
    seen = allowed[:, place[:, None], place]
    seen[:, :rest] = seen[:, :, :rest] = True
    rows = -(-tokens // SQUARE)
    padded = torch.zeros(H, rows * SQUARE, rows * SQUARE, dtype=torch.bool)
    padded[:, :tokens, :tokens] = seen
    met = padded.unflatten(2, (rows, SQUARE)).unflatten(1, (rows, SQUARE)).sum((2, 4))
    assert torch.equal(mask.to_dense()[0].bool(), met > 0)
    full_number, full_order = mask.full_kv_num_blocks, mask.full_kv_indices
    assert full_number is not None and full_order is not None
    for h in range(H):
        for row in range(rows):
            full = full_order[0, h, row, : full_number[0, h, row]].tolist()
            assert all(met[h, row, column] == SQUARE**2 for column in full)
    if n == 512:  # its blocks are squares
        assert full_number.sum() > 0


@pytest.mark.slow  # on a GPU tests/gpu/check_blocks.py counts
def test_other_blocks_of_the_same_shapes_compile_nothing_anew() -> None:
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("eager")
    run = torch.compile(flex_attention, dynamic=False, backend=graphs)
    q, k, v = torch.randn(3, 1, H, 200, 16)
    for seed in range(3):
        kept = torch.rand(H, 6, 6, generator=torch.Generator().manual_seed(seed)).argsort(2)[..., :2]
        run(q, k, v, block_mask=squares(kept, 190, 10, None))
    assert graphs.frame_count == 1


def test_blocks_that_are_written_over_are_seen() -> None:
    """The squares of a tensor are kept for its next call, unless its values or its memory are others."""
    grid = Grid(8, 10)
    q, k, v = tensors(grid, torch.float32)
    first, second = drawn(grid, 5, 2), Blocks(drawn(grid, 5, 2).order, drawn(grid, 5, 2).kept.flip(1).clone())

    def run() -> Tensor:
        return flex_block_attention(q, k, v, grid, first.order, first.kept, None, 0.5)

    def wanted(blocks: Blocks) -> Tensor:
        return block_sparse_attention(q, k, v, grid, blocks, scale=0.5, backend="reference")

    with torch.no_grad():
        before = first.kept.clone()
        torch.testing.assert_close(run(), wanted(first))
        torch.testing.assert_close(run(), wanted(first))
        first.kept.copy_(second.kept)
        torch.testing.assert_close(run(), wanted(second))
        first.kept.data = before
        torch.testing.assert_close(run(), wanted(Blocks(first.order, before)))
    assert (wanted(second) - wanted(Blocks(first.order, before))).abs().max() > 0.01


def test_blocks_are_as_equal_as_they_can_be() -> None:
    for n, count in ((10, 3), (4, 6), (64, 64), (7, 1)):
        place, there = places(n, count, torch.device("cpu"))
        assert place[there].tolist() == list(range(n))
        assert (there.sum(1).max() - there.sum(1).min()) <= 1
        assert [b for b in range(count) for _ in range(int(there[b].sum()))] == [p * count // n for p in range(n)]
    order = torch.rand(2, 9).argsort(1)
    assert torch.equal(order.gather(1, inverse(order)), torch.arange(9).expand(2, -1))


def test_what_does_not_fit_is_refused() -> None:
    grid = Grid(4, 6)
    q, k, v = tensors(grid, torch.float32)
    good = drawn(grid, 6, 2)
    for blocks, message in (
        (Blocks(good.order[:, 1:], good.kept), r"order must be \[H, tokens\] = \[3, 24\]"),
        (Blocks(good.order, good.kept[:2]), r"kept must be \[H, blocks, K\] with H = 3"),
    ):
        with pytest.raises(ValueError, match=message):
            block_sparse_attention(q, k, v, grid, blocks)
    with pytest.raises(ValueError, match="cpu"):
        block_sparse_attention(q, k, v, grid, good, backend="triton")


def test_memory_grows_with_what_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor is as large as the tokens times the tokens: the largest one holds the kept keys of a few rows."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = [0]

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(t, Tensor):
                    largest[0] = max(largest[0], t.untyped_storage().nbytes())
            return out

    monkeypatch.setattr(block_sparse, "_MOST", 1 << 16)
    grid = Grid(64, 64)
    q, k, v = torch.randn(3, 1, grid.tokens, H, D)
    with Watch():
        block_sparse_attention(q, k, v, grid, drawn(grid, 64, 4))
    assert largest[0] < 4 * H * grid.tokens**2 / 50
