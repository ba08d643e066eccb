"""Multipole attention's Triton backend in Triton's interpreter (see `interpreted.py`)."""

import pytest
import torch
import torch.nn.functional as F
from interpreted import shifted_boxes

from vision_attn.grid import Grid
from vision_attn.kernels.multipole import Cells, choose_cells, multipole_attention

interpreter = pytest.mark.interpreter
CASES = {
    "ragged-text": (Grid(7, 14, prefix=2, suffix=1), dict(cell=4, pool=2, exact=1), 16),
    "near-0": (Grid(17, 9, prefix=1), dict(cell=4, near=0, pool=4, exact=2), 16),
    "no-exact": (Grid(12, 18), dict(cell=6, near=0, pool=3, exact=0), 24),
    "large-cell": (Grid(18, 20), dict(cell=16, near=0, pool=8, exact=1), 16),
}
SLOW = {
    "levels": (Grid(24, 14, prefix=2), dict(cell=4, pool=2, exact=2), 16),
    "wide": (Grid(15, 12, prefix=2), dict(near=0, exact=1), 144),
}
ROWS = [
    ("ragged-text", torch.float32),
    ("no-exact", torch.float16),
    *(pytest.param(name, dtype, marks=pytest.mark.slow) for name in SLOW for dtype in (torch.float32, torch.float16)),
    *(pytest.param(name, torch.float16, marks=pytest.mark.slow) for name in ("ragged-text", "near-0", "large-cell")),
    *(pytest.param(name, torch.float32, marks=pytest.mark.slow) for name in ("no-exact", "near-0", "large-cell")),
]


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def results(backend, dtype, case, mask, weighted=False):
    """Output and gradients of q, k, v, and mass or weights, for the same chosen cells."""
    grid, fields, D = case
    q, k, v = (draw(1, grid.tokens, 1, D, seed=seed, dtype=dtype).requires_grad_() for seed in range(3))
    wide = [t.detach().double() for t in (q, k)]
    mass = draw(1, 2, seed=4).to(torch.promote_types(dtype, torch.float32)).requires_grad_()
    weights = draw(*[Cells(**fields).pool] * 2, seed=5).to(mass.dtype).requires_grad_()
    learned = dict(weights=weights) if weighted else dict(mass=mass)
    cells = Cells(**fields, **learned, chosen=choose_cells(*wide, grid, Cells(**fields)))
    o = multipole_attention(q, k, v, grid, cells, mask=mask, backend=backend)
    loss, leaves = (o * draw(*o.shape, seed=9).to(o)).sum(), (q, k, v, *learned.values())
    # a cell that meets no means has no use for what they learn
    return [o, *torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)]


@interpreter
@pytest.mark.parametrize(("name", "dtype"), [("near-0", torch.float32), ("ragged-text", torch.float16)], ids=str)
def test_the_weights_of_means_learn(name, dtype):
    """Cells at the borders have fewer tokens, so the same weight is another share there."""
    case = CASES[name]
    _, *exact = results("reference", torch.float64, case, None, True)
    _, *plain = results("torch", dtype, case, None, True)
    _, *ours = results("triton", dtype, case, None, True)
    for a, b, c in zip(ours, plain, exact, strict=True):
        budget = 2 * (b.double() - c).abs().max() + 8 * torch.finfo(dtype).eps * c.abs().max()
        assert (a.double() - c).abs().max() <= budget


@interpreter
@pytest.mark.parametrize(("name", "dtype"), ROWS, ids=str)
def test_error_is_within_the_budget(name, dtype):
    case = (CASES | SLOW)[name]
    outside = case[0].prefix + case[0].suffix
    mask = torch.ones(1, outside, dtype=torch.bool) if outside > 1 else None
    if mask is not None:
        mask[0, 0] = False
    exact = results("reference", torch.float64, case, mask)
    plain = results("torch", dtype, case, mask)
    ours = results("triton", dtype, case, mask)
    for a, b, c in zip(ours, plain, exact, strict=True):
        # the float64 rows are drawn alike and rounded to the dtype first in the others
        budget = 2 * (b.double() - c).abs().max() + 8 * torch.finfo(dtype).eps * c.abs().max()
        assert (a.double() - c).abs().max() <= budget


