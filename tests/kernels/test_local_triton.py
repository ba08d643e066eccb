"""The Triton backend of `local_attention` against its definition: on the CPU in Triton's interpreter.

bf16 is silently wrong in the interpreter and the tuned launches are checked on a GPU: `tests/gpu/check_local.py`.
"""

import importlib.util
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_local_attention import CASES, Case, draw, exact_and_plain, run

from vision_attn.grid import Grid
from vision_attn.kernels.local import local_attention
from vision_attn.kernels.local.op import local_attention_lse, local_attention_triton, triton_reasons
from vision_attn.kernels.local.window import Window

INTERPRETED = "VISION_ATTN_INTERPRETED"
inside = pytest.mark.skipif(INTERPRETED not in os.environ, reason="run by test_in_the_interpreter")
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@needs_triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here: tests/gpu/check_local.py")
@pytest.mark.skipif(INTERPRETED in os.environ, reason="this is that process")
@pytest.mark.parametrize("speed", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_in_the_interpreter(speed):
    """Triton reads TRITON_INTERPRET when it is imported, and torch imports it: so a process of its own.

    It runs this file and the `triton` rows of the golden cases.
    """
    environment = {**os.environ, "TRITON_INTERPRET": "1", INTERPRETED: "1"}
    here = Path(__file__).parent
    files = [here / f"test_{name}.py" for name in ("local_triton", "golden_neighborhood", "golden_clear")]
    options = ["-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", "triton", "-m", speed]
    command = [sys.executable, "-m", "pytest", *options, *map(str, files)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=here.parent)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]


@pytest.fixture(autouse=True)
def _few_programs(monkeypatch):
    """Tiles that an interpreter walks quickly; their sizes are no matter of correctness."""
    if INTERPRETED in os.environ:
        from vision_attn.kernels.local import backward as local_backward
        from vision_attn.kernels.local import forward as local_forward
        from vision_attn.kernels.local import key_gradients as local_key_gradients
        from vision_attn.kernels.local.call import Tiles

        for module in (local_key_gradients, local_forward, local_backward):
            table = {(size, 256, math.inf): Tiles((8, 16), (8, 8), 1, 1) for size in (2, 4)}
            monkeypatch.setattr(module, "_CONFIGS", table)


def triton_run(case, inputs):
    """Like `run` of the portable tests, by way of the Triton operator."""
    q, k, v, window, mask, leaves = inputs
    scale = q.shape[-1] ** -0.5 if case.scale is None else case.scale
    o = local_attention_triton(q, k, v, case.grid, window, mask, scale)
    cotangent = torch.cos(0.7 * torch.arange(o.numel(), dtype=torch.float64)).view_as(o).to(o.dtype)
    return [o, *torch.autograd.grad(o, leaves, cotangent)]


def few_heads(monkeypatch, batch=1, heads=1):
    import test_local_attention

    monkeypatch.setattr(
        test_local_attention, "draw", lambda case, dtype=torch.float64: draw(case, dtype, batch=batch, heads=heads)
    )


def within_budget(ours, plain, exact, dtype):
    """At most twice the error of plain PyTorch and one rounding; zero gradients are sums in float32."""
    rounding = torch.finfo(dtype).eps * exact.abs().max() + 1e-6
    return ours.dtype == dtype and (ours - exact).abs().max() <= 2 * ((plain - exact).abs().max() + rounding)


@inside
@pytest.mark.parametrize(
    ("index", "dtype"),
    [*((i, torch.float32) for i in (1, 2, 3, 7, 8, 9, 10, 12, 14, 16, 19)), *((i, torch.float16) for i in (3, 13))],
    ids=lambda value: str(CASES[value]) if isinstance(value, int) else str(value),
)
def test_error_is_within_the_budget(index, dtype, monkeypatch):
    few_heads(monkeypatch)
    case = CASES[index]
    low, exact = exact_and_plain(case, dtype)
    for o, p, e in zip(triton_run(case, low), run(case, low, "reference"), exact, strict=True):
        assert within_budget(o, p, e, dtype)


