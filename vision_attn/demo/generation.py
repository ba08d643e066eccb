"""`vision-attn generate`: one picture of a pipeline, converted as the arguments say, at any size."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from vision_attn._compat import ensure_torchvision
from vision_attn.conversion.conversion import Conversion, convert, load
from vision_attn.demo.call_arguments import call_of_text, check_call
from vision_attn.highres.levels import Options, generate_highres
from vision_attn.processors import AttnSpec, spec_of_text

TEACHERS = {
    "emoji": "base",
    "emoji-nano": "nano",
    "emoji-unet": "unet",
}  # the offline ones, and their names in the demo
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Request:
    """What to draw, and with which attention.

    Args:
        prompt: What to draw.
        height: In pixels, the pipeline's own if None.
        width: In pixels, the pipeline's own if None.
        attention: The processor, None for that of the adapter, or of the host.
        adapter: Folder, file or hub name of trained weights, as for `load`.
        min_tokens: Layers with fewer tokens keep their own attention.
        options: How levels are made, for `generate_highres`; None for one plain call of the pipeline.
        seed: Of the noise.
        call: Further arguments of the pipeline's call.

    Raises:
        ValueError: If the fields contradict each other, or a number is below 1.
    """

    prompt: str
    height: int | None = None
    width: int | None = None
    attention: AttnSpec | None = None
    adapter: str | None = None
    min_tokens: int = 0
    options: Options | None = None
    seed: int = 0
    call: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.options is not None and (self.height is None or self.width is None):
            raise ValueError("--highres needs --height and --width")
        if self.min_tokens and (self.options is not None or self.adapter is not None or self.attention is None):
            raise ValueError("--min-tokens goes with --attention, without --highres and --adapter")
        numbers = dict(height=self.height, width=self.width, steps=self.call.get("num_inference_steps"))
        for name, value in (*numbers.items(), ("num_images_per_prompt", self.call.get("num_images_per_prompt"))):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} must be an int of at least 1, got {value!r}")


def request_of(arguments: Any) -> Request:
    """Return what the arguments of `vision-attn generate` ask for.

    Raises:
        ValueError: If they contradict each other, or a value is out of its range.
        TypeError: If the processor has no such field.
    """
    given: dict[str, Any] = {name: getattr(arguments, name) for name in ("steps", "level_steps", "strength", "rope")}
    given = {name: value for name, value in given.items() if value is not None}
    call = call_of_text(arguments.set)
    options = None
    if arguments.highres:
        if "strength" in given:
            given["strength"] = tuple(given["strength"])
        options = Options(**given)
    elif extra := [f"--{name.replace('_', '-')}" for name in given if name != "steps"]:
        raise ValueError(f"{' and '.join(extra)} go with --highres")
    elif "steps" in given:
        call["num_inference_steps"] = given["steps"]
    attention = spec_of_text(arguments.attention) if arguments.attention else None
    return Request(
        arguments.prompt, arguments.height, arguments.width, attention, arguments.adapter, arguments.min_tokens,
        options, arguments.seed, call,
    )  # fmt: skip


def load_pipeline(name: str, *, device: str | None = None, dtype: str | None = None) -> Any:
    """Load a text-to-image pipeline.

    Args:
        name: Folder or hub name of a diffusers pipeline, or an embedded teacher: 'emoji', 'emoji-nano', 'emoji-unet'.
        device: Such as 'cpu' or 'cuda', a GPU where there is one if None.
        dtype: 'float32', 'float16' or 'bfloat16'; bfloat16 on a GPU and float32 on a CPU if None.

    Raises:
        ValueError: If there is no such pipeline, or no such device here.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    _check_device(device)
    kind = DTYPES[dtype] if dtype else torch.float32 if device == "cpu" else torch.bfloat16
    ensure_torchvision()
    import vision_attn.demo  # noqa: PLC0415, diffusers learns its pipelines

    if name in TEACHERS:
        teacher = vision_attn.demo.load_teacher(TEACHERS[name])
        return teacher if (device, kind) == ("cpu", torch.float32) else teacher.to(device, kind)
    is_folder = (Path(name) / "model_index.json").exists()
    if not is_folder and (Path(name).exists() or name.count("/") != 1):
        raise ValueError(
            f"{name} is neither a folder with model_index.json, nor a name on the hub, nor one of {', '.join(TEACHERS)}"
        )
    from diffusers import DiffusionPipeline  # noqa: PLC0415, diffusers is optional

    try:
        return DiffusionPipeline.from_pretrained(name, torch_dtype=kind).to(device)
    except OSError as error:
        raise ValueError(f"{name} could not be loaded: {str(error).strip().splitlines()[0]}") from None


