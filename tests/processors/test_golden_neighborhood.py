"""NAT's and DiNAT's attention layer, recorded with NATTEN's own CPU kernels, against `local_attention`."""

import pytest
import torch
import torch.nn.functional as F
from golden_case import GOLDEN, TOLERANCE, mechanism

from vision_attn.grid import Grid
from vision_attn.kernels.local import Window, local_attention

CASES = sorted(path.stem for path in (GOLDEN / "attn_na2d").glob("*.json"))


def neighborhood_layer(x, weights, num_heads, kernel_size, dilation, backend, scale=None):
    """The layer of NATTEN 0.14 on `[B, height, width, C]`: it pads its input up to the window, then projects."""
    dilation = dilation or 1
    B, height, width, C = x.shape
    least = kernel_size * dilation
    x = F.pad(x, (0, 0, 0, max(0, least - width), 0, max(0, least - height)))
    grid = Grid(*x.shape[1:3])
    qkv = F.linear(x, weights["qkv.weight"], weights.get("qkv.bias"))
    q, k, v = qkv.reshape(B, grid.tokens, 3, num_heads, C // num_heads).unbind(2)
    window = Window(kernel_size=kernel_size, dilation=dilation, bias=weights.get("rpb"))
    o = local_attention(q, k, v, grid, window, scale=scale, backend=backend)
    o = o.reshape(B, grid.height, grid.width, C)[:, :height, :width]
    return F.linear(o, weights["proj.weight"], weights["proj.bias"])


SLOW = ("k3d1_open", "k3d3_open", "k7d1_open", "padded_open")  # in Triton's interpreter
ROWS = [(name, backend) for name in CASES for backend in ("reference", "torch")]
ROWS += [
    pytest.param(name, "triton", marks=[pytest.mark.interpreter, *([pytest.mark.slow] if name in SLOW else [])])
    for name in CASES
]


@pytest.mark.parametrize(("name", "backend"), ROWS)
def test_layer_equals_natten(name, backend):
    case = mechanism(f"attn_na2d/{name}")
    kwargs = case["cfg"]["ctor_kwargs"]
    weights = {name: t.requires_grad_() for name, t in case["state_dict"].items()}
    x = case["inputs"]["x"].requires_grad_()
    sizes = (kwargs["num_heads"], kwargs["kernel_size"], kwargs.get("dilation"))
    o = neighborhood_layer(x, weights, *sizes, backend, kwargs.get("qk_scale"))
    torch.testing.assert_close(o, case["output"], **TOLERANCE)
    o.backward(case["cotangent"])
    torch.testing.assert_close(x.grad, case["grad_input"]["x"], **TOLERANCE)
    for parameter, norm in case["cfg"]["param_grad_l2"].items():
        assert weights[parameter].grad.norm().item() == pytest.approx(norm, rel=1e-4), parameter


@pytest.mark.parametrize("wrong", ["larger-window", "transposed-bias"])
def test_a_wrong_layer_is_caught(wrong):
    case = mechanism("attn_na2d/k3d1_open")
    weights, kernel_size = dict(case["state_dict"]), 3
    if wrong == "larger-window":
        kernel_size = 4
        weights["rpb"] = F.pad(weights["rpb"], (1, 1, 1, 1))
    else:
        weights["rpb"] = weights["rpb"].mT.contiguous()
    o = neighborhood_layer(
        case["inputs"]["x"], weights, case["cfg"]["ctor_kwargs"]["num_heads"], kernel_size, 1, "torch"
    )
    assert not torch.allclose(o, case["output"], **TOLERANCE)
