"""The Triton backend of linear attention against its definition, in Triton's interpreter (see `interpreted.py`)."""

import pytest
import torch
from interpreted import linear_tiles
from operator_cases import CASES, Case, call, check_case, draw, inputs_of, one_head, shares

from vision_attn.kernels.linear import Features, feature_mean, linear_attention
from vision_attn.kernels.triton.launching import triton_reasons

interpreter = pytest.mark.interpreter
LINEAR = [one_head(case) for case in CASES if case.operator == "linear"]
WIDE = Case("linear", "wide", dict(N=30, M=30, H=1, D=144, F=160))
NARROW = Case("linear", "wide-features", WIDE.options | dict(D=40))
LONG = Case("linear", "wide-long", WIDE.options | dict(N=70, M=70))
MANY = Case("linear", "many-features", dict(N=20, M=26, H=1, D=24, F=272, weight=True))
HEDGEHOG = Case("linear", "hedgehog-d256", dict(N=40, M=40, H=2, D=256, F=512, map="none"))
ROWS = [
    (MANY, torch.float32),
    *((case, torch.float32) for case in LINEAR),
    *((case, torch.float16) for case in LINEAR if case.id in ("elu", "weights", "rala-hidden", "one-token")),
    (NARROW, torch.float32),
]
SLOW = [
    (MANY, torch.float16),
    *((HEDGEHOG, dtype) for dtype in (torch.float32, torch.float16)),
    (Case("linear", "many-hidden", MANY.options | dict(map="relu", hidden=True)), torch.float16),
    (WIDE, torch.float32),
    (LONG, torch.float32),
    (Case("linear", "wide-rala", LONG.options | dict(rotary=True, globals=True, weight=True)), torch.float16),
    *(
        (case, torch.float16)
        for case in LINEAR
        if case.id not in ("rala", "elu", "weights", "rala-hidden", "one-token")
    ),
    *((Case("linear", "wider", LONG.options | dict(D=256, F=256)), dtype) for dtype in (torch.float16, torch.float32)),
    *((Case("linear", f"d{D}", LONG.options | dict(D=D, F=D)), torch.float16) for D in (72, 80, 128)),
]


@interpreter
@pytest.mark.parametrize(("case", "dtype"), [*ROWS, *(pytest.param(*r, marks=pytest.mark.slow) for r in SLOW)], ids=str)
def test_error_is_within_the_budget(case, dtype, monkeypatch):
    if case in (WIDE, NARROW):
        linear_tiles(monkeypatch, 32)
    check_case(case, dtype)