@inside
@pytest.mark.parametrize("near", [True, False])
def test_a_table_of_biases_is_near_or_read_where_it_lies(near, monkeypatch):
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder

    from vision_attn.kernels.local import tiles as local_tiles

    gather, gathered = InterpreterBuilder.create_gather, []
    monkeypatch.setattr(InterpreterBuilder, "create_gather", lambda *args: gathered.append(1) or gather(*args))
    if not near:
        monkeypatch.setattr(local_tiles, "BIAS_NEAR", tl.constexpr(8))
    few_heads(monkeypatch, heads=2)
    low, exact = exact_and_plain(CASES[12], torch.float32)
    for o, p, e in zip(triton_run(CASES[12], low), run(CASES[12], low, "reference"), exact, strict=True):
        assert within_budget(o, p, e, torch.float32)
    assert bool(gathered) == near


@pytest.fixture
def boxes(monkeypatch):
    """Fetch tiles through TMA descriptors, as on Hopper."""
    from vision_attn.kernels.local import plan as local_plan
    from vision_attn.kernels.triton import plan as triton_plan

    local_plan.plan_queries.forget()
    local_plan.plan_keys.forget()
    monkeypatch.setattr(local_plan, "uses_boxes", lambda tensors: True)
    # what the interpreter asks of a tensor, to copy one that is on a GPU
    Shifted = triton_plan.Shifted
    for name in ("untyped_storage", "storage_offset", "size", "stride"):
        monkeypatch.setattr(Shifted, name, lambda self, name=name: getattr(self.tensor, name)(), raising=False)
    for name in ("new_empty", "set_"):
        monkeypatch.setattr(Shifted, name, lambda self, *args, **kwargs: self, raising=False)


BOXED = [
    CASES[3],
    CASES[13],
    CASES[14],
    CASES[16],
    Case(Grid(10, 13), dict(kernel_size=3, dilation=(3, 4)), head_dim=24, strided=True),
    Case(Grid(8, 12), dict(kernel_size=(2, 3), dilation=(4, 3))),
]


@inside
@pytest.mark.parametrize("case", BOXED, ids=str)
def test_boxes_equal_the_definition_and_stay_inside_the_tensors(case, boxes):
    """What lies before and behind q, k and v in memory is NaN, which a weight of zero would not hide."""
    q, k, v, window, mask, _ = draw(case, torch.float32, batch=2, heads=2)

    def surrounded(t):
        t = t.detach()
        t = t.transpose(1, 2).contiguous() if case.strided else t
        t = torch.cat([torch.full_like(t, math.nan), t, torch.full_like(t, math.nan)])[2:4]
        return (t.transpose(1, 2) if case.strided else t).requires_grad_()

    q, k, v = leaves = [surrounded(t) for t in (q, k, v)]
    inputs = (q, k, v, window, mask, leaves)
    for a, b in zip(triton_run(case, inputs), run(case, inputs, "reference"), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@inside
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


@inside
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


@inside
def test_extreme_logits_keep_the_budget():
    grid = Grid(10, 12, prefix=3)
    q, k, v = (torch.randn(1, grid.tokens, 1, 16) * 100 for _ in range(3))
    for window in (Window(radius=3), Window(kernel_size=5)):
        exact = local_attention(q.double(), k.double(), v.double(), grid, window, backend="reference")
        plain = local_attention(q, k, v, grid, window, backend="reference")
        ours = local_attention_triton(q, k, v, grid, window, None, 0.25)
        assert (ours - exact).abs().max() <= 2 * (plain - exact).abs().max() + 1e-5 * exact.abs().max()


@inside
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


@inside
def test_a_wrong_window_is_caught():
    grid = Grid(9, 12)
    q, k, v = (torch.randn(1, grid.tokens, 1, 16) for _ in range(3))
    ours = local_attention_triton(q, k, v, grid, Window(radius=3.2), None, 0.25)
    assert (ours - local_attention(q, k, v, grid, Window(radius=3), backend="reference")).abs().max() > 1e-3


def test_every_reason_is_listed(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    reasons = triton_reasons(torch.zeros(1, 4, 1, 320, dtype=torch.float64), Window(radius=2))
    assert "q is on cpu, not on cuda" in reasons
    assert "head_dim 320 is above 256" in reasons
    assert "dtype torch.float64 is none of float32, float16, bfloat16" in reasons
