"""Reads and writes the files that the authors of a paper released, as they are.

CLEAR (https://huggingface.co/Huage001/CLEAR): flat files `clear_local_{radius}[_down_{pool}].safetensors` with the
query, key, value and output projections of FLUX.1's attention under FLUX's own names, and with pooling
`*.attn.processor.spatial_weight` `[1, 1, 1, pool, 1, pool, 1]`. The radius is in the file's name only.

LinFusion (https://huggingface.co/Yuanshi/LinFusion-1-5, -2-1, -XL): `config.json` lists the modules, and
`diffusion_pytorch_model.safetensors` holds for module i `{i}.to_q.weight`, `to_k`, `to_v`, `to_out.0`, and the residual
networks `{i}.to_q_.{0,1,3}`, `{i}.to_k_.{0,1,3}`. Without them (`projection_mid_dim` -1) the authors' residual is the
identity, W (x + x): the weights of q and k are doubled when read, and halved when written.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from vision_attn.hosts.host import heads_of
from vision_attn.processors.base import CHILD, AttnSpec
from vision_attn.processors.clear import Clear
from vision_attn.processors.linfusion import LinFusion

LINFUSION_WEIGHTS = "diffusion_pytorch_model.safetensors"
_CLEAR = re.compile(r"clear_local_(\d+)(?:_down_(\d+))?\.safetensors$")
_PUBLISHED_CHILD = ".attn.processor."
CLEAR_TRAINED = (".attn.to_q.", ".attn.to_k.", ".attn.to_v.", ".attn.to_out.")


def published_adapter(
    name: str, tensors: Mapping[str, Tensor], spec: AttnSpec | None = None
) -> tuple[dict[str | None, AttnSpec], dict[str, Tensor]]:
    """Return the spec of all layers and the tensors under our names, for a released file of CLEAR.

    Args:
        name: The file's name, which tells the hyperparameters.
        tensors: Its content.
        spec: Replaces what the name says.

    Raises:
        ValueError: If the name is not that of a released file, or the content is not what name or spec say.
    """
    match = _CLEAR.search(name)
    if spec is None and match is None:
        raise ValueError(
            f"{name} is not named like a released file, clear_local_RADIUS[_down_POOL].safetensors: give its spec="
        )
    if spec is None and match is not None:
        spec = Clear(radius=int(match[1]), pool=int(match[2] or 1))
    if not isinstance(spec, Clear):
        raise ValueError(f"{name} holds weights of CLEAR, but the spec is {spec}")
    shapes = {tuple(tensor.shape) for key, tensor in tensors.items() if key.endswith("spatial_weight")}
    want = {(1, 1, 1, spec.pool, 1, spec.pool, 1)} if spec.pool > 1 else set()
    if shapes != want:
        raise ValueError(f"{name}: spatial_weight should be {want or 'absent'} for {spec}, but is {shapes or 'absent'}")
    renamed = {key.replace(_PUBLISHED_CHILD, f".attn.{CHILD}."): tensor for key, tensor in tensors.items()}
    return {None: spec}, renamed


def is_linfusion(config: Mapping[str, Any]) -> bool:
    """Whether a `config.json` is that of a LinFusion repository."""
    return config.get("_class_name") == "LinFusion" and isinstance(config.get("modules_list"), list)


def linfusion_adapter(
    source: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[dict[str | None, AttnSpec], dict[str, Tensor]]:
    """Return the spec of each layer and the tensors under our names, for a LinFusion repository.

    Raises:
        ValueError: If tensors are missing or unexpected; they are named.
    """
    modules = config["modules_list"]
    layers: dict[str | None, AttnSpec] = {}
    renamed, wrong = {}, []
    for i, module in enumerate(modules):
        mid = module["projection_mid_dim"]
        layers[module["module_name"]] = LinFusion(mid_dim=mid)
        wrong += [f"missing: {key}" for key in _linfusion_keys(i, mid) if key not in tensors]
    for key, tensor in tensors.items():
        number, _, rest = key.partition(".")
        if not number.isdigit() or int(number) >= len(modules):
            wrong.append(f"unexpected: {key}")
            continue
        module = modules[int(number)]
        if key not in _linfusion_keys(int(number), module["projection_mid_dim"]):
            wrong.append(f"unexpected: {key}")
        child = f"{CHILD}." if rest.startswith(("to_q_.", "to_k_.")) else ""
        if module["projection_mid_dim"] == -1 and rest in _QUERIES_AND_KEYS:
            tensor = 2 * tensor  # noqa: PLW2901 - their f is then the identity: W (x + x)
        renamed[f"{module['module_name']}.{child}{rest}"] = tensor
    if wrong:
        raise ValueError(f"{source} is not a complete LinFusion repository: {'; '.join(wrong[:8])}")
    return layers, renamed


def _linfusion_keys(number: int, mid_dim: int | None) -> list[str]:
    own = [f"to_{role}.weight" for role in ("q", "k", "v")] + ["to_out.0.weight", "to_out.0.bias"]
    residual = [] if mid_dim == -1 else [f"to_{r}_.{i}.{kind}" for r in "qk" for i in (0, 1, 3) for kind in _WB]
    return [f"{number}.{key}" for key in own + residual]


_WB = ("weight", "bias")
_QUERIES_AND_KEYS = ("to_q.weight", "to_k.weight")


def export_clear(conversion: Any, folder: str | Path) -> Path:
    """Write a converted FLUX.1 in the format of CLEAR's released weights, in bfloat16.

    Args:
        conversion: A `Conversion` to `Clear`, of one model.
        folder: Made if it does not exist.

    Returns:
        The path of the file, `clear_local_{radius}[_down_{pool}].safetensors`.

    Raises:
        ValueError: If it is not a FLUX.1 with one `Clear` of whole radius on all layers.
    """
    model, spec = check_clear(conversion)
    tensors = {}
    for key, tensor in model.state_dict().items():
        if any(part in key for part in CLEAR_TRAINED) or f".attn.{CHILD}." in key:
            name = key.replace(f".attn.{CHILD}.", _PUBLISHED_CHILD)
            tensors[name] = tensor.detach().to("cpu", torch.bfloat16).contiguous()
    name = f"clear_local_{int(spec.radius)}" + (f"_down_{spec.pool}" if spec.pool > 1 else "")
    return _write(Path(folder), f"{name}.safetensors", tensors)


def check_clear(conversion: Any) -> tuple[nn.Module, Clear]:
    """Return the model and the spec of a conversion that CLEAR's format can hold.

    Raises:
        ValueError: If it is not a FLUX.1 with one `Clear` of whole radius on all layers.
    """
    model, specs = _only_model(conversion), set(conversion.specs.values())
    spec = next(iter(specs))
    if type(model).__name__ != "FluxTransformer2DModel" or len(specs) > 1 or not isinstance(spec, Clear):
        raise ValueError(
            f"CLEAR's format is for a FluxTransformer2DModel with one Clear, and this is a {type(model).__name__} with "
            f"{', '.join(sorted(map(str, specs)))}"
        )
    if spec.radius != int(spec.radius):
        raise ValueError(f"CLEAR's format is for whole radii, and this is {spec.radius}")
    return model, spec


def export_linfusion(conversion: Any, folder: str | Path) -> Path:
    """Write a converted UNet in the format of LinFusion's repositories.

    Args:
        conversion: A `Conversion` to `LinFusion(feature_map='elu')`, of one model.
        folder: Made if it does not exist.

    Returns:
        The folder.

    Raises:
        ValueError: If a layer has another spec, or its projections are not separate and unbiased.
    """
    modules_list: list[dict[str, Any]] = []
    tensors: dict[str, Tensor] = {}
    for number, (name, spec, module) in enumerate(check_linfusion(conversion)):
        halved = _QUERIES_AND_KEYS if spec.mid_dim == -1 else ()
        for key, value in _released_names(module).items():
            tensor = value.detach().cpu().contiguous()
            tensors[f"{number}.{key}"] = tensor / 2 if key in halved else tensor
        modules_list.append(
            {
                "dim_n": module.to_q.in_features,
                "heads": heads_of(name, module)[0],
                "module_name": name,
                "projection_mid_dim": spec.mid_dim,
            }
        )
    folder = Path(folder)
    _write(folder, LINFUSION_WEIGHTS, tensors)
    content = {"_class_name": "LinFusion", "modules_list": modules_list}
    (folder / "config.json").write_text(json.dumps(content, indent=2) + "\n")
    return folder


def check_linfusion(conversion: Any) -> list[tuple[str, LinFusion, Any]]:
    """Return name, spec and module of each layer of a conversion that LinFusion's format can hold.

    Raises:
        ValueError: If a layer has another spec, or its projections are not separate and unbiased.
    """
    model, layers = _only_model(conversion), []
    for name, spec in conversion.specs.items():
        if not isinstance(spec, LinFusion) or spec.feature_map != "elu" or spec.rotate:
            raise ValueError(f"LinFusion's format has no place for {spec} on {name}")
        module = model.get_submodule(name)
        layers.append((name, spec, module))
        own, keys = _released_names(module), [key.removeprefix("0.") for key in _linfusion_keys(0, spec.mid_dim)]
        if set(own) != set(keys):
            raise ValueError(f"LinFusion's format has {', '.join(keys)}, and {name} has {', '.join(own)}")
    return layers


def _released_names(module: nn.Module) -> dict[str, Tensor]:
    return {key.replace(f"{CHILD}.", ""): tensor for key, tensor in module.state_dict().items()}


def _only_model(conversion: Any) -> nn.Module:
    if len(conversion.models) != 1:
        raise ValueError(f"a released file is for one model, and this conversion has {', '.join(conversion.models)}")
    model: nn.Module = next(iter(conversion.models.values()))
    return model


def _write(folder: Path, name: str, tensors: Mapping[str, Tensor]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(tensors), folder / f"{name}.part", metadata={"format": "pt"})
    (folder / f"{name}.part").replace(folder / name)
    return folder / name
