"""Multipole attention against its definition: outputs, gradients, precision, masses, and what is counted."""

import math

import pytest
import torch

from vision_attn.grid import Grid
from vision_attn.kernels.dense import dense_attention
from vision_attn.kernels.multipole import Cells, choose_cells, multipole_attention

CASES = {
    "ragged-text": (Grid(13, 22, prefix=3, suffix=2), dict(cell=4, pool=2, exact=3)),
    "levels": (Grid(24, 20, prefix=1), dict(cell=2, pool=2, exact=2)),
    "near-0": (Grid(33, 9, prefix=1), dict(cell=4, near=0, pool=4, exact=2)),
    "near-2": (Grid(20, 21), dict(cell=3, near=2, pool=3, exact=1)),
    "no-exact": (Grid(20, 24), dict(cell=6, pool=3, exact=0)),
    "pool-1": (Grid(12, 16, suffix=5), dict(cell=3, pool=1, exact=2)),
    "cell-over-pool": (Grid(26, 30), dict(cell=6, near=0, pool=2, exact=2)),
    "one-row": (Grid(1, 40), dict(cell=4, pool=2, exact=3)),
    "few-cells": (Grid(5, 17), dict(cell=4, pool=4, exact=9)),
    "group": (Grid(16, 16), dict(cell=2, pool=2, exact=2, group=2)),
}
rows = pytest.mark.parametrize("name", CASES)


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def inputs(grid, dtype=torch.float64, B=2, H=3, D=8):
    return [draw(B, grid.tokens, H, D, seed=seed, dtype=dtype).requires_grad_() for seed in range(3)]


def hidden_text(grid, B=2):
    outside = grid.prefix + grid.suffix
    if not outside:
        return None
    mask = torch.ones(B, outside, dtype=torch.bool)
    mask[0, -1] = False
    return mask


@rows
def test_equals_its_definition(name):
    grid, fields = CASES[name]
    mask, results = hidden_text(grid), []
    for backend in ("reference", "torch"):
        mass, weights = (
            draw(3, 2, seed=5).requires_grad_(),
            draw(fields["pool"], fields["pool"], seed=6).requires_grad_(),
        )
        q, k, v = inputs(grid)
        cells = Cells(**fields, mass=mass, weights=weights)
        o = multipole_attention(q, k, v, grid, cells, mask=mask, scale=0.4, backend=backend)
        learned = (q, k, v, weights, mass)
        grads = torch.autograd.grad((o * draw(*o.shape, seed=7)).sum(), learned, allow_unused=True)
        results.append([o, *grads])
    for ours, exact in zip(*results, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-10, atol=1e-11)


@rows
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
def test_error_is_within_the_budget_of_the_dtype(name, dtype):
    grid, fields = CASES[name]
    q, k, v = (t.detach() for t in inputs(grid, dtype))
    wide = [t.double() for t in (q, k, v)]
    cells = Cells(**fields, chosen=choose_cells(*wide[:2], grid, Cells(**fields)))
    exact = multipole_attention(*wide, grid, cells, backend="reference")
    plain = multipole_attention(q, k, v, grid, cells, backend="reference")
    error = (multipole_attention(q, k, v, grid, cells, backend="torch").double() - exact).abs().max()
    assert error <= 2 * (plain.double() - exact).abs().max() + torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.parametrize("seed", range(12))
def test_every_token_is_counted_once(seed):
    """With v = 1 the weights sum to 1; with equal keys each token weighs the same, whatever mean it is in."""
    g = torch.Generator().manual_seed(seed)
    height, width, prefix, cell, near, exact = (int(torch.randint(a, b, (), generator=g)) for a, b in RANGES)
    pool = [n for n in range(1, cell + 1) if cell % n == 0][seed % 2 - 1]
    grid = Grid(height, width, prefix=prefix)
    cells = Cells(cell, near, pool, exact)
    q = draw(1, grid.tokens, 2, 4, seed=seed)
    equal = torch.ones_like(q)
    chosen = choose_cells(q, draw(*q.shape, seed=seed + 99), grid, cells)
    cells = Cells(cell, near, pool, exact, chosen=chosen)
    for backend in ("reference", "torch"):
        ones = multipole_attention(q, equal, torch.ones_like(q), grid, cells, backend=backend)
        torch.testing.assert_close(ones, torch.ones_like(q), rtol=0, atol=1e-12)
        # v is 1 at the tokens of one half: every query then sees that half's share of all tokens
        half = torch.zeros_like(q)
        half[:, grid.image] = (torch.arange(grid.image_tokens) % 2 == 0).to(q)[None, :, None, None]
        o = multipole_attention(q, equal, half, grid, Cells(cell, near, 1, exact, chosen=chosen), backend=backend)
        share = half[0, :, 0, 0].mean()
        if cell % 2 == 0 or near > 0:
            dense = dense_attention(q, equal, half)
            torch.testing.assert_close(dense, torch.full_like(q, float(share)), rtol=0, atol=1e-12)
        torch.testing.assert_close(o.mean((1, 2, 3)), torch.full((1,), float(share), dtype=q.dtype), rtol=0.2, atol=0)


