"""The parts of `vision-attn bench pipelines`: architectures, FlexAttention, compiled blocks, timed steps."""

import time

import pytest
import torch
from torch import nn

from vision_attn import Clear, convert
from vision_attn.bench.local.flex import FlexClear
from vision_attn.bench.pipelines.architectures import ARCHITECTURES
from vision_attn.bench.pipelines.attention import WAYS
from vision_attn.bench.pipelines.steps import PipelineCase, Steps, compiled_blocks, shortened
from vision_attn.bench.timing import Clock

CPU, META = torch.device("cpu"), torch.device("meta")


def twin(name, device=CPU):
    model = ARCHITECTURES[name].twin()
    return model.build(device, torch.float32), model.arguments(64, device, torch.float32)


def run(model, arguments):
    """Return the first picture of a forward; Z-Image returns a list of them."""
    found = model(**arguments)[0]
    return found[0] if isinstance(found, list) else found


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_model_is_afterwards_as_it_was(name):
    model, arguments = twin(name)
    grid = PipelineCase(name, 64, (), small=True).grid
    with torch.no_grad():
        before = run(model, arguments)
        assert before.isfinite().all()
        for way in ("stock sdpa", "clear r8", "linfusion", "hilo"):
            with WAYS[way].use(model, grid, CPU) as conversion, compiled_blocks(model, (), False):
                inside = run(model, arguments)
                assert (conversion is None) == (way == "stock sdpa")
                assert conversion is None or set(conversion.status.values()) == {"rerouted"}
            assert inside.shape == before.shape and torch.equal(run(model, arguments), before)


@pytest.mark.parametrize(
    ("name", "millions", "stacks"),
    [
        ("flux", 11901, [19, 38]),
        ("sdxl", 2567, []),
        ("sd15", 860, []),
        ("pixart", 611, [28]),
        ("sd35", 2243, []),
        ("qwen", 20430, [60]),
        ("flux2", 32223, [8, 48]),
        ("zimage", 6155, [30]),
    ],
)
def test_full_sizes_are_the_released_ones(name, millions, stacks):
    model = ARCHITECTURES[name].build(META, torch.bfloat16)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == millions
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert [len(getattr(model, stack)) for stack in ARCHITECTURES[name].stacks] == stacks
    assert torch.get_default_dtype() == torch.float32


def test_flex_computes_the_disc():
    model = ARCHITECTURES["flux"].twin()
    built, arguments = model.build(CPU, torch.float32), model.arguments(128, CPU, torch.float32)
    grid, outputs = PipelineCase("flux", 128, ()).grid, []
    assert grid.image_tokens == 64
    for spec in (FlexClear.on(grid, 3, CPU), Clear(radius=3), Clear(radius=4)):
        conversion = convert(built, spec)
        with torch.no_grad():
            outputs.append(built(**arguments)[0])
        conversion.revert()
    flex, clear, wider = outputs
    assert torch.allclose(flex, clear, atol=1e-5) and not torch.allclose(flex, wider, atol=1e-4)


def test_compiled_blocks_are_given_back():
    model, _ = twin("sd35")
    blocks = [m for m in model.modules() if type(m).__name__ == "JointTransformerBlock"]
    with compiled_blocks(model, ("JointTransformerBlock",)):
        assert all(block._compiled_call_impl is not None for block in blocks) and blocks
    assert all(block._compiled_call_impl is None for block in blocks)
    with (
        pytest.raises(ValueError, match="has no FluxTransformerBlock"),
        compiled_blocks(model, ("FluxTransformerBlock",)),
    ):
        pass


class Sleeper(nn.Module):
    """Blocks that take their time."""

    def __init__(self, *milliseconds):
        super().__init__()
        self.blocks = nn.ModuleList(Sleep(ms) for ms in milliseconds)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


class Sleep(nn.Module):
    """One of them."""

    def __init__(self, ms):
        super().__init__()
        self.ms = ms

    def forward(self, x):
        time.sleep(self.ms / 1e3)
        return x + 1


def two_stacks():
    model = Sleeper(4)
    model.a, model.b = (Sleeper(*[ms] * count).blocks for ms, count in ((20, 3), (10, 5)))

    def step():
        x = model(torch.zeros(1))
        for block in (*model.a, *model.b):
            x = block(x)
        return x

    return model, step


def test_an_extrapolated_step_is_its_blocks_times_their_count(monkeypatch):
    clock = [0.0]  # moved by sleeping alone: a busy machine takes longer
    monkeypatch.setattr(time, "sleep", lambda seconds: clock.append(clock.pop() + seconds))
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    model, step = two_stacks()
    whole = Steps(step, model, ("a", "b"), CPU).measure(warm=False)
    short = Steps(step, model, ("a", "b"), CPU, longest_s=0.1).measure(warm=False)
    assert (whole["extrapolated"], short["extrapolated"]) == (False, True)
    assert whole["samples"] == 5 and short["samples"] == 2
    expected = 4 + 3 * 20 + 5 * 10
    assert [short["median_ms"], whole["median_ms"]] == pytest.approx([expected] * 2)
    assert short["blocks_ms"] == pytest.approx(dict(a=20, b=10))
    assert step().item() == 1 + 3 + 5 and len(model.a) == 3


def test_a_short_model_gets_its_blocks_back():
    model, _ = two_stacks()
    own = model.a
    with pytest.raises(RuntimeError), shortened(model, ("a", "b"), Clock(CPU)):
        assert len(model.a) == len(model.b) == 1
        raise RuntimeError
    assert model.a is own and len(model.b) == 5
