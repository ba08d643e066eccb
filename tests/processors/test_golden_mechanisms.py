"""The attention layers of Agent, HiLo, InLine and RALA against what the authors' own modules returned.

The tolerance is atol 1e-5, rtol 1e-4; the cases' own suggestions, 1e-5 of the largest output, are wider.
"""

import re
from itertools import product

import pytest
import torch
from golden_case import TOLERANCE, mechanism
from golden_layers import FAMILIES, LAYERS, ROTARY, build

from vision_attn.backbones.agent.attention import AgentReducedAttention, AgentSelfAttention, AgentStripeAttention
from vision_attn.backbones.cswin_layers import StripeAttention
from vision_attn.backbones.inline.attention import (
    InLineReducedAttention,
    InLineSelfAttention,
    InLineStripeAttention,
)
from vision_attn.backbones.litv2.attention import HiLoSelfAttention
from vision_attn.backbones.pvt_layers import ReducedAttention
from vision_attn.backbones.ravlt.attention import RALASelfAttention, rotary, rotary_frequencies
from vision_attn.processors.hilo import low_heads


def test_all_mechanisms_have_cases():
    assert {name.split("/")[0] for name in LAYERS} == set(FAMILIES)
    assert ROTARY


@pytest.mark.parametrize("name", LAYERS)
def test_layer_equals_the_authors(name):
    case, layer, call = build(name)
    inputs = {key: x.requires_grad_() for key, x in case["inputs"].items()}
    o = call(*inputs.values())
    torch.testing.assert_close(o, case["output"], **TOLERANCE)
    o.backward(case["cotangent"])
    for key, x in inputs.items():
        assert x.grad.norm().item() == pytest.approx(case["cfg"]["input_grad_l2"][key], rel=1e-4)
        if key in case["grad_input"]:
            torch.testing.assert_close(x.grad, case["grad_input"][key], **TOLERANCE)
    norms = case["cfg"]["param_grad_l2"]
    assert {parameter for parameter, _ in layer.named_parameters()} == set(norms)
    for parameter, norm in norms.items():
        assert layer.get_parameter(parameter).grad.norm().item() == pytest.approx(norm, rel=1e-4, abs=1e-5), parameter


@pytest.mark.parametrize("name", ROTARY)
def test_rotary_equals_the_authors(name):
    case = mechanism(name)
    kwargs, size = case["cfg"]["ctor_kwargs"], re.search(r"RoPE\(\((\d+), (\d+)\)\)", case["cfg"]["call"]).groups()
    head_dim = kwargs["embed_dim"] // kwargs["num_heads"]
    cos, sin = rotary(torch.zeros(1, 1, *map(int, size)), head_dim)
    torch.testing.assert_close(torch.stack([sin, cos]), case["output"], **TOLERANCE)
    if "angle" in case["state_dict"]:
        torch.testing.assert_close(rotary_frequencies(head_dim), case["state_dict"]["angle"], rtol=1e-3, atol=1e-5)


def test_a_wrong_layer_is_caught():
    case, layer, call = build("attn_agent_swin/win_open")
    layer.ah_bias.data, layer.aw_bias.data = layer.aw_bias.data.mT.contiguous(), layer.ah_bias.data.mT.contiguous()
    assert not torch.allclose(call(case["inputs"]["x"]), case["output"], **TOLERANCE)


MAPS = [
    pytest.param(lambda: AgentSelfAttention(16, 2, 4, (4, 4), class_token=True), (5, 7), id="agent-class-token"),
    pytest.param(lambda: AgentReducedAttention(16, 2, 4, (4, 4), sr_ratio=2), (5, 7), id="agent-reduced"),
    pytest.param(lambda: ReducedAttention(16, 2, sr_ratio=2), (5, 7), id="reduced"),
    pytest.param(lambda: AgentStripeAttention(16, (4, 4), 0, 2, 2, agent_num=4), (3, 5), id="agent-stripe"),
    pytest.param(lambda: StripeAttention(16, (4, 4), 1, 2, 2), (5, 3), id="stripe"),
    pytest.param(lambda: HiLoSelfAttention(16, 4, alpha=0.5), (5, 3), id="hilo"),
    pytest.param(lambda: InLineSelfAttention(16, 2, window=(4, 3)), (5, 7), id="inline-windows"),
    pytest.param(lambda: InLineReducedAttention(16, 2), (5, 7), id="inline-reduced"),
]


