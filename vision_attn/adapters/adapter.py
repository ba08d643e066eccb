"""A saved conversion: a folder with `config.json` and one safetensors file, or a file released by a paper's authors.

`config.json` holds the spec of the layers as class name and fields, the base model, the layers and the versions. The
safetensors file holds only tensors that the conversion added or changed: those of the base model under their names
there, those of a layer's processor under the layer's name and `vision_attn`. Nothing is ever unpickled.
"""

import dataclasses
import importlib.metadata
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vision_attn.adapters.published import (
    CLEAR_TRAINED,
    LINFUSION_WEIGHTS,
    is_linfusion,
    linfusion_adapter,
    published_adapter,
)
from vision_attn.processors import from_config, to_config
from vision_attn.processors.base import AttnSpec, model_name, stored_name

CONFIG, WEIGHTS = "config.json", "vision_attn.safetensors"
FORMAT = "vision_attn.adapter.v1"


@dataclasses.dataclass(frozen=True)
class Adapter:
    """What a file or folder says about one component.

    Attributes:
        source: Where it was read, for messages.
        component: Name of the component in its pipeline, '' for a model by itself.
        layers: The spec of each layer by name; the name None stands for all layers of the host.
        tensors: Tensors by their names in the converted model.
        min_tokens: As given to `convert`.
        model_class: Name of the model's class, '' if not known.
        complete: Parts of names: every parameter of the model whose name has one of them must be in `tensors`.
    """

    source: str
    component: str
    layers: Mapping[str | None, AttnSpec]
    tensors: Mapping[str, Tensor]
    min_tokens: int = 0
    model_class: str = ""
    complete: tuple[str, ...] = ()

    def check(self, model: nn.Module) -> None:
        """Refuse a model of another class than the one that was saved, and a file that is not complete.

        Raises:
            ValueError: If neither the model's class nor a base class has the saved name, or tensors are missing.
        """
        wanted = [name for name, _ in model.named_parameters() if any(part in name for part in self.complete)]
        if missing := [name for name in wanted if name not in self.tensors]:
            raise ValueError(f"{self.source} is not complete; missing: {', '.join(missing[:8])}")
        if self.model_class and self.model_class not in [cls.__name__ for cls in type(model).__mro__]:
            raise ValueError(f"{self.source} is for a {self.model_class}, and this is a {type(model).__name__}")

    def specs(self, names: Sequence[str]) -> dict[str, AttnSpec]:
        """Return the spec of each layer of a model whose attention layers are `names`.

        Raises:
            ValueError: If the model lacks a layer, or no layer was saved.
        """
        if not self.layers:
            raise ValueError(f"{self.source} has the spec of no layer")
        if None in self.layers:
            return dict.fromkeys(names, self.layers[None])
        missing = sorted(name for name in self.layers if name not in names and name is not None)
        if missing:
            raise ValueError(f"{self.source} is for another model: this one has no layer {', '.join(missing[:6])}")
        return {name: spec for name, spec in self.layers.items() if name is not None}


def read_adapter(
    source: str | Path, weight_name: str | None = None, spec: AttnSpec | None = None, **hub: Any
) -> list[Adapter]:
    """Read a folder, a file, or a repository of the hub.

    Args:
        source: The folder or file, or the name of the repository.
        weight_name: Name of a file in the folder or repository, if that is not an adapter.
        spec: Replaces the spec that was saved.
        hub: `subfolder` and the options in `HUB`.

    Returns:
        One adapter for each component.

    Raises:
        TypeError: If an option is unknown.
        FileNotFoundError: If `source` does not exist and cannot be downloaded.
        ValueError: If it is not an adapter, or a file is damaged or not a safetensors file.
    """
    place = _fetch(source, weight_name, **hub)
    if place.is_file():
        _refuse_other_files(place)
        layers, tensors = published_adapter(place.name, read_tensors(place), spec)
        return [Adapter(str(place), "transformer", layers, tensors, complete=CLEAR_TRAINED)]
    if (place / CONFIG).exists():
        return [_read_folder(place, spec)]
    inner = sorted(path.parent for path in place.glob(f"*/{CONFIG}"))
    if not inner:
        files = ", ".join(sorted(path.name for path in place.iterdir())[:8]) or "nothing"
        raise ValueError(
            f"{place} is not an adapter: it has no {CONFIG}, only {files}; name a weights file by weight_name="
        )
    return [_read_folder(path, spec) for path in inner]


def _read_folder(folder: Path, spec: AttnSpec | None) -> Adapter:
    try:
        config = json.loads((folder / CONFIG).read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG} is damaged: {error}") from None
    if isinstance(config, dict) and is_linfusion(config):
        return _read_linfusion(folder, config, spec)
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise ValueError(f"{folder / CONFIG} is not a vision_attn adapter: its format is not {FORMAT!r}")
    try:
        return _read_config(folder, config, spec)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder / CONFIG} is damaged: {type(error).__name__} {error}") from None


def _read_linfusion(folder: Path, config: dict[str, Any], spec: AttnSpec | None) -> Adapter:
    if spec is not None:
        raise ValueError(f"{folder} is a LinFusion repository, which has the spec of each layer: leave out spec=")
    tensors = read_tensors(folder / LINFUSION_WEIGHTS)
    try:
        return Adapter(str(folder), "unet", *linfusion_adapter(str(folder), config, tensors))
    except (KeyError, TypeError) as error:
        raise ValueError(f"{folder / CONFIG} is damaged: {type(error).__name__} {error}") from None


