"""A converted model keeps working with what users do: copies, LoRA, hooks, checkpointing, half precision, compilers."""

import copy
import io
import pickle
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import accelerate
import diffusers
import pytest
import timm
import torch
from diffusers.hooks import apply_group_offloading
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from test_hosts import TEXT, distance, run
from tiny_hosts import CHANNELS, HOST, TEXT_DIM, noise, randomise
from tiny_pipelines import add_lora, ip_adapter_inputs, load_ip_adapter
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from vision_attn import Clear, Conversion, Softmax, convert
from vision_attn.intercept import is_rerouted

SIZE = (16, 8)
CLEAR, POOLED = Clear(radius=2), Clear(radius=2, pool=2)
specs = pytest.mark.parametrize("spec", [CLEAR, POOLED], ids=["clear", "pooled"])
when = pytest.mark.parametrize("before", [True, False], ids=["before", "after"])


def hosts(*names: str) -> Any:
    return pytest.mark.parametrize("host_id", names)


def converted(host_id: str, spec: Any) -> nn.Module:
    """A converted host, with its added parameters as if they had been trained."""
    model = HOST[host_id].build()
    conversion = convert(model, spec)
    with torch.no_grad():
        for i, parameter in enumerate(conversion.parameters()):
            parameter.add_(0.1 * noise(*parameter.shape, seed=i))
    return model


@cache
def stock(host_id: str) -> Tensor:
    return run(HOST[host_id], HOST[host_id].build(), *SIZE)


@cache
def expected(host_id: str, spec: Any) -> Tensor:
    return run(HOST[host_id], converted(host_id, spec), *SIZE)


def call(host_id: str, model: Any, size: tuple[int, int] = SIZE, **more: Any) -> Tensor:
    return HOST[host_id].output(model(**HOST[host_id].inputs(*size, 2, TEXT), **more))


def changed_by(model: nn.Module, action: Callable[[nn.Module], Any]) -> nn.Module:
    action(model)
    return model


def through_a_file(model: nn.Module) -> nn.Module:
    torch.save(model, file := io.BytesIO())
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda m: pickle.loads(pickle.dumps(m)), "torch.save": through_a_file}


@hosts("flux", "sd15-unet", "sd35", "vit", "eva02")
@pytest.mark.parametrize("make", COPIES.values(), ids=COPIES)
def test_copies(host_id: str, make: Any) -> None:
    model = converted(host_id, POOLED)
    run(HOST[host_id], model, 8, 8)
    other = make(model)
    assert torch.equal(run(HOST[host_id], other, *SIZE), expected(host_id, POOLED))
    assert [type(m).__name__ for m in other.modules()] == [type(m).__name__ for m in model.modules()]
    Conversion.of(other).revert()
    assert torch.equal(run(HOST[host_id], other, *SIZE), stock(host_id))
    assert torch.equal(run(HOST[host_id], model, *SIZE), expected(host_id, POOLED))
    with Conversion.of(make(model)).bypassed():
        assert torch.equal(run(HOST[host_id], model, *SIZE), expected(host_id, POOLED))


@hosts("flux", "sd15-unet", "vit")
def test_state_dict(host_id: str) -> None:
    weights = converted(host_id, POOLED).state_dict()
    fresh = HOST[host_id].build()
    conversion = convert(fresh, POOLED)
    fresh.load_state_dict(weights)
    assert torch.equal(run(HOST[host_id], fresh, *SIZE), expected(host_id, POOLED))
    result = HOST[host_id].build().load_state_dict(weights, strict=False)
    assert not result.missing_keys
    assert result.unexpected_keys == [name for name, _ in conversion.named_parameters()]


@hosts("flux", "sd15-unet", "sd35")
@specs
def test_save_pretrained(host_id: str, spec: Any, tmp_path: Path) -> None:
    model = converted(host_id, spec)
    model.save_pretrained(tmp_path)
    added = [name for name, _ in Conversion.of(model).named_parameters()]
    tensors = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    assert set(tensors) == set(model.state_dict()) and set(added) <= set(tensors)
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert sorted(info["unexpected_keys"]) == sorted(added) and not info["missing_keys"]
    assert not any(is_rerouted(module) for module in loaded.modules())
    assert torch.equal(run(HOST[host_id], loaded.eval(), *SIZE), stock(host_id))
    convert(loaded, spec)
    loaded.load_state_dict(tensors)
    assert torch.equal(run(HOST[host_id], loaded, *SIZE), expected(host_id, spec))


