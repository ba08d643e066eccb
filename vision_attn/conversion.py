"""`convert` joins a processor to a host, `Conversion` is what one can then do with it, `load` restores a saved one."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from vision_attn.adapter import read_adapter, write_adapter
from vision_attn.families import Host, find_host
from vision_attn.intercept import is_rerouted, state_of
from vision_attn.kernels.backend import check_backend
from vision_attn.layer_state import LayerState
from vision_attn.layer_table import LayerTable, Row
from vision_attn.plan import Plan, Where, fix_grid, is_converted, model_state, selector, undo
from vision_attn.processors.base import AttnSpec
from vision_attn.targets import candidates_of, refuse_converted, targets_of


class Conversion:
    """The converted models of a pipeline, or one model. It holds no state: `Conversion.of(model)` makes another.

    Args:
        models: The converted models by component name, '' for a model by itself.
    """

    def __init__(self, models: dict[str, nn.Module]) -> None:
        self.models = models

    @classmethod
    def of(cls, target: Any) -> "Conversion":
        """Return the conversion of a converted model or pipeline.

        Raises:
            ValueError: If nothing of it is converted.
        """
        models = {name: model for name, model in candidates_of(target).items() if is_converted(model)}
        if not models:
            raise ValueError(f"this {type(target).__name__} is not converted")
        return cls(models)

    def _rerouted(self) -> Iterator[tuple[str, nn.Module, LayerState]]:
        for component, model in self.models.items():
            for module in model.modules():
                if is_rerouted(module):
                    state = state_of(module)
                    yield f"{component}.{state.name}" if len(self.models) > 1 else state.name, module, state

    @property
    def layers(self) -> LayerTable:
        """The converted layers with their heads, tokens, attended share and status."""
        table = LayerTable()
        for name, module, state in self._rerouted():
            grid, attended = state.grid, None
            if grid is not None:
                attended = state.spec.attended(grid) if state.status == "rerouted" else 1.0
            table.append(Row(name, state.num_heads, grid and grid.tokens, attended, state.status))
        return table

    def status(self) -> dict[str, str]:
        """Return what became of each layer's last call: 'rerouted', 'dense: why', or 'not run yet'."""
        return {name: state.status for name, _, state in self._rerouted()}

    @property
    def spec(self) -> AttnSpec:
        """The spec that the layers were converted with."""
        return next(state.spec for _, _, state in self._rerouted())

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the parameters that the conversion added, under their names in the model."""
        for name, module, _ in self._rerouted():
            for inner, parameter in module.vision_attn.named_parameters():  # type: ignore[union-attr]
                yield f"{name}.vision_attn.{inner}", parameter

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the parameters that the conversion added: what to train when the host is frozen."""
        for _, parameter in self.named_parameters():
            yield parameter

    @contextmanager
    def bypassed(self) -> Iterator[None]:
        """Run the host's own attention inside the `with` block: the teacher of the same weights."""
        shared = [model_state(model).shared for model in self.models.values()]
        before = [s.bypassed for s in shared]
        for s in shared:
            s.bypassed = True
        try:
            yield
        finally:
            for s, value in zip(shared, before, strict=True):
                s.bypassed = value

    @contextmanager
    def use_grid(self, height: int, width: int) -> Iterator[None]:
        """Fix the grid, in tokens, inside the `with` block, for hosts whose grid `torch.compile` cannot read."""
        contexts = {id(state.context): state.context for _, _, state in self._rerouted()}.values()
        before = [context.fixed for context in contexts]
        fix_grid(list(contexts), (height, width))
        try:
            yield
        finally:
            for context, fixed in zip(contexts, before, strict=True):
                context.fixed = fixed

    def revert(self) -> None:
        """Give the host back as it was: its classes, hooks, switches and state-dict keys, and weights that `load` set."""
        for model in self.models.values():
            undo(model)

    def save(self, folder: str | Path) -> None:
        """Write an adapter folder, from which `load` restores this conversion.

        It holds `config.json` and one safetensors file with the tensors that the conversion added, and those of the
        host that have changed since, under their names in the model. Several components get a folder each.

        Args:
            folder: Is made if it does not exist. Files of an earlier adapter are replaced.
        """
        for component, model in self.models.items():
            place = Path(folder) / component if len(self.models) > 1 else Path(folder)
            write_adapter(place, model, component, model_state(model))

    def __repr__(self) -> str:
        table = self.layers
        done = sum(row.status == "rerouted" for row in table)
        return f"{self.spec} on {len(table)} layers, {done} rerouted in the last forward"