def _check_device(device: str) -> None:
    """Refuse a device that cannot be used here."""
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {device}: no GPU can be used here")
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:  # PyTorch asserts that it was built for the device
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"--device {device} cannot be used here, give cpu or cuda: {reason}") from None


def generate(pipe: Any, request: Request) -> tuple[Any, str]:
    """Draw; the pipeline is as before afterwards.

    Args:
        pipe: A text-to-image pipeline.
        request: What to draw.

    Returns:
        A PIL image, and a line about the attention that drew it.

    Raises:
        ValueError: If the pipeline has no such argument, or the conversion or the size does not fit it.
    """
    check_call(pipe, request.call)
    conversion: Conversion | None = None
    levels = request.options is not None
    if request.adapter is not None:
        conversion = load(pipe, request.adapter, spec=request.attention)
    elif request.attention is not None and not levels:
        conversion = convert(pipe, request.attention, min_tokens=request.min_tokens)
    try:
        noise = torch.Generator().manual_seed(request.seed)
        if request.options is not None:
            assert request.height is not None and request.width is not None
            image, note = _by_levels(pipe, request, noise, request.attention if conversion is None else None)
        else:
            size = _size(pipe, request.height, request.width)
            image = pipe(prompt=request.prompt, generator=noise, **size, **request.call).images[0]
            note = f"{image.height} x {image.width} pixels"
        return image, f"{note}, {_attention(conversion, request)}"
    finally:
        if conversion is not None:
            conversion.revert()


def _size(pipe: Any, height: int | None, width: int | None) -> dict[str, int]:
    """Return height and width for the pipeline's call; where one is given, some pipelines would ignore it alone."""
    given = {side: pixels for side, pixels in (("height", height), ("width", width)) if pixels is not None}
    if len(given) != 1:
        return given
    latents: Any = getattr(pipe, "default_sample_size", None)
    for denoiser in (getattr(pipe, "unet", None), getattr(pipe, "transformer", None)):
        latents = latents or getattr(getattr(denoiser, "config", None), "sample_size", None)
    if latents is None or not hasattr(pipe, "vae_scale_factor"):
        raise ValueError(f"give --height and --width: a {type(pipe).__name__} does not tell its own size")
    sides = latents if isinstance(latents, tuple | list) else (latents, latents)
    own = {side: int(n) * pipe.vae_scale_factor for side, n in zip(("height", "width"), sides, strict=True)}
    return own | given


def _by_levels(pipe: Any, request: Request, noise: torch.Generator, attn: AttnSpec | None) -> tuple[Any, str]:
    size = (request.height, request.width)
    drawn = generate_highres(
        pipe, request.prompt, *size, options=request.options, attn=attn, generator=noise, **request.call  # type: ignore
    )  # fmt: skip
    return drawn.images[0], "pixels: " + ", ".join(f"{one.height} x {one.width}" for one in drawn.levels)


def _attention(conversion: Conversion | None, request: Request) -> str:
    """Describe what was rerouted."""
    if conversion is None:
        return f"{request.attention} above the first level" if request.attention else "the host's attention"
    rows = [row for row in conversion.layers if row.status == "rerouted"]
    shares = [row.attended for row in rows if row.attended is not None]
    seen = f", a token sees {sum(shares) / len(shares):.1%}" if shares else ""
    specs = " and ".join(dict.fromkeys(map(str, conversion.specs.values())))
    return f"{specs} in {len(rows)} of {len(conversion.layers)} layers{seen}"