RANGES = ((1, 27), (1, 27), (0, 4), (2, 7), (0, 3), (0, 6))


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_one_hot_values_show_the_weight_of_each_token(backend):
    """With equal keys and v one-hot by token, a row holds 1 / N at every token that is exact or alone in its mean."""
    grid = Grid(9, 14, prefix=2)
    q = torch.ones(1, grid.tokens, 1, grid.tokens, dtype=torch.float64)
    v = torch.eye(grid.tokens, dtype=torch.float64)[None, :, None]
    cells = Cells(cell=3, near=1, pool=1, exact=0)
    o = multipole_attention(q, q, v, grid, cells, scale=0.0, backend=backend)[0, :, 0]
    torch.testing.assert_close(o.sum(1), torch.ones_like(o[:, 0]))
    # means spread the weight of their tokens evenly, so that with equal keys nothing is lost to any token
    torch.testing.assert_close(o, torch.full_like(o, 1 / grid.tokens))


@pytest.mark.parametrize("backend", ["reference", "torch", "auto"])
def test_a_cell_that_covers_the_grid_is_dense_attention(backend):
    grid = Grid(9, 7, prefix=4)
    q, k, v = (t.detach() for t in inputs(grid))
    o = multipole_attention(q, k, v, grid, Cells(cell=10, pool=5), backend=backend)
    torch.testing.assert_close(o, dense_attention(q, k, v))


def test_samples_choose_their_own_cells():
    grid = Grid(32, 32)
    q, k = (draw(2, grid.tokens, 2, 8, seed=seed) for seed in range(2))
    chosen = choose_cells(q, k, grid, Cells(cell=4, exact=3))
    assert not torch.equal(chosen[0], chosen[1])
    alone = choose_cells(q[1:], k[1:], grid, Cells(cell=4, exact=3))
    assert torch.equal(chosen[1:], alone)
    near = Cells(cell=4).layout(grid, q.device).near
    assert not (chosen[..., None] == near[None, None, :, None]).any()


def test_the_cells_of_largest_weight_are_chosen():
    grid = Grid(24, 24)
    q, k = (draw(1, grid.tokens, 1, 8, seed=seed) for seed in range(2))
    cells = Cells(cell=4, near=1, exact=2)
    means = [t.view(6, 4, 6, 4, 8).mean((1, 3)).flatten(0, 1) for t in (q[0, :, 0], k[0, :, 0])]
    weight = means[0] @ means[1].T
    near = cells.layout(grid, q.device).near
    for own, chosen in enumerate(choose_cells(q, k, grid, cells)[0, 0]):
        far = [c for c in range(36) if c not in near[own].tolist()]
        assert set(chosen.tolist()) == set(sorted(far, key=lambda c: -float(weight[own, c]))[:2])


