"""LinFusion adds to the input of projections, whatever these have become: adapters, quantised, parametrized, fused."""

import threading
from collections.abc import Callable
from functools import cache
from typing import Any

import peft
import pytest
import torch
from converted_hosts import SIZE
from covering import quick
from diffusers.hooks.layerwise_casting import apply_layerwise_casting, apply_layerwise_casting_hook
from host_runs import distance, run
from peft import inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from tiny_hosts import HOST, noise
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from vision_attn import Conversion, LinFusion, Schedule, Softmax, convert, load
from vision_attn.conversion.state import plain
from vision_attn.processors.base import CHILD, stored_name

SPEC = LinFusion(mid_dim=4)
TARGETS = {"sd15-unet": ["to_q", "to_k"], "vit": ["qkv"], "dinov3": ["qkv"], "flux": ["to_q", "to_k"]}


def train(model: nn.Module, spec: Any = SPEC) -> nn.Module:
    """Convert a host to LinFusion, with networks that are not zero."""
    with torch.no_grad():
        for i, (name, parameter) in enumerate(convert(model, spec).named_parameters()):
            parameter.copy_(0.3 * noise(*parameter.shape, seed=i) + (".1.weight" in name))
    return model


def trained(host_id: str) -> nn.Module:
    return train(HOST[host_id].build())


@cache
def wanted(host_id: str) -> Tensor:
    return run(HOST[host_id], trained(host_id), *SIZE)


def inject(model: nn.Module, config: Any) -> list[BaseTunerLayer]:
    """Add an adapter that does something, and return its layers."""
    before = {name for name, _ in model.named_parameters()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        inject_adapter_in_model(config, model)
    model.eval()
    with torch.no_grad():
        for i, (name, parameter) in enumerate(model.named_parameters()):
            if plain(name) not in before and parameter.is_floating_point():
                parameter.add_(0.1 * noise(*parameter.shape, seed=i))
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


ADAPTERS: dict[str, Callable[[list[str]], Any]] = {
    "lora": lambda targets: peft.LoraConfig(r=2, target_modules=targets),
    "rslora": lambda targets: peft.LoraConfig(r=2, target_modules=targets, use_rslora=True),
    "dora": lambda targets: peft.LoraConfig(r=2, target_modules=targets, use_dora=True),
    "adalora": lambda targets: peft.AdaLoraConfig(init_r=2, total_step=10, target_modules=targets),
    "loha": lambda targets: peft.LoHaConfig(r=2, target_modules=targets),
    "lokr": lambda targets: peft.LoKrConfig(r=2, target_modules=targets),
    "oft": lambda targets: peft.OFTConfig(r=0, oft_block_size=4, target_modules=targets),
    "boft": lambda targets: peft.BOFTConfig(boft_block_size=4, target_modules=targets),
    "hra": lambda targets: peft.HRAConfig(r=2, target_modules=targets),
    "ia3-outputs": lambda targets: peft.IA3Config(target_modules=targets, feedforward_modules=[]),
    "ia3-inputs": lambda targets: peft.IA3Config(target_modules=targets, feedforward_modules=targets),
    "fourierft": lambda targets: peft.FourierFTConfig(n_frequency=10, target_modules=targets),
    "miss": lambda targets: peft.MissConfig(r=2, target_modules=targets),
    "shira": lambda targets: peft.ShiraConfig(r=1, target_modules=targets),
    "ln-tuning": lambda targets: peft.LNTuningConfig(target_modules=targets),
}


@pytest.mark.parametrize(
    "host_id, adapter, before",
    quick(
        [(host_id, adapter, before) for host_id in TARGETS for adapter in ADAPTERS for before in (True, False)],
        (lambda host_id, adapter, before: (host_id in ("vit",), adapter), 1),
        (lambda host_id, adapter, before: (host_id, before), 1),
    ),
)
def test_an_adapter_computes_what_it_does_merged(host_id: str, adapter: str, before: bool) -> None:
    model = HOST[host_id].build() if before else trained(host_id)
    layers = inject(model, ADAPTERS[adapter](TARGETS[host_id]))
    if before:
        train(model)
    apart = run(HOST[host_id], model, *SIZE)
    assert len(layers) > 1 and distance(apart, wanted(host_id)) > 1e-4
    for layer in layers:
        layer.merge()
    assert distance(apart, run(HOST[host_id], model, *SIZE)) < 1e-5
    for layer in layers:
        layer.unmerge()
    Conversion.of(model).revert()
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


SAVED_APART = ADAPTERS | {
    "whole-layers": lambda targets: peft.LoraConfig(r=2, target_modules=targets, modules_to_save=["head", "proj_out"]),
}


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("adapter", SAVED_APART)
@pytest.mark.parametrize("host_id", ["flux", "vit"])
def test_adapters_of_peft_have_files_of_their_own(host_id: str, adapter: str, before: bool, tmp_path: Any) -> None:
    """What they learn is not in ours, which loads into a host that has none; what the host learns under them is."""
    model = HOST[host_id].build() if before else trained(host_id)
    inject(model, SAVED_APART[adapter](TARGETS[host_id]))
    if before:
        train(model)
    own = f"{'head' if host_id == 'vit' else 'proj_out'}{'.original_module' * (adapter == 'whole-layers')}.weight"
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01)
        model.get_parameter(own).requires_grad_(False).add_(0.01)
    Conversion.of(model).save(tmp_path)
    again = HOST[host_id].build()
    added = {stored_name(name) for name, _ in load(again, tmp_path).named_parameters()}
    assert set(load_file(tmp_path / "vision_attn.safetensors")) - added == {own.replace(".original_module", "")}


