"""Pipelines for distillation: how to load one, and how its own code calls its denoiser.

Families differ in names, scales and extra inputs of their denoisers. None of that is repeated here: the pipeline runs
up to its first call of the denoiser, and the arguments of that call are kept.
"""

import inspect
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vision_attn._compat import ensure_torchvision
from vision_attn.distill.config import ModelConfig
from vision_attn.highres.redraw import encode
from vision_attn.hosts.selection import targets_of

EMOJI = "emoji:"
_PROMPT_PARTS = ("text_encoder", "tokenizer", "image_encoder", "feature_extractor", "safety_checker")


@dataclass(frozen=True)
class Interface:
    """How a pipeline calls its denoiser.

    Attributes:
        latents: Name of the argument with the noisy latents.
        timestep_scale: The denoiser's timestep is the scheduler's times this.
        batched: Names of the tensors with one row per sample; those inside a dictionary have a dot.
        literals: Values that are no tensors, by name.
    """

    latents: str
    timestep_scale: float
    batched: tuple[str, ...]
    literals: dict[str, Any]

    def arguments(self, latents: Tensor, timesteps: Tensor, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """Return the arguments of a call of the denoiser.

        Args:
            latents: Noisy latents.
            timesteps: The scheduler's `[B]`.
            tensors: Everything else, by recorded names.
        """
        call: dict[str, Any] = {self.latents: latents, "timestep": timesteps.to(latents.device) * self.timestep_scale}
        for name, value in {**self.literals, **tensors}.items():
            outer, dot, inner = name.partition(".")
            if dot:
                call.setdefault(outer, {})[inner] = value
            else:
                call[name] = value
        return {**call, "return_dict": False}

    def config(self) -> dict[str, Any]:
        """Return the fields as JSON can hold them."""
        return {**asdict(self), "batched": list(self.batched)}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "Interface":
        """Undo `config`."""
        return cls(**{**config, "batched": tuple(config["batched"])})


def load_pipeline(config: ModelConfig, *, prompts: bool = True) -> Any:
    """Load the teacher's pipeline.

    Args:
        config: Which, and how.
        prompts: Whether prompts are to be encoded; if not, text encoders stay on the disk.

    Raises:
        ValueError: If an embedded teacher has another name.
        OSError: If there is no such folder or repository.
    """
    ensure_torchvision()
    dtype = getattr(torch, config.dtype)
    if config.base.startswith(EMOJI):
        from vision_attn.demo import load_teacher  # noqa: PLC0415, with diffusers

        pipe = load_teacher(config.base.removeprefix(EMOJI))
        pipe = pipe if dtype == torch.float32 else pipe.to(dtype)
    else:
        from diffusers import DiffusionPipeline  # noqa: PLC0415, diffusers is optional

        where = {"revision": config.revision} if config.revision else {}
        kind = {"variant": config.variant} if config.variant else {}
        absent: dict[str, None] = {}
        if not prompts:
            index = DiffusionPipeline.load_config(config.base, **where)
            absent = {name: None for name in index if name.startswith(_PROMPT_PARTS)}
        pipe = DiffusionPipeline.from_pretrained(config.base, torch_dtype=dtype, **where, **kind, **absent)
    pipe.set_progress_bar_config(disable=True)
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            part.requires_grad_(False).eval()
    return pipe


def denoiser_of(pipe: Any) -> tuple[str, nn.Module]:
    """Return the name and the model of the one denoiser that is distilled.

    Raises:
        ValueError: If the pipeline has several.
    """
    models = targets_of(pipe, None, None)
    if len(models) != 1:
        raise ValueError(f"one denoiser is distilled at a time, and this pipeline has {', '.join(models)}")
    return next(iter(models.items()))


def unguided(pipe: Any, guidance: float) -> dict[str, Any]:
    """Return arguments of a pipeline's call that switch classifier-free guidance off; `guidance` is FLUX's input."""
    known = inspect.signature(type(pipe).__call__).parameters
    if "true_cfg_scale" not in known:
        return {"guidance_scale": 1.0}
    takes = getattr(denoiser_of(pipe)[1].config, "guidance_embeds", False)
    return {"true_cfg_scale": 1.0, **({"guidance_scale": guidance} if takes else {})}


class _Recorded(Exception):  # noqa: N818, no error: it ends the pipeline's call
    """Carries the arguments of the denoiser out of the pipeline."""


def record(pipe: Any, height: int, width: int, guidance: float, **call: Any) -> dict[str, Any]:
    """Run a pipeline up to its first call of the denoiser and return the arguments of that call by name.

    Args:
        pipe: The pipeline; its scheduler is changed, as by any call.
        height: In pixels.
        width: In pixels.
        guidance: See `unguided`.
        call: What the pipeline takes: `prompt`, or embeddings.
    """
    model = denoiser_of(pipe)[1]
    names = list(inspect.signature(type(model).forward).parameters)[1:]

    def stop(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        raise _Recorded({**dict(zip(names, args, strict=False)), **kwargs})

    hook = model.register_forward_pre_hook(stop, with_kwargs=True, prepend=True)
    try:
        with torch.no_grad():
            size = {"height": height, "width": width, "num_inference_steps": 2, "output_type": "latent"}
            pipe(**size, **unguided(pipe, guidance), **call)
    except _Recorded as recorded:
        flat: dict[str, Any] = {}
        for name, value in recorded.args[0].items():
            if isinstance(value, dict):
                flat |= {f"{name}.{inner}": item for inner, item in value.items()}
            elif value is not None and name != "return_dict":
                flat[name] = value
        return flat
    finally:
        hook.remove()
    raise ValueError(f"this {type(pipe).__name__} never called its denoiser")


def interface_of(pipe: Any, height: int, width: int, guidance: float, **call: Any) -> Interface:
    """Find out how a pipeline calls its denoiser: see `record`."""
    one = record(pipe, height, width, guidance, **call)
    time = float(torch.as_tensor(one["timestep"]).flatten()[0])
    scale = time / float(pipe.scheduler.timesteps[0])
    three = record(pipe, height, width, guidance, num_images_per_prompt=3, **call)
    latents = next(name for name in ("hidden_states", "sample", "x") if name in one)
    tensors = {name: value for name, value in one.items() if isinstance(value, Tensor)}
    batched = [name for name, value in tensors.items() if name != "timestep" and value.shape != three[name].shape]
    literals = {name: value for name, value in one.items() if name not in tensors and name != "timestep"}
    unknown = [name for name, value in literals.items() if not isinstance(value, (bool, int, float, str, type(None)))]
    if unknown or latents not in batched:
        raise ValueError(f"a {type(pipe).__name__} calls its denoiser with {', '.join(unknown)}, which cannot be kept")
    return Interface(latents, round(scale, 9), tuple(n for n in batched if n != latents), literals)


def encode_images(pipe: Any, images: Tensor) -> Tensor:
    """Encode pixels `[B, 3, height, width]` in [-1, 1] into latents as the denoiser gets them; FLUX's are packed."""
    latents = encode(pipe, images)
    packs = hasattr(pipe, "_pack_latents") and hasattr(pipe, "_unpack_latents")
    return pipe._pack_latents(latents, *latents.shape) if packs else latents