@pytest.fixture
def boxes(monkeypatch):
    """Fetch tiles through TMA descriptors, as on Hopper; the tensors of which there were any."""
    from vision_attn.kernels.triton import launching, rows

    fetched, of = [], rows.Box.of
    monkeypatch.setattr(rows.Box, "of", lambda self, t: [fetched.append(t), of(self, t)][1])
    monkeypatch.setattr(rows, "hopper", lambda t: True)
    shifted_boxes(monkeypatch)
    launching.forget()
    yield fetched
    launching.forget()


BOXED = {
    "no-means": (Grid(7, 8, prefix=3), dict(cell=4, pool=2, exact=1), 16),
    "one-cell": (Grid(2, 3), dict(cell=4, near=0, pool=2, exact=0), 16),
    "ragged-text": CASES["ragged-text"],
    "levels": SLOW["levels"],
}


@interpreter
@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in BOXED])
def test_boxes_equal_pointers(name, boxes, monkeypatch):
    found = results("triton", torch.float32, BOXED[name], None)
    assert boxes
    monkeypatch.undo()
    for a, b in zip(found, results("torch", torch.float32, BOXED[name], None), strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=2e-5)


@interpreter
@pytest.mark.parametrize("learned", [True, False], ids=["weights", "equal-weights"])
@pytest.mark.parametrize(
    ("spread", "scale", "D"), [(0.0, 0.25, 16), (0.5, 0.25, 16), (1.0, -0.25, 16), (0.5, 0.1, 136)]
)
def test_means_and_choice_are_those_of_plain_pytorch(learned, spread, scale, D):
    """Wide heads take the 20 cells in two tiles."""
    from vision_attn.kernels.multipole.cells import means_of
    from vision_attn.kernels.multipole.op import _choice, _means
    from vision_attn.kernels.multipole.pyramid import pyramid

    grid = Grid(16, 18, prefix=3)
    q, k, v = (draw(1, grid.tokens, 2, D, seed=seed) for seed in range(3))
    weights = draw(2, 2, seed=5) if learned else None
    cells = Cells(cell=4, near=0, pool=2, exact=3, spread=spread, weights=weights)
    size = [grid.height, grid.width, grid.prefix, grid.suffix, 4, 0, 2]
    sides = cells.layout(grid, q.device).sides
    assert len(sides) > 1
    order = pyramid(size).order(q.device)
    *means, low, high = _means(k, v, weights, size, spread > 0)
    for ours, t in zip(means, (k, v), strict=True):
        plain = means_of(t[:, grid.image], grid, cells, sides)
        torch.testing.assert_close(ours, F.pad(plain, (0, 0, 0, 0, 0, 1))[:, order])
    chosen = _choice(q, means[0], low, high, size, 3, spread, scale).long().sort(-1).values
    assert torch.equal(chosen, choose_cells(q, k, grid, cells, scale=scale).sort(-1).values)


@interpreter
def test_opcheck():
    from vision_attn.kernels.multipole.op import _means, _multipole

    size = [8, 12, 2, 0, 4, 0, 2]
    q, k, v = (draw(1, 98, 1, 16, seed=seed).requires_grad_() for seed in range(3))
    means = [t.detach().requires_grad_() for t in _means(k, v, None, size, False)[:2]]
    chosen = torch.full((1, 1, 6, 1), 6, dtype=torch.int32)
    chosen[..., 0, 0] = 5
    torch.library.opcheck(_means.registered, (k, v, None, size, True))
    torch.library.opcheck(_means.registered, (k, v, draw(2, 2, seed=4).requires_grad_(), size, True))
    mass, mask = draw(1, 2).requires_grad_(), torch.tensor([[True, False]])
    torch.library.opcheck(_multipole.registered, (q, k, v, *means, chosen, mass, mask, size, 0.25))