def test_an_adapter_that_is_unloaded_leaves_the_networks() -> None:
    model = peft.get_peft_model(trained("vit"), peft.LoraConfig(r=2, target_modules=["qkv"], init_lora_weights=False))
    assert distance(run(HOST["vit"], model, *SIZE), wanted("vit")) > 1e-3
    assert torch.equal(run(HOST["vit"], model.unload(), *SIZE), wanted("vit"))


@pytest.mark.parametrize("host_id", ["flux", "sd15-unet", "sd3"])
@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_fused_projections(host_id: str, before: bool) -> None:
    model: Any = HOST[host_id].build()
    steps = [model.fuse_qkv_projections, lambda: train(model)]
    for step in steps if before else steps[::-1]:
        step()
    assert distance(run(HOST[host_id], model, *SIZE), wanted(host_id)) < 1e-5
    layers = inject(model, peft.LoraConfig(r=2, use_dora=True, target_modules=["to_qkv"]))
    apart = run(HOST[host_id], model, *SIZE)
    for layer in layers:
        layer.merge()
    assert distance(apart, run(HOST[host_id], model, *SIZE)) < 1e-5
    assert distance(apart, wanted(host_id)) > 1e-3


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


WEIGHTS: dict[str, Callable[[nn.Linear], Any]] = {
    "doubled": lambda layer: parametrize.register_parametrization(layer, "weight", Doubled()),
    "weight-norm": lambda layer: parametrizations.weight_norm(layer, "weight"),
    "old-weight-norm": lambda layer: torch.nn.utils.weight_norm(layer, "weight"),
    "spectral-norm": lambda layer: parametrizations.spectral_norm(layer, "weight"),
    "old-spectral-norm": lambda layer: torch.nn.utils.spectral_norm(layer, "weight"),
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", 0.3),
}


def projections(model: nn.Module, host_id: str) -> list[Any]:
    """Return the layers of a host that project to queries and keys of the image."""
    found = [(name.split("."), module) for name, module in model.named_modules()]
    return [module for path, module in found if path[-1] in TARGETS[host_id] and "attn2" not in path]


@pytest.mark.filterwarnings("ignore:.*_norm.* is deprecated")
@pytest.mark.parametrize("host_id", ["vit", "sd15-unet"])
@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_that_are_computed(host_id: str, name: str, before: bool) -> None:
    def change() -> None:
        with torch.random.fork_rng(devices=[]):
            for layer in projections(model, host_id):
                torch.manual_seed(0)
                WEIGHTS[name](layer)

    model, plain = HOST[host_id].build(), trained(host_id)
    steps = [change, lambda: train(model)]
    for step in steps if before else steps[::-1]:
        step()
    output = run(HOST[host_id], model, *SIZE)
    with torch.no_grad():
        for layer, copied in zip(projections(model, host_id), projections(plain, host_id), strict=True):
            copied.weight.copy_(layer.weight)
    assert distance(output, run(HOST[host_id], plain, *SIZE)) < 1e-5
    if "weight-norm" not in name:  # which leaves a weight as it is, until it is trained
        assert distance(output, wanted(host_id)) > 1e-3


