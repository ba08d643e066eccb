"""Multipole attention over processes that hold whole rows of cells: the kernels, interpreted, equal one process.

So do their gradients, and those of the masses and of the weights.
"""

import pytest
import sliced
from processes import Group

from vision_attn.grid import Grid
from vision_attn.processors import Multipole

SPEC = Multipole(cell=4, pool=2, exact=2)
CASES = {  # how many processes, what they compute, the grid, where it is cut if not evenly
    "text": (2, SPEC, Grid(16, 12, prefix=5), None),
    "four": (4, SPEC, Grid(32, 12), None),
    "uneven": (2, SPEC, Grid(14, 13, prefix=3, suffix=2), ((0, 2, 3), (0, 8 * 13, 14 * 13), (0, 0, 2))),
    "no-spread": (2, Multipole(cell=4, near=0, pool=4, exact=3, spread=0), Grid(16, 10, prefix=4), None),
    "tiles-beyond-cells": (2, Multipole(cell=6, near=0, pool=3, exact=1), Grid(24, 12, prefix=5), None),
    "no-choice": (2, Multipole(cell=4, pool=1, exact=0), Grid(16, 12, prefix=4), None),
}
ROWS = [  # the interpreter takes half a minute for each
    pytest.param(name, gathers, id=f"{name}-{how}", marks=() if (name, how) == ("text", "sent") else pytest.mark.slow)
    for name in CASES
    for how, gathers in (("sent", False), ("gathered", True))
]
pytestmark = pytest.mark.interpreter


@pytest.fixture(scope="module")
def groups():
    found = {size: Group(size) for size in (2, 4)}
    yield found
    for group in found.values():
        group.close()


@pytest.mark.parametrize(("name", "gathers"), ROWS)
def test_equal_to_one_process(groups, name, gathers):
    size, spec, grid, cuts = CASES[name]
    masked = bool(grid.prefix) and not gathers
    expected = sliced.alone(spec, grid, masked)[0]
    answers = groups[size].run("sliced:inferred", spec, grid, masked, gathers, cuts, seconds=300)
    found = sliced.whole([answer[0] for answer in answers], answers[0][2])
    sliced.close(found, expected, "o", 2e-5)
    travelled = [answer[1].get("exact cells", 0) > 0 for answer in answers]
    assert all(travelled) if spec.exact and not gathers else not any(travelled)


@pytest.mark.parametrize(("name", "gathers"), ROWS)
def test_gradients_equal_those_of_one_process(groups, name, gathers):
    size, spec, grid, cuts = CASES[name]
    masked = bool(grid.prefix) and not gathers
    again = name == "text"  # with gradient checkpointing, as models train
    answers = groups[size].run("sliced:trained", spec, grid, masked, cuts, gathers, again, seconds=300)
    sliced.compare(answers, sliced.alone(spec, grid, masked))