@pytest.mark.parametrize(("make", "size"), MAPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_map_runs_forward_and_backward(make, size, dtype):
    layer = make().to(dtype)
    tokens = size[0] * size[1] + getattr(layer, "class_token", False)
    x = torch.randn(2, tokens, 16, dtype=dtype, requires_grad=True)
    if isinstance(layer, HiLoSelfAttention | ReducedAttention):
        o = layer(x.unflatten(1, size)).flatten(1, 2)
    else:
        o = layer(torch.stack([x] * 3) if isinstance(layer, StripeAttention) else x, size)
    assert o.shape == x.shape and o.dtype == dtype
    o.float().square().sum().backward()
    assert x.grad.isfinite().all() and x.grad.any()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


def test_stripes_that_do_not_divide_the_map_are_stripes_of_a_smaller_map():
    layer = StripeAttention(8, (4, 4), 0, 2, 2)
    qkv = torch.randn(3, 2, 4 * 5, 8)
    image = qkv.unflatten(2, (4, 5))
    parts = [layer(image[..., i : i + 2, :].flatten(2, 3), (4, len(range(5)[i : i + 2]))) for i in (0, 2, 4)]
    expected = torch.cat([part.unflatten(1, (4, -1)) for part in parts], 2).flatten(1, 2)
    torch.testing.assert_close(layer(qkv, (4, 5)), expected)


def test_injective_stripes_share_the_kernels_of_the_whole_map():
    """The authors' code refuses several stripes; each is a map of its own, with the kernels of all."""
    layer = InLineStripeAttention(8, (4, 4), 1, 2, 2)
    qkv, mean = torch.randn(3, 2, 5 * 4, 8), torch.randn(2, 8)
    parts = [layer(qkv[:, :, 4 * i : 4 * min(i + 2, 5)], (min(2, 5 - i), 4), mean) for i in (0, 2, 4)]
    torch.testing.assert_close(layer(qkv, (5, 4), mean), torch.cat(parts, 1))


def test_injective_windows_are_maps_of_their_own():
    layer, x = InLineSelfAttention(8, 2, window=(3, 4)), torch.randn(2, 5, 9, 8)
    o = layer(x)
    for rows, columns in product((slice(0, 3), slice(3, 5)), (slice(0, 4), slice(4, 8), slice(8, 9))):
        torch.testing.assert_close(o[:, rows, columns], layer(x[:, rows, columns].contiguous()))


@pytest.mark.parametrize("alpha", [0.0, 0.2, 0.9, 1.0])
def test_hilo_has_the_projections_of_its_heads(alpha):
    layer = HiLoSelfAttention(24, 12, alpha=alpha)
    low = low_heads(12, alpha, 2)
    groups = {name.split("_")[0] for name in layer.state_dict()}
    assert groups == {"l"} if low == 12 else groups == {"h"} if low == 0 else groups == {"l", "h"}


WRONG = [
    (lambda: AgentSelfAttention(16, 3, 4, (4, 4)), "dim 16 is not a multiple of num_heads 3"),
    (lambda: AgentSelfAttention(16, 2, 5, (4, 4)), "agent_num must be a square number, got 5"),
    (lambda: ReducedAttention(16, 0), "num_heads 0"),
    (lambda: StripeAttention(16, (4, 4), 2, 2, 2), "idx must be -1, 0 or 1, got 2"),
    (lambda: HiLoSelfAttention(16, 4, alpha=1.5), "alpha must be between 0 and 1"),
    (lambda: HiLoSelfAttention(16, 3), "num_heads 3"),
    (lambda: InLineSelfAttention(16, 3), "num_heads 3"),
    (lambda: InLineSelfAttention(16, 2, feature_map="elu"), "feature_map"),
    (lambda: RALASelfAttention(16, 8), r"dim 16 is not a multiple of 4 \* num_heads 8"),
]


@pytest.mark.parametrize(("make", "message"), WRONG)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
