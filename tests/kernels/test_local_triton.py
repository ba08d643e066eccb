"""The Triton backend of `local_attention` against its definition, in Triton's interpreter (see `interpreted.py`)."""

import math

import pytest
import torch
from interpreted import shifted_boxes
from local_cases import CASES, Case, draw, exact_and_plain, run, within_budget

from vision_attn.grid import Grid
from vision_attn.kernels.local import Window, local_attention, local_attention_lse
from vision_attn.kernels.local.op import local_attention_triton
from vision_attn.kernels.triton.launching import triton_reasons

interpreter = pytest.mark.interpreter


def triton_run(case, inputs):
    """Like `run` of the portable tests, by way of the Triton operator."""
    q, k, v, window, mask, leaves = inputs
    scale = q.shape[-1] ** -0.5 if case.scale is None else case.scale
    o = local_attention_triton(q, k, v, case.grid, window, mask, scale)
    cotangent = torch.cos(0.7 * torch.arange(o.numel(), dtype=torch.float64)).view_as(o).to(o.dtype)
    return [o, *torch.autograd.grad(o, leaves, cotangent)]


def row(case, dtype, *marks):
    return pytest.param(case, dtype, id=f"{'fp32' if dtype == torch.float32 else 'fp16'}-{case}", marks=marks)


DILATED = Case(Grid(7, 10, suffix=6), dict(kernel_size=(2, 3), dilation=(3, 2)), pooled=5)
BIASED = Case(Grid(4, 6, prefix=4), dict(kernel_size=3), bias=True, mask=True, strided=True)
BIASED_AND_DILATED = Case(Grid(5, 6, suffix=6), dict(kernel_size=(2, 3), dilation=(2, 1)), bias=True, pooled=5)
ROWS = [
    *(row(CASES[i], torch.float32) for i in (1, 3, 7, 9, 16)),
    row(BIASED_AND_DILATED, torch.float32),
    *(row(case, torch.float16) for case in (CASES[13], BIASED, DILATED)),
    *(row(CASES[i], torch.float32, pytest.mark.slow) for i in (2, 8, 10, 12, 14, 19)),
    row(CASES[3], torch.float16, pytest.mark.slow),
]


@interpreter
@pytest.mark.parametrize(("case", "dtype"), ROWS)
def test_error_is_within_the_budget(case, dtype):
    low, exact = exact_and_plain(case, dtype, batch=1, heads=1)
    for o, p, e in zip(triton_run(case, low), run(case, low, "reference"), exact, strict=True):
        assert within_budget(o, p, e, dtype)


@interpreter
@pytest.mark.parametrize("near", [True, False])
def test_a_table_of_biases_is_near_or_read_where_it_lies(near, monkeypatch):
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder

    from vision_attn.kernels.local import tiles as local_tiles

    gather, gathered = InterpreterBuilder.create_gather, []
    monkeypatch.setattr(InterpreterBuilder, "create_gather", lambda *args: gathered.append(1) or gather(*args))
    if not near:
        monkeypatch.setattr(local_tiles, "BIAS_NEAR", tl.constexpr(8))
    low, exact = exact_and_plain(BIASED, torch.float32, batch=1, heads=2)
    for o, p, e in zip(triton_run(BIASED, low), run(BIASED, low, "reference"), exact, strict=True):
        assert within_budget(o, p, e, torch.float32)
    assert bool(gathered) == near


@pytest.fixture
def boxes(monkeypatch):
    """Fetch tiles through TMA descriptors, as on Hopper."""
    from vision_attn.kernels.local import tiles

    tiles.plan_queries.forget()
    tiles.plan_keys.forget()
    monkeypatch.setattr(tiles, "uses_boxes", lambda tensors: True)
    shifted_boxes(monkeypatch)


BOXED = [
    Case(Grid(9, 13, prefix=5, suffix=9), dict(radius=4), mask=True, pooled=7),
    CASES[13],
    DILATED,
    Case(Grid(4, 9), dict(kernel_size=2, dilation=(1, 4)), head_dim=24, strided=True),
    *(
        pytest.param(case, marks=pytest.mark.slow)
        for case in (
            CASES[3],
            CASES[14],
            CASES[16],
            Case(Grid(10, 13), dict(kernel_size=3, dilation=(3, 4)), head_dim=24, strided=True),
            Case(Grid(8, 12), dict(kernel_size=(2, 3), dilation=(4, 3))),
        )
    ),
]


