"""`torch.compile(fullgraph=True)` of converted models: equal to eager, and few graphs."""

from functools import partial
from typing import Any

import diffusers
import pytest
import torch
from converted_hosts import CLEAR, POOLED, SIZE, call, converted, expected
from host_runs import TEXT, distance, run, stock
from processor_table import PROCESSORS
from tiny_hosts import CHANNELS, HOST, TEXT_DIM, randomise
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from vision_attn import AgentSD, Conversion, LinFusion, convert
from vision_attn.conversion.doors import never_reached


def small_unet() -> nn.Module:
    """Return a UNet of one level: three would take the compiler a minute."""
    return randomise(
        diffusers.UNet2DConditionModel(
            in_channels=CHANNELS, out_channels=CHANNELS, layers_per_block=1, block_out_channels=(16,),
            down_block_types=("CrossAttnDownBlock2D",), up_block_types=("UpBlock2D",), mid_block_type=None,
            norm_num_groups=8, cross_attention_dim=TEXT_DIM, attention_head_dim=2,
        )
    )  # fmt: skip


def small_sd3() -> nn.Module:
    config = dict(HOST["sd3"].build().config) | dict(num_layers=1)
    return randomise(diffusers.SD3Transformer2DModel.from_config(config))


COMPILED = {
    "flux-grid": ("flux", HOST["flux"].build, dict(grid=SIZE), 1),
    "flux-use-grid": ("flux", HOST["flux"].build, {}, 1),
    "sd3": ("sd3", small_sd3, {}, 3),  # one of them reads the grid of the second size
    "unet": ("sd15-unet", small_unet, {}, 1),
    "vit": ("vit", HOST["vit"].build, {}, 2),
}


MERGED = AgentSD(cell=(1, 2), ratio=0.5, agent_ratio=0.9, random=False)  # wants the tokens that entered the block

# Their quick twins: the blocks of FLUX.1 below, and PRX as a whole in test_newer_hosts.py.
SLOW = ("flux-grid", "flux-use-grid", "sd3")


@pytest.fixture
def compiler() -> CompileCounterWithBackend:
    """Count the graphs, and trace through autograd and the fake kernels of our operators."""
    torch._dynamo.reset()
    return CompileCounterWithBackend("aot_eager")


@pytest.fixture
def tracer() -> CompileCounterWithBackend:
    """Count the graphs alone, in half of the time."""
    torch._dynamo.reset()
    return CompileCounterWithBackend("eager")


@pytest.mark.parametrize(
    "host_id, build, options, graphs",
    [pytest.param(*row, id=name, marks=pytest.mark.slow if name in SLOW else ()) for name, row in COMPILED.items()],
)
def test_compiled_whole(host_id: str, build: Any, options: Any, graphs: int, compiler: Any, request: Any) -> None:
    model = build()
    conversion = convert(model, POOLED, **options)
    sizes = [SIZE, (8, 12), SIZE] if graphs > 1 else [SIZE]
    want = [run(HOST[host_id], model, *size) for size in sizes]
    run_compiled = torch.compile(model, fullgraph=True, backend=compiler)
    if "use-grid" in request.node.callspec.id:
        with conversion.use_grid(*SIZE):
            got = [run(HOST[host_id], run_compiled, *SIZE)]
    else:
        got = [run(HOST[host_id], run_compiled, *size) for size in sizes]
    for output, eager in zip(got, want, strict=True):
        torch.testing.assert_close(output, eager, rtol=0, atol=1e-5)
    assert compiler.frame_count == graphs


FLOATS = ("multipole-pool", "agent-sd")  # of their specs; others are left to `make test-all`


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n not in FLOATS)) for n in PROCESSORS])
def test_compiled_whole_for_all_sizes_at_once(name: str, tracer: Any) -> None:
    """Numbers of a spec that are no ints are symbols too. An odd batch lets AgentSD draw nothing."""
    model = converted("vit", PROCESSORS[name])
    sizes = [SIZE, (12, 16)]
    want = [run(HOST["vit"], model, *size, batch=3) for size in sizes]
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=tracer)
    for size, output in zip(sizes, want, strict=True):
        torch.testing.assert_close(run(HOST["vit"], compiled, *size, batch=3), output, rtol=0, atol=1e-5)


def test_a_layer_that_is_compiled_by_itself_says_so() -> None:
    """After other tests Dynamo may let such a layer run as it is, and then it is answered."""
    model = converted("vit", CLEAR)
    name, *_ = Conversion.of(model).status
    layer = model.get_submodule(name)
    assert "compiled by itself" not in never_reached(name, layer)
    layer.compile(backend="aot_eager")
    assert "compiled by itself, where nothing can answer: compile its block" in never_reached(name, layer)
    try:
        got = run(HOST["vit"], model, *SIZE)
    except RuntimeError as error:
        assert str(error) == never_reached(name, layer)
    else:
        assert torch.equal(got, expected("vit", CLEAR))


