"""Agent attention's Triton backend in the interpreter, and the authors' layers by way of all three operators.

`test_linear_triton.py` runs this file in a process that interprets.
"""

import os

import pytest
import torch
from golden_case import TOLERANCE as GOLDEN_TOLERANCE
from golden_layers import LAYERS, build
from test_linear_triton import INTERPRETED, draw, inside, shares, tiles
from test_operators import CASES, Case, call, inputs_of, run

from vision_attn.kernels import backend
from vision_attn.kernels.agent import Agents, agent_attention


@pytest.fixture(autouse=True)
def _few_programs(monkeypatch):
    if INTERPRETED in os.environ:
        tiles(monkeypatch, 64)
        few(monkeypatch, 64)


def few(monkeypatch, length, programs=1):
    from vision_attn.kernels.agent import backward as agent_backward
    from vision_attn.kernels.agent import forward as agent_forward
    from vision_attn.kernels.agent.forward import Blocks
    from vision_attn.kernels.linear.tiles import Launch

    table = {(size, 256): Blocks(length, Launch(length, 1, 1, programs)) for size in (2, 4)}
    for module, name in (
        (agent_forward, "_FORWARD"),
        (agent_backward, "_QUERIES"),
        (agent_backward, "_KEYS"),
    ):
        monkeypatch.setattr(module, name, table)


def one_head(case, **options):
    return Case(case.operator, case.id, case.options | dict(H=1) | options)


def check_case(case, dtype):
    exact = run(case, inputs_of(case), "reference")
    ours, plain = (run(case, inputs_of(case, dtype), backend) for backend in ("triton", "reference"))
    assert max(shares(ours, plain, exact, dtype)) <= 1


AGENT = [one_head(case) for case in CASES if case.operator == "agent"]
ROWS = [*((case, torch.float32) for case in AGENT), *((c, torch.float16) for c in AGENT if c.id == "direct-hidden")]
MANY = Case("agent", "many", dict(N=70, M=80, A=150, H=1, D=80, biases=True, direct=9))
SLOW = [*((case, torch.float16) for case in (*AGENT, MANY)), (MANY, torch.float32)]


@inside
@pytest.mark.parametrize(("case", "dtype"), [*ROWS, *(pytest.param(*r, marks=pytest.mark.slow) for r in SLOW)], ids=str)
def test_error_is_within_the_budget(case, dtype):
    check_case(case, dtype)


@inside
@pytest.mark.parametrize("id", ["biases", "other-keys"])
def test_parts_of_the_keys_and_of_the_queries_add_up(id, monkeypatch):
    few(monkeypatch, 16)
    for module in ("forward", "backward"):
        path = f"vision_attn.kernels._agent_{module}_triton.parts_of"
        monkeypatch.setattr(path, lambda tokens, *rest: (-(-tokens // 32), 32))
    case = next(case for case in AGENT if case.id == id)
    check_case(one_head(case, N=60, M=90), torch.float32)


@inside
@pytest.mark.parametrize(
    "shape", [(0, 9, 7, 5), (1, 0, 7, 5), (1, 1, 1, 1)], ids=["batch-0", "no-queries", "one-of-all"]
)
def test_edges(shape):
    B, N, M, A = shape
    t = [draw(B, n, 2, 16) for n in (N, M, M, A)]
    results = []
    for name in ("triton", "reference"):
        o = agent_attention(*t[:3], Agents(t[3]), backend=name)
        results.append([o, *torch.autograd.grad(o.square().sum(), t)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@inside
@pytest.mark.parametrize("scale", [-0.3, 0.0, 30.0])
def test_scales(scale):
    t = [draw(1, n, 1, 16) for n in (40, 50, 50, 6)]
    o = [agent_attention(*t[:3], Agents(t[3]), scale=scale, backend=name) for name in ("triton", "reference")]
    exact = agent_attention(*(x.double() for x in t[:3]), Agents(t[3].double()), scale=scale, backend="reference")
    assert max(shares([o[0]], [o[1]], [exact], torch.float32)) <= 1


@inside
def test_opcheck_and_compile():
    from vision_attn.kernels.agent.op import _attend

    q, k, v, bias = draw(2, 20, 1, 16), draw(2, 9, 1, 16), draw(2, 9, 1, 16), draw(1, 20, 7)
    seen = torch.rand(2, 9) > 0.3
    torch.library.opcheck(_attend.registered, (q, k, v, bias, seen, 7, [0.2, 0.3]))
    function = torch.compile(agent_attention, fullgraph=True, backend="aot_eager")
    agents = Agents(draw(2, 4, 1, 16), draw(1, 4, 9))
    o = [f(q, k, v, agents, backend="triton") for f in (function, agent_attention)]
    for a, b in zip(*(torch.autograd.grad(t.square().sum(), (q, k, v)) for t in o), strict=True):
        torch.testing.assert_close(a, b)


@inside
def test_a_wrong_bias_is_caught():
    case = next(case for case in AGENT if case.id == "biases")
    t = inputs_of(case, torch.float32)
    wrong = agent_attention(t["q"], t["k"], t["v"], Agents(t["agents"], None, t["query_bias"]), backend="triton")
    assert (wrong - call(case, t, "reference")).abs().max() > 1e-3


# One layer of each paper; agents in stripes are DeiT's, with another grouping of tokens.
GOLDEN = [next(n for n in LAYERS if n.startswith(f)) for f in dict.fromkeys(name.split("/")[0] for name in LAYERS)]


@pytest.fixture
def through_triton(monkeypatch):
    """Send what would be 'auto' to Triton; return the names of the operators that ran."""
    ran = []

    def pick(operator, name, implementations):
        if name != "auto":
            return backend.pick(operator, name, implementations)
        ran.append(operator)
        return implementations["triton"].run

    for module in ("linear", "agent", "window"):
        monkeypatch.setattr(f"vision_attn.kernels.{module}.pick", pick)
    return ran


@inside
@pytest.mark.parametrize(
    "name", [*GOLDEN, *(pytest.param(n, marks=pytest.mark.slow) for n in LAYERS if n not in GOLDEN)]
)
def test_layer_equals_the_authors(name, through_triton):
    case, layer, function = build(name)
    ((key, x),) = case["inputs"].items()
    o = function(x.requires_grad_())
    torch.testing.assert_close(o, case["output"], **GOLDEN_TOLERANCE)
    o.backward(case["cotangent"])
    torch.testing.assert_close(x.grad, case["grad_input"][key], **GOLDEN_TOLERANCE)
    for parameter, norm in case["cfg"]["param_grad_l2"].items():
        assert layer.get_parameter(parameter).grad.norm().item() == pytest.approx(norm, rel=1e-4, abs=1e-5), parameter
    assert through_triton or "Vanilla" in case["cfg"]["upstream_class"] or "agent_num" not in case["cfg"]["ctor_kwargs"]


@inside
@pytest.mark.slow
def test_linfusion_equals_the_authors(through_triton):
    import test_golden_linfusion

    test_golden_linfusion.test_released_weights_give_the_authors_output(test_golden_linfusion.CASES[0])
    assert set(through_triton) == {"linear_attention"}
