"""`torch.jit.trace` and FLOP counters work on a converted model as on stock; torch.fx knows no sizes, and says so.

fvcore's and ptflops' counters trace with `torch.jit.trace`.
"""

from typing import Any

import pytest
import timm
import torch
from converted_hosts import CLEAR, SIZE, converted, hosts
from covering import quick
from host_runs import TEXT, run, size_of, stock
from processor_table import KIND_OF_SPEC, PROCESSORS
from tiny_hosts import HOST, noise
from torch import Tensor, nn
from torch.fx import symbolic_trace
from torch.utils.flop_counter import FlopCounterMode

from vision_attn import Conversion, Softmax, convert


class Positional(nn.Module):
    """A model that takes the tensors among its arguments by position, as `torch.jit.trace` gives them."""

    def __init__(self, host_id: str, model: nn.Module, inputs: dict[str, Any]) -> None:
        super().__init__()
        self.model, self.output = model, HOST[host_id].output
        self.tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
        self.others = {name: value for name, value in inputs.items() if name not in self.tensors}

    def forward(self, *tensors: Tensor) -> Tensor:
        return self.output(self.model(**dict(zip(self.tensors, tensors, strict=True)), **self.others))


def traced(host_id: str, model: nn.Module, size: tuple[int, int], batch: int = 2) -> Tensor:
    """Return what a trace answers to other values than those it was taken with: only sizes are constants in it."""
    module = Positional(host_id, model.eval(), HOST[host_id].inputs(*size, batch, TEXT))
    arguments = tuple(module.tensors.values())
    others = tuple(2 * t if t.is_floating_point() and t.dim() > 3 else t for t in arguments)
    with torch.no_grad():
        # diffusers caches some positions, which a second trace finds
        return torch.jit.trace(module, others, check_trace=False)(*arguments)


def built(host_id: str) -> str:
    """Return what is built without its fields; hosts of one class run the same code."""
    return str(getattr(HOST[host_id].build, "args", host_id))


TRACED = quick([(name,) for name in HOST if name != "wan"], (built, 1))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("host_id", TRACED)
def test_jit_trace_of_every_host(host_id: str) -> None:
    size = size_of(HOST[host_id])
    model = converted(host_id, Softmax())
    run(HOST[host_id], model, *size)
    status = Conversion.of(model).status
    torch.testing.assert_close(traced(host_id, model, size), stock(host_id), rtol=0, atol=1e-5)
    if host_id != "lumina2":  # it decides by a length, which is a tensor in a trace, whether attention gets its mask
        assert Conversion.of(model).status == status


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", quick([(name,) for name in PROCESSORS], (KIND_OF_SPEC.get, 1)))
def test_jit_trace_of_every_processor(name: str) -> None:
    model = HOST["vit"].build()
    convert(model, PROCESSORS[name])
    torch.testing.assert_close(traced("vit", model, SIZE), run(HOST["vit"], model, *SIZE))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", ["nat_mini", "dinat_mini", "agent_deit_tiny", "litv2_small", "ravlt_tiny"])
def test_jit_trace_of_backbones(name: str) -> None:
    import vision_attn.backbones  # noqa: F401

    model, x = timm.create_model(name).eval(), torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.trace(model, x, check_trace=False)(x), model(x))


@hosts("sd15-unet", "flux", "vit")
def test_flops_are_counted(host_id: str) -> None:
    counts = []
    for model in (HOST[host_id].build(), converted(host_id, Softmax()), converted(host_id, CLEAR)):
        with FlopCounterMode(display=False) as counter:
            run(HOST[host_id], model, *SIZE)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] and counts[2] > 0


def test_fx_names_the_way_out_and_traces_a_bypassed_model() -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, patch_size=8, embed_dim=48, depth=2, num_heads=3)
    x = noise(1, 3, 64, 64)
    want = model.eval()(x)
    conversion = convert(model, CLEAR)
    local = model(x)
    for trace in (symbolic_trace, lambda m: timm.models.create_feature_extractor(m, ["blocks.1"])):
        with pytest.raises(RuntimeError, match=r"blocks.0.attn cannot be traced by torch.fx.*bypassed"):
            trace(model)
    with conversion.bypassed():
        assert torch.equal(symbolic_trace(model)(x), want)
    assert torch.equal(model(x), local)


@pytest.mark.parametrize("part", ["", "blocks.1"])
def test_jit_script_names_the_way_out(part: str) -> None:
    """It compiles `forward`, in which a layer would attend to all tokens."""
    model = converted("vit", CLEAR)
    with pytest.raises(RuntimeError, match=r"attn cannot be compiled by torch.jit.script.*torch.jit.trace"):
        torch.jit.script(model.get_submodule(part))
    Conversion.of(model).revert()
    x = HOST["vit"].inputs(*SIZE, 2, TEXT)["x"]
    torch.testing.assert_close(torch.jit.script(model)(x), stock("vit", SIZE))
