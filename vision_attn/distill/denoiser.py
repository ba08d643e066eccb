"""How a pipeline calls its denoiser, how to call it alike in training, and how to draw with it.

Families differ in the names, scales and extra inputs of their denoisers. Nothing of that is repeated here: the pipeline
runs up to its first call of the denoiser, and the arguments of that call are kept.
"""

import inspect
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vision_attn._compat import ensure_torchvision
from vision_attn.conversion.state import computing_dtype
from vision_attn.distill.config import ModelConfig
from vision_attn.highres.redraw import decode, encode, shift_at, unpacked
from vision_attn.hosts.host import argument_names
from vision_attn.hosts.selection import COMPONENTS, targets_of

EMOJI = "emoji:"
_PROMPT_PARTS = ("text_encoder", "tokenizer", "image_encoder", "feature_extractor", "safety_checker")


def load_pipeline(config: ModelConfig, *, prompts: bool = True) -> Any:
    """Load the teacher's pipeline.

    Args:
        config: Which one, and how.
        prompts: Whether prompts will be encoded. If not, text encoders are not loaded.

    Raises:
        ValueError: If the package has no teacher of that name, a library is missing, or the pipeline cannot be loaded.
    """
    ensure_torchvision()
    dtype = getattr(torch, config.dtype)
    if config.base.startswith(EMOJI):
        from vision_attn.demo import load_teacher  # noqa: PLC0415, with diffusers

        if config.quantisation == "nf4":
            raise ValueError(f"model.quantisation: {config.base} is no folder that diffusers could load in 4 bits")
        pipe = load_teacher(config.base.removeprefix(EMOJI))
        pipe = pipe if dtype == torch.float32 else pipe.to(dtype)
    else:
        from vision_attn.demo.loading import loading  # noqa: PLC0415, with diffusers

        with loading(config.base):
            pipe = _read_pipeline(config, dtype, prompts)
    if config.quantisation in _TORCHAO:
        _quantise(denoiser_of(pipe)[1], config.quantisation)
    pipe.set_progress_bar_config(disable=True)
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            part.requires_grad_(False).eval()
    return pipe


def _read_pipeline(config: ModelConfig, dtype: torch.dtype, prompts: bool) -> Any:
    from diffusers import DiffusionPipeline  # noqa: PLC0415, diffusers is optional

    where = {"revision": config.revision} if config.revision else {}
    kind: dict[str, Any] = {"variant": config.variant} if config.variant else {}
    if config.quantisation == "nf4":
        kind["quantization_config"] = _nf4(DiffusionPipeline.load_config(config.base, **where), dtype)
    absent: dict[str, None] = {}
    if not prompts:
        index = DiffusionPipeline.load_config(config.base, **where)
        absent = {name: None for name in index if name.startswith(_PROMPT_PARTS)}
    return DiffusionPipeline.from_pretrained(config.base, torch_dtype=dtype, **where, **kind, **absent)


_TORCHAO = {"int8": "Int8WeightOnlyConfig", "float8": "Float8WeightOnlyConfig"}


def _quantise(model: nn.Module, name: str) -> None:
    """Quantise the linear layers of a model by torchao."""
    try:
        from torchao import quantization  # noqa: PLC0415, optional
    except ImportError as error:
        raise ValueError(f"model.quantisation: '{name}' needs torchao (pip install torchao): {error}") from None
    quantization.quantize_(model, getattr(quantization, _TORCHAO[name])())


def _nf4(components: Mapping[str, Any], dtype: torch.dtype) -> Any:
    """Return diffusers' setting that loads the denoiser of a pipeline in 4 bits."""
    from diffusers import BitsAndBytesConfig, PipelineQuantizationConfig  # noqa: PLC0415, optional

    codes = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    return PipelineQuantizationConfig(quant_mapping={name: codes for name in COMPONENTS if name in components})


def denoiser_of(pipe: Any) -> tuple[str, nn.Module]:
    """Return the component name and the model of a pipeline's denoiser.

    Raises:
        ValueError: If the pipeline has several.
    """
    models = targets_of(pipe, None, None)
    if len(models) != 1:
        raise ValueError(f"one denoiser is distilled at a time, and this pipeline has {', '.join(models)}")
    return next(iter(models.items()))


@dataclass(frozen=True)
class Batch:
    """Samples of one size.

    Attributes:
        size: (height, width) in pixels.
        latents: Clean latents, in the shape that the denoiser takes.
        tensors: The other tensors that the denoiser takes, by name.
        null: The rows `[1, ...]` of the empty prompt, of those tensors that have a row per sample.
    """

    size: tuple[int, int]
    latents: Tensor
    tensors: dict[str, Tensor]
    null: dict[str, Tensor]

    def to(self, device: Any, dtype: torch.dtype) -> "Batch":
        """Move to a device. Tensors with a row per sample get the model's dtype, latents stay float32."""

        def move(name: str, value: Tensor) -> Tensor:
            fitting = name in self.null and value.is_floating_point()
            return value.to(device, dtype if fitting else value.dtype, non_blocking=True)

        tensors = {name: move(name, value) for name, value in self.tensors.items()}
        null = {name: move(name, value) for name, value in self.null.items()}
        return Batch(self.size, self.latents.to(device, torch.float32, non_blocking=True), tensors, null)

    def twice(self, count: int) -> "Batch":
        """Return the first `count` samples, and the same once more."""
        tensors = {n: torch.cat([t[:count]] * 2) if n in self.null else t for n, t in self.tensors.items()}
        return Batch(self.size, torch.cat([self.latents[:count]] * 2), tensors, self.null)

    def without_prompts(self, chosen: Tensor) -> dict[str, Tensor]:
        """Return the tensors with the empty prompt in the rows where `chosen` `[B]` is true."""
        rows = chosen.to(self.latents.device)
        return {
            name: torch.where(rows.view(-1, *[1] * (value.dim() - 1)), self.null[name], value)
            if name in self.null
            else value
            for name, value in self.tensors.items()
        }