@pytest.mark.parametrize("host_id", ["vit", "sd15-unet"])
@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated")
def test_quantised_layers(host_id: str) -> None:
    def quantised(model: nn.Module) -> Tensor:
        layers = set(projections(model, host_id))
        names = {name for name, module in model.named_modules() if module in layers}
        model = torch.ao.quantization.quantize_dynamic(model, names, dtype=torch.qint8)
        assert not any(type(layer) is nn.Linear for layer in projections(model, host_id))
        return run(HOST[host_id], model, *SIZE)

    own, without = (quantised(train(HOST[host_id].build(), spec)) for spec in (SPEC, LinFusion(mid_dim=-1)))
    assert distance(own, without) > 0.03
    assert 0 < distance(own, wanted(host_id)) < distance(without, wanted(host_id))


@pytest.mark.parametrize("host_id", ["vit", "sd15-unet", "flux"])
def test_layerwise_casting(host_id: str) -> None:
    model = trained(host_id)
    apply_layerwise_casting(model, torch.float16, torch.float32)
    assert distance(run(HOST[host_id], model, *SIZE), wanted(host_id)) < 1e-2
    assert {layer.weight.dtype for layer in projections(model, host_id)} == {torch.float16}
    assert {parameter.dtype for parameter in Conversion.of(model).parameters()} == {torch.float32}  # no `nn.Linear`
    for module in Conversion.of(model).specs:
        for inner in model.get_submodule(f"{module}.{CHILD}").modules():
            if isinstance(getattr(inner, "weight", None), nn.Parameter) and inner.weight.dim() == 2:
                apply_layerwise_casting_hook(inner, torch.float16, torch.float32, non_blocking=False)
    assert distance(run(HOST[host_id], model, *SIZE), wanted(host_id)) < 1e-2


def test_a_schedule_adds_in_its_stage_alone() -> None:
    host_id, timesteps = "flux", (0.9, 0.1)
    spec = Schedule(((0.5, SPEC), (1.0, Softmax())))
    outputs = []
    for made in (SPEC, Softmax(), spec):
        model: Any = train(HOST[host_id].build(), made)
        with torch.no_grad():
            inputs = [HOST[host_id].inputs(*SIZE, 2, 7) | dict(timestep=torch.full((2,), t)) for t in timesteps]
            outputs.append([model(**one).sample for one in inputs])
    linear, dense, mixed = outputs
    torch.testing.assert_close(mixed[0], linear[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(mixed[1], dense[1], rtol=0, atol=1e-5)


def test_threads_do_not_see_each_others_projections() -> None:
    model, sizes, failed = trained("vit"), ((12, 10), (8, 8)), []
    want = [run(HOST["vit"], model, *size) for size in sizes]

    def work(size: tuple[int, int], expected: Tensor) -> None:
        for _ in range(20):
            if not torch.equal(run(HOST["vit"], model, *size), expected):
                failed.append(size)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(sizes, want, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


@pytest.mark.slow
@pytest.mark.parametrize("host_id, target", [("vit", "qkv"), ("flux", "to_q")])
def test_compiled_with_an_adapter_that_was_added_last(host_id: str, target: str) -> None:
    models = []
    for _ in range(2):
        model = trained(host_id)
        inject(model, peft.LoraConfig(r=2, target_modules=[target]))
        models.append(model)
    options = dict(grid=SIZE) if host_id == "flux" else {}
    with Conversion.of(models[0]).use_grid(*options.get("grid", SIZE)):
        compiled = torch.compile(models[0], fullgraph=True, backend="eager")
        output = run(HOST[host_id], compiled, *SIZE)
    torch.testing.assert_close(output, run(HOST[host_id], models[1], *SIZE), rtol=0, atol=1e-5)


def test_an_exception_leaves_no_projections_behind() -> None:
    model: Any = trained("vit")
    want = run(HOST["vit"], model, *SIZE)
    handle = model.blocks[0].attn.proj.register_forward_pre_hook(lambda module, args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(HOST["vit"], model, *SIZE)
    handle.remove()
    x, qkv = noise(1, 120, 48), model.blocks[0].attn.qkv
    assert torch.equal(qkv(x), torch.nn.functional.linear(x, qkv.weight, qkv.bias))
    assert torch.equal(run(HOST["vit"], model, *SIZE), want)