def gradients(host_id: str, checkpoint: bool, sizes: Any) -> dict[str, Tensor]:
    model = converted(host_id, POOLED).train()
    if checkpoint:
        getattr(model, "enable_gradient_checkpointing", getattr(model, "set_grad_checkpointing", None))()
    sum(call(host_id, model, size).square().mean() for size in sizes).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@hosts("flux", "sd35", "sd15-unet", "pixart", "vit")
@pytest.mark.parametrize("sizes", [[SIZE], [SIZE, (8, 8)], [SIZE, (8, 16)]], ids=["one", "two", "two-of-equal-length"])
def test_gradient_checkpointing(host_id: str, sizes: Any) -> None:
    want = gradients(host_id, False, sizes)
    got = gradients(host_id, True, sizes)
    assert got.keys() == want.keys() and any(".vision_attn." in name for name in want)
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=1e-6, msg=name)


@hosts("flux", "sd15-unet", "vit")
def test_checkpointing_with_sizes_of_equal_length_one_after_another(host_id: str) -> None:
    totals = []
    for checkpoint in (False, True):
        model = converted(host_id, POOLED).train()
        if checkpoint:
            getattr(model, "enable_gradient_checkpointing", getattr(model, "set_grad_checkpointing", None))()
        for size in (SIZE, (8, 16), SIZE):
            loss = call(host_id, model, size).square().mean()
            run(HOST[host_id], model, 8, 8)
            loss.backward()
        totals.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in totals[0].items():
        torch.testing.assert_close(totals[1][name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_checkpointed_layers_run_again_as_they_ran_first() -> None:
    outputs = {}
    for checkpoint in (False, True):
        model = converted("flux", POOLED).train()
        if checkpoint:
            model.enable_gradient_checkpointing()
        with Conversion.of(model).bypassed():
            teacher = call("flux", model)
        (teacher - call("flux", model)).square().mean().backward()
        outputs[checkpoint] = {name: p.grad for name, p in model.named_parameters()}
    for name, gradient in outputs[False].items():
        torch.testing.assert_close(outputs[True][name], gradient, rtol=1e-4, atol=1e-6, msg=name)


LOW = ["flux", "sd15-unet", "sd35", "vit"]


@hosts(*LOW)
def test_autocast(host_id: str) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        models = [HOST[host_id].build(), converted(host_id, Softmax()), converted(host_id, POOLED)]
        plain, softmax, output = [run(HOST[host_id], model, *SIZE) for model in models]
    assert output.dtype == plain.dtype and torch.equal(softmax, plain)
    rounding = distance(plain.float(), stock(host_id))
    assert 0 < distance(output.float(), expected(host_id, POOLED)) < 2 * rounding + 2**-8


def lowered(tree: Any, dtype: torch.dtype) -> Any:
    if isinstance(tree, dict):
        return {name: lowered(value, dtype) for name, value in tree.items()}
    return tree.to(dtype) if isinstance(tree, Tensor) and tree.is_floating_point() else tree


@hosts(*LOW)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["half", "bfloat16"])
def test_half_precision(host_id: str, dtype: torch.dtype, tmp_path: Path) -> None:
    outputs = []
    for model in (HOST[host_id].build(), converted(host_id, Softmax()), converted(host_id, POOLED)):
        model.to(dtype)
        with torch.no_grad():
            outputs.append(HOST[host_id].output(model(**lowered(HOST[host_id].inputs(*SIZE, 2, TEXT), dtype))))
    assert outputs[2].dtype == outputs[0].dtype and torch.equal(outputs[0], outputs[1])
    rounding = distance(outputs[0].float(), stock(host_id))
    limit = 2 * rounding + torch.finfo(dtype).eps
    assert 0 < distance(outputs[2].float(), expected(host_id, POOLED)) < limit
    conversion = Conversion.of(model)
    conversion.save(tmp_path)
    assert set(load_file(tmp_path / "vision_attn.safetensors")) == {name for name, _ in conversion.named_parameters()}


@hosts("flux", "sd15-unet", "sd35")
@when
def test_lora(host_id: str, before: bool) -> None:
    def adapted(spec: Any) -> nn.Module:
        model = HOST[host_id].build()
        steps = [lambda: add_lora(model), lambda: convert(model, spec)]
        for step in steps if before else steps[::-1]:
            step()
        return model

    want = run(HOST[host_id], add_lora(HOST[host_id].build()), *SIZE)
    torch.testing.assert_close(run(HOST[host_id], adapted(Softmax()), *SIZE), want, rtol=0, atol=1e-5)
    model = adapted(CLEAR)
    output = run(HOST[host_id], model, *SIZE)
    assert output.isfinite().all() and distance(output, want) > 1e-3
    model.disable_adapters()
    assert torch.equal(run(HOST[host_id], model, *SIZE), expected(host_id, CLEAR))
    model.enable_adapters()
    assert torch.equal(run(HOST[host_id], model, *SIZE), output)
    call(host_id, model).square().mean().backward()
    adapters = {name: p for name, p in model.named_parameters() if "lora_" in name}
    assert adapters and all(p.grad is not None and p.grad.any() for p in adapters.values())
    Conversion.of(model).revert()
    assert torch.equal(run(HOST[host_id], model, *SIZE), want)


def test_peft_around_a_vit() -> None:
    config = LoraConfig(r=2, target_modules=["qkv"], init_lora_weights=False)
    plain = get_peft_model(HOST["vit"].build(), config)
    model = get_peft_model(converted("vit", Softmax()), config)
    model.load_state_dict(plain.state_dict())
    assert torch.equal(run(HOST["vit"], model, *SIZE), run(HOST["vit"], plain, *SIZE))
    local = get_peft_model(converted("vit", CLEAR), config)
    run(HOST["vit"], local, *SIZE).isfinite().all()
    assert torch.equal(run(HOST["vit"], local.unload(), *SIZE), expected("vit", CLEAR))


@hosts("sd15-unet", "sd15-inpaint-unet", "flux")
def test_ip_adapter_loaded_after_conversion(host_id: str) -> None:
    outputs = []
    for spec in (None, Softmax(), CLEAR):
        model = HOST[host_id].build() if spec is None else converted(host_id, spec)
        load_ip_adapter(model)
        with torch.no_grad():
            outputs.append(call(host_id, model, **ip_adapter_inputs(model, 2)))
    torch.testing.assert_close(outputs[1], outputs[0], rtol=0, atol=1e-5)
    assert outputs[2].isfinite().all() and distance(outputs[2], outputs[0]) > 1e-3
    assert set(Conversion.of(model).status().values()) == {"rerouted"}
    Conversion.of(model).revert()
    with torch.no_grad():
        assert torch.equal(call(host_id, model, **ip_adapter_inputs(model, 2)), outputs[0])


CPU = torch.device("cpu")
OFFLOADS: dict[str, Callable[[nn.Module], Any]] = {
    "model": lambda model: accelerate.cpu_offload_with_hook(model, execution_device=CPU),
    "sequential": lambda model: accelerate.cpu_offload(model, execution_device=CPU),
    "group-leaf": partial(apply_group_offloading, onload_device=CPU, offload_type="leaf_level"),
    "group-block": partial(
        apply_group_offloading, onload_device=CPU, offload_type="block_level", num_blocks_per_group=1
    ),
}  # fmt: skip


@hosts("flux", "sd15-unet", "sd35")
@specs
@pytest.mark.parametrize("offload", OFFLOADS.values(), ids=OFFLOADS)
@when
def test_offload_hooks(host_id: str, spec: Any, offload: Any, before: bool) -> None:
    model = HOST[host_id].build()
    if before:
        offload(model)
    conversion = convert(model, spec)
    for i, (_, parameter) in enumerate(conversion.named_parameters()):
        parameter.data += 0.1 * noise(*parameter.shape, seed=i)
    if not before:
        offload(model)
    for _ in range(2):
        assert torch.equal(run(HOST[host_id], model, *SIZE), expected(host_id, spec))
    conversion.revert()
    assert torch.equal(run(HOST[host_id], model, *SIZE), stock(host_id))


@hosts("flux", "sd15-unet", "sd3", "pixart", "hunyuandit", "auraflow", "qwen-image")
@when
def test_fused_projections(host_id: str, before: bool) -> None:
    for spec, want in ((Softmax(), stock(host_id)), (CLEAR, expected(host_id, CLEAR))):
        model = HOST[host_id].build()
        steps = [model.fuse_qkv_projections, partial(convert, model, spec)]
        for step in steps if before else steps[::-1]:
            step()
        torch.testing.assert_close(run(HOST[host_id], model, *SIZE), want, rtol=0, atol=1e-5)
    Conversion.of(model).revert()
    torch.testing.assert_close(run(HOST[host_id], model, *SIZE), stock(host_id), rtol=0, atol=1e-5)
    model.unfuse_qkv_projections()
    assert torch.equal(run(HOST[host_id], model, *SIZE), stock(host_id))


def small_unet() -> nn.Module:
    """One level: the compiler takes a minute for three."""
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


@pytest.fixture
def compiler() -> CompileCounterWithBackend:
    torch._dynamo.reset()
    return CompileCounterWithBackend("aot_eager")


@pytest.mark.parametrize("host_id, build, options, graphs", COMPILED.values(), ids=COMPILED)
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


def test_compiled_blocks(compiler: Any) -> None:
    config = dict(HOST["flux"].build().config) | dict(num_layers=3, num_single_layers=0)
    model = randomise(diffusers.FluxTransformer2DModel.from_config(config))
    before = run(HOST["flux"], model, 4, 6)
    convert(model, CLEAR)
    want = run(HOST["flux"], model, 4, 6)
    assert distance(want, before) > 1e-3
    model.compile_repeated_blocks(fullgraph=True, backend=compiler)
    torch.testing.assert_close(run(HOST["flux"], model, 4, 6), want, rtol=0, atol=1e-5)
    assert compiler.frame_count == 1  # for all blocks of a kind
    run(HOST["flux"], model, 8, 4)
    assert compiler.frame_count <= 3  # as many as the stock model needs
    torch.testing.assert_close(run(HOST["flux"], model, 4, 6), want, rtol=0, atol=1e-5)
    assert compiler.frame_count <= 3


def test_compiled_before_conversion(compiler: Any) -> None:
    model = HOST["vit"].build()
    run_compiled = torch.compile(model, fullgraph=True, backend=compiler)
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


def test_flux_compiled_whole_without_a_grid_is_refused(compiler: Any) -> None:
    model, inputs = converted("flux", CLEAR), HOST["flux"].inputs(*SIZE, 2, TEXT)
    want = model(**inputs).sample
    with torch.no_grad(), pytest.raises(Exception, match="use_grid"):
        torch.compile(model, fullgraph=True, backend=compiler)(**inputs)
    assert torch.equal(model(**inputs).sample, want)


@hosts("flux", "sd15-unet", "vit")
def test_inference_mode_and_training_mode(host_id: str) -> None:
    model = converted(host_id, POOLED)
    for _ in range(2):
        with torch.inference_mode():
            assert torch.equal(call(host_id, model), expected(host_id, POOLED))
        assert torch.equal(run(HOST[host_id], model, *SIZE), expected(host_id, POOLED))
    assert model.train().training and all(module.training for module in model.modules())
    torch.testing.assert_close(call(host_id, model), expected(host_id, POOLED), rtol=0, atol=1e-5)


TIMM: dict[str, Callable[[Any, Tensor], Any]] = {
    "forward_features": lambda model, x: model.forward_features(x),
    "forward_intermediates": lambda model, x: torch.cat(
        [t.flatten() for t in model.forward_intermediates(x, indices=2, intermediates_only=True)]
    ),
    "get_intermediate_layers": lambda model, x: torch.cat([t.flatten() for t in model.get_intermediate_layers(x, n=2)]),
    "head": lambda model, x: model.forward_head(model.forward_features(x), pre_logits=True),
}


@pytest.mark.parametrize("way", TIMM.values(), ids=TIMM)
def test_ways_of_calling_timm(way: Any) -> None:
    x = HOST["vit"].inputs(*SIZE, 2, TEXT)["x"]
    with torch.no_grad():
        outputs = [way(model, x) for model in (HOST["vit"].build(), *(converted("vit", s) for s in (Softmax(), CLEAR)))]
        small = way(converted("vit", CLEAR), x[..., :64, :])
    torch.testing.assert_close(outputs[1], outputs[0], rtol=0, atol=1e-5)
    assert distance(outputs[2], outputs[0]) > 1e-3 and small.isfinite().all()


def test_timm_features_only() -> None:
    extractor = timm.create_model("vit_tiny_patch16_224", features_only=True, img_size=64, depth=2, out_indices=(0, 1))
    x = noise(2, 3, 64, 64)
    with torch.no_grad():
        plain = extractor.eval()(x)
        conversion = convert(extractor.model, Softmax())
        same = extractor(x)
        conversion.revert()
        convert(extractor.model, Clear(radius=1.5))
        local = extractor(x)
    for a, b, c in zip(plain, same, local, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
        assert distance(c, a) > 1e-3


def test_timm_fused_attn_is_switched_on_and_back() -> None:
    model = HOST["vit"].build()
    model.blocks[1].attn.fused_attn = False
    before = run(HOST["vit"], model, *SIZE)
    conversion = convert(model, POOLED)
    assert model.blocks[1].attn.fused_attn is True
    run(HOST["vit"], model, *SIZE)
    conversion.revert()
    assert [block.attn.fused_attn for block in model.blocks] == [True, False]
    assert torch.equal(run(HOST["vit"], model, *SIZE), before)
