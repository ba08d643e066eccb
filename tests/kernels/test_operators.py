"""Linear, agent and window attention against their definitions in float64: outputs, gradients, precision, errors."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from vision_attn.grid import Grid
from vision_attn.kernels.agent import Agents, Direct, agent_attention
from vision_attn.kernels.linear import Features, linear_attention, rotate_pairs
from vision_attn.kernels.linear_local import linear_local_attention
from vision_attn.kernels.window import window_attention

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])


@dataclass(frozen=True)
class Case:
    """One row: an operator, its sizes, and the options that its `call` reads."""

    operator: str
    id: str
    options: dict[str, Any]

    def __str__(self):
        return f"{self.operator}-{self.id}"


def linear(id, **options):
    return Case("linear", id, dict(N=90, M=90, H=3, D=16, F=16) | options)


def agent(id, **options):
    return Case("agent", id, dict(N=77, M=77, A=9, H=2, D=16) | options)


def window(id, grid, size, **options):
    return Case("window", id, dict(grid=grid, size=size, H=2, D=16) | options)


def linear_local(id, grid, size, **options):
    return Case("linear_local", id, dict(grid=grid, size=size, H=2, D=16, F=24) | options)


CASES = [
    linear("elu"),
    linear("relu", map="relu"),
    linear("hedgehog", map="none", F=24),
    linear("more-keys", N=13, M=130),
    linear("weights", weight=True),
    linear("hidden-keys", weight=True, hidden=True),
    linear("rala", rotary=True, globals=True, eps=1e-6),
    linear("rala-hidden", globals=True, weight=True, hidden=True),
    linear("strided", strided=True, D=40, F=40),
    linear("one-token", N=1, M=1),
    linear("zero-keys", map="relu", zero=True, eps=1e-4),
    agent("plain"),
    agent("biases", biases=True),
    agent("direct", direct=5),
    agent("direct-hidden", direct=7, seen=True, biases=True, query_scale=0.6),
    agent("other-keys", N=50, M=130, seen=True, strided=True, D=40),
    agent("one-agent", A=1),
    window("2x2", Grid(8, 12), 2),
    window("cut", Grid(7, 11), 2),
    window("text", Grid(9, 6, prefix=5), 4),
    window("text-hidden", Grid(9, 6, prefix=5, suffix=3), (4, 3), mask=True, strided=True, D=40),
    window("whole", Grid(5, 6), 16),
    window("stripe", Grid(8, 8), (8, 2), scale=0.4),
    window("one-row", Grid(1, 9, suffix=2), 3),
    linear_local("even", Grid(8, 12), 4),
    linear_local("cut-text", Grid(7, 10, prefix=5), 4),
    linear_local("hidden", Grid(9, 6, prefix=5, suffix=3), (4, 3), mask=True, strided=True, scale=0.6),
    linear_local("one-cell", Grid(4, 5, prefix=1), 8),
]


def inputs_of(case, dtype=torch.float64):
    """Return the tensors that take gradients, and the masks; equal values for every dtype up to rounding."""
    generator = torch.Generator().manual_seed(0)
    o = case.options

    def draw(*shape, positive=False):
        t = torch.randn(shape, dtype=torch.float64, generator=generator)
        return (t.abs() if positive else t).to(torch.float16).to(dtype).requires_grad_()

    def tokens(n, channels, positive=False):
        if o.get("strided"):
            return draw(2, o["H"], n, channels).transpose(1, 2)
        return draw(2, n, o["H"], channels, positive=positive)

    def keep(n):
        return torch.rand(2, n, generator=generator) > 0.4

    if case.operator == "linear":
        features = o.get("map") == "none"
        t = dict(q=tokens(o["N"], o["F"], features), k=tokens(o["M"], o["F"], features), v=tokens(o["M"], o["D"]))
        if o.get("zero"):
            t["k"] = (-t["k"].detach().abs()).requires_grad_()
        if o.get("weight"):
            t["key_weight"] = draw(2, o["M"], o["H"], positive=True)
            if o.get("hidden"):
                t["key_weight"] = (t["key_weight"].detach() * keep(o["M"])[..., None]).requires_grad_()
        if o.get("globals"):
            t["global_query"] = draw(2, o["H"], o["F"])
        return t
    if case.operator == "agent":
        N, M, A, H, D = (o[name] for name in "NMAHD")
        t = dict(q=tokens(N, D), k=tokens(M, D), v=tokens(M, D), agents=tokens(A, D))
        if o.get("biases"):
            t |= dict(key_bias=draw(H, A, M), query_bias=draw(H, N, A))
        if o.get("direct"):
            t |= dict(k_direct=tokens(o["direct"], D), v_direct=tokens(o["direct"], D))
        if o.get("seen"):
            t["seen"] = keep(M)
            t["direct_seen"] = keep(o["direct"]) if o.get("direct") else None
        return t
    grid = o["grid"]
    t = {name: tokens(grid.tokens, o["D"]) for name in "qkv"}
    if case.operator == "linear_local":
        t |= {name: draw(2, grid.tokens, o["H"], o["F"], positive=True) for name in ("phi_q", "phi_k")}
        t["gate"] = draw(o["H"], positive=True)
    return t | (dict(mask=keep(grid.prefix + grid.suffix)) if o.get("mask") else {})


def call(case, t, backend):
    """Run the operator of a row."""
    o = case.options
    if case.operator == "linear":
        rotary = None
        if o.get("rotary"):
            angles = torch.arange(o["N"])[:, None] * torch.linspace(0.1, 1, o["F"] // 2).repeat_interleave(2)
            rotary = (angles.cos(), angles.sin())
        features = Features(o.get("map", "elu"), rotary)
        weights = {name: t.get(name) for name in ("key_weight", "global_query")}
        eps = o.get("eps", 1e-6)
        return linear_attention(t["q"], t["k"], t["v"], features=features, **weights, eps=eps, backend=backend)
    if case.operator == "agent":
        agents = Agents(t["agents"], t.get("key_bias"), t.get("query_bias"), o.get("query_scale"))
        direct = Direct(t["k_direct"], t["v_direct"], t.get("direct_seen")) if "k_direct" in t else None
        return agent_attention(t["q"], t["k"], t["v"], agents, seen=t.get("seen"), direct=direct, backend=backend)
    mask, scale = t.get("mask"), o.get("scale")
    if case.operator == "linear_local":
        return linear_local_attention(
            (t["q"], t["phi_q"]), (t["k"], t["phi_k"]), t["v"], o["grid"], o["size"], t["gate"],
            mask=mask, scale=scale, backend=backend,
        )  # fmt: skip
    return window_attention(t["q"], t["k"], t["v"], o["grid"], o["size"], mask=mask, scale=scale, backend=backend)


def run(case, t, backend):
    """Return the output and all gradients for a cosine cotangent."""
    o = call(case, t, backend)
    leaves = [x for x in t.values() if x is not None and x.requires_grad]
    cotangent = torch.cos(0.7 * torch.arange(o.numel(), dtype=torch.float64)).view_as(o).to(o.dtype)
    return [o, *torch.autograd.grad(o, leaves, cotangent)]


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
    "seen": (ValueError, "seen", lambda: agent_attention(X, X, X, Agents(X), seen=torch.ones(1, 5).bool())),
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
