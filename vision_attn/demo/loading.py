"""Loads the model or pipeline that a command names: a folder, a hub name, a timm model, or an embedded teacher."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from vision_attn.demo import TEACHERS, load_teacher
from vision_attn.hosts.selection import COMPONENTS

# The teachers' names in commands that take any pipeline.
EMOJI = {"emoji" if name == "base" else f"emoji-{name}": name for name in TEACHERS}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def load_pipeline(name: str, *, device: str | None = None, dtype: str | None = None) -> Any:
    """Load a text-to-image pipeline.

    Args:
        name: Folder or hub name of a diffusers pipeline, or a name of `EMOJI` for an embedded teacher.
        device: A device such as 'cpu' or 'cuda'; if None, a GPU where there is one.
        dtype: 'float32', 'float16' or 'bfloat16'; if None, bfloat16 on a GPU and float32 on a CPU.

    Raises:
        ValueError: If the pipeline does not exist, or the device cannot be used here.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    _check_device(device)
    kind = DTYPES[dtype] if dtype else torch.float32 if device == "cpu" else torch.bfloat16
    if name in EMOJI:
        teacher = load_teacher(EMOJI[name])
        return teacher if (device, kind) == ("cpu", torch.float32) else teacher.to(device, kind)
    is_folder = (Path(name) / "model_index.json").exists()
    if not is_folder and (Path(name).exists() or name.count("/") != 1):
        raise ValueError(
            f"{name} is neither a folder with model_index.json, nor a name on the hub, nor one of {', '.join(EMOJI)}"
        )
    return read_pipeline(name, torch_dtype=kind).to(device)


def read_pipeline(name: str | Path, **options: Any) -> Any:
    """Load a pipeline by diffusers from a folder or the hub; `options` are those of its `from_pretrained`.

    Raises:
        ValueError: If it cannot be loaded, whatever diffusers raises about it.
    """
    from diffusers import DiffusionPipeline  # noqa: PLC0415, diffusers is optional

    with loading(name):
        return DiffusionPipeline.from_pretrained(name, **options)


@contextmanager
def loading(name: str | Path) -> Iterator[None]:
    """Turn what a library raises about a folder or a repository into one line that names it."""
    try:
        yield
    except Exception as error:  # diffusers lets through what the parts of a damaged folder raise
        kind = "" if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: "
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ValueError(f"{name} could not be loaded: {kind}{reason}") from None


def _check_device(device: str) -> None:
    """Refuse a device that does not work here."""
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {device}: no GPU can be used here")
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:  # PyTorch asserts that it was built for the device
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"--device {device} cannot be used here, give cpu or cuda: {reason}") from None


def load_target(name: str) -> Any:
    """Load a model to inspect, without its weights where its configuration is enough.

    Args:
        name: Folder or hub name of a diffusers pipeline or model, or the name of a timm model.

    Raises:
        ValueError: If there is no such model.
    """
    folder = Path(name)
    if (folder / "model_index.json").exists():
        return _denoiser(folder) or read_pipeline(folder)
    if (folder / "config.json").exists():
        return _diffusers_model(folder)
    import timm  # noqa: PLC0415

    import vision_attn.backbones  # noqa: F401, PLC0415, registers them with timm

    if timm.is_model(name):
        try:
            return timm.create_model(name, dynamic_img_size=True)
        except TypeError:  # not a vision transformer: `estimate` refuses it by name
            return timm.create_model(name)
    if name.count("/") == 1 and not folder.exists():
        return read_pipeline(name)
    raise ValueError(
        f"{name} is neither a folder with model_index.json or config.json, nor a timm model, nor a name on the hub"
    )


def load_running(name: str) -> Any:
    """Load a pipeline or a timm model on the GPU, with its weights, as for `load_target`.

    Raises:
        ValueError: If there is no such pipeline or model, or no GPU.
    """
    _check_device("cuda")
    import timm  # noqa: PLC0415

    if timm.is_model(name):
        return load_target(name).eval().to("cuda", torch.bfloat16)
    return load_pipeline(name, device="cuda")


def component_of(name: str) -> str | None:
    """Return which component of a pipeline `load_target` loads; None if the name is not that of a pipeline."""
    index = Path(name) / "model_index.json"
    if not index.exists():
        return None
    parts = _read(index)
    return next((part for part in COMPONENTS if part in parts or (index.parent / part).is_dir()), None)


def _denoiser(folder: Path) -> Any:
    """Build the denoiser of a saved pipeline from its configuration; None if that does not say enough."""
    index = _read(folder / "model_index.json")
    names = [name for name in ("transformer", "unet") if (folder / name / "config.json").exists()]
    vae = folder / "vae" / "config.json"
    if len(names) != 1 or "controlnet" in index or not vae.exists():
        return None
    config, levels = _read(folder / names[0] / "config.json"), _read(vae)
    import diffusers  # noqa: PLC0415

    if not hasattr(diffusers, str(config.get("_class_name"))) or "block_out_channels" not in levels:
        return None
    model = _diffusers_model(folder / names[0])
    model.vae_scale_factor = 2 ** (len(levels["block_out_channels"]) - 1)  # pixels per latent, for `estimate`
    return model


def _diffusers_model(folder: Path) -> Any:
    """Build a model of diffusers from its configuration, without weights."""
    import diffusers  # noqa: PLC0415

    config = _read(folder / "config.json")
    kind = getattr(diffusers, str(config.get("_class_name")), None)
    if not (isinstance(kind, type) and issubclass(kind, torch.nn.Module)):
        raise ValueError(f"{folder}/config.json is not a diffusers model: its class is {config.get('_class_name')!r}")
    with loading(folder), torch.device("meta"):
        return kind.from_config(config)  # type: ignore[attr-defined]


def _read(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds a mapping."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: it holds a {type(content).__name__}, not a mapping")
    return content
