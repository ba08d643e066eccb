"""Multipole attention in 8 bits: how far it is from its definition in float64, and that all backends round alike.

`test_local_eight_bit.py` says what the interpreter can compute, and tests what both operators share.
"""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from eight_bit_cases import PRECISIONS, WORST, check_gradients_are_refused

from vision_attn.grid import Grid
from vision_attn.kernels.eight_bits import Blocks
from vision_attn.kernels.multipole import Cells, choose_cells, multipole_attention
from vision_attn.kernels.multipole.cells import means_of
from vision_attn.kernels.multipole.eight_bit import rounded_inputs
from vision_attn.kernels.multipole.mean_blocks import MeanBlocks
from vision_attn.kernels.multipole.pyramid import pyramid_of

slow = pytest.mark.slow
CASES = {  # grid, cells, D
    "near-0-text": (Grid(17, 10, prefix=3, suffix=2), dict(near=0, exact=1, spread=0.5), 16),
    "covers": (Grid(9, 8, prefix=3), dict(), 16),
    "near-1": (Grid(33, 26, suffix=5), dict(exact=1), 40),
    "cell-4": (Grid(24, 20, prefix=1), dict(cell=4, pool=2, exact=2), 16),
    "cell-12": (Grid(26, 30), dict(cell=12, near=0, exact=1), 128),
    "cell-4-pool-4": (Grid(17, 9, prefix=66), dict(cell=4, near=0, exact=2), 256),
    "pool-1": (Grid(24, 40), dict(near=0, pool=1, exact=0), 32),
    "far": (Grid(40, 33, prefix=2), dict(exact=0), 64),
}
HERE = ("near-0-text", "covers")  # a program of the interpreter takes a tenth of a second
BY_PRECISION = [
    pytest.param(name, one, id=f"{one}-{name}", marks=() if (name, one) in zip(HERE, PRECISIONS, strict=True) else slow)
    for name in CASES for one in PRECISIONS
]  # fmt: skip


def inputs(name, dtype=torch.float32, batch=1, heads=1):
    """q, k with a mean, v, the mask of some tokens outside the grid, and cells with masses and weights."""
    grid, fields, D = CASES[name]
    torch.manual_seed(0)
    q, k, v = (torch.randn(batch, grid.tokens, heads, D).to(dtype) for _ in range(3))
    outside = grid.prefix + grid.suffix
    mask = torch.arange(outside).expand(batch, -1) % 3 > 0 if outside > 1 else None
    pool = Cells(**fields).pool
    weights = torch.linspace(0.5, 1.5, pool * pool).view(pool, pool)
    cells = Cells(**fields, mass=torch.linspace(-0.3, 0.3, 2 * heads).view(heads, 2), weights=weights)
    return (q, k + 2, v), cells, mask


def run(name, given, precision, backend, scale=None):
    tensors, cells, mask = given
    cells = replace(cells, precision=precision)
    return multipole_attention(*tensors, CASES[name][0], cells, mask=mask, scale=scale, backend=backend)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in HERE else slow) for name in CASES])
def test_the_error_is_that_of_eight_bits(name, precision):
    given = inputs(name, batch=2, heads=2)
    tensors, cells, mask = given
    chosen = choose_cells(*tensors[:2], CASES[name][0], cells)  # float32 may choose otherwise than float64
    wide = tuple(t.double() for t in tensors), replace(cells, chosen=chosen), mask
    exact = run(name, wide, None, "reference")
    reference, portable = (run(name, given, precision, backend) for backend in ("reference", "torch"))
    alike = F.cosine_similarity(reference.flatten(), exact.flatten(), 0).item()
    assert 1e-5 < 1 - alike < WORST[precision]  # rounded at all, and by no more than 8 bits round
    assert (reference - portable).abs().mean() < 3e-5 * exact.abs().mean()


@pytest.mark.interpreter
@pytest.mark.parametrize(("name", "precision"), BY_PRECISION)
def test_kernels_round_as_the_definition_does(name, precision):
    """A mean that float32 rounds otherwise may move a key by a step: few elements, so the mean error is compared."""
    given = inputs(name)
    ours, want = (run(name, given, precision, backend) for backend in ("triton", "reference"))
    assert (ours - want).abs().mean() < 2e-4 * want.abs().mean()