@interpreter
@pytest.mark.parametrize("id", ["elu", "rala-hidden"])
def test_parts_of_the_sequence_add_up(id, monkeypatch):
    linear_tiles(monkeypatch, 16, 4)
    monkeypatch.setattr(
        "vision_attn.kernels.linear.forward.cut", lambda tokens, *rest, **options: (-(-tokens // 16), 16)
    )
    monkeypatch.setattr(
        "vision_attn.kernels.linear.backward.cut", lambda tokens, *rest, **options: (-(-tokens // 16), 16)
    )
    case = next(case for case in LINEAR if case.id == id)
    check_case(Case(case.operator, case.id, case.options | dict(N=50, M=150)), torch.float32)


BOTH = (torch.float32, torch.float16)
TILED = [(case, BOTH[i % 2]) for i, case in enumerate(LINEAR)] + [(NARROW, torch.float16)]
SLOW_TILED = [(case, BOTH[(i + 1) % 2]) for i, case in enumerate(LINEAR) if case.id != "rala"] + [
    (WIDE, torch.float16),
    (LONG, torch.float16),
]


@interpreter
@pytest.mark.parametrize(
    ("case", "dtype"), [*TILED, *(pytest.param(*r, marks=pytest.mark.slow) for r in SLOW_TILED)], ids=str
)
def test_tiles_that_tma_loads(case, dtype, monkeypatch):
    from vision_attn.kernels.linear import forward as linear_forward
    from vision_attn.kernels.triton.rows import Box

    made = []
    monkeypatch.setattr(linear_forward, "uses_boxes", lambda tensors: True)
    monkeypatch.setattr(Box, "of", lambda self, t, of=Box.of: made.append(self.tile) or of(self, t))
    linear_tiles(monkeypatch, 32, 2, boxes=True)
    check_case(case, dtype)
    if case.options.get("rotary"):  # its angles are read by their addresses, and so is all else
        assert not made
    else:
        assert len(made) >= 7  # k, v; q; q, do; k, v
    assert all(tile[:3] == [1, 32, 1] for tile in made)


@interpreter
@pytest.mark.parametrize("change", [dict(eps=0.5), dict(features=Features("relu"))], ids=["eps", "map"])
def test_calls_that_differ_by_one_setting_share_no_plan(change):
    q, k, v = (draw(1, 20, 1, 16) for _ in range(3))
    for options in (dict(), change, dict()):
        o, want = (linear_attention(q, k, v, **options, backend=backend) for backend in ("triton", "reference"))
        torch.testing.assert_close(o, want, atol=1e-5, rtol=1e-5)
        for a, b in zip(*(torch.autograd.grad(t.square().sum(), (q, k, v)) for t in (o, want)), strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


EDGES = {
    "near-zero-denominators": lambda dtype: (draw(1, 40, 2, 16, dtype=dtype), draw(1, 40, 2, 16, dtype=dtype), -9.0),
    "large": lambda dtype: (draw(1, 40, 2, 16, dtype=dtype, scale=40), draw(1, 40, 2, 16, dtype=dtype, scale=40), 0.0),
    "batch-0": lambda dtype: (draw(0, 40, 2, 16, dtype=dtype), draw(0, 40, 2, 16, dtype=dtype), 0.0),
    "no-queries": lambda dtype: (draw(1, 0, 2, 16, dtype=dtype), draw(1, 9, 2, 16, dtype=dtype), 0.0),
    "no-keys": lambda dtype: (draw(1, 9, 2, 16, dtype=dtype), draw(1, 0, 2, 16, dtype=dtype), 0.0),
}


@interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("edge", EDGES)
def test_edges(edge, dtype):
    q, k, shift = EDGES[edge](dtype)
    v = draw(*k.shape[:3], 24, dtype=dtype)
    t = [(x.detach() + s).requires_grad_() for x, s in ((q, 0), (k, shift), (v, 0))]
    results = []
    for backend, wide in (("triton", dtype), ("reference", dtype), ("reference", torch.float64)):
        leaves = [x.detach().to(wide).requires_grad_() for x in t]
        o = linear_attention(*leaves, backend=backend)
        cotangent = torch.cos(torch.arange(o.numel(), dtype=torch.float64)).view_as(o).to(wide)
        results.append([o, *torch.autograd.grad(o, leaves, cotangent)])
    if not t[0].numel() or not t[1].numel():
        assert all(torch.equal(a, torch.zeros_like(a)) for a in results[0])
    else:
        assert max(shares(*results, dtype)) <= 1


@interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("weight", [False, True], ids=["mean", "weighted"])
def test_mean_of_features(weight, dtype):
    results = []
    for backend, wide in (("triton", dtype), ("torch", dtype), ("torch", torch.float64)):
        torch.manual_seed(1)
        q = torch.randn(2, 1, 150, 24).to(dtype).to(wide).transpose(1, 2).requires_grad_()
        w = torch.rand(2, 150, 1).to(dtype).to(wide).requires_grad_() if weight else None
        m = feature_mean(q, weight=w, scale=0.3, backend=backend)
        cotangent = torch.cos(torch.arange(m.numel(), dtype=torch.float64)).view_as(m).to(m.dtype)
        results.append(list(torch.autograd.grad(m, [q, *([w] if weight else [])], cotangent)))
        if backend == "triton":
            mean = m
    torch.testing.assert_close(mean.double(), m, atol=1e-6, rtol=1e-6)
    assert max(shares(*results, dtype)) <= 1


@interpreter
def test_views_and_channels_that_are_not_neighbours():
    """Gradients of views land in the whole tensor, and q with strided channels is read as it is seen."""
    leaf = torch.randn(1, 60, 3, 2, 16).requires_grad_()
    o = [linear_attention(leaf[:, :, 0], leaf[:, :, 1], leaf[:, :, 2], backend=b) for b in ("triton", "reference")]
    for a, b in zip(*(torch.autograd.grad(t.square().sum(), leaf) for t in o), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    q = torch.randn(1, 60, 16, 2).transpose(2, 3)
    ours, exact = (linear_attention(q, q, q, backend=backend) for backend in ("triton", "reference"))
    torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-6)


@interpreter
def test_opcheck_and_compile():
    """PyTorch's rules hold (schema, fake kernels, autograd), and one graph holds the operator."""
    from vision_attn.kernels.linear.op import _linear, _mean

    q, k, v = (draw(1, 40, 1, 16) for _ in range(3))
    cos, sin = torch.randn(40, 16), torch.randn(40, 16)
    weight, query = torch.rand(1, 40, 1).requires_grad_(), draw(1, 1, 16)
    torch.library.opcheck(_linear.registered, (q, k, v, cos, sin, weight, query, "elu", 1e-6))
    torch.library.opcheck(_linear.registered, (q, k, v, None, None, None, None, "relu", 1e-6))
    torch.library.opcheck(_mean.registered, (q, weight, "elu", 0.25))
    compiled = torch.compile(linear_attention, fullgraph=True, backend="aot_eager")
    options = dict(features=Features("elu", (cos, sin)), key_weight=weight, global_query=query, backend="triton")
    o = [f(q, k, v, **options) for f in (compiled, linear_attention)]
    for a, b in zip(*(torch.autograd.grad(t.square().sum(), (q, k, v, weight, query)) for t in o), strict=True):
        torch.testing.assert_close(a, b)


@interpreter
def test_a_wrong_formula_is_caught():
    case = next(case for case in LINEAR if case.id == "weights")
    t = inputs_of(case)
    exact, low = call(case, t, "reference"), inputs_of(case, torch.float32)
    wrong = linear_attention(low["q"], low["k"], low["v"], backend="triton")
    assert next(shares([wrong], [exact.float()], [exact], torch.float32)) > 100


def test_every_reason_is_listed(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    q, v = torch.zeros(1, 4, 1, 320, dtype=torch.float64), torch.zeros(1, 4, 1, 8)
    reasons = triton_reasons(q, v, constants=(v.requires_grad_(),))
    assert "q is on cpu, not on cuda" in reasons
    assert "head_dim 320 is above 256" in reasons
    assert "dtype torch.float64 is none of float32, float16, bfloat16" in reasons
    assert "rotary needs a gradient" in reasons
    with pytest.raises(ValueError, match=r"triton.*cuda.*320"):
        linear_attention(q, q, q, backend="triton")
    with pytest.raises(ValueError, match="320 features, with a rotation or a global query, are above 256"):
        linear_attention(q, q, q[..., :8], global_query=q[:, 0], backend="triton")


@interpreter
@pytest.mark.parametrize("F", [64, 40])
def test_small_features_keep_their_precision_in_float16(F):
    """A tile that tokens or channels do not fill is scaled by what is there: phi(0) = 1 would hide it."""
    q, k, v = (torch.randn(1, 49, 1, F).half() for _ in range(3))
    k = (k / 2 - 15.5).half()
    results = []
    for dtype, backend in ((torch.float64, "reference"), (torch.float16, "triton")):
        leaves = [t.to(dtype).requires_grad_() for t in (q, k, v)]
        o = linear_attention(*leaves, features=Features("elu"), eps=1e-12, backend=backend)
        results.append([o, *torch.autograd.grad(o, leaves, torch.cos(torch.arange(o.numel())).view_as(o).to(dtype))])
    for exact, ours in zip(*results, strict=True):
        assert (ours - exact).abs().max() < 0.005 * exact.abs().max()