def _read_config(folder: Path, config: dict[str, Any], spec: AttnSpec | None) -> Adapter:
    layers: dict[str | None, AttnSpec] = {}
    for group in config["processors"]:
        layers.update(dict.fromkeys(group["layers"], spec or from_config(group["spec"])))
    if not isinstance(config["min_tokens"], int):
        raise TypeError(f"min_tokens is {config['min_tokens']!r}")
    tensors = {model_name(name): tensor for name, tensor in read_tensors(folder / WEIGHTS).items()}
    model_class = config["base_model"]["class"]
    return Adapter(str(folder), config["component"], layers, tensors, config["min_tokens"], model_class)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        FileNotFoundError: If it does not exist.
        ValueError: If it is damaged.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged or not a safetensors file: {error}") from None


def _refuse_other_files(path: Path) -> None:
    if path.suffix != ".safetensors":
        raise ValueError(f"{path.name} is refused: only .safetensors files are read, because a pickle can run any code")


HUB = ("revision", "token", "cache_dir", "local_dir", "force_download", "local_files_only", "endpoint")


def _fetch(source: str | Path, weight_name: str | None, *, subfolder: str = "", **hub: Any) -> Path:
    """Return the local path of `source`, downloading it from the hub if it is the name of a repository."""
    if unknown := sorted(set(hub) - set(HUB)):
        raise TypeError(f"load has no option {', '.join(unknown)}: for the hub there are subfolder, {', '.join(HUB)}")
    place = Path(source)
    if place.exists():
        place = place / subfolder / (weight_name or "")
        if not place.exists():
            raise FileNotFoundError(f"{place} does not exist")
        return place
    if str(source).count("/") != 1 or str(source).startswith((".", "/", "~")):
        raise FileNotFoundError(
            f"{source} does not exist, and is not the name of a repository such as 'Huage001/CLEAR'"
        )
    from huggingface_hub import hf_hub_download, snapshot_download  # noqa: PLC0415, only where one is downloaded
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled  # noqa: PLC0415

    try:
        if weight_name:
            return Path(hf_hub_download(str(source), weight_name, subfolder=subfolder or None, **hub))
        inside = f"{subfolder}/" if subfolder else ""
        wanted = [f"{inside}**{name}" for name in (CONFIG, WEIGHTS, LINFUSION_WEIGHTS)]
        return Path(snapshot_download(str(source), allow_patterns=wanted, **hub)) / subfolder
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise FileNotFoundError(f"{source} does not exist here, and could not be downloaded: {error}") from None


def write_adapter(folder: Path, adapter: Adapter, base_name: str) -> None:
    """Write an adapter folder. The files appear complete or not at all.

    Args:
        folder: Made if it does not exist. Files of an earlier adapter are replaced.
        adapter: What to write.
        base_name: Name of the base model, '' if it is not known.
    """
    groups: dict[AttnSpec, list[str]] = {}
    for name, spec in adapter.layers.items():
        groups.setdefault(spec, []).append(str(name))
    content = {
        "format": FORMAT,
        "component": adapter.component,
        "base_model": {"class": adapter.model_class, "name": base_name},
        "processors": [{"spec": to_config(spec), "layers": names} for spec, names in groups.items()],
        "min_tokens": adapter.min_tokens,
        "versions": {name: _version(name) for name in ("vision_attn", "torch", "diffusers", "timm")},
    }
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {stored_name(name): tensor.detach().cpu().contiguous() for name, tensor in adapter.tensors.items()}
    save_file(tensors, folder / f"{WEIGHTS}.part", metadata={"format": "pt"})
    (folder / f"{CONFIG}.part").write_text(json.dumps(content, indent=2) + "\n")
    for name in (WEIGHTS, CONFIG):
        os.replace(folder / f"{name}.part", folder / name)


def refuse_strangers(root: Path, places: Sequence[Path]) -> None:
    """Refuse folders in which an adapter would replace what is none, or be read together with others.

    Args:
        root: The folder that `load` is to read.
        places: The folders of the adapters: `root` itself, or folders in it.

    Raises:
        ValueError: If one has the `config.json` of something else, such as a model that was saved there; or if `root`
            has adapters in other folders beside `places`.
    """
    for place in places:
        if _is_ours(place / CONFIG) is False:
            raise ValueError(
                f"{place / CONFIG} belongs to something else, such as a model, and would be lost: give another folder"
            )
    if root in places:
        return
    others = sorted(path.parent for path in root.glob(f"*/{CONFIG}") if path.parent not in places and _is_ours(path))
    if others:
        raise ValueError(
            f"{root} has adapters of {', '.join(path.name for path in others)}, which would be loaded with those of "
            f"{', '.join(path.name for path in places)}: delete them, or give another folder"
        )


def _is_ours(config: Path) -> bool | None:
    """Whether a `config.json` is that of an adapter; None if there is none, or it is no JSON."""
    try:
        content = json.loads(config.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return isinstance(content, dict) and content.get("format") == FORMAT


def remove_adapter(folder: Path) -> None:
    """Remove the files that `write_adapter` wrote into a folder."""
    if _is_ours(folder / CONFIG):
        for name in (CONFIG, WEIGHTS):
            (folder / name).unlink(missing_ok=True)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
