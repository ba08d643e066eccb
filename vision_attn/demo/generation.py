"""`vision-attn generate`: draws one picture with a pipeline, converted as the arguments say, at any size."""

import ast
import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

import torch

from vision_attn._checks import is_int
from vision_attn.conversion.conversion import Conversion, convert, load
from vision_attn.highres.levels import Options, generate_highres
from vision_attn.processors import AttnSpec, spec_of_text

_TENSORS = {torch.Tensor, torch.FloatTensor, torch.LongTensor}
_LEVELS = ("num_inference_steps", "level_inference_steps", "strength", "rope")  # arguments of `Options`


@dataclass(frozen=True)
class Request:
    """What to draw, and with which attention.

    Args:
        prompt: What to draw.
        height: Height in pixels; the pipeline's default if None.
        width: Width in pixels; the pipeline's default if None.
        spec: The processor; None for the adapter's, or without one the host's own attention.
        adapter: Folder, file or hub name of a saved conversion, as for `load`.
        min_tokens: Layers with fewer tokens keep their own attention.
        options: Options of `generate_highres`; None for one plain call of the pipeline.
        seed: Seed of the noise.
        call: Further arguments of the pipeline's call.

    Raises:
        ValueError: If the fields contradict each other, or a number is below 1.
    """

    prompt: str
    height: int | None = None
    width: int | None = None
    spec: AttnSpec | None = None
    adapter: str | None = None
    min_tokens: int = 0
    options: Options | None = None
    seed: int = 0
    call: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.options is not None and (self.height is None or self.width is None):
            raise ValueError("--highres needs --height and --width")
        if self.min_tokens and (self.options is not None or self.adapter is not None or self.spec is None):
            raise ValueError("--min-tokens goes with --processor, without --highres and --adapter")
        numbers = dict(height=self.height, width=self.width, num_inference_steps=self.call.get("num_inference_steps"))
        for name, value in (*numbers.items(), ("num_images_per_prompt", self.call.get("num_images_per_prompt"))):
            if value is not None and (not is_int(value) or value < 1):
                raise ValueError(f"{name} must be an int of at least 1, got {value!r}")


def request_of(arguments: Any) -> Request:
    """Return the request that the arguments of `vision-attn generate` describe.

    Raises:
        ValueError: If they contradict each other, or a value is out of its range.
        TypeError: If the processor has no such field.
    """
    given: dict[str, Any] = {name: getattr(arguments, name) for name in _LEVELS}
    given = {name: value for name, value in given.items() if value is not None}
    call = call_of_text(arguments.set)
    options = None
    if arguments.highres:
        if "strength" in given:
            given["strength"] = tuple(given["strength"])
        options = Options(**given)
    elif extra := [f"--{name.replace('_', '-')}" for name in given if name != "num_inference_steps"]:
        raise ValueError(f"{' and '.join(extra)} go with --highres")
    elif "num_inference_steps" in given:
        call["num_inference_steps"] = given["num_inference_steps"]
    spec = spec_of_text(arguments.processor) if arguments.processor else None
    return Request(
        arguments.prompt, arguments.height, arguments.width, spec, arguments.adapter, arguments.min_tokens,
        options, arguments.seed, call,
    )  # fmt: skip


def generate(pipe: Any, request: Request) -> tuple[Any, str]:
    """Draw one picture. The pipeline is converted for it and reverted afterwards.

    Args:
        pipe: A text-to-image pipeline.
        request: What to draw.

    Returns:
        A PIL image, and a line about the attention that drew it.

    Raises:
        ValueError: If the pipeline does not take an argument of the call, or the conversion or the size does not fit.
    """
    check_call(pipe, request.call)
    conversion: Conversion | None = None
    levels = request.options is not None
    if request.adapter is not None:
        conversion = load(pipe, request.adapter, spec=request.spec)
    elif request.spec is not None and not levels:
        conversion = convert(pipe, request.spec, min_tokens=request.min_tokens)
    try:
        noise = torch.Generator().manual_seed(request.seed)
        if request.options is not None:
            assert request.height is not None and request.width is not None
            image, note = _by_levels(pipe, request, noise, request.spec if conversion is None else None)
        else:
            size = _size(pipe, request.height, request.width)
            image = pipe(prompt=request.prompt, generator=noise, **size, **request.call).images[0]
            note = f"{image.height} x {image.width} pixels"
        return image, f"{note}, {_attention(conversion, request)}"
    finally:
        if conversion is not None:
            conversion.revert()


