"""Processors over processes (gloo, on the CPU) equal one process: outputs and all gradients, in float32.

Slices end inside rows and inside cells, text is cut too, and there are more processes than the grid has rows of cells.
"""

import pytest
import sliced
import torch
from processes import Group
from processor_table import PROCESSORS

from vision_attn.grid import Grid
from vision_attn.kernels.multipole import Cells
from vision_attn.parallel.slabs import room
from vision_attn.processors import Clear, Halo, HiLo, LinFusion, Multipole, Neighborhood, Schedule

SPECS = PROCESSORS | {
    "clear-3.2": Clear(radius=3.2),
    "clear-everything": Clear(radius=30),
    "neighborhood-dilated": Neighborhood(kernel_size=(4, 3), dilation=(2, 1)),
    "halo-3": Halo(block=3, halo=4),
    "halo-rows": Halo(block=(2, 5), halo=(1, 0)),
    "hilo-3": HiLo(alpha=0.5, window_size=3),
    "hilo-1": HiLo(alpha=0.5, window_size=1),
    "linfusion-bare": LinFusion(mid_dim=-1),
    "multipole-bare": Multipole(cell=2, pool=1, exact=0),
    "multipole-3": Multipole(cell=3, near=0, pool=3, exact=1, spread=0),
    "multipole-everything": Multipole(),
}
GRIDS = {
    "even": Grid(8, 6),
    "text": Grid(8, 6, prefix=5),
    "both": Grid(10, 4, prefix=3, suffix=4),
    "references": Grid(12, 6, suffix=7),
    "wide": Grid(6, 14, prefix=2),
    "odd": Grid(7, 9, prefix=3),
}
QUICK = ("clear", "multipole", "linfusion")


class Groups(dict):
    """Groups of processes by their size, started when they are asked for."""

    def __missing__(self, size):
        self[size] = Group(size)
        return self[size]


@pytest.fixture(scope="module")
def group():
    found = Groups()
    yield found
    for each in found.values():
        each.close()


def fits(spec, grid):
    """Whether a spec takes a grid in one process."""
    try:
        spec.attended(grid)
    except ValueError:
        return False
    return True


ROWS = [
    pytest.param(size, name, grid, marks=() if name in QUICK and (size, grid) == (2, "odd") else pytest.mark.slow)
    for size in (2, 3, 4)
    for name, spec in SPECS.items()
    for grid in GRIDS
    if fits(spec, GRIDS[grid])
]


@pytest.mark.parametrize(("size", "name", "grid"), ROWS)
def test_equal_to_one_process(group, size, name, grid):
    for masked in (False, True) if GRIDS[grid].prefix + GRIDS[grid].suffix else (False,):
        expected = sliced.alone(SPECS[name], GRIDS[grid], masked)
        answers = group[size].run("sliced:over", SPECS[name], GRIDS[grid], masked)
        sliced.compare(answers, expected)


def test_slices_may_end_anywhere(group):
    grid = Grid(9, 7, prefix=4)
    cuts = ((0, 4, 4), (0, 17, 63), (0, 0, 0))
    for spec in (Clear(radius=2), Multipole(cell=2, near=0, pool=1, exact=1), LinFusion(mid_dim=-1)):
        sliced.compare(group[2].run("sliced:over", spec, grid, False, cuts), sliced.alone(spec, grid))


@pytest.mark.slow
def test_a_process_may_hold_no_token_of_the_grid(group):
    grid = Grid(6, 6, prefix=3)
    cuts = ((0, 1, 2, 3), (0, 0, 36, 36), (0, 0, 0, 0))
    for name, spec in SPECS.items():
        if fits(spec, grid) and name != "agent-sd":
            sliced.compare(group[3].run("sliced:over", spec, grid, False, cuts), sliced.alone(spec, grid))


def test_different_sizes_in_turn(group):
    for grid in (Grid(6, 6, prefix=2), Grid(9, 5, prefix=7), Grid(6, 6, prefix=2)):
        sliced.compare(group[2].run("sliced:over", Clear(radius=2), grid), sliced.alone(Clear(radius=2), grid))


def test_a_wrong_halo_is_caught(group):
    """The comparison can fail: with a row too few around a slice, the tokens at its end see too little."""
    grid = Grid(8, 6)
    answers = group[2].run("sliced:over_short", Clear(radius=3), grid)
    with pytest.raises(AssertionError, match="o: "):
        sliced.compare(answers, sliced.alone(Clear(radius=3), grid))


COUNTS = {  # K and V vectors that one of two processes receives, text aside: reference/parallel.md
    "clear": (Clear(radius=4), Grid(16, 16), 2 * 3 * 16),
    "multipole": (Multipole(cell=4, pool=2, exact=0), Grid(32, 32), 2 * (4 * 32 + 32 * 16 // 4)),
    "multipole-choice": (Multipole(cell=4, pool=2, exact=1), Grid(32, 32), 2 * (4 * 32 + 32 * 16 // 4)),
}


@pytest.mark.parametrize("name", COUNTS)
def test_bytes_are_those_that_must_travel(group, name):
    spec, grid, vectors = COUNTS[name]
    counted = vectors * sliced.BATCH * sliced.HEADS * sliced.DIM * 4
    for answer in group[2].run("sliced:over", spec, grid):
        received = {what: count for what, count in answer[6].items() if what not in ("exact cells", "wanted cells")}
        assert counted <= sum(received.values()) <= 1.3 * counted


def test_a_schedule_runs_the_processor_of_its_stage(group):
    spec = Schedule(((0.5, Clear(radius=2)), (1.0, Clear(radius=3))))
    grid = Grid(7, 6, prefix=3)
    sliced.compare(group[2].run("sliced:over", spec, grid), sliced.alone(spec, grid))


@pytest.mark.parametrize(("outside", "cell", "zero"), [(5, 8, 256), (512, 8, 0), (0, 8, 0), (5, 6, 1000)])
def test_what_a_tile_reads_beyond_the_text_or_a_cell_is_zero(outside, cell, zero):
    """A weight of zero does not hide a NaN; all other memory is NaN here."""
    torch.use_deterministic_algorithms(True)
    found = room(torch.empty(0), (1, 1000, 2, 4), outside, Cells(cell=cell, pool=2))
    first = 0 if zero == 1000 else outside
    assert (found[:, first : first + zero] == 0).all() and int(found.isnan().sum()) == 8 * (1000 - zero)
