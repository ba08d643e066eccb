"""Rows of linear, agent, window and linear-local attention: their inputs, how they are called, and error budgets."""

from dataclasses import dataclass
from typing import Any

import torch

from vision_attn.grid import Grid
from vision_attn.kernels.agent import Agents, Direct, agent_attention
from vision_attn.kernels.linear import Features, injective_attention, linear_attention
from vision_attn.kernels.linear_local import linear_local_attention
from vision_attn.kernels.window import Haloed, window_attention


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


def injective(id, **options):
    return Case("linear_injective", id, dict(N=90, M=90, H=3, D=16, F=16) | options)


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
    injective("plain"),
    injective("hidden", M=130, weight=True, hidden=True, held=True, scale=0.7),
    injective("weights", N=13, weight=True, F=24),
    injective("strided", strided=True, D=40, F=40),
    injective("one-token", N=1, M=1),
    agent("plain"),
    agent("biases", biases=True),
    agent("direct", direct=5),
    agent("direct-hidden", direct=7, mask=True, biases=True, query_scale=0.6),
    agent("other-keys", N=50, M=130, mask=True, strided=True, D=40),
    agent("one-agent", A=1),
    window("2x2", Grid(8, 12), 2),
    window("cut", Grid(7, 11), 2),
    window("text", Grid(9, 6, prefix=5), 4),
    window("text-hidden", Grid(9, 6, prefix=5, suffix=3), (4, 3), mask=True, strided=True, D=40),
    window("whole", Grid(5, 6), 16),
    window("stripe", Grid(8, 8), (8, 2), scale=0.4),
    window("one-row", Grid(1, 9, suffix=2), 3),
    window("halo", Grid(8, 12), Haloed(4, 1)),
    window("halo-cut-text-hidden", Grid(7, 11, prefix=5, suffix=3), Haloed((4, 3), (2, 4)), mask=True, strided=True),
    window("halo-cut", Grid(9, 7), Haloed(2, 3), scale=0.4),
    window("halo-whole", Grid(5, 6, prefix=1), Haloed(3, 16)),
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

    if case.operator in ("linear", "linear_injective"):
        features = o.get("map") == "none"
        t = dict(q=tokens(o["N"], o["F"], features), k=tokens(o["M"], o["F"], features), v=tokens(o["M"], o["D"]))
        if o.get("zero"):
            t["k"] = (-t["k"].detach().abs()).requires_grad_()
        if o.get("weight"):
            t["key_weight"] = draw(2, o["M"], o["H"], positive=True)
            if o.get("hidden"):
                t["key_weight"] = (t["key_weight"].detach() * keep(o["M"])[..., None]).requires_grad_()
            if o.get("held"):
                t["key_weight"] = t["key_weight"].detach()
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
        if o.get("mask"):
            t["mask"] = keep(M)
            t["direct_mask"] = keep(o["direct"]) if o.get("direct") else None
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
    if case.operator == "linear_injective":
        options = dict(key_weight=t.get("key_weight"), scale=o.get("scale"), backend=backend)
        return injective_attention(t["q"], t["k"], t["v"], **options)
    if case.operator == "agent":
        agents = Agents(t["agents"], t.get("key_bias"), t.get("query_bias"), o.get("query_scale"))
        direct = Direct(t["k_direct"], t["v_direct"], t.get("direct_mask")) if "k_direct" in t else None
        return agent_attention(t["q"], t["k"], t["v"], agents, mask=t.get("mask"), direct=direct, backend=backend)
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


def one_head(case, **options):
    """Return a row with one head, which an interpreter walks faster, and other options."""
    return Case(case.operator, case.id, case.options | dict(H=1) | options)


def draw(*shape, dtype=torch.float32, scale=1.0):
    """Return random numbers that take a gradient."""
    return (torch.randn(shape) * scale).to(dtype).requires_grad_()


def shares(ours, plain, exact, dtype):
    """Errors as shares of the budget: twice the error of plain PyTorch and one rounding of the largest value."""
    for o, p, e in zip(ours, plain, exact, strict=True):
        assert o.dtype == dtype and o.shape == e.shape
        budget = 2 * ((p - e).abs().max() + torch.finfo(dtype).eps * e.abs().max() + 1e-6)
        yield ((o - e).abs().max() / budget).item()


def check_case(case, dtype):
    """Check output and gradients of the Triton backend against float64."""
    exact = run(case, inputs_of(case), "reference")
    ours, plain = (run(case, inputs_of(case, dtype), backend) for backend in ("triton", "reference"))
    assert max(shares(ours, plain, exact, dtype)) <= 1