@interpreter
@pytest.mark.parametrize("case", BOXED, ids=str)
def test_boxes_equal_the_definition_and_stay_inside_the_tensors(case, boxes):
    """What lies before and behind q, k and v in memory is NaN, which a weight of zero would not hide."""
    q, k, v, window, mask, _ = draw(case, torch.float32, batch=2 if case == CASES[13] else 1, heads=2)

    def surrounded(t):
        t = t.detach()
        t = t.transpose(1, 2).contiguous() if case.strided else t
        t = torch.cat([torch.full_like(t, math.nan), t, torch.full_like(t, math.nan)])[len(t) : 2 * len(t)]
        return (t.transpose(1, 2) if case.strided else t).requires_grad_()

    q, k, v = leaves = [surrounded(t) for t in (q, k, v)]
    inputs = (q, k, v, window, mask, leaves)
    for a, b in zip(triton_run(case, inputs), run(case, inputs, "reference"), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@interpreter
def test_lse_and_its_gradient():
    """Two halves of the keys merge into the whole, and gradients flow through the merge."""
    grid = Grid(5, 6, prefix=3)
    q, k, v = (torch.randn(1, grid.tokens, 2, 16).requires_grad_() for _ in range(3))
    window = Window(radius=math.inf)
    o, lse = local_attention_lse(q, k, v, grid, window, None, 0.25)
    logits = torch.einsum("bnhd,bmhd->bhnm", q, k) * 0.25
    torch.testing.assert_close(lse, logits.logsumexp(-1), atol=1e-5, rtol=1e-5)
    weight = torch.randn_like(lse)
    ours = torch.autograd.grad((lse * weight).sum() + o.square().sum(), (q, k, v))
    want = torch.einsum("bhnm,bmhd->bnhd", logits.softmax(-1), v)
    exact = torch.autograd.grad((logits.logsumexp(-1) * weight).sum() + want.square().sum(), (q, k, v))
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@interpreter
@pytest.mark.parametrize("scale", [-0.3, 0.0], ids=["negative", "zero"])
def test_scales_that_reverse_or_erase_the_order(scale):
    grid = Grid(6, 9, prefix=2)
    q, k, v = (torch.randn(1, grid.tokens, 1, 16).requires_grad_() for _ in range(3))
    window = Window(radius=2.5)
    o = local_attention_triton(q, k, v, grid, window, None, scale)
    want = local_attention(q, k, v, grid, window, scale=scale, backend="reference")
    torch.testing.assert_close(o, want, atol=1e-5, rtol=1e-5)
    for a, b in zip(*(torch.autograd.grad(t.square().sum(), (q, k, v)) for t in (o, want)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@interpreter
def test_extreme_logits_keep_the_budget():
    grid = Grid(10, 12, prefix=3)
    q, k, v = (torch.randn(1, grid.tokens, 1, 16) * 100 for _ in range(3))
    for window in (Window(radius=3), Window(kernel_size=5)):
        exact = local_attention(q.double(), k.double(), v.double(), grid, window, backend="reference")
        plain = local_attention(q, k, v, grid, window, backend="reference")
        ours = local_attention_triton(q, k, v, grid, window, None, 0.25)
        assert (ours - exact).abs().max() <= 2 * (plain - exact).abs().max() + 1e-5 * exact.abs().max()


@interpreter
@pytest.mark.parametrize(
    "case",
    [
        Case(Grid(10, 12), dict(kernel_size=5), head_dim=16, scale=60.0),
        pytest.param(Case(Grid(10, 12, prefix=3), dict(radius=3), head_dim=64, scale=100.0), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_weights_of_logits_in_the_thousands_add_up_to_one(case):
    """A log-sum-exp in one float32 would be rounded by more than plain PyTorch's weights are wrong.

    Other products of k and q than the forward's would be too, as on some CPUs: here they have no rounding.
    """
    low, exact = exact_and_plain(case, torch.float32, batch=1, heads=1, eighths=True)
    ours, plain = triton_run(case, low), run(case, low, "reference")
    assert within_budget(ours[3], plain[3], exact[3], torch.float32)


@interpreter
def test_opcheck_and_compile():
    """PyTorch's rules hold (schema, fake kernels, autograd), and one graph holds the operator."""
    from vision_attn.kernels.local.op import _local

    grid, window = Grid(4, 5, prefix=2, suffix=1), Window(kernel_size=3)
    q, k, v = (torch.randn(1, grid.tokens, 1, 16).requires_grad_() for _ in range(3))
    bias = torch.randn(1, 5, 5).requires_grad_()
    pooled = [torch.randn(1, 3, 1, 16).requires_grad_() for _ in range(2)]
    mask = torch.tensor([[True, False, True]])
    torch.library.opcheck(_local.registered, (q, k, v, *pooled, bias, mask, [4, 5, 2, 1], 0.0, [3, 3], [1, 1], 0.25))
    compiled = torch.compile(local_attention_triton, fullgraph=True, backend="aot_eager")
    ours = compiled(q, k, v, grid, window, None, 0.25)
    want = local_attention_triton(q, k, v, grid, window, None, 0.25)
    for a, b in zip(*(torch.autograd.grad(t.square().sum(), (q, k, v)) for t in (ours, want)), strict=True):
        torch.testing.assert_close(a, b)


@interpreter
def test_a_wrong_window_is_caught():
    grid = Grid(9, 12)
    q, k, v = (torch.randn(1, grid.tokens, 1, 16) for _ in range(3))
    ours = local_attention_triton(q, k, v, grid, Window(radius=3.2), None, 0.25)
    assert (ours - local_attention(q, k, v, grid, Window(radius=3), backend="reference")).abs().max() > 1e-3


def test_every_reason_is_listed(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    reasons = triton_reasons(torch.zeros(1, 4, 1, 320, dtype=torch.float64))
    assert "q is on cpu, not on cuda" in reasons
    assert "head_dim 320 is above 256" in reasons
    assert "dtype torch.float64 is none of float32, float16, bfloat16" in reasons