def test_compiled_blocks(tracer: Any) -> None:
    config = dict(HOST["flux"].build().config) | dict(num_layers=3, num_single_layers=0)
    model = randomise(diffusers.FluxTransformer2DModel.from_config(config))
    before = run(HOST["flux"], model, 4, 6)
    convert(model, CLEAR)
    want = run(HOST["flux"], model, 4, 6)
    assert distance(want, before) > 1e-3
    model.compile_repeated_blocks(fullgraph=True, backend=tracer)
    torch.testing.assert_close(run(HOST["flux"], model, 4, 6), want, rtol=0, atol=1e-5)
    assert tracer.frame_count == 1  # for all blocks of a kind
    run(HOST["flux"], model, 8, 4)
    assert tracer.frame_count <= 3  # the stock model needs as many
    torch.testing.assert_close(run(HOST["flux"], model, 4, 6), want, rtol=0, atol=1e-5)
    assert tracer.frame_count <= 3


def test_compiled_before_conversion(tracer: Any) -> None:
    model = HOST["vit"].build()
    run_compiled = torch.compile(model, fullgraph=True, backend=tracer)
    before = run(HOST["vit"], run_compiled, *SIZE)
    conversion = convert(run_compiled, CLEAR)
    assert (
        distance(run(HOST["vit"], run_compiled, *SIZE), expected("vit", CLEAR))
        < 1e-5
        < distance(before, expected("vit", CLEAR))
    )
    with conversion.bypassed():
        torch.testing.assert_close(run(HOST["vit"], run_compiled, *SIZE), before, rtol=0, atol=1e-5)
    conversion.revert()
    assert torch.equal(run(HOST["vit"], run_compiled, *SIZE), before)


def test_compiled_backward(compiler: Any) -> None:
    gradients = []
    for wrap in (lambda model: model, partial(torch.compile, fullgraph=True, backend=compiler)):
        model = converted("vit", POOLED).train()
        call("vit", wrap(model)).square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert compiler.frame_count == 1
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_flux_compiled_whole_without_a_grid_is_refused(tracer: Any) -> None:
    model, inputs = converted("flux", CLEAR), HOST["flux"].inputs(*SIZE, 2, TEXT)
    want = model(**inputs).sample
    with torch.no_grad(), pytest.raises(Exception, match="use_grid"):
        torch.compile(model, fullgraph=True, backend=tracer)(**inputs)
    assert torch.equal(model(**inputs).sample, want)


@pytest.mark.parametrize("host_id", ["vit", *(pytest.param(name, marks=pytest.mark.slow) for name in ("flux", "sd35"))])
def test_compiled_whole_with_another_grid_is_refused(host_id: str, tracer: Any) -> None:
    model = HOST[host_id].build()
    convert(model, CLEAR, grid=(SIZE[0] + 2, SIZE[1]))
    with torch.no_grad(), pytest.raises(Exception, match="the grid given, "):
        run(HOST[host_id], torch.compile(model, fullgraph=True, backend=tracer), *SIZE)
    torch._dynamo.reset()
    in_parts = torch.compile(model, backend=tracer)
    with torch.no_grad():
        try:
            got = run(HOST[host_id], in_parts, *SIZE)
        except RuntimeError as error:
            assert "the grid given, " in str(error)
        else:
            torch.testing.assert_close(got, stock(host_id, SIZE), rtol=0, atol=1e-5)


@pytest.mark.parametrize("host_id", ["sd3", "pixart", "qwen-image", "sd15-unet", "vit"])
@pytest.mark.parametrize("spec", [CLEAR, LinFusion(mid_dim=4), MERGED], ids=["clear", "linfusion", "agentsd"])
def test_blocks_that_run_uncompiled_in_a_compiled_model(host_id: str, spec: Any, tracer: Any) -> None:
    """They know the grid of the forward that is compiled, not that of an earlier one, and what entered them."""
    case, model = HOST[host_id], converted(host_id, spec)
    sizes = [SIZE, SIZE[::-1]]
    want = [run(case, model, *size) for size in sizes]
    run(case, model, *SIZE)
    for name in Conversion.of(model).status:
        block = model.get_submodule(name.rpartition(".")[0])
        block.forward = torch.compiler.disable(block.forward)  # type: ignore[method-assign]
    compiled = torch.compile(model, backend=tracer)
    for size, output in zip(sizes[::-1], want[::-1], strict=True):
        torch.testing.assert_close(run(case, compiled, *size), output, rtol=0, atol=1e-5)
    assert set(Conversion.of(model).status.values()) == {"rerouted"} and tracer.frame_count


def test_levels_of_a_compiled_unet_are_known(tracer: Any) -> None:
    """AgentSD leaves the lower levels dense, whose downsampling the whole input tells."""
    spec = AgentSD(cell=(1, 2), ratio=0.5, agent_ratio=0.9, max_downsample=1, random=False)
    want = run(HOST["sd15-unet"], converted("sd15-unet", spec), 16, 16)
    everywhere = AgentSD(cell=(1, 2), ratio=0.5, agent_ratio=0.9, max_downsample=4, random=False)
    assert distance(run(HOST["sd15-unet"], converted("sd15-unet", everywhere), 16, 16), want) > 1e-3
    compiled = torch.compile(converted("sd15-unet", spec), backend=tracer)
    torch.testing.assert_close(run(HOST["sd15-unet"], compiled, 16, 16), want, rtol=0, atol=1e-5)