@slow
@pytest.mark.interpreter
@pytest.mark.parametrize(("scale", "heads"), [(-0.3, 2), (0.0, 1)], ids=["negative-scale", "no-scale"])
def test_kernels_take_any_scale_heads_and_half_precision(scale, heads):
    given = inputs("near-0-text", torch.float16, batch=2, heads=heads)
    ours, want = (run("near-0-text", given, "int8", backend, scale) for backend in ("triton", "reference"))
    assert ours.dtype == torch.float16
    assert (ours - want).abs().float().mean() < 1e-3 * want.abs().float().mean()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_means_are_those_of_the_tokens_and_round_by_themselves(precision):
    """One large mean widens no scale but its own; mean values have the scales of the values."""
    (q, k, v), cells, _ = inputs("far")
    grid, cells = CASES["far"][0], replace(cells, precision=precision)
    sides = cells.layout(grid, q.device).sides
    k[:, grid.prefix :][:, :4] *= 1000
    means = [means_of(t[:, grid.image], grid, cells, sides) for t in (k, v)]
    x = rounded_inputs(q, k, v, grid, cells)
    want = means[0] - k.mean(1, keepdim=True)
    share = (x.means_k - want).abs().amax(3) / want.abs().amax(3)
    assert 1e-5 < share.max() < (0.51 / 127 if precision == "int8" else 1 / 16)
    assert (x.means_v - means[1]).abs().max() <= means[1].abs().max() / 16
    assert x.means_v.abs().max() <= v.abs().max()


@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param((40, 33, 8, 1, 4), id="near-1"), pytest.param((17, 70, 4, 0, 4), id="one-mean-a-cell"),
        pytest.param((64, 64, 8, 2, 2), id="near-2"), pytest.param((30, 50, 12, 1, 4), id="cell-12"),
    ],
)  # fmt: skip
def test_blocks_hold_the_means_that_their_cells_see(sizes):
    """Each mean that a cell sees is in a block that it meets."""
    height, width, cell, near, pool = sizes
    rows, layout = pyramid_of(*sizes), Cells(cell, near, pool, 0).layout(Grid(height, width), torch.device("cpu"))
    blocks, order = MeanBlocks(rows), rows.order(torch.device("cpu"))
    slots, met = blocks.slots(torch.device("cpu")), blocks.met(torch.device("cpu"))
    assert slots.shape == (blocks.count, 64) and met.shape == (len(layout.near), rows.levels * blocks.each)
    none = int(layout.slots.max())
    for own in range(len(met)):
        found = slots[met[own].long()].flatten()
        means = order[found[found >= 0].long()]
        seen = layout.slots[own][layout.slots[own] < none] if none in layout.slots[own] else layout.slots[own]
        counts = torch.bincount(means, minlength=none + 1)
        assert (counts[seen] >= 1).all()


def test_blocks_of_cells_are_their_tiles():
    cut = Blocks((26, 17, 3, 0), cell=12)
    places = cut.places(torch.device("cpu"))
    assert (cut.outside, cut.split, len(places)) == (1, 2, 1 + 3 * 2 * 4)
    assert places[places >= 0].sort()[0].tolist() == list(range(3 + 26 * 17))
    image = places[1:].view(3, 2, 4, 64)
    token = 3 + (12 + 8) * 17 + 8  # the last tile of the cell in row 1 and column 0
    assert image[1, 0, 3].view(8, 8)[:4, :4].tolist() == [[token + 17 * y + x for x in range(4)] for y in range(4)]
    assert (image[1, 0, 3].view(8, 8)[4:] == -1).all()


def test_a_gradient_is_refused():
    grid = Grid(17, 9)
    tensors = *torch.randn(3, 1, grid.tokens, 1, 16).unbind(), torch.zeros(1, 1), torch.zeros(4, 4)

    def attend(q, k, v, mass, weights):
        return multipole_attention(q, k, v, grid, Cells(near=0, precision="fp8", mass=mass, weights=weights))

    check_gradients_are_refused("fp8", tensors, attend)


def test_a_precision_has_a_name():
    with pytest.raises(ValueError, match="precision must be None"):
        Cells(precision="int4")


@slow  # its twin is that of local attention
@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=pytest.mark.interpreter)])
def test_opcheck_and_compile(backend):
    grid, cells = Grid(9, 5, prefix=2), Cells(near=0, exact=1, precision="int8")
    q, k, v = torch.randn(3, 1, grid.tokens, 1, 16)
    if backend == "triton":
        from vision_attn.kernels.multipole.op import _eight_bit

        size, chosen = [9, 5, 2, 0, 8, 0, 4], torch.full((1, 1, 2, 1), 2, dtype=torch.int32)
        means = torch.zeros(2, 1, 16, 1, 16)
        args = (q, k, v, *means, chosen, None, None, size, 0.25, "int8")
        torch.library.opcheck(_eight_bit.registered, args, test_utils="test_faketensor")

    def attend(q, k, v):
        return multipole_attention(q, k, v, grid, cells, backend=backend)

    torch.testing.assert_close(torch.compile(attend, fullgraph=True, backend="aot_eager")(q, k, v), attend(q, k, v))
