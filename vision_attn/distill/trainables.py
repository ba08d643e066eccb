"""What of a converted model is trained, and what it starts from."""

from collections.abc import Iterator
from typing import Any

from torch import nn

from vision_attn.conversion.conversion import Conversion
from vision_attn.conversion.state import is_rerouted
from vision_attn.distill.config import StudentConfig
from vision_attn.processors.base import CHILD

_NAMES = {
    "q": ("to_q", "q_proj"),
    "k": ("to_k", "k_proj"),
    "v": ("to_v", "v_proj"),
    "out": ("to_out.0", "to_out"),
}
_FUSED = ("to_qkv", "qkv", "to_qkv_mlp_proj")


def choose_trainables(conversion: Conversion, student: StudentConfig) -> dict[str, nn.Parameter]:
    """Freeze everything but what is to be trained, which becomes float32, and return it by name.

    Raises:
        ValueError: If that is nothing, or projections cannot be told apart.
    """
    model = next(iter(conversion.models.values()))
    model.requires_grad_(False)
    if student.trainable == "lora":
        add_lora(model, student)
    for parameter in conversion.parameters():
        parameter.requires_grad_(True)
    if student.trainable == "attention":
        for _, projection in projections(model, student.projections):
            projection.requires_grad_(True)
    chosen = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not chosen:
        raise ValueError(
            f"{student.processor} has no parameters of its own: student.trainable must be 'attention' or 'lora'"
        )
    for parameter in chosen.values():
        parameter.data = parameter.data.float()
    return chosen


def projections(model: nn.Module, roles: list[str]) -> Iterator[tuple[str, nn.Module]]:
    """Yield the projections of the converted layers by full name.

    Raises:
        ValueError: If a layer's projections are fused.
    """
    for name, layer in model.named_modules():
        if not is_rerouted(layer):
            continue
        own: dict[str, Any] = dict(layer.named_modules())
        if any(fused in own for fused in _FUSED) and "to_q" not in own:
            raise ValueError(f"{name} projects q, k and v at once: unfuse_qkv_projections() before training")
        for role in roles:
            found = next((key for key in _NAMES[role] if isinstance(own.get(key), nn.Linear)), None)
            if found is not None:
                yield f"{name}.{found}", own[found]


def add_lora(model: Any, student: StudentConfig) -> None:
    """Add LoRA layers on the projections of the converted layers."""
    from peft import LoraConfig, inject_adapter_in_model  # noqa: PLC0415, optional

    names = [name for name, _ in projections(model, student.projections)]
    inject_adapter_in_model(LoraConfig(r=student.rank, lora_alpha=2 * student.rank, target_modules=names), model)


def merge_lora(model: nn.Module) -> None:
    """Add LoRA layers into the weights and take them out."""
    layers: list[tuple[str, Any]] = [(n, m) for n, m in model.named_modules() if hasattr(m, "_disable_adapters")]
    for name, layer in layers:
        layer.merge()
        outer, _, own = name.rpartition(".")
        setattr(model.get_submodule(outer), own, layer.get_base_layer())


def randomise(conversion: Conversion) -> None:
    """Draw the projections and the processors of the converted layers anew, as the layers' own classes do it."""
    model = next(iter(conversion.models.values()))
    for _, projection in projections(model, ["q", "k", "v", "out"]):
        projection.reset_parameters()  # type: ignore[operator]
    for layer in model.modules():
        if is_rerouted(layer):
            for inner in getattr(layer, CHILD).modules():
                if hasattr(inner, "reset_parameters"):
                    inner.reset_parameters()