def _size(pipe: Any, height: int | None, width: int | None) -> dict[str, int]:
    """Return height and width for the pipeline's call: both or none, because some pipelines ignore one alone."""
    given = {side: pixels for side, pixels in (("height", height), ("width", width)) if pixels is not None}
    if len(given) != 1:
        return given
    latents: Any = getattr(pipe, "default_sample_size", None)
    for denoiser in (getattr(pipe, "unet", None), getattr(pipe, "transformer", None)):
        latents = latents or getattr(getattr(denoiser, "config", None), "sample_size", None)
    if latents is None or not hasattr(pipe, "vae_scale_factor"):
        raise ValueError(f"give --height and --width: a {type(pipe).__name__} does not say its default size")
    sides = latents if isinstance(latents, tuple | list) else (latents, latents)
    own = {side: int(n) * pipe.vae_scale_factor for side, n in zip(("height", "width"), sides, strict=True)}
    return own | given


def _by_levels(pipe: Any, request: Request, noise: torch.Generator, spec: AttnSpec | None) -> tuple[Any, str]:
    size = (request.height, request.width)
    drawn = generate_highres(
        pipe, request.prompt, *size, options=request.options, spec=spec, generator=noise, **request.call  # type: ignore
    )  # fmt: skip
    return drawn.images[0], "pixels: " + ", ".join(f"{one.height} x {one.width}" for one in drawn.levels)


def _attention(conversion: Conversion | None, request: Request) -> str:
    """Describe the attention that drew."""
    if conversion is None:
        return f"{request.spec} above the first level" if request.spec else "the host's attention"
    rows = [row for row in conversion.layers if row.status == "rerouted"]
    shares = [row.attended for row in rows if row.attended is not None]
    seen = f", a token sees {sum(shares) / len(shares):.1%}" if shares else ""
    specs = " and ".join(dict.fromkeys(map(str, conversion.specs.values())))
    return f"{specs} in {len(rows)} of {len(conversion.layers)} layers{seen}"


def call_of_text(items: Sequence[str]) -> dict[str, Any]:
    """Read `name=value` arguments. A value is a Python literal, or else text.

    Raises:
        ValueError: If an item is not `name=value`.
    """
    call: dict[str, Any] = {}
    for item in items:
        name, equals, value = item.partition("=")
        if not equals or not name.isidentifier():
            raise ValueError(f"--set takes name=value, got {item!r}")
        try:
            call[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            call[name] = value
    return call


def check_call(pipe: Any, call: dict[str, Any]) -> None:
    """Refuse arguments that the pipeline's call does not take, and other values where it takes only tensors."""
    known: dict[str, inspect.Parameter] = {}
    for kind in type(pipe).__mro__:
        if "__call__" in vars(kind):
            parameters = inspect.signature(kind.__call__).parameters
            known = {**parameters, **known}
            if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
                break
    own = {"self", "prompt", "height", "width", "generator", "output_type", "return_dict", "args", "kwargs"}
    names = sorted(set(known) - own)
    if unknown := sorted(set(call) - set(names)):
        raise ValueError(f"{type(pipe).__name__} takes no {', '.join(unknown)}: it takes {', '.join(names)}")
    for name, value in call.items():
        kinds = set(get_args(known[name].annotation) or [known[name].annotation]) - {type(None)}
        if kinds <= _TENSORS and not isinstance(value, torch.Tensor | None):
            raise ValueError(f"{type(pipe).__name__} takes a tensor as {name}, got {value!r}")