@pytest.mark.parametrize("spread", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("scale", [0.7, -0.7])
def test_the_spread_of_a_cells_keys_counts(spread, scale):
    """The weight by its formula, channel by channel, on a grid whose border cuts cells."""
    grid, cells = Grid(13, 18, prefix=2), Cells(cell=4, near=0, exact=3, spread=spread)
    q, k = (draw(1, grid.tokens, 2, 8, seed=seed) for seed in range(2))
    boxes = cells.layout(grid, q.device).tokens[:-1].tolist()
    image = [t[:, grid.image].view(13, 18, 2, 8) for t in (q, k)]
    chosen = choose_cells(q, k, grid, cells, scale=scale)
    for h in range(2):
        parts = [[t[a:b, c:d, h].flatten(0, 1) for a, b, c, d in boxes] for t in image]
        for own, mean_q in enumerate(part.mean(0) * scale for part in parts[0]):
            weight = []
            for keys in parts[1]:
                best = torch.where(mean_q > 0, keys.amax(0), keys.amin(0))
                at = keys.mean(0) + spread * (best - keys.mean(0))
                weight.append(float(mean_q @ at) + math.log(len(keys)))
            far = sorted((c for c in range(len(boxes)) if c != own), key=lambda c: -weight[c])
            assert set(chosen[0, h, own].tolist()) == set(far[:3])


def test_a_single_far_key_is_found_by_its_bound():
    """One key that fits the query among keys that do not: the mean of its cell hides it, the bounds show it."""
    grid, place = Grid(24, 24), 9 * 24 + 14  # in cell (2, 3)
    q, k = torch.ones(1, grid.tokens, 1, 4), -0.1 * torch.ones(1, grid.tokens, 1, 4)
    k[:, [0, 1, 2, 24, 25]] = 0.2  # a cell whose mean is the best
    k[0, place] = 1
    fields = dict(cell=4, near=0, exact=1)
    found = [choose_cells(q, k, grid, Cells(**fields, spread=spread))[0, 0, -1, 0] for spread in (0, 0.5)]
    assert found == [0, 2 * 6 + 3]
    with pytest.raises(ValueError, match="spread must be between 0 and 1, got 2"):
        Cells(spread=2)
    with pytest.raises(TypeError, match="spread"):
        Cells(spread="0.5")


@pytest.mark.parametrize("wrong", ["mass", "near", "exact"])
def test_a_wrong_formula_is_caught(wrong, monkeypatch):
    grid, fields = CASES["ragged-text"]
    q, k, v = (t.detach() for t in inputs(grid))
    cells = Cells(**fields, chosen=choose_cells(q, k, grid, Cells(**fields)))
    exact = multipole_attention(q, k, v, grid, cells, backend="reference")
    changed = dict(mass=dict(mass=torch.full((3, 1), 0.05, dtype=q.dtype)), near=dict(near=2), exact=dict(exact=0))[
        wrong
    ]
    fields = {**fields, "chosen": cells.chosen} | changed
    if wrong != "mass":
        fields.pop("chosen")
    error = (multipole_attention(q, k, v, grid, Cells(**fields), backend="torch") - exact).abs().max()
    assert error > 1e-3


@pytest.mark.parametrize("name", ["ragged-text", pytest.param("no-exact", marks=pytest.mark.slow)])
def test_compiles_whole(name):
    grid, fields = CASES[name]
    q, k, v = (t.detach().float().requires_grad_() for t in inputs(grid))
    compiled = torch.compile(multipole_attention, fullgraph=True, backend="aot_eager")
    results = []
    for f in (compiled, multipole_attention):
        o = f(q, k, v, grid, Cells(**fields), backend="torch")
        results.append([o, *torch.autograd.grad(o.square().sum(), (q, k, v))])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


BAD = {
    "cell": (lambda q: Cells(cell=0), ValueError, "cell must be at least 1, got 0"),
    "type": (lambda q: Cells(cell=2.0), TypeError, "cell must be an int"),
    "pool": (lambda q: Cells(cell=8, pool=3), ValueError, "pool must divide cell, got cell=8 and pool=3"),
    "mass": (lambda q: Cells(mass=torch.zeros(2, 3)), ValueError, r"mass must be \[H, levels\]"),
    "weights": (lambda q: Cells(weights=torch.zeros(3, 4)), ValueError, r"weights must be \[pool, pool\]"),
    "chosen": (lambda q: Cells(chosen=torch.zeros(1, 3, 2, 4)), ValueError, r"chosen must be \[B, H, cells, exact\]"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused(name):
    make, error, message = BAD[name]
    q = draw(1, 30 * 20, 3, 8)
    with pytest.raises(error, match=message):
        multipole_attention(q, q, q, Grid(30, 20), make(q))


def test_a_backend_that_is_named_does_not_fall_back():
    q = draw(1, 4 * 4, 1, 8)
    with pytest.raises(ValueError, match=r"triton.*float64 is none of.*too small for a tile"):
        multipole_attention(q, q, q, Grid(4, 4), Cells(cell=2, pool=1), backend="triton")


def test_unwritten_memory_does_not_matter():
    grid = Grid(11, 13, prefix=2)
    q, k, v = (t.detach() for t in inputs(grid, torch.float32))
    assert multipole_attention(q, k, v, grid, Cells(cell=4, exact=2)).isfinite().all()
    assert math.isfinite(multipole_attention(q, k, v, grid, Cells(cell=4, exact=2), scale=50.0).abs().max())
