"""All operators, forward and backward, read and write inside their tensors alone, with the launches of the tables.

Compiled code that reads beyond a tensor mostly finds other memory there: see `addressed.py`. Sizes are small and odd,
so that tiles hang over every edge, and rows of `vision-attn tune` are tried with launches that no table has.
"""

import math
import os
import re
from contextlib import suppress
from dataclasses import replace

import pytest

pytest.importorskip("triton", reason="Triton is not installed")
import torch
from addressed import OutsideError, checked_addresses
from local_cases import CASES as LOCAL
from local_cases import draw as draw_local
from local_cases import run as run_local
from operator_cases import CASES, call, inputs_of

from vision_attn.bench import tuned
from vision_attn.bench.tuned import KERNELS, Case, operator_call
from vision_attn.bench.tuning import neighbours, only_committed, rows_of, trying
from vision_attn.grid import Grid
from vision_attn.kernels.backend import LaunchError
from vision_attn.kernels.hedgehog import hedgehog
from vision_attn.kernels.image import Windows, add_depthwise, means
from vision_attn.kernels.linear import feature_mean
from vision_attn.kernels.local import Window, local_attention
from vision_attn.kernels.multipole import Cells, multipole_attention
from vision_attn.kernels.residual import Network, add_networks
from vision_attn.kernels.triton import launching, rows

pytestmark = pytest.mark.interpreter
DTYPES = torch.float32, torch.float16
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _tables(monkeypatch):
    """Take the launches of the package's tables, without the small tiles of other tests."""
    monkeypatch.undo()
    monkeypatch.setenv("VISION_ATTN_LAUNCHES", os.devnull)
    launching.forget()
    yield
    launching.forget()


def draw(*shape, dtype=torch.float32):
    return torch.randn(shape).to(dtype).requires_grad_()


def local(case):
    return lambda dtype: run_local(case, draw_local(case, dtype, batch=1, heads=1), "triton")


def several(case):
    return lambda dtype: call(case, inputs_of(case, dtype), "triton").sum().backward()


def multipole(grid, D=24, **fields):
    def run(dtype):
        q, k, v = (draw(1, grid.tokens, 2, D, dtype=dtype) for _ in range(3))
        with torch.set_grad_enabled("precision" not in fields):
            o = multipole_attention(q, k, v, grid, Cells(**fields), backend="triton")
        if o.requires_grad:
            o.sum().backward()

    return run


@torch.no_grad()
def local_eight_bit(dtype):
    grid = Grid(13, 19, prefix=5, suffix=2)
    q, k, v = (draw(2, grid.tokens, 2, 24, dtype=dtype) for _ in range(3))
    for window in (Window(radius=4, precision="int8"), Window(kernel_size=5, dilation=2, precision="fp8")):
        local_attention(q, k, v, grid, window, backend="triton")


def images(dtype):
    grid = Grid(7, 11, prefix=3)
    q, v = (draw(2, grid.tokens, 2, 24, dtype=dtype) for _ in range(2))
    with torch.no_grad():
        means(q, grid, Windows(count=(3, 2)), and_of=v, backend="triton")
        means(q, grid, Windows(size=3), and_of=v, backend="triton")
        weight, bias, gate = draw(48, 1, 5, 5, dtype=dtype), draw(48, dtype=dtype), draw(2, 24, 24, dtype=dtype)
        add_depthwise(q, v, grid, weight, bias, gate=gate, backend="triton")


def sums(dtype):
    q = draw(2, 77, 3, 24, dtype=dtype)
    feature_mean(q, backend="triton").sum().backward()
    with torch.no_grad():
        hedgehog(q, draw(3, 24, 24, dtype=dtype), backend="triton")


@torch.no_grad()
def residual(dtype):
    for C, mid, count in ((136, 200, 2), (72, 24, 1)):
        shapes = (mid, C), (mid,), (mid,), (mid,), (C, mid), (C,)
        networks = tuple(Network(*(draw(*shape, dtype=torch.float16) for shape in shapes)) for _ in range(count))
        add_networks(draw(2, 77, C, dtype=torch.float16), networks, backend="triton")


