"""`convert` joins a processor to a host, `load` does it as a saved conversion says; both return a `Conversion`."""

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from torch import nn

from vision_attn.adapters.adapter import Adapter, read_adapter
from vision_attn.conversion.converted import Conversion
from vision_attn.conversion.model_state import is_converted, undo
from vision_attn.conversion.plan import Plan, fix_grid
from vision_attn.hosts import Host, find_host
from vision_attn.hosts.policy import Specs, Where, assign, check_specs, selector
from vision_attn.hosts.targets import candidates_of, refuse_converted, targets_of
from vision_attn.kernels.backend import check_backend
from vision_attn.processors.base import AttnSpec

__all__ = ["Conversion", "convert", "load", "reconvert", "use_grid"]


def convert(
    target: Any,
    spec: Specs,
    *,
    where: Where = None,
    min_tokens: int = 0,
    grid: tuple[int, int] | None = None,
    backend: str = "auto",
    host: Host | None = None,
    components: tuple[str, ...] | None = None,
    only_if_faster: bool = False,
) -> Conversion:
    """Replace the self-attention over the image of a model, or of a pipeline's denoisers, in place.

    The model is changed only if everything fits.

    Args:
        target: A diffusers pipeline, a diffusers UNet or DiT, or a timm vision transformer.
        spec: The processor, such as `Clear(radius=16)`; a sequence of them that take turns with the depth; or a
            dictionary of them by pattern of layer names, `{"down_blocks.*": HiLo(), "*": Clear()}`, of which the first
            that matches counts.
        where: Which layers: a pattern as in a shell, a compiled regular expression (searched), or a predicate, on
            names such as 'down_blocks.0.attentions.0.transformer_blocks.0.attn1'.
        min_tokens: Layers whose grid has fewer tokens run their own attention.
        grid: (height, width) in tokens, if the host's grid is always the same or cannot be read (FLUX compiled whole).
        backend: How the processor's operators run: 'auto', 'triton', 'torch' or 'reference'.
        host: For a model that is not known: which modules, and where the grid is.
        components: Names of the pipeline's components to convert, `unet`, `transformer`, `transformer_2` and `prior`
            unless given.
        only_if_faster: Layers run their own attention on grids that are too small for the processor to pay, by the
            measured rates of `estimate` for the device that the model is on now; their status says so. It is about
            this machine, so `Conversion.save` does not keep it.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If the model is unknown or converted already, no layer is selected, or a layer cannot be rerouted.
    """
    refuse_converted(targets_of(target, components, host))
    return reconvert(
        target,
        spec,
        where=where,
        min_tokens=min_tokens,
        grid=grid,
        backend=backend,
        host=host,
        components=components,
        only_if_faster=only_if_faster,
    )


def reconvert(
    target: Any,
    spec: Specs,
    *,
    where: Where = None,
    min_tokens: int = 0,
    grid: tuple[int, int] | None = None,
    backend: str = "auto",
    host: Host | None = None,
    components: tuple[str, ...] | None = None,
    only_if_faster: bool = False,
) -> Conversion:
    """Convert like `convert`, in the place of an earlier conversion if there is one."""
    if isinstance(min_tokens, bool) or not isinstance(min_tokens, int) or min_tokens < 0:
        raise ValueError(f"min_tokens must be a number of tokens, at least 0, got {min_tokens!r}")
    check_specs(spec)
    _check(host, backend)
    select = selector(where)
    models = targets_of(target, components, host)
    plans = []
    for model in models.values():
        family = host or find_host(model)
        names = [name for name in family.layer_names(model) if select(name)]
        plans.append(Plan(model, assign(spec, names), family, backend))
    for plan in plans:
        if grid is not None:
            fix_grid(plan.contexts, grid)
    for plan in plans:
        if only_if_faster:
            plan.break_even()
        if is_converted(plan.model):
            undo(plan.model)
        plan.apply(min_tokens)
    return Conversion(models)


def _check(host: Any, backend: str) -> None:
    if host is not None and not isinstance(host, Host):
        raise TypeError(f"host must be a Host, got {host!r}")
    check_backend(backend)


def use_grid(target: Any, height: int, width: int) -> AbstractContextManager[None]:
    """Fix the grid of a converted model or pipeline inside a `with` block: see `Conversion.use_grid`."""
    return Conversion.of(target).use_grid(height, width)


def load(
    target: Any,
    source: str | Path,
    *,
    weight_name: str | None = None,
    spec: AttnSpec | None = None,
    host: Host | None = None,
    backend: str = "auto",
    **hub: Any,
) -> Conversion:
    """Convert a model or pipeline as a saved adapter says, and load its weights.

    Reads what `Conversion.save` wrote, and as they are the released CLEAR weights
    (`clear_local_{8,16,32}[_down_4].safetensors`) and LinFusion's repositories. The model is changed only if every
    tensor has its place.

    Args:
        target: What `convert` takes.
        source: A folder, a safetensors file, or the name of a repository on the Hugging Face hub.
        weight_name: File of the folder or repository, if it is not an adapter's.
        spec: Instead of the one that was saved, with the same parameters: `Clear(radius=16, native_tokens=4608)` for
            sizes above the training size. A released file of CLEAR whose name does not tell its radius needs it;
            LinFusion's repositories tell theirs and take none.
        host: For a model that is not known, as for `convert`.
        backend: How the processors' operators run.
        hub: `subfolder`, of a folder too, and `revision`, `token`, `cache_dir`, ... of `huggingface_hub`.

    Raises:
        TypeError: If there is no such option.
        FileNotFoundError: If there is no such folder, file or repository.
        ValueError: If the file does not fit the model; missing and unexpected tensors are named.
    """
    if spec is not None and not isinstance(spec, AttnSpec):
        raise TypeError(f"spec must be a processor's spec such as Clear(radius=16), got {spec!r}")
    _check(host, backend)
    models, plans = {}, []
    for adapter in read_adapter(source, weight_name, spec, **hub):
        name, model = _model_for(adapter, target, host)
        refuse_converted({name: model})
        adapter.check(model)
        family = host or find_host(model)
        plan = Plan(model, adapter.specs(family.layer_names(model)), family, backend)
        plan.expect(adapter.tensors, adapter.source)
        models[name] = model
        plans.append((plan, adapter))
    for plan, adapter in plans:
        plan.apply(adapter.min_tokens)
        plan.fill(adapter.tensors)
    return Conversion(models)


def _model_for(adapter: Adapter, target: Any, host: Host | None) -> tuple[str, nn.Module]:
    """Choose the model of `target` that an adapter is for."""
    candidates = candidates_of(target)
    if adapter.component in candidates:
        return adapter.component, candidates[adapter.component]
    models = targets_of(target, None, host)
    if ("" in models or not adapter.component) and len(models) == 1:
        return next(iter(models.items()))
    raise ValueError(f"{adapter.source} is for {adapter.component!r}, but there is only {', '.join(candidates)}")
