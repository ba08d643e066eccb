"""`local_attention` against its definition, a dense float64 mask and softmax: outputs, all gradients, errors."""

import math

import pytest
import torch
from local_cases import CASES, COUNTED, draw, exact_and_plain, run

from vision_attn.grid import Grid
from vision_attn.kernels.local import Window, local_attention


@pytest.mark.parametrize("case", CASES + COUNTED, ids=str)
def test_equals_its_definition(case):
    inputs = draw(case)
    for ours, exact in zip(run(case, inputs, "torch"), run(case, inputs, "reference"), strict=True):
        torch.testing.assert_close(ours, exact, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("case", CASES + COUNTED[:1], ids=str)
def test_an_empty_batch(case, backend):
    inputs = draw(case, batch=0)
    o, *grads = run(case, inputs, backend)
    assert o.shape == inputs[0].shape and [g.shape for g in grads] == [x.shape for x in inputs[-1]]
    assert not any(g.any() for g in grads)  # that of the bias is not empty


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("case", [*(CASES[i] for i in (3, 4, 11, 14)), COUNTED[1]], ids=str)
def test_error_is_within_the_budget_of_the_dtype(case, dtype):
    """At most twice the error of the definition computed in this dtype, plus one rounding of the result."""
    low, exact = exact_and_plain(case, dtype)
    plain, ours = run(case, low, "reference"), run(case, low, "torch")
    for o, p, e in zip(ours, plain, exact, strict=True):
        rounding = torch.finfo(dtype).eps * e.abs().max()
        assert o.dtype == dtype
        assert (o - e).abs().max() <= 2 * (p - e).abs().max() + rounding


@pytest.mark.parametrize("wrong", [dict(radius=4.2), dict(radius=4, pool=True)], ids=["larger-disc", "pooled-key"])
def test_a_wrong_window_is_caught(wrong):
    case = CASES[0]
    inputs = draw(case)
    window = Window(radius=wrong["radius"], pooled=(inputs[1][:, :1], inputs[2][:, :1]) if "pool" in wrong else None)
    ours = local_attention(*inputs[:3], case.grid, window, backend="torch")
    assert (ours - local_attention(*inputs[:3], case.grid, inputs[3], backend="reference")).abs().max() > 1e-3


def test_extreme_logits_keep_the_budget():
    grid = Grid(10, 12, prefix=3)
    q, k, v = (torch.randn(1, grid.tokens, 2, 16) * 100 for _ in range(3))
    assert (torch.einsum("bnhd,bmhd->bhnm", q, k) / 4).abs().max() > 1e4
    for window in (Window(radius=3), Window(kernel_size=5)):
        exact = local_attention(q.double(), k.double(), v.double(), grid, window, backend="reference")
        ours, plain = (
            (local_attention(q, k, v, grid, window, backend=b).double() - exact).abs().max()
            for b in ("torch", "reference")
        )
        assert ours <= 2 * plain + 1e-5 * exact.abs().max()


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_a_counted_pooled_key_stands_for_its_tokens_outside_the_disc(backend):
    """With equal logits every token weighs the same, whether it lies in the disc, outside the grid or in a cell."""
    for grid, radius, cell in ((Grid(12, 8, prefix=3), 3.5, 4), (Grid(6, 15, suffix=1), 5, 3), (Grid(4, 4), 9, 2)):
        q = torch.zeros(1, grid.tokens, 1, grid.tokens, dtype=torch.float64)
        v = torch.eye(grid.tokens, dtype=torch.float64)[None, :, None]
        rows, columns = grid.height // cell, grid.width // cell
        means = v[:, grid.image].unflatten(1, (rows, cell, columns, cell)).mean((2, 4)).flatten(1, 2)
        window = Window(radius=radius, pooled=(means * 0, means), cell=cell)
        o = local_attention(q, q, v, grid, window, backend=backend)[0, grid.image, 0]
        inside = window.allowed(grid)
        in_disc, far = o[:, grid.image][inside], o[:, grid.image].sum(1)
        outside = (grid.prefix + grid.suffix) / grid.tokens
        torch.testing.assert_close(far, torch.full_like(far, 1 - outside), atol=1e-12, rtol=0)
        beyond = window.counts(grid)
        assert torch.equal(beyond.sum(1), (~inside).sum(1))
        assert (in_disc >= 1 / grid.tokens - 1e-12).all()  # a cell that the disc cuts gives its tokens in it a share
        whole = (beyond == cell**2).double() @ torch.ones(rows * columns, 1, dtype=torch.float64)
        assert whole.any() or radius == 9
        uncounted = local_attention(q, q, v, grid, Window(radius=radius, pooled=window.pooled), backend=backend)
        assert (uncounted[0, grid.image, 0] - o).abs().max() > 1e-3 or radius == 9


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_finite_input_gives_finite_output_and_gradients(backend):
    """All keys outside the grid hidden, a window of one token, equal and huge keys: nothing turns into NaN."""
    grid = Grid(5, 9, prefix=4, suffix=2)
    mask = torch.zeros(1, 6, dtype=torch.bool)
    for dtype, size in ((torch.float32, 1e18), (torch.float16, 3e4)):
        q = torch.zeros(1, grid.tokens, 2, 16, dtype=dtype)
        k = torch.full_like(q, size).requires_grad_()
        v = torch.full_like(q, size).requires_grad_()
        for window in (Window(radius=1), Window(kernel_size=1), Window(kernel_size=3)):
            o = local_attention(q, k, v, grid, window, mask=mask, backend=backend)
            grads = torch.autograd.grad(o.sum(), (k, v))
            assert all(t.isfinite().all() for t in (o, *grads))


def test_pairs_count_the_window():
    for grid in (Grid(9, 14), Grid(20, 6), Grid(1, 5)):
        for window in (
            Window(radius=1),
            Window(radius=3.7),
            Window(radius=8),
            Window(radius=math.inf),
            Window(kernel_size=1),
        ):
            assert window.pairs(grid) == window.allowed(grid).sum()
    grid = Grid(4, 6, prefix=2, suffix=1)
    assert Window(radius=math.inf).share(grid) == 1.0


@pytest.mark.parametrize("case", [CASES[3], CASES[14], COUNTED[1]], ids=str)
def test_opcheck(case, monkeypatch):
    """The custom operators keep PyTorch's rules: schema, fake kernels, autograd."""
    from vision_attn.kernels.local import portable as local_portable

    calls = []
    op = local_portable.grid_attention
    monkeypatch.setattr(local_portable, "grid_attention", lambda *args: calls.append(args) or op(*args))
    inputs = draw(case, torch.float32)
    run(case, inputs, "torch")
    torch.library.opcheck(
        op.registered, tuple(t.detach().requires_grad_(t.requires_grad) if torch.is_tensor(t) else t for t in calls[0])
    )


@pytest.mark.parametrize(
    "case", [CASES[14], *(pytest.param(case, marks=pytest.mark.slow) for case in (CASES[4], COUNTED[0]))], ids=str
)
def test_compiles_without_a_break(case):
    inputs = draw(case, torch.float32)
    q, k, v, window, mask, leaves = inputs
    compiled = torch.compile(local_attention, fullgraph=True, backend="aot_eager")
    o = compiled(q, k, v, case.grid, window, mask=mask)
    grads = torch.autograd.grad(o.sum(), leaves)
    want = local_attention(q, k, v, case.grid, window, mask=mask)
    torch.testing.assert_close(o, want)
    for ours, exact in zip(grads, torch.autograd.grad(want.sum(), leaves), strict=True):
        torch.testing.assert_close(ours, exact, atol=1e-4, rtol=1e-4)


GRID = Grid(6, 8, prefix=2)


def bad(**change):
    """Return valid arguments with one change."""
    q, k, v = (torch.randn(1, GRID.tokens, 2, 16) for _ in range(3))
    arguments = dict(q=q, k=k, v=v, grid=GRID, window=Window(radius=3))
    return {**arguments, **{name: f(arguments) if callable(f) else f for name, f in change.items()}}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(q=lambda a: a["q"][0]), ValueError, r"q must be \[B, N, H, D\], got shape \(50, 2, 16\)"),
        (dict(v=lambda a: a["v"][..., :8]), ValueError, "one shape, got q .* and v"),
        (dict(k=lambda a: a["k"].double()), TypeError, "one floating dtype, got q torch.float32 and k torch.float64"),
        (
            {name: lambda a: a["q"].int() for name in "qkv"},
            TypeError,
            "q, k and v must be floating point, got q torch.int32$",
        ),
        (dict(k=lambda a: a["k"].to("meta")), ValueError, "one device, got q on cpu and k on meta"),
        (dict(grid=Grid(6, 8)), ValueError, "N = 50 tokens, but Grid.* has 48"),
        (
            dict(window=Window(kernel_size=5, dilation=2)),
            ValueError,
            "kernel_size 5 [*] dilation 2 does not fit in Grid",
        ),
        (dict(mask=torch.ones(1, 3, dtype=torch.bool)), ValueError, r"mask must be .* = \[1, 2\]"),
        (dict(mask=torch.ones(1, 2)), TypeError, "mask must be bool"),
        (dict(mask=[True, False]), TypeError, "mask must be bool.* got a list"),
        (dict(k=None), TypeError, r"k must be a tensor \[B, N, H, D\], got a NoneType"),
        (dict(grid=(6, 8)), TypeError, r"grid must be a Grid\(height, width\), got \(6, 8\)"),
        (dict(backend="cuda"), ValueError, "backend must be one of 'auto', .*, got 'cuda'"),
        (dict(window=Window(kernel_size=3, bias=torch.zeros(2, 5, 3))), ValueError, r"bias must be .* = \(2, 5, 5\)"),
        (dict(window=Window(radius=3, pooled=(torch.zeros(1, 4, 2, 8),) * 2)), ValueError, "pooled keys must be"),
        (
            dict(window=Window(radius=3, pooled=(torch.zeros(1, 4, 2, 16),) * 2, cell=2)),
            ValueError,
            "has 12 cells of side 2, got 4 and 4 pooled keys and values",
        ),
        (
            dict(window=Window(radius=3, pooled=(torch.zeros(1, 4, 2, 16),) * 2, cell=4)),
            ValueError,
            "cell 4 must divide the height and width of Grid",
        ),
        (
            dict(window=Window(radius=3, pooled=(torch.zeros(1, 12, 2, 16),) * 2, cell=2), backend="triton"),
            ValueError,
            "do not count the tokens of pooled keys",
        ),
    ],
    ids=[
        "rank",
        "shape",
        "dtype",
        "integers",
        "device",
        "tokens",
        "fit",
        "mask-shape",
        "mask-dtype",
        "mask-list",
        "no-tensor",
        "no-grid",
        "backend",
        "bias",
        "pooled",
        "cells-number",
        "cells-fit",
        "cells-triton",
    ],
)
def test_bad_input_is_named(change, error, message):
    with pytest.raises(error, match=message):
        local_attention(**bad(**change))


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        (dict(), ValueError, "give either radius or kernel_size"),
        (dict(radius=3, cell=2), ValueError, "give radius and pooled"),
        (dict(radius=3, cell=0.5), TypeError, "cell must be an int"),
        (dict(radius=3, kernel_size=3), ValueError, "give either radius or kernel_size"),
        (dict(radius=0), ValueError, "radius must be above 0"),
        (dict(radius=math.nan), ValueError, "radius must be a number of tokens, got nan"),
        (dict(radius="8"), TypeError, "radius must be a number"),
        (dict(radius=3, dilation=2), ValueError, "a disc has neither bias nor dilation"),
        (dict(kernel_size=0), ValueError, "kernel_size must be at least 1"),
        (dict(kernel_size=(3, 4, 5)), TypeError, "kernel_size must be an int or a pair"),
        (dict(kernel_size=3, dilation=0), ValueError, "dilation must be at least 1"),
    ],
    ids=["none", "cell", "cell-type", "both", "zero", "nan", "type", "disc-dilation", "kernel", "triple", "dilation"],
)
def test_a_bad_window_is_named(fields, error, message):
    with pytest.raises(error, match=message):
        Window(**fields)


@pytest.mark.parametrize(
    ("fields", "error"),
    [((0, 4), ValueError), ((4, 4.0), TypeError), ((4, 4, -1), ValueError), ((4, True), TypeError)],
    ids=["zero", "float", "negative-prefix", "bool"],
)
def test_a_bad_grid_is_named(fields, error):
    with pytest.raises(error, match="must be"):
        Grid(*fields)
