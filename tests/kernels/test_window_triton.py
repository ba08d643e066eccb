"""Window attention's Triton backend in Triton's interpreter (see `interpreted.py`)."""

import pytest
import torch
from interpreted import cell_tiles, pair_tiles
from operator_cases import CASES, Case, check_case, draw, one_head

from vision_attn.grid import Grid
from vision_attn.kernels.window import Haloed, window_attention

interpreter = pytest.mark.interpreter
WINDOW = [one_head(case) for case in CASES if case.operator == "window"]
ROWS = [*((case, torch.float32) for case in WINDOW), *((c, torch.float16) for c in WINDOW if c.id == "text-hidden")]
WIDE = Case("window", "wide", dict(grid=Grid(9, 11, prefix=40), size=(3, 5), H=1, D=144))
SLOW = [*((c, torch.float16) for c in (*WINDOW, WIDE) if c.id != "text-hidden"), (WIDE, torch.float32)]


@interpreter
@pytest.mark.parametrize(("case", "dtype"), [*ROWS, *(pytest.param(*r, marks=pytest.mark.slow) for r in SLOW)], ids=str)
def test_error_is_within_the_budget(case, dtype):
    check_case(case, dtype)


@interpreter
@pytest.mark.parametrize(
    "size", [(8, 3), 2, Haloed(3, (1, 4)), *(pytest.param(n, marks=pytest.mark.slow) for n in (7, 1, Haloed(5, 2)))],
    ids=str,
)  # fmt: skip
def test_windows_larger_than_a_tile_are_walked(size, monkeypatch):
    cell_tiles(monkeypatch, 16)
    pair_tiles(monkeypatch, 16)
    check_case(Case("window", "parts", dict(grid=Grid(9, 6, prefix=3), size=size, H=1, D=16)), torch.float32)


@interpreter
@pytest.mark.parametrize("B", [0, 1])
def test_batches(B):
    q, k, v = (draw(B, 30, 2, 16) for _ in range(3))
    results = []
    for name in ("triton", "reference"):
        o = window_attention(q, k, v, Grid(4, 7, suffix=2), 3, scale=-0.2, backend=name)
        results.append([o, *torch.autograd.grad(o.square().sum(), (q, k, v))])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@interpreter
def test_opcheck_and_compile():
    from vision_attn.kernels.window.op import _window

    q, k, v = (draw(1, 20, 1, 16) for _ in range(3))
    shared, mask = [draw(1, 3, 1, 16) for _ in range(2)], torch.tensor([[True, False, True]])
    torch.library.opcheck(_window.registered, (q, k, v, *shared, mask, [4, 5], [2, 2], [0, 0], 0.25))
    torch.library.opcheck(_window.registered, (q, k, v, None, None, None, [4, 5], [2, 3], [1, 0], 0.25))
    function = torch.compile(window_attention, fullgraph=True, backend="aot_eager")
    o = [f(q, k, v, Grid(4, 4, prefix=4), 2, backend="triton") for f in (function, window_attention)]
    for a, b in zip(*(torch.autograd.grad(t.square().sum(), (q, k, v)) for t in o), strict=True):
        torch.testing.assert_close(a, b)


@interpreter
def test_a_wrong_window_is_caught():
    q, k, v = (draw(1, 48, 1, 16) for _ in range(3))
    ours = window_attention(q, k, v, Grid(6, 8), (2, 3), backend="triton")
    assert (ours - window_attention(q, k, v, Grid(6, 8), 2, backend="reference")).abs().max() > 1e-3
    haloed = [window_attention(q, k, v, Grid(6, 8), Haloed((2, 3), n), backend="triton") for n in (0, 1)]
    assert torch.equal(haloed[0], ours) and (haloed[1] - ours).abs().max() > 1e-3