def convert(
    target: Any,
    spec: AttnSpec,
    *,
    where: Where = None,
    min_tokens: int = 0,
    grid: tuple[int, int] | None = None,
    backend: str = "auto",
    host: Host | None = None,
    components: tuple[str, ...] | None = None,
) -> Conversion:
    """Replace the self-attention over the image of a model, or of a pipeline's denoisers, in place.

    The model is changed only if everything fits.

    Args:
        target: A diffusers pipeline, a diffusers UNet or DiT, or a timm vision transformer.
        spec: The processor, such as `Clear(radius=16)`.
        where: Which layers: a pattern as in a shell, a compiled regular expression (searched), or a predicate, on
            names such as 'down_blocks.0.attentions.0.transformer_blocks.0.attn1'.
        min_tokens: Layers whose grid has fewer tokens run their own attention.
        grid: (height, width) in tokens, if the host's grid is always the same or cannot be read (FLUX compiled whole).
        backend: How the processor's operators run: 'auto', 'torch' or 'reference'.
        host: For a model that is not known: which modules, and where the grid is.
        components: Names of the pipeline's components to convert, `unet`, `transformer`, `transformer_2` and `prior`
            unless given.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If the model is unknown or converted already, no layer is selected, or a layer cannot be rerouted.
    """
    refuse_converted(targets_of(target, components, host))
    return reconvert(
        target, spec, where=where, min_tokens=min_tokens, grid=grid, backend=backend, host=host, components=components
    )


def reconvert(
    target: Any,
    spec: AttnSpec,
    *,
    where: Where = None,
    min_tokens: int = 0,
    grid: tuple[int, int] | None = None,
    backend: str = "auto",
    host: Host | None = None,
    components: tuple[str, ...] | None = None,
) -> Conversion:
    """Convert like `convert`, in the place of an earlier conversion if there is one."""
    if not isinstance(spec, AttnSpec):
        raise TypeError(f"spec must be a processor's spec such as Clear(radius=16), got {spec!r}")
    if isinstance(min_tokens, bool) or not isinstance(min_tokens, int) or min_tokens < 0:
        raise ValueError(f"min_tokens must be a number of tokens, at least 0, got {min_tokens!r}")
    check_backend(backend)
    select = selector(where)
    models = targets_of(target, components, host)
    plans = [Plan(model, spec, host or find_host(model), select, backend) for model in models.values()]
    for plan in plans:
        if grid is not None:
            fix_grid(plan.contexts, grid)
    for plan in plans:
        plan.apply(min_tokens)
    return Conversion(models)


def use_grid(target: Any, height: int, width: int) -> Any:
    """Fix the grid of a converted model or pipeline inside a `with` block: see `Conversion.use_grid`."""
    return Conversion.of(target).use_grid(height, width)


def load(
    target: Any, source: str | Path, *, weight_name: str | None = None, backend: str = "auto", **hub: Any
) -> Conversion:
    """Convert a model or pipeline as a saved adapter says, and load its weights.

    Reads what `Conversion.save` wrote, and the released CLEAR weights (`clear_local_{8,16,32}[_down_4].safetensors`) as
    they are. The model is changed only if every tensor has its place.

    Args:
        target: What `convert` takes.
        source: A folder, a safetensors file, or the name of a repository on the Hugging Face hub.
        weight_name: File of the folder or repository, if it is not an adapter's.
        backend: How the processors' operators run.
        hub: `revision`, `subfolder`, `token`, ... of `huggingface_hub`.

    Raises:
        FileNotFoundError: If there is no such folder, file or repository.
        ValueError: If the file does not fit the model; missing and unexpected tensors are named.
    """
    check_backend(backend)
    models = targets_of(target, None, None)
    refuse_converted(models)
    plans = []
    for adapter in read_adapter(source, weight_name, **hub):
        model = models.get(adapter.component) or (next(iter(models.values())) if len(models) == 1 else None)
        if model is None:
            raise ValueError(f"{adapter.source} is for {adapter.component!r}, but there is only {', '.join(models)}")
        host = find_host(model)
        specs = adapter.specs([name for _, layers in host.find(model) for name, _ in layers])
        plan = Plan(model, specs, host, specs.__contains__, backend)
        plan.expect(adapter.tensors, adapter.source)
        plans.append((plan, adapter))
    for plan, adapter in plans:
        plan.apply(adapter.min_tokens)
        plan.fill(adapter.tensors)
    return Conversion({name: model for name, model in models.items() if is_converted(model)})
