"""Agent attention's Triton backend in Triton's interpreter, and the authors' layers by way of all three operators."""

import pytest
import torch
from golden_case import TOLERANCE
from golden_layers import LAYERS, build
from interpreted import auto_is_triton, pair_tiles
from operator_cases import CASES, Case, call, check_case, draw, inputs_of, one_head, shares

from vision_attn.kernels.agent import Agents, agent_attention

interpreter = pytest.mark.interpreter
AGENT = [one_head(case) for case in CASES if case.operator == "agent"]
ROWS = [*((case, torch.float32) for case in AGENT), *((c, torch.float16) for c in AGENT if c.id == "direct-hidden")]
MANY = Case("agent", "many", dict(N=70, M=80, A=150, H=1, D=80, biases=True, direct=9))
SLOW = [*((c, torch.float16) for c in (*AGENT, MANY) if c.id != "direct-hidden"), (MANY, torch.float32)]


@interpreter
@pytest.mark.parametrize(("case", "dtype"), [*ROWS, *(pytest.param(*r, marks=pytest.mark.slow) for r in SLOW)], ids=str)
def test_error_is_within_the_budget(case, dtype):
    check_case(case, dtype)


@interpreter
@pytest.mark.parametrize("id", ["biases", "other-keys"])
def test_parts_of_the_keys_and_of_the_queries_add_up(id, monkeypatch):
    pair_tiles(monkeypatch, 16)
    path = "vision_attn.kernels.triton.pairs.cut"
    monkeypatch.setattr(path, lambda tokens, *rest, **options: (-(-tokens // 32), 32))
    case = next(case for case in AGENT if case.id == id)
    check_case(one_head(case, N=60, M=90), torch.float32)


@interpreter
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


@interpreter
@pytest.mark.parametrize("scale", [-0.3, 0.0, 30.0])
def test_scales(scale):
    t = [draw(1, n, 1, 16) for n in (40, 50, 50, 6)]
    o = [agent_attention(*t[:3], Agents(t[3]), scale=scale, backend=name) for name in ("triton", "reference")]
    exact = agent_attention(*(x.double() for x in t[:3]), Agents(t[3].double()), scale=scale, backend="reference")
    assert max(shares([o[0]], [o[1]], [exact], torch.float32)) <= 1


@interpreter
def test_opcheck_and_compile():
    from vision_attn.kernels.agent.op import _attend

    q, k, v, bias = draw(2, 20, 1, 16), draw(2, 9, 1, 16), draw(2, 9, 1, 16), draw(1, 20, 7)
    mask = torch.rand(2, 9) > 0.3
    torch.library.opcheck(_attend.registered, (q, k, v, bias, mask, 7, [0.2, 0.3]))
    function = torch.compile(agent_attention, fullgraph=True, backend="aot_eager")
    agents = Agents(draw(2, 4, 1, 16), draw(1, 4, 9))
    o = [f(q, k, v, agents, backend="triton") for f in (function, agent_attention)]
    for a, b in zip(*(torch.autograd.grad(t.square().sum(), (q, k, v)) for t in o), strict=True):
        torch.testing.assert_close(a, b)


@interpreter
def test_a_wrong_bias_is_caught():
    case = next(case for case in AGENT if case.id == "biases")
    t = inputs_of(case, torch.float32)
    wrong = agent_attention(t["q"], t["k"], t["v"], Agents(t["agents"], None, t["query_bias"]), backend="triton")
    assert (wrong - call(case, t, "reference")).abs().max() > 1e-3


# One layer of each paper; agents in stripes are DeiT's, with another grouping of tokens.
GOLDEN = [next(n for n in LAYERS if n.startswith(f)) for f in dict.fromkeys(name.split("/")[0] for name in LAYERS)]


@interpreter
@pytest.mark.parametrize(
    "name", [*GOLDEN, *(pytest.param(n, marks=pytest.mark.slow) for n in LAYERS if n not in GOLDEN)]
)
def test_layer_equals_the_authors(name, monkeypatch):
    ran = auto_is_triton(monkeypatch)
    case, layer, function = build(name)
    inputs = {key: x.requires_grad_() for key, x in case["inputs"].items()}
    o = function(*inputs.values())
    torch.testing.assert_close(o, case["output"], **TOLERANCE)
    o.backward(case["cotangent"])
    for key, x in inputs.items():
        assert x.grad.norm().item() == pytest.approx(case["cfg"]["input_grad_l2"][key], rel=1e-4)
        if key in case["grad_input"]:
            torch.testing.assert_close(x.grad, case["grad_input"][key], **TOLERANCE)
    for parameter, norm in case["cfg"]["param_grad_l2"].items():
        assert layer.get_parameter(parameter).grad.norm().item() == pytest.approx(norm, rel=1e-4, abs=1e-5), parameter
    assert ran or "Vanilla" in case["cfg"]["upstream_class"] or "agent_num" not in case["cfg"]["ctor_kwargs"]
