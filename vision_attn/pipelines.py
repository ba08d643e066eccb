"""`pipe.set_attn_processor`, as diffusers' models have it, but it takes our processors too.

Importing this module adds the method to every diffusers pipeline, unless diffusers has one of its own.

    import vision_attn.pipelines
    pipe.set_attn_processor("clear", radius=16)

`vision_attn.convert(pipe, ...)` does the same and leaves the class of the pipeline alone.
"""

import inspect
from collections.abc import Mapping
from typing import Any

from vision_attn._compat import ensure_torchvision
from vision_attn.conversion.conversion import Conversion, convert
from vision_attn.conversion.state import is_converted
from vision_attn.graphs import disable, enable, replayed_of
from vision_attn.hosts.selection import candidates_of, denoisers_of
from vision_attn.processors import AttnSpec, make_spec


def register() -> None:
    """Give `diffusers.DiffusionPipeline` its `set_attn_processor`, if it has none."""
    ensure_torchvision()
    from diffusers import DiffusionPipeline  # noqa: PLC0415, diffusers is optional

    if not hasattr(DiffusionPipeline, "set_attn_processor"):
        DiffusionPipeline.set_attn_processor = set_attn_processor


def set_attn_processor(pipe: Any, processor: Any, **options: Any) -> Conversion | None:
    """Set the attention of a pipeline's denoisers. A conversion replaces the one before it.

    Args:
        pipe: A diffusers pipeline.
        processor: One of our specs (`Clear(radius=16)`), a sequence of them or a dictionary of them by pattern, as
            for `convert`; the name of one, with its fields in `options`; a processor of diffusers or a dictionary of
            them, which goes to the denoiser's own `set_attn_processor`; or None, which reverts the conversion.
        options: Fields of a processor given by name, and options of `convert` such as `where` or `min_tokens`; and
            `graphs`: True replays the denoisers from CUDA graphs, False stops that (see `vision_attn.graphs`).

    Returns:
        The conversion; None if `processor` is one of diffusers or None.

    Raises:
        ValueError: If the name is unknown, or the conversion is refused; the pipeline is then as it was.
        TypeError: If an option is unknown, or `processor` is none of these.
    """
    graphs = options.pop("graphs", None)
    if graphs is not None and not isinstance(graphs, bool):
        raise TypeError(f"graphs must be True or False, got {graphs!r}")
    enabled = None
    if graphs and not any(replayed_of(model) for model in candidates_of(pipe).values()):
        enabled = enable(pipe)  # first, because `only_if_faster` looks for it
    try:
        conversion = _set(pipe, processor, options)
    except Exception:
        if enabled is not None:
            enabled.disable()
        raise
    if graphs is not None:
        (enable if graphs else disable)(pipe)
    return conversion


def _set(pipe: Any, processor: Any, options: dict[str, Any]) -> Conversion | None:
    if processor is None:
        if options:
            raise TypeError(f"None takes no options, got {', '.join(options)}")
        if any(map(is_converted, candidates_of(pipe).values())):
            Conversion.of(pipe).revert()
        return None
    if not isinstance(processor, str) and not _is_ours(processor):
        _forward(pipe, processor, options)
        return None
    arguments = {name: options.pop(name) for name in _CONVERT if name in options}
    if isinstance(processor, str):
        processor = make_spec(processor, **options)
    elif options:
        raise TypeError(f"unknown options {', '.join(options)}: known are {', '.join(_CONVERT)}")
    return convert(pipe, processor, replace=True, **arguments)


_CONVERT = tuple(
    name
    for name, parameter in inspect.signature(convert).parameters.items()
    if parameter.kind is parameter.KEYWORD_ONLY
    and name not in ("host", "replace")  # the models of a pipeline are known
)


def _is_ours(processor: Any) -> bool:
    """Whether `processor` is a spec, or holds specs."""
    if isinstance(processor, Mapping):
        processor = list(processor.values())
    several = isinstance(processor, (list, tuple)) and bool(processor)
    return isinstance(processor, AttnSpec) or (several and all(isinstance(spec, AttnSpec) for spec in processor))


def _forward(pipe: Any, processor: Any, options: Mapping[str, Any]) -> None:
    """Hand a processor of diffusers to the denoisers. They empty a dictionary, so each gets a copy."""
    if options:
        raise TypeError(f"a {type(processor).__name__} takes no options, got {', '.join(options)}")
    if isinstance(processor, type) or not (callable(processor) or (isinstance(processor, dict) and processor)):
        raise TypeError(f"a processor must be a spec such as Clear(radius=16), or one of diffusers, got {processor!r}")
    denoisers = denoisers_of(pipe)
    for name, model in denoisers.items():
        if not hasattr(model, "set_attn_processor"):
            raise ValueError(f"the {name} of this pipeline, a {type(model).__name__}, has no set_attn_processor")
    for model in denoisers.values():
        model.set_attn_processor(dict(processor) if isinstance(processor, dict) else processor)  # type: ignore[operator]


register()