CALLS = {
    **{f"local-{case}": local(case) for case in LOCAL},
    **{str(case): several(case) for case in CASES if str(case) != "linear_injective-weights"},  # it has no gradient
    "multipole-ragged-text": multipole(Grid(7, 14, prefix=2, suffix=1), cell=4, pool=2, exact=1, spread=0.5),
    "multipole-near-0": multipole(Grid(17, 9, prefix=1), cell=4, near=0, pool=4, exact=2),
    "multipole-wide": multipole(Grid(15, 12), D=144, near=0, exact=1),
    "multipole-large-cell": multipole(Grid(18, 20), cell=16, near=0, pool=8, exact=1),
    "multipole-int8": multipole(Grid(9, 22, prefix=3), cell=8, exact=1, precision="int8"),
    "local-eight-bit": local_eight_bit,
    "images": images,
    "sums": sums,
    "residual": residual,  # of 16 bits alone
}
QUICK = (
    "local-0+3x2+0-radius50.5-D32", "linear-rala-hidden", "linear_injective-strided", "agent-direct-hidden",
    "window-text-hidden", "linear_local-hidden", "images", "sums", "residual",
)  # fmt: skip


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param(name, dtype, marks=[] if name in QUICK and dtype is torch.float16 else [pytest.mark.slow])
        for name in CALLS
        for dtype in DTYPES
    ],
    ids=str,
)
def test_an_operator_stays_inside_its_tensors(name, dtype):
    with checked_addresses():
        CALLS[name](dtype)


def tried(case):
    """Return what the interpreter can tell apart of the launch of a row and of its neighbours."""

    def plain(launch):
        boxes = launch.boxes and replace(launch.boxes, warps=4, stages=1)
        return replace(launch, warps=4, stages=1, boxes=boxes)

    return list(dict.fromkeys(map(plain, [case.row.launch, *neighbours(case.row.launch)])))


with only_committed():
    ROWS = [Case(kernel, row) for kernel in KERNELS for row in rows_of(kernel, "interpreter") if row.channels <= 128]
QUICK_ROWS = "pairs.keys 16 bits D 64", "window.keys 16 bits D 64", "linear.keys 16 bits D 64"
BOXED = re.compile(r"local\.|multipole\.|linear_local\.|linear\.(?!mean|wide)")  # what TMA may load for


@pytest.mark.parametrize(
    ("case", "boxes"),
    [
        pytest.param(case, boxes, marks=[] if str(case) in QUICK_ROWS else [pytest.mark.slow])
        for case in ROWS
        for boxes in (False, True)
        if not boxes or BOXED.match(case.kernel)
    ],
    ids=lambda value: ("pointers", "boxes")[value] if isinstance(value, bool) else str(value),
)
def test_a_launch_that_is_tried_stays_inside_its_tensors(case, boxes, monkeypatch):
    """`vision-attn tune` tries neighbours of the launches of the tables, also those by which TMA loads."""
    monkeypatch.setattr(tuned, "_PREFIX", 5)
    monkeypatch.setattr(rows, "hopper", lambda t: boxes)
    side = max(7 if case.backward else 9, 0 if case.row.columns == math.inf else int(case.row.columns))  # as its window
    dtype = torch.float16 if case.row.size == 2 else torch.float32
    ran = 0
    for launch in tried(case):
        with trying(case, launch, "interpreter"), checked_addresses():
            function, tensors, do = operator_call(case, side, CPU, dtype, heads=1)
            with suppress(LaunchError):  # a launch that is refused before it runs is left out by `tune` too
                if case.backward:
                    leaves = [t.requires_grad_() for t in tensors]
                    torch.autograd.grad(function(*leaves, backend="triton"), leaves, do)
                else:
                    with torch.no_grad():
                        function(*tensors, backend="triton")
                ran += 1
    assert ran


def test_an_operator_that_asks_for_a_key_too_many_is_found(monkeypatch):
    from vision_attn.kernels.triton.pairs import Pairs

    numbers = Pairs.numbers
    monkeypatch.setattr(Pairs, "numbers", lambda self: numbers(self) | dict(tokens=self.k.shape[1] + 1))
    match = r"agent.forward._attend, program .*, reads 16 elements beyond the last of k, torch.float32 \[2, 77, 2, 16\]"
    with checked_addresses(), pytest.raises(OutsideError, match=match):
        CALLS["agent-plain"](torch.float32)
