"""LinearLocal's Triton backend and the Hedgehog's in Triton's interpreter (see `interpreted.py`)."""

import importlib

import pytest
import torch
from interpreted import cell_tiles
from operator_cases import CASES, Case, call, check_case, draw, inputs_of, one_head, run, shares

from vision_attn.grid import Grid
from vision_attn.kernels.hedgehog import hedgehog
from vision_attn.kernels.hedgehog.op import hedgehog_reasons
from vision_attn.kernels.linear_local import linear_local_attention
from vision_attn.kernels.triton.launching import inference_reasons, triton_reasons
from vision_attn.processors import LinearLocal, LinFusion
from vision_attn.processors.base import Layer

interpreter = pytest.mark.interpreter


MIXED = [one_head(case) for case in CASES if case.operator == "linear_local"]
HEADS = Case("linear_local", "heads", dict(grid=Grid(4, 6, prefix=3), size=3, H=3, D=40, F=80))
WIDE = Case("linear_local", "wide", dict(grid=Grid(9, 11, prefix=40), size=(3, 5), H=1, D=144, F=200))
QUICK = {
    (case.id, dtype) for case, dtype in zip(MIXED, (torch.float32, None, torch.float16, torch.float32), strict=True)
}
MANY = Case("linear_local", "many-features", dict(grid=Grid(6, 7, prefix=4), size=3, H=1, D=24, F=300))
EVERY = [(case, dtype) for case in (*MIXED, HEADS, WIDE, MANY) for dtype in (torch.float32, torch.float16)]
ROWS = [row for row in EVERY if (row[0].id, row[1]) in QUICK]
SLOW = [row for row in EVERY if row not in ROWS]


@interpreter
@pytest.mark.parametrize(("case", "dtype"), [*ROWS, *(pytest.param(*r, marks=pytest.mark.slow) for r in SLOW)], ids=str)
def test_error_is_within_the_budget(case, dtype):
    check_case(case, dtype)


@interpreter
@pytest.mark.parametrize(
    "size", [(5, 4), *(pytest.param(n, marks=pytest.mark.slow) for n in ((8, 3), 7, 2, 1))], ids=str
)
def test_windows_larger_than_a_tile_are_walked(size, monkeypatch):
    cell_tiles(monkeypatch, 16, 16)
    check_case(
        Case("linear_local", "parts", dict(grid=Grid(8, 4, prefix=3), size=size, H=1, D=16, F=20)), torch.float32
    )


@interpreter
@pytest.mark.parametrize(
    ("D", "F"), [(6, 7), *(pytest.param(*n, marks=pytest.mark.slow) for n in ((16, 7), (18, 130)))]
)
def test_any_number_of_channels(D, F):
    check_case(Case("linear_local", "odd", dict(grid=Grid(4, 6), size=2, H=1, D=D, F=F)), torch.float32)


@interpreter
def test_slices_that_lie_anywhere():
    leaves = [draw(2, 24, 1, 17) for _ in range(5)]
    q, k, v, a, b = (t.abs()[..., 1:] for t in leaves)
    o = [
        linear_local_attention((q, a), (k, b), v, Grid(4, 6), 2, torch.ones(1), backend=backend)
        for backend in ("triton", "reference")
    ]
    torch.testing.assert_close(*o, atol=1e-5, rtol=1e-4)
    grads = [torch.autograd.grad(x[..., ::2].square().sum(), leaves, retain_graph=True) for x in o]
    torch.testing.assert_close(*grads, atol=1e-5, rtol=1e-4)


@interpreter
@pytest.mark.parametrize("scale", [-0.4, 0.0, 12.0])
def test_scales(scale):
    case = Case("linear_local", "scale", dict(grid=Grid(5, 7), size=3, H=1, D=16, F=16, scale=scale))
    if scale:
        check_case(case, torch.float32)
    else:  # every logit is the greatest: each backend may choose whose gradient that is
        o = [call(case, inputs_of(case, torch.float32), backend) for backend in ("triton", "reference")]
        torch.testing.assert_close(*o, atol=1e-6, rtol=1e-5)


@interpreter
def test_an_empty_batch():
    t, gate = [torch.zeros(0, 12, 1, 16).requires_grad_() for _ in range(5)], torch.ones(1).requires_grad_()
    o = linear_local_attention((t[0], t[1]), (t[2], t[3]), t[4], Grid(3, 4), 2, gate, backend="triton")
    assert o.shape == (0, 12, 1, 16)
    o.sum().backward()
    assert torch.equal(gate.grad, torch.zeros(1))


