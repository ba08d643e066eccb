"""Some rows of cells attend alone, with means and exact cells that are known: what one of several processes runs."""

from dataclasses import replace

import pytest
import torch

from vision_attn.grid import Grid
from vision_attn.kernels.multipole import Cells, choose_cells, multipole_attention, part_attention
from vision_attn.kernels.multipole.cells import means_of

GRID, TEXT, ROWS = Grid(14, 9), 3, (1, 3)
OWN = slice(4 * 9 + 2, 12 * 9 - 3)  # tokens of the rows of cells 1 and 2, cut inside


def results(backend):
    """Return output and gradients of the own queries, of all keys, means and masses."""
    torch.manual_seed(0)
    cells = Cells(cell=4, near=0, pool=2, exact=2)
    layout = cells.layout(GRID, torch.device("cpu"))
    q, k, v = torch.randn(3, 1, GRID.tokens, 1, 16)
    text = torch.randn(2, 1, TEXT, 1, 16)
    mass = torch.randn(1, 2).requires_grad_()
    means = [means_of(t, GRID, cells, layout.sides).requires_grad_() for t in (k, v)]
    C, part = len(layout.near), slice(ROWS[0] * layout.size[1], ROWS[1] * layout.size[1])
    chosen = torch.full((1, 1, C, 2), C)
    chosen[:, :, part] = choose_cells(q, k, GRID, cells)[:, :, part]
    own, weight = torch.zeros_like(q), torch.zeros_like(q)
    own[:, OWN], weight[:, OWN] = q[:, OWN], torch.randn_like(q[:, OWN])
    queries, keys, values = (
        torch.cat(pair, 1).requires_grad_() for pair in ((torch.zeros_like(text[0]), own), (text[0], k), (text[1], v))
    )
    mask = torch.tensor([[True, False, True]])
    grid, cells = Grid(14, 9, prefix=TEXT), replace(cells, mass=mass, chosen=chosen)
    o = part_attention(queries, keys, values, grid, cells, tuple(means), ROWS, mask=mask, scale=0.25, backend=backend)
    (o * weight).sum().backward()
    whole = multipole_attention(queries, keys, values, grid, replace(cells, chosen=None), mask=mask, scale=0.25)
    dq = queries.grad[:, TEXT:][:, OWN]
    return o[:, OWN].detach(), dq, keys.grad, values.grad, *(t.grad for t in means), mass.grad, whole[:, TEXT:][:, OWN]


def test_it_is_the_same_as_in_the_whole_grid():
    o, *_, whole = results("torch")
    torch.testing.assert_close(o, whole, atol=1e-5, rtol=1e-5)


@pytest.mark.interpreter
def test_the_kernels_are_as_the_portable_code():
    for ours, plain in zip(results("triton"), results("torch"), strict=True):
        torch.testing.assert_close(ours, plain, atol=2e-5, rtol=2e-5)