@dataclass(frozen=True)
class Interface:
    """How a pipeline calls its denoiser.

    Attributes:
        latents: Name of the argument that takes the noisy latents.
        timestep_scale: The denoiser's timestep is the scheduler's times this.
        batched: Names of the tensors that have a row per sample; a tensor inside a dictionary is named 'outer.inner'.
        literals: Arguments that are no tensors, by name.
    """

    latents: str
    timestep_scale: float
    batched: tuple[str, ...]
    literals: dict[str, Any]

    def arguments(self, latents: Tensor, timesteps: Tensor, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """Return the arguments of a call of the denoiser.

        Args:
            latents: Noisy latents.
            timesteps: The scheduler's timesteps `[B]`.
            tensors: All other tensors, by recorded names.
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


class _Recorded(Exception):  # noqa: N818, no error: it ends the pipeline's call
    """Carries the arguments of the denoiser out of the pipeline."""


def record(pipe: Any, height: int, width: int, guidance: float, **call: Any) -> dict[str, Any]:
    """Run a pipeline up to its first call of the denoiser and return the arguments of that call by name.

    Args:
        pipe: The pipeline. Its scheduler is changed, as by any call.
        height: In pixels.
        width: In pixels.
        guidance: The input of FLUX.1-dev: see `_unguided`.
        call: What the pipeline takes: `prompt`, or embeddings.

    Raises:
        ValueError: If the pipeline never calls its denoiser.
    """
    model = denoiser_of(pipe)[1]
    names = argument_names(model)

    def stop(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        raise _Recorded({**dict(zip(names, args, strict=False)), **kwargs})

    hook = model.register_forward_pre_hook(stop, with_kwargs=True, prepend=True)
    try:
        with torch.no_grad():
            size = {"height": height, "width": width, "num_inference_steps": 2, "output_type": "latent"}
            pipe(**size, **_unguided(pipe, guidance), **call)
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


def _unguided(pipe: Any, guidance: float) -> dict[str, Any]:
    """Return arguments of a pipeline's call without classifier-free guidance; `guidance` is an input of FLUX.1-dev."""
    known = inspect.signature(type(pipe).__call__).parameters
    if "true_cfg_scale" not in known:
        return {"guidance_scale": 1.0}
    takes = getattr(denoiser_of(pipe)[1].config, "guidance_embeds", False)
    return {"true_cfg_scale": 1.0, **({"guidance_scale": guidance} if takes else {})}


def interface_of(pipe: Any, height: int, width: int, guidance: float, **call: Any) -> Interface:
    """Find out how a pipeline calls its denoiser. The arguments are those of `record`.

    Raises:
        ValueError: If the denoiser is called with something that cannot be stored.
    """
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
    """Encode pixels `[B, 3, height, width]` in [-1, 1] into the latents that the denoiser takes; FLUX's are packed."""
    latents = encode(pipe, images)
    packs = hasattr(pipe, "_pack_latents") and hasattr(pipe, "_unpack_latents")
    return pipe._pack_latents(latents, *latents.shape) if packs else latents


def to_images(pipe: Any, latents: Tensor, size: tuple[int, int]) -> Tensor:
    """Decode the denoiser's latents into pictures `[B, 3, height, width]` in [0, 1], on the CPU."""
    with torch.no_grad():
        pixels = decode(pipe, unpacked(pipe, latents.to(pipe.vae.device), *size))
    return (pixels.cpu() / 2 + 0.5).clamp(0, 1)


def sample(
    model: Any, pipe: Any, interface: Interface, batch: Batch, noise: Tensor, *, num_inference_steps: int
) -> Tensor:
    """Denoise with the pipeline's scheduler, without guidance; return latents like `noise`.

    Args:
        model: The denoiser as it is called.
        pipe: Its pipeline, which gives the scheduler and the native size.
        interface: How the denoiser is called.
        batch: The embeddings. Its latents are not used.
        noise: Where the denoising begins.
        num_inference_steps: Denoising steps.
    """
    scheduler, flow = _scheduler_for(pipe, batch.size)
    if flow:
        scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / num_inference_steps, num_inference_steps).tolist())
    else:
        scheduler.set_timesteps(num_inference_steps)
    latents = noise * scheduler.init_noise_sigma if hasattr(scheduler, "init_noise_sigma") else noise
    dtype = computing_dtype(model) if isinstance(model, nn.Module) else noise.dtype
    with torch.no_grad():
        for time in scheduler.timesteps:
            scaled = latents if flow else scheduler.scale_model_input(latents, time)
            call = interface.arguments(scaled.to(dtype), time.expand(len(noise)), batch.tensors)
            output = model(**call)[0].float()
            if output.dim() == 4 and output.shape[1] == 2 * noise.shape[1]:  # the second half are variances
                output = output.chunk(2, 1)[0]
            latents = scheduler.step(output, time, latents, return_dict=False)[0]
    return latents


def _scheduler_for(pipe: Any, size: tuple[int, int]) -> tuple[Any, bool]:
    """Return a new scheduler of the pipeline's kind, and whether it is one of flow matching.

    Flow matching gets the static shift of a size in pixels, so that it needs no `mu` in each call.
    """
    config = pipe.scheduler.config
    if not hasattr(pipe.scheduler, "scale_noise"):
        return type(pipe.scheduler).from_config(config), False
    shift = shift_at(pipe, size, "sqrt")
    return type(pipe.scheduler).from_config(config, use_dynamic_shifting=False, shift=shift), True
