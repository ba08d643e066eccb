"""Linear, agent and window attention against their definitions in float64: outputs, gradients, precision, errors."""

import pytest
import torch
from operator_cases import CASES, call, inputs_of, linear, run

from vision_attn.grid import Grid
from vision_attn.kernels.agent import Agents, Direct, agent_attention
from vision_attn.kernels.linear import Features, linear_attention, rotate_pairs
from vision_attn.kernels.linear_local import linear_local_attention
from vision_attn.kernels.window import window_attention

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_its_definition(case):
    t = inputs_of(case)
    for ours, exact in zip(run(case, t, "torch"), run(case, t, "reference"), strict=True):
        torch.testing.assert_close(ours, exact, atol=1e-10, rtol=1e-9)


# with one cell the gradient of its weight is a sum that cancels to nothing
@DTYPES
@pytest.mark.parametrize("case", [case for case in CASES if case.id != "one-cell"], ids=str)
def test_error_is_within_the_budget_of_the_dtype(case, dtype):
    """At most twice the error of the definition on inputs of this dtype, plus the roundings of SDPA's weights."""
    exact = run(case, inputs_of(case), "reference")
    ours, plain = (run(case, inputs_of(case, dtype), backend) for backend in ("torch", "reference"))
    for o, p, e in zip(ours, plain, exact, strict=True):
        rounding = 4 * torch.finfo(dtype).eps * max(e.abs().max(), 1)  # some gradients vanish exactly
        assert o.dtype == dtype
        assert (o - e).abs().max() <= 2 * (p - e).abs().max() + rounding


@pytest.mark.parametrize("case", CASES, ids=str)
def test_autocast_keeps_sums_in_float32(case):
    exact = run(case, inputs_of(case, torch.float32), "torch")
    with torch.autocast("cpu", torch.bfloat16):
        ours = call(case, inputs_of(case, torch.float32), "torch")
    tolerance = (
        1e-6 if case.operator.startswith("linear") else 0.03
    )  # PyTorch's own attention runs in bf16 under autocast
    assert (ours - exact[0]).abs().max() <= tolerance * exact[0].abs().max() + 1e-6


@pytest.mark.parametrize(
    "case", [c for c in CASES if c.id in ("rala-hidden", "direct-hidden", "text-hidden", "cut", "cut-text")], ids=str
)
def test_compiles_whole(case):
    torch._dynamo.reset()  # or the second row would be traced with symbolic sizes
    t = inputs_of(case, torch.float32)
    compiled = torch.compile(lambda t: call(case, t, "torch"), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(t), call(case, t, "reference"), atol=1e-5, rtol=1e-4)


def test_fp16_sums_do_not_overflow():
    q, k, v = (torch.full((1, 70000, 1, 16), 4.0, dtype=torch.float16) for _ in range(3))
    o = linear_attention(q, k, v)
    torch.testing.assert_close(o, v)


