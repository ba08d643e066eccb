"""The golden cases of attention layers: Agent, HiLo, InLine and RALA as the authors' own modules computed them.

Cases are found by their files, and constructor arguments are mapped generally: a case with other arguments needs no
change here.
"""

import re
from math import isqrt

from golden_case import case_names, mechanism

from vision_attn.backbones.agent.attention import AgentReducedAttention, AgentSelfAttention, AgentStripeAttention
from vision_attn.backbones.cswin_layers import StripeAttention
from vision_attn.backbones.inline.attention import (
    InLineReducedAttention,
    InLineSelfAttention,
    InLineStripeAttention,
)
from vision_attn.backbones.litv2.attention import HiLoSelfAttention
from vision_attn.backbones.pvt_layers import ReducedAttention
from vision_attn.backbones.ravlt.attention import RALASelfAttention, rotary

FAMILIES = [f"attn_agent_{name}" for name in ("deit", "pvt", "swin", "cswin", "dynamic")]
FAMILIES += ["attn_hilo", "attn_inline", "attn_rala"]
CASES = sorted(name for family in FAMILIES for name in case_names(family))
ROTARY = [name for name in CASES if mechanism(name)["cfg"]["upstream_class"] == "RoPE"]
LAYERS = [name for name in CASES if name not in ROTARY]


def pair(value):
    return (value, value) if isinstance(value, int) else tuple(value)


def arguments(case):
    """Constructor arguments without those that have no value, no effect, or one value in all of the authors' models."""
    kwargs = {name: value for name, value in case["cfg"]["ctor_kwargs"].items() if value is not None}
    for name, usual in (("attn_drop", 0), ("proj_drop", 0), ("drop", 0), ("kernel_size", 3), ("scale", -0.5)):
        assert kwargs.pop(name, usual) == usual
    return kwargs


def called_size(case):
    """Height and width that a case was called with, from the text of its `call`; None where it names none."""
    call = case["cfg"]["call"]
    found = re.search(r"H=(\d+), W=(\d+)", call) or re.search(r"hw_shape=\((\d+), (\d+)\)", call)
    return tuple(map(int, found.groups())) if found else None


def agent_layer(case):
    """DeiT, PVT and Swin: a layer on tokens `[B, N, C]`."""
    kwargs = arguments(case)
    patches, resolution = kwargs.pop("num_patches", None), kwargs.pop("input_resolution", None)
    size = kwargs.pop("window", None) or kwargs.pop("window_size", None) or resolution
    size = pair(isqrt(patches) if patches else size) if patches or size else None
    agent_grid = kwargs.pop("downstream_agent_shape", None)
    kwargs["qkv_bias"] = any(name in case["state_dict"] for name in ("qkv.bias", "q.bias"))
    reduced = "q.weight" in case["state_dict"]
    if "agent_num" not in kwargs:
        layer = ReducedAttention(**kwargs)
    else:
        kwargs |= dict(size=size, agent_grid=agent_grid and pair(agent_grid))
        if not reduced:
            kwargs["class_token"] = "ac_bias" in case["state_dict"]
        layer = (AgentReducedAttention if reduced else AgentSelfAttention)(**kwargs)
    if reduced:
        return layer, lambda x: layer(x.unflatten(1, called_size(case) or size)).flatten(1, 2)
    return layer, lambda x: layer(x, called_size(case) or size)


def stripe_layer(case):
    """CSWin: a layer on stacked q, k and v."""
    kwargs = arguments(case)
    kwargs["resolution"] = pair(kwargs["resolution"])
    layer = (AgentStripeAttention if "agent_num" in kwargs else StripeAttention)(**kwargs)
    return layer, lambda qkv: layer(qkv, kwargs["resolution"])


def hilo_layer(case):
    """LITv2: a layer on a map, called with tokens."""
    bias = any(name in case["state_dict"] for name in ("l_q.bias", "h_qkv.bias"))
    layer = HiLoSelfAttention(**(arguments(case) | dict(qkv_bias=bias)))
    return layer, lambda x: layer(x.unflatten(1, called_size(case))).flatten(1, 2)


def rala_layer(case):
    """RAVLT: a layer on a map `[B, height, width, C]`."""
    kwargs = arguments(case)
    layer = RALASelfAttention(**kwargs, linear=case["cfg"]["upstream_class"] != "VanillaSelfAttention")
    return layer, lambda x: layer(x, rotary(x, kwargs["dim"] // kwargs["num_heads"]))


def inline_layer(case):
    """InLine: a layer on tokens `[B, N, C]`, or on stacked q, k and v and a mean token."""
    kwargs = arguments(case)
    for name in ("shift_size", "qk_scale", "dim_out"):
        kwargs.pop(name, None)  # of no effect, or the usual one
    kwargs["qkv_bias"] = any(name in case["state_dict"] for name in ("qkv.bias", "q.bias"))
    if "get_v.weight" in case["state_dict"]:
        del kwargs["qkv_bias"]
        kwargs["resolution"] = pair(kwargs["resolution"])
        layer = InLineStripeAttention(**kwargs)
        return layer, lambda qkv, x_mean: layer(qkv, kwargs["resolution"], x_mean)
    if "q.weight" in case["state_dict"]:
        assert kwargs.pop("sr_ratio", 1) == 1
        layer = InLineReducedAttention(**kwargs)
        return layer, lambda x: layer(x.unflatten(1, called_size(case))).flatten(1, 2)
    size = pair(kwargs.pop("window", None) or kwargs.pop("window_size", None))
    kwargs["feature_map"] = kwargs.pop("kernel_func", "identity").replace("leakyrelu", "leaky_relu")
    layer = InLineSelfAttention(**kwargs)
    return layer, lambda x: layer(x, size)


def build(name):
    """Return a case, the layer with the authors' weights, and a function of the case's inputs."""
    case = mechanism(name)
    family = name.split("/")[0]
    special = {"attn_agent_cswin": stripe_layer, "attn_hilo": hilo_layer, "attn_rala": rala_layer}
    special["attn_inline"] = inline_layer
    layer, call = special.get(family, agent_layer)(case)
    layer.load_state_dict(case["state_dict"])
    return case, layer, call
