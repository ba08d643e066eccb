"""The ways in which people quantise a host, all of them on a CPU, and a twin of a quantised host in plain weights."""

import copy
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from tiny_hosts import HOST
from torch import nn


def _torchao(config: str) -> Callable[[nn.Module], nn.Module]:
    def quantise(model: nn.Module) -> nn.Module:
        from torchao import quantization

        quantization.quantize_(model, getattr(quantization, config)())
        return model

    return quantise


def _bitsandbytes(kind: str) -> Callable[[nn.Module], nn.Module]:
    """Replace linear layers as diffusers' loader does, which wants a GPU for it."""

    def quantise(model: nn.Module) -> nn.Module:
        import bitsandbytes

        layers = bitsandbytes.nn
        for name, linear in [(name, module) for name, module in model.named_modules() if type(module) is nn.Linear]:
            size, bias = (linear.in_features, linear.out_features), linear.bias is not None
            if kind == "nf4":
                new = layers.Linear4bit(*size, bias=bias, quant_type="nf4", compute_dtype=linear.weight.dtype)
                new.support_avx512bf16_for_cpu = False  # tiny layers do not fill its blocks of 32 x 64
                new.weight = layers.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
            else:
                new = layers.Linear8bitLt(*size, bias=bias, has_fp16_weights=False)
                new.weight = layers.Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False)
            new.bias = linear.bias
            outer, _, own = name.rpartition(".")
            setattr(model.get_submodule(outer), own, new.to("cpu").train(linear.training))
        return model

    return quantise


def _layerwise(dtype: torch.dtype) -> Callable[[Any], nn.Module]:
    def quantise(model: Any) -> nn.Module:
        model.enable_layerwise_casting(storage_dtype=dtype, compute_dtype=torch.float32)
        return model

    return quantise


class Quantisation(NamedTuple):
    """One way to quantise.

    Attributes:
        package: What it needs.
        quantise: Quantises a model in place.
        rounding: Share by which activations are rounded too; 0 if they are not.
    """

    package: str
    quantise: Callable[[nn.Module], nn.Module]
    rounding: float = 0.0


QUANTISATIONS = {
    "torchao-int8": Quantisation("torchao", _torchao("Int8WeightOnlyConfig")),
    "torchao-int8-dynamic": Quantisation("torchao", _torchao("Int8DynamicActivationInt8WeightConfig"), 0.03),
    "torchao-float8": Quantisation("torchao", _torchao("Float8WeightOnlyConfig")),
    "bitsandbytes-nf4": Quantisation("bitsandbytes", _bitsandbytes("nf4")),
    "bitsandbytes-int8": Quantisation("bitsandbytes", _bitsandbytes("int8"), 0.03),
    "layerwise-float8": Quantisation("torch", _layerwise(torch.float8_e4m3fn)),
    "layerwise-bfloat16": Quantisation("torch", _layerwise(torch.bfloat16)),
}


def needs(package: str) -> Any:
    """Return the mark of a row that runs only where a package is installed."""
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"{package} is not installed")


def row(*values: Any, package: str, slow: bool = False) -> Any:
    """Return a row of a table whose id says what it needs, if that is missing."""
    marks = [needs(package), *([pytest.mark.slow] if slow else [])]
    missing = importlib.util.find_spec(package) is None
    name = "-".join(map(str, values)) + (f", where {package} is installed" if missing else "")
    return pytest.param(*values, marks=marks, id=name)


def quantised(host_id: str, name: str) -> nn.Module:
    """Return a quantised host."""
    return QUANTISATIONS[name].quantise(HOST[host_id].build()).requires_grad_(False)


def plain_twin(host_id: str, model: nn.Module) -> nn.Module:
    """Return a host with the weights that the linear layers of a quantised host multiply by: what they make of 1."""
    twin = HOST[host_id].build().requires_grad_(False)
    with torch.no_grad():
        for name, plain in twin.named_modules():
            layer: Any = model.get_submodule(name) if isinstance(plain, nn.Linear | nn.Conv2d) else None
            if layer is None:
                continue
            if plain.bias is not None:
                plain.bias.copy_(layer.bias)
            if isinstance(plain, nn.Linear):
                output = layer(torch.eye(plain.in_features))
                plain.weight.copy_((output if plain.bias is None else output - plain.bias).T)
            else:
                plain.weight.copy_(layer.weight)  # layerwise casting stores them in fewer bits too
    return twin


def from_gguf(host_id: str, folder: Path) -> nn.Module:
    """Write a host to a GGUF file, in 8 bits where its blocks of 32 fit, and read it back by diffusers' loader."""
    import diffusers
    import gguf

    model: Any = HOST[host_id].build()
    model.save_pretrained(folder)
    kind = gguf.GGMLQuantizationType.Q8_0
    linear = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    writer = gguf.GGUFWriter(folder / "model.gguf", "flux")
    for name, tensor in model.state_dict().items():
        values = tensor.numpy()
        if name in linear and values.shape[-1] % 32 == 0:
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    config = diffusers.GGUFQuantizationConfig(compute_dtype=torch.float32)
    options: dict[str, Any] = dict(config=str(folder), quantization_config=config, torch_dtype=torch.float32)
    return type(model).from_single_file(str(folder / "model.gguf"), **options).eval()


def beside_its_lora(pipe: Any, folder: str) -> Any:
    """Write an adapter and LoRA layers beside it, as the distillation of a quantised host does; return the pipeline."""
    from peft import LoraConfig, inject_adapter_in_model

    import vision_attn

    conversion = vision_attn.convert(pipe, vision_attn.Clear(radius=3))
    conversion.save(folder)
    conversion.revert()
    model = copy.deepcopy(pipe.transformer)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["to_q"]), model)
    model.save_lora_adapter(folder)
    return pipe