@interpreter
@pytest.mark.slow
def test_equal_inputs_give_equal_gradients():
    first, again = (results("triton", torch.float32, CASES["ragged-text"], None) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize(
    ("rows", "first", "stop"), [((), 0, 63), ((1, 2), 3 + 24, 3 + 48), ((2, 3), 3 + 48, 63), ((1, 1), 3 + 24, 3 + 24)]
)
def test_of_some_rows_of_cells_only_their_queries_are_met(rows, first, stop):
    from vision_attn.kernels.multipole.op import Call

    q = torch.zeros(1, 63, 1, 16)
    call = Call(q, q, q, q, q, torch.zeros(1, 1, 6, 0), None, None, [10, 6, 3, 0, 4, 0, 2, *rows], 1.0)
    assert call.queries == (first, stop)


@interpreter
def test_a_process_without_a_row_of_cells_has_no_gradient():
    from vision_attn.kernels.multipole.op import part_attention_triton

    grid, cells = Grid(8, 8, prefix=3), Cells(cell=4, near=0, pool=2, exact=0)
    q, k, v = (draw(1, grid.tokens, 1, 16, seed=seed).requires_grad_() for seed in range(3))
    sides = cells.layout(grid, q.device).sides
    means = tuple(torch.zeros(1, sum(a * b for a, b in sides), 1, 16) for _ in "kv")
    none = Cells(cell=4, near=0, pool=2, exact=0, chosen=torch.zeros(1, 1, 4, 0, dtype=torch.long))
    o = part_attention_triton(q, k, v, grid, none, means, (1, 1), None, 0.25)
    grads = torch.autograd.grad(o.sum() * 0, (q, k, v))
    assert all((grad == 0).all() for grad in grads)


@interpreter
def test_a_wrong_mass_is_caught():
    grid, fields, D = CASES["ragged-text"]
    q, k, v = (draw(1, grid.tokens, 1, D, seed=seed) for seed in range(3))
    chosen = choose_cells(q, k, grid, Cells(**fields))
    o = multipole_attention(q, k, v, grid, Cells(**fields, chosen=chosen), backend="reference")
    wrong = Cells(**fields, chosen=chosen, mass=torch.full((1, 1), 0.1))
    assert (multipole_attention(q, k, v, grid, wrong, backend="triton") - o).abs().max() > 1e-3


def grouped(backend, shared):
    """Output and gradients of q, k, v and mass: 2 samples, 2 groups of 2 heads, in the batch or with repeated keys."""
    grid, fields = Grid(7, 14, prefix=2), dict(cell=4, near=0, pool=2, exact=1)
    q = draw(2, grid.tokens, 4, 16).requires_grad_()
    k, v = (draw(2, grid.tokens, 2, 16, seed=seed).requires_grad_() for seed in (1, 2))
    mass = draw(4, 2, seed=4).requires_grad_()
    if shared:
        queries = q.unflatten(2, (2, 2)).transpose(1, 2).flatten(0, 1)
        keys, values = (t.transpose(1, 2).flatten(0, 1)[:, :, None].expand(-1, -1, 2, -1) for t in (k, v))
    else:
        queries, keys, values = q, *(t.repeat_interleave(2, 2) for t in (k, v))
    o = multipole_attention(queries, keys, values, grid, Cells(**fields, mass=mass), backend=backend)
    if shared:
        o = o.unflatten(0, (2, 2)).transpose(1, 2).flatten(2, 3)
    return [o, *torch.autograd.grad((o * draw(*o.shape, seed=9)).sum(), (q, k, v, mass))]


@pytest.mark.parametrize(
    "backend", ["reference", "torch", pytest.param("triton", marks=[interpreter, pytest.mark.slow])]
)
def test_heads_that_share_keys_in_memory_give_what_repeated_keys_give(backend):
    for found, expected in zip(grouped(backend, True), grouped(backend, False), strict=True):
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


def test_masses_of_other_samples_are_refused():
    k = draw(2, 24, 2, 8)
    for rows in (3, 8):
        with pytest.raises(ValueError, match=r"mass must be \[H, levels\]"):
            multipole_attention(k, k, k, Grid(4, 6), Cells(cell=2, near=0, pool=1, mass=draw(rows, 2)))