def test_large_window_problems_are_done_in_parts_with_the_same_gradients(monkeypatch):
    case = next(case for case in CASES if case.id == "text-hidden")
    whole = run(case, inputs_of(case), "torch")
    monkeypatch.setattr("vision_attn.kernels.window._MAX_SCORES", 1000)
    for ours, exact in zip(run(case, inputs_of(case), "torch"), whole, strict=True):
        torch.testing.assert_close(ours, exact, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("options", [{}, dict(weight=True, globals=True), dict(map="relu")], ids=str)
def test_without_keys_the_output_is_zero(options):
    case = linear("no-keys", M=0, **options)
    ours, exact = (run(case, inputs_of(case), backend) for backend in ("torch", "reference"))
    assert not ours[0].any()
    torch.testing.assert_close(ours, exact)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_an_empty_batch(case, backend):
    t = {name: None if x is None else x.detach() for name, x in inputs_of(case).items()}
    shared = ("gate", "key_bias", "query_bias")
    t = {name: x if x is None or name in shared else x[:0] for name, x in t.items()}
    leaves = [x.requires_grad_() for x in t.values() if x is not None and x.is_floating_point()]
    o = call(case, t, backend)
    assert o.shape[0] == 0 and o.shape[2:] == t["v"].shape[2:]
    grads = torch.autograd.grad(o, leaves, torch.zeros_like(o), materialize_grads=True)  # SDPA drops its mask's
    assert [g.shape for g in grads] == [x.shape for x in leaves]


def test_rotation_turns_pairs():
    x = torch.tensor([1.0, 0.0, 0.0, 1.0]).view(1, 1, 1, 4)
    quarter = torch.full((1, 4), torch.pi / 2)
    want = torch.tensor([0.0, 1.0, -1.0, 0.0]).view(1, 1, 1, 4)
    torch.testing.assert_close(rotate_pairs(x, quarter.cos(), quarter.sin()), want)


@pytest.mark.parametrize("wrong", ["no-weights", "other-cell", "no-bias"])
def test_a_wrong_formula_is_caught(wrong):
    ids = {"no-weights": "weights", "other-cell": "2x2", "no-bias": "biases"}
    case = next(case for case in CASES if case.id == ids[wrong])
    t = inputs_of(case)
    exact = call(case, t, "reference")
    if wrong == "other-cell":
        ours = window_attention(t["q"], t["k"], t["v"], case.options["grid"], (2, 3))
    elif wrong == "no-bias":
        ours = agent_attention(t["q"], t["k"], t["v"], Agents(t["agents"], None, t["query_bias"]))
    else:
        ours = linear_attention(t["q"], t["k"], t["v"], features=Features(case.options.get("map", "elu")))
    assert (ours - exact).abs().max() > 1e-3


def some(*shape, dtype=torch.float32):
    return torch.randn(shape, dtype=dtype)


X = some(1, 6, 2, 4)
ONES = torch.ones(2)
REFUSED = {
    "three-axes": (ValueError, "B, N, H, D", lambda: linear_attention(X[0], X, X)),
    "integers": (
        TypeError,
        "all inputs must be floating point, got q torch.int32$",
        lambda: linear_attention(X.int(), X.int(), X.int()),
    ),
    "dtypes": (TypeError, "float64", lambda: linear_attention(X, X.double(), X)),
    "key-features": (ValueError, "k must be", lambda: linear_attention(X, X[..., :2], X)),
    "value-tokens": (ValueError, "v must be", lambda: linear_attention(X, X, X[:, :3])),
    "map": (ValueError, "gelu", lambda: linear_attention(X, X, X, features=Features("gelu"))),
    "rotary": (ValueError, "rotary", lambda: linear_attention(X, X, X, features=Features(rotary=(some(6, 2),) * 2))),
    "weight": (ValueError, "key_weight", lambda: linear_attention(X, X, X, key_weight=some(1, 5, 2))),
    "global": (ValueError, "global_query", lambda: linear_attention(X, X, X, global_query=some(1, 2, 3))),
    "backend": (ValueError, "cuda!", lambda: linear_attention(X, X, X, backend="cuda!")),
    "agents-heads": (ValueError, "agents must be", lambda: agent_attention(X, X, X, Agents(some(1, 3, 1, 4)))),
    "no-agents": (ValueError, "at least one", lambda: agent_attention(X, X, X, Agents(X[:, :0]))),
    "key-bias": (ValueError, "key_bias", lambda: agent_attention(X, X, X, Agents(X, some(2, 6, 5)))),
    "mask": (ValueError, "mask", lambda: agent_attention(X, X, X, Agents(X), mask=torch.ones(1, 5).bool())),
    "direct": (ValueError, "direct.k", lambda: agent_attention(X, X, X, Agents(X), direct=Direct(X[..., :1], X))),
    "features": (
        ValueError,
        "features",
        lambda: linear_local_attention((X, X), (X, X[..., :2]), X, Grid(2, 3), 2, torch.ones(2)),
    ),
    "gate": (ValueError, "gate", lambda: linear_local_attention((X, X), (X, X), X, Grid(2, 3), 2, torch.ones(3))),
    "int-gate": (
        TypeError,
        "gate must be",
        lambda: linear_local_attention((X, X), (X, X), X, Grid(2, 3), 2, ONES.int()),
    ),
    "far-gate": (
        ValueError,
        "v on cpu and gate on meta",
        lambda: linear_local_attention((X, X), (X, X), X, Grid(2, 3), 2, ONES.to("meta")),
    ),
    "linear-list": (TypeError, "v must be a tensor .* got a list", lambda: linear_attention(X, X, [X])),
    "window-none": (TypeError, "q must be a tensor", lambda: window_attention(None, X, X, Grid(2, 3), 2)),
    "window-integers": (
        TypeError,
        "q, k and v must be floating point, got q torch.int32$",
        lambda: window_attention(X.int(), X.int(), X.int(), Grid(2, 3), 2),
    ),
    "window-dtypes": (
        TypeError,
        "share one floating dtype, got q torch.float32 and k torch.float64",
        lambda: window_attention(X, X.double(), X, Grid(2, 3), 2),
    ),
    "window-zero": (ValueError, "at least 1", lambda: window_attention(X, X, X, Grid(2, 3), 0)),
    "window-float": (TypeError, "window_size", lambda: window_attention(X, X, X, Grid(2, 3), 1.5)),
    "window-grid": (ValueError, "tokens", lambda: window_attention(X, X, X, Grid(2, 4), 2)),
    "window-mask": (ValueError, "prefix", lambda: window_attention(X, X, X, Grid(2, 2, 2), 2, mask=X[:, :, 0, 0] > 0)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_refused(name):
    error, message, run = REFUSED[name]
    with pytest.raises(error, match=message):
        run()
