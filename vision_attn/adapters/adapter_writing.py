"""Writes a converted model as an adapter folder: see `adapter` for what is in it."""

import importlib.metadata
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from vision_attn.adapters.adapter import CONFIG, FORMAT, WEIGHTS
from vision_attn.conversion.model_state import ModelState, plain
from vision_attn.conversion.rerouting import CHILD, is_rerouted, state_of
from vision_attn.processors import to_config
from vision_attn.processors.base import AttnSpec


def write_adapter(folder: Path, model: nn.Module, component: str, state: ModelState) -> None:
    """Write the conversion of one model. The files appear complete or not at all; LoRA layers have files of their own.

    Raises:
        ValueError: If projections were fused since the conversion, and trained.
    """
    layers = [state_of(module) for module in model.modules() if is_rerouted(module)]
    groups: dict[AttnSpec, list[str]] = {}
    for layer in layers:
        groups.setdefault(layer.spec, []).append(layer.name)
    _refuse_fused(model, state)
    tensors = {plain(name): tensor for name, tensor in model.state_dict().items()}
    changed = state.changed(model)
    kept = {n: t.detach().cpu().contiguous() for n, t in tensors.items() if f".{CHILD}." in n or n in changed}
    config: Any = getattr(model, "config", None)
    base = getattr(config, "_name_or_path", "") or getattr(model, "pretrained_cfg", {}).get("architecture", "")
    content = {
        "format": FORMAT,
        "component": component,
        "base_model": {"class": type(model).__name__, "name": base},
        "processors": [{"spec": to_config(spec), "layers": names} for spec, names in groups.items()],
        "min_tokens": state.shared.min_tokens,
        "versions": {name: _version(name) for name in ("vision_attn", "torch", "diffusers", "timm")},
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(kept, folder / f"{WEIGHTS}.part", metadata={"format": "pt"})
    (folder / f"{CONFIG}.part").write_text(json.dumps(content, indent=2) + "\n")
    for name in (WEIGHTS, CONFIG):
        os.replace(folder / f"{name}.part", folder / name)


def remove_adapter(folder: Path) -> None:
    """Remove the files that `write_adapter` wrote into a folder."""
    try:
        ours = json.loads((folder / CONFIG).read_text()).get("format") == FORMAT
    except (OSError, ValueError, AttributeError):
        return
    if ours:
        for name in (CONFIG, WEIGHTS):
            (folder / name).unlink(missing_ok=True)


def _refuse_fused(model: nn.Module, state: ModelState) -> None:
    """Refuse projections that were fused since the conversion and are no longer the copy of what was fused."""
    names: dict[str, Tensor] = {plain(name): parameter for name, parameter in model.named_parameters()}
    known = {plain(name) for name in state.fingerprints}
    for name, parameter in names.items():
        layer, _, rest = name.rpartition(".to_")
        role, _, kind = rest.partition(".")
        if name in known or role not in _FUSED:
            continue
        parts = [names[f"{layer}.{part}.{kind}"] for part in _FUSED[role] if f"{layer}.{part}.{kind}" in names]
        if not parts or not torch.equal(torch.cat(parts), parameter):
            raise ValueError(
                f"{name} is no parameter of the model that was converted, and not saved: unfuse_qkv_projections() "
                "before training, and fuse again afterwards"
            )


_FUSED = {
    "qkv": ("to_q", "to_k", "to_v"),
    "kv": ("to_k", "to_v"),
    "added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