@interpreter
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float16, marks=pytest.mark.slow)])
def test_sums_over_a_larger_grid_have_gradients(dtype):
    """With sums of another grid, features of the keys count only by what their window takes away."""
    generator = torch.Generator().manual_seed(0)

    def leaves(kind):
        generator.manual_seed(0)
        t = [torch.randn(2, 23, 1, 16, dtype=torch.float64, generator=generator).half().to(kind) for _ in range(3)]
        t += [torch.rand(2, 23, 1, 24, dtype=torch.float64, generator=generator).half().to(kind) for _ in range(2)]
        wide = torch.promote_types(kind, torch.float32)
        t += [
            80 * torch.rand(2, 1, 24, *rest, dtype=torch.float64, generator=generator).to(wide) for rest in ((16,), ())
        ]
        return [x.requires_grad_() for x in (*t, torch.full((1,), 0.7, dtype=wide))]

    def results(kind, backend):
        q, k, v, a, b, S, z, gate = t = leaves(kind)
        o = linear_local_attention((q, a), (k, b), v, Grid(4, 5, prefix=3), 2, gate, far=(S, z), backend=backend)
        return [o, *torch.autograd.grad(o[..., ::3].sum(), t)]

    ours, plain, exact = results(dtype, "triton"), results(dtype, "reference"), results(torch.float64, "reference")
    for o, p, e in zip(ours, plain, exact, strict=True):
        assert o.dtype == p.dtype and o.shape == e.shape
        assert (o - e).abs().max() <= 2 * ((p - e).abs().max() + torch.finfo(dtype).eps * e.abs().max())


@interpreter
def test_gradients_repeat_bit_for_bit():
    case = one_head(MIXED[0], grid=Grid(4, 6, prefix=3))
    for a, b in zip(*(run(case, inputs_of(case, torch.float32), "triton") for _ in range(2)), strict=True):
        assert torch.equal(a, b)


@interpreter
def test_equal_logits_give_the_gradient_of_the_greatest_to_one_of_them():
    """Where tokens are equal PyTorch divides it among them, and so do sums over equal tokens."""
    torch.manual_seed(1)
    token = [torch.randn(1, 1, 1, 8) for _ in range(5)]
    q, k, v, a, b = (t.repeat(1, 16, 1, 1) for t in token)
    v = torch.randn(1, 16, 1, 8)
    grads = []
    for backend in ("triton", "reference"):
        t = [x.detach().abs().requires_grad_() for x in (q, k, v, a, b)]
        o = linear_local_attention((t[0], t[3]), (t[1], t[4]), t[2], Grid(4, 4), 2, torch.ones(1), backend=backend)
        dq, dk, *_ = torch.autograd.grad(o[..., ::2].square().sum(), t)
        grads.append([dq, dk.view(1, 2, 2, 2, 2, 8).sum((2, 4))])
    torch.testing.assert_close(*grads, atol=1e-6, rtol=1e-4)


@interpreter
def test_opcheck_and_compile():
    from vision_attn.kernels.hedgehog.op import _features
    from vision_attn.kernels.linear_local.op import _linear_local

    q, k, v, a, b = (draw(1, 20, 1, 16).detach().abs().requires_grad_() for _ in range(5))
    shared, mask = [draw(1, 3, 1, 16) for _ in range(2)], torch.tensor([[True, False, True]])
    gate = torch.ones(1).requires_grad_()
    arguments = (q, k, v, a, b, *shared, None, None, mask, gate, [4, 5], [2, 2], 0.25)
    torch.library.opcheck(_linear_local.registered, arguments)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(_features.registered, (q.detach(), torch.eye(16)[None]), test_utils=checks)
    t = [draw(1, 20, 1, 16).detach() for _ in range(3)]

    def function(q, k, v):
        phi = [hedgehog(x, torch.eye(16)[None], backend="triton") for x in (q, k)]
        return linear_local_attention((q, phi[0]), (k, phi[1]), v, Grid(4, 5), 2, torch.ones(1), backend="triton")

    torch.testing.assert_close(torch.compile(function, fullgraph=True, backend="aot_eager")(*t), function(*t))

    def learned(q, k, v):
        return linear_local_attention((q, a), (k, b), v, Grid(4, 5), 2, gate, backend="triton")

    compiled = torch.compile(learned, fullgraph=True, backend="aot_eager")
    ours, want = (
        [o, *torch.autograd.grad(o.square().sum(), (q, k, v, a, b, gate))]
        for o in (compiled(q, k, v), learned(q, k, v))
    )
    torch.testing.assert_close(ours, want)


@interpreter
def test_what_is_not_fused_is_refused():
    q, k, v = (draw(1, 20, 1, 16) for _ in range(3))
    with pytest.raises(ValueError, match="it has no gradient"):
        hedgehog(q, torch.eye(16)[None], backend="triton")
    with pytest.raises(ValueError, match="head_dim 144 is above 128"):
        hedgehog(torch.ones(1, 2, 1, 144), torch.eye(144)[None], backend="triton")
    o = linear_local_attention((q, q.abs()), (k, k.abs()), v, Grid(4, 5), 2, torch.ones(1), backend="triton")
    (dq,) = torch.autograd.grad(o.square().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="has no derivative: for second derivatives, use backend='torch'"):
        dq.sum().backward()


