"""Super token attention against its definition: a loop over tokens and super tokens in float64, and its gradients."""

from typing import Any

import pytest
import torch
from operator_cases import shares
from torch import Tensor

from vision_attn import Grid, SuperToken
from vision_attn.processors import Layer
from vision_attn.processors.super_token import associate, join, spread, surrounding

H, D = 2, 4
ROWS = {
    "cells-divide": (SuperToken(2), Grid(4, 6)),
    "cut-text": (SuperToken(3), Grid(5, 7, prefix=3, suffix=1)),
    "twice": (SuperToken(2, 2), Grid(5, 4, prefix=1)),
    "one-cell": (SuperToken(8), Grid(3, 5, prefix=2)),
    "size-one": (SuperToken(1), Grid(3, 4, prefix=2)),
}


def tensors(grid: Grid, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(3, 2, grid.tokens, H, D, generator=torch.Generator().manual_seed(0), dtype=dtype)


def defined(spec: SuperToken, q: Tensor, k: Tensor, v: Tensor, grid: Grid, mask: Tensor | None = None) -> Tensor:
    """Attend by the definition, from the whole map of tokens to super tokens `[tokens, cells]`."""
    own = grid.prefix + torch.arange(grid.image_tokens, device=q.device)
    cell = [(y // spec.size, x // spec.size) for y in range(grid.height) for x in range(grid.width)]
    cells = sorted(set(cell))
    near = torch.tensor([[max(abs(a[0] - b[0]), abs(a[1] - b[1])) <= 1 for b in cells] for a in cell])
    at_first = torch.tensor([[a == b for b in cells] for a in cell]).double()
    text = [i for i in range(grid.tokens) if not grid.image.start <= i < grid.image.stop]
    samples = []
    for b in range(q.shape[0]):
        f = k[b, own].detach().flatten(1)
        f = f / f.norm(dim=1, keepdim=True) * f.shape[1] ** 0.5
        w = at_first
        for _ in range(spec.iterations):
            s = w.T @ f / w.sum(0)[:, None]
            w = (f @ s.T / f.shape[1] ** 0.5).masked_fill(~near, -torch.inf).softmax(1)
        if spec.size == 1:
            w = at_first
        share = w / w.sum(0)
        joined = [torch.einsum("nm,nhd->mhd", share, t[b, own]) for t in (q, k, v)]
        keys, values = (torch.cat([s, t[b, text]]) for s, t in zip(joined[1:], (k, v), strict=True))
        seen = torch.ones(q.shape[1], dtype=torch.bool)
        if mask is not None:
            seen[text] = mask[b]
        hidden = torch.cat([torch.ones(len(cells), dtype=torch.bool), seen[text]])
        logits = torch.einsum("mhd,nhd->hmn", joined[0], keys) * D**-0.5
        o = torch.einsum("hmn,nhd->mhd", logits.masked_fill(~hidden, -torch.inf).softmax(-1), values)
        dense = torch.einsum("mhd,nhd->hmn", q[b], k[b]) * D**-0.5
        whole = torch.einsum("hmn,nhd->mhd", dense.masked_fill(~seen, -torch.inf).softmax(-1), v[b])
        samples.append(whole.index_put((own,), torch.einsum("nm,mhd->nhd", w, o)))
    return torch.stack(samples)


def built(spec: SuperToken) -> Any:
    return spec.build(Layer("", H, D))


@pytest.mark.parametrize("name", ROWS)
def test_output_and_gradients_are_those_of_the_definition(name: str) -> None:
    spec, grid = ROWS[name]
    leaves = tensors(grid).requires_grad_()
    outside = grid.prefix + grid.suffix
    mask = torch.rand(2, outside, generator=torch.Generator().manual_seed(1)) < 0.5 if outside else None
    o, expected = built(spec)(*leaves, grid, mask), defined(spec, *leaves, grid, mask)
    torch.testing.assert_close(o, expected, rtol=0, atol=1e-12)
    do = torch.randn_like(o)
    (ours,), (theirs,) = (torch.autograd.grad(t, leaves, do) for t in (o, expected))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_another_size_is_caught() -> None:
    leaves, grid = tensors(Grid(4, 6)), Grid(4, 6)
    assert (built(SuperToken(2))(*leaves, grid) - defined(SuperToken(3), *leaves, grid)).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_error_is_within_the_budget(dtype: torch.dtype) -> None:
    """Plain PyTorch is the definition on inputs of that precision, whose sums are float64: this is the strictest."""
    spec, grid = SuperToken(2), Grid(6, 9, prefix=4)
    q, k, v = tensors(grid, dtype)
    o = built(spec)(q, k, v, grid)
    exact = defined(spec, *(t.double() for t in (q, k, v)), grid)
    assert o.dtype == dtype
    for share in shares([o], [exact.to(dtype)], [exact], dtype):
        assert share <= 1


@pytest.mark.parametrize("padded", [False, True], ids=["inside", "padded"])
def test_shares_of_a_token_sum_to_one_unless_some_lie_beyond_the_border(padded: bool) -> None:
    weight = associate(torch.randn(1, 3, 4, 4, 8), 1, padded=padded)
    total = weight.sum(-1)
    torch.testing.assert_close(total, torch.ones_like(total))
    inside = spread(weight.sum(3)[:, :, :, None]).sum()
    assert (inside < 3 * 4 * 4 - 1e-3) == padded


def test_what_super_tokens_share_out_is_what_they_gather() -> None:
    """`spread` is the transpose of `surrounding`, and equal tokens average to themselves."""
    s, parts = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5, 9)
    torch.testing.assert_close((surrounding(s) * parts).sum(), (s * spread(parts)).sum())
    weight = associate(torch.randn(1, 2, 3, 4, 8), 2)
    torch.testing.assert_close(join(weight, torch.ones(1, 2, 3, 4, 1)), torch.ones(1, 2, 3, 1))


@pytest.mark.slow  # tracing takes seconds
def test_compiled_code_is_one_graph() -> None:
    spec, grid = SuperToken(3), Grid(5, 7, prefix=2)
    q, k, v = tensors(grid, torch.float32)
    compiled = torch.compile(built(spec), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(q, k, v, grid), built(spec)(q, k, v, grid))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: SuperToken(size=0), ValueError, "size must be at least 1"),
        (lambda: SuperToken(size=2.0), TypeError, "size"),  # type: ignore[arg-type]
        (lambda: SuperToken(iterations=0), ValueError, "iterations"),
    ],
    ids=["size-0", "size-float", "iterations-0"],
)
def test_bad_fields_are_refused(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()