def test_training_of_features_is_left_to_pytorch():
    """On a GPU 'auto' takes the Hedgehog's kernel unless something needs a gradient."""
    t, plain, trained = torch.ones(1, 4, 1, 16), torch.eye(16)[None], torch.eye(16)[None].requires_grad_()
    gpu = triton_reasons(t, auto=True)
    for weight, expected in ((plain, gpu), (trained, [*gpu, "it has no gradient"])):
        assert inference_reasons(t, t, weights=(weight,), auto=True) == expected
        assert hedgehog_reasons(t, weight, auto=True) == expected
    with torch.no_grad():
        assert inference_reasons(t, t, weights=(trained,), auto=True) == gpu


@interpreter
@pytest.mark.parametrize("spec", [LinearLocal(window_size=3), LinFusion(mid_dim=-1, feature_map="hedgehog")], ids=str)
def test_processors_are_fused_when_asked(spec, monkeypatch):
    called = []
    for module in ("hedgehog", "linear_local"):
        path, name = (
            f"vision_attn.kernels.{module}.op",
            dict(hedgehog="_features", linear_local="_linear_local")[module],
        )
        operator = getattr(importlib.import_module(path), name)
        monkeypatch.setattr(
            f"{path}.{name}", lambda *a, operator=operator, module=module: called.append(module) or operator(*a)
        )
    grid, t = Grid(4, 5, prefix=3), [draw(1, 23, 2, 16).detach() for _ in range(3)]
    fused, plain = (spec.build(Layer("", 2, 16, backend, 32)) for backend in ("triton", "torch"))
    with torch.no_grad():
        o = fused(*t, grid)
        assert called == ["hedgehog"] * 2 + ["linear_local"] * isinstance(spec, LinearLocal)
        torch.testing.assert_close(o, plain(*t, grid), atol=2e-5, rtol=1e-4)
        before = len(called)
        spec.build(Layer("", 2, 16, "auto", 32))(*t, grid)
    assert len(called) == before  # on a CPU they are interpreted
    with pytest.raises(ValueError, match="it has no gradient"):  # a backend that is named never falls back
        fused(*(x.requires_grad_() for x in t), grid)


@interpreter
def test_a_wrong_window_is_caught():
    with torch.no_grad():
        q, k, v, a, b = (draw(1, 48, 1, 16).abs() for _ in range(5))
        ours = linear_local_attention((q, a), (k, b), v, Grid(6, 8), (2, 3), torch.ones(1), backend="triton")
        other = linear_local_attention((q, a), (k, b), v, Grid(6, 8), 2, torch.ones(1), backend="reference")
    assert (ours - other).abs().max() > 1e-3


@interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "shape",
    [(2, 37, 2, 16), (1, 70, 1, 40), (1, 150, 2, 16), pytest.param((1, 50, 1, 128), marks=pytest.mark.slow)],
)
def test_features_of_the_hedgehog(shape, dtype):
    generator = torch.Generator().manual_seed(0)
    x = (3 * torch.randn(shape, generator=generator)).to(dtype)
    weight = torch.randn(shape[2], shape[3], shape[3], generator=generator) / 3
    exact = hedgehog(x.double(), weight.double(), backend="torch")
    ours, plain = (hedgehog(t, weight, backend=name) for name, t in (("triton", x), ("torch", x)))
    assert max(shares([ours], [plain], [exact], dtype)) <= 1
    strided = hedgehog(x.transpose(1, 2).contiguous().transpose(1, 2), weight, backend="triton")
    assert torch.equal(strided, ours)


@interpreter
@pytest.mark.parametrize("size", [0.0, 1e-40, 1e-12, 7.0, 300.0])
def test_weights_of_the_hedgehog_are_not_rounded(size):
    """Logits of a few hundred tell weights of 16 bits from those of 32."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 64, 1, 32, generator=generator).half()
    weight = size * torch.randn(1, 32, 32, generator=generator)
    ours, exact = hedgehog(x, weight, backend="triton"), hedgehog(x.double(), weight.double(), backend="torch")
    torch.testing.assert_close(ours.double(), exact, atol=2e-3, rtol=0)


@pytest.mark.parametrize(
    ("x", "weight", "message"),
    [
        (torch.ones(1, 4, 2, 8), torch.ones(2, 8, 4), r"weight must be \[H, D, D\] = \[2, 8, 8\]"),
        (torch.ones(4, 2, 8), torch.ones(2, 8, 8), r"x must be \[B, N, H, D\]"),
        (torch.ones(1, 4, 2, 8, dtype=torch.int64), torch.ones(2, 8, 8), "must be floating point, got x torch.int64"),
        (torch.ones(1, 4, 2, 8), torch.ones(2, 8, 8, dtype=torch.cfloat), "weight torch.complex64"),
        (torch.ones(1, 4, 2, 8), torch.ones(2, 8, 8, device="meta"), "got x on cpu and weight on meta"),
    ],
    ids=["shape-of-weight", "shape-of-x", "integers", "complex", "devices"],
)
def test_bad_input_of_the_hedgehog(x, weight, message):
    with pytest.raises((ValueError, TypeError), match=message):
        hedgehog(x, weight)
