"""`convert` joins a processor to a host, `load` restores a saved conversion; both return a `Conversion`."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from torch import nn

from vision_attn._checks import check_bool, check_int
from vision_attn.adapters.adapter import Adapter, read_adapter, refuse_strangers, remove_adapter, write_adapter
from vision_attn.conversion.plan import Plan, fix_grid, refuse_unsynchronised, undo
from vision_attn.conversion.state import (
    LayerState,
    adapter_of,
    base_name,
    is_converted,
    is_rerouted,
    model_state,
    state_of,
)
from vision_attn.estimation.model import aligned
from vision_attn.graphs import Graphs, replayed_of, replaying
from vision_attn.hosts import Host, find_host
from vision_attn.hosts.selection import (
    Specs,
    Where,
    assign,
    candidates_of,
    check_host,
    check_specs,
    distinct,
    select,
    targets_of,
)
from vision_attn.kernels.backend import check_backend
from vision_attn.parallel.models import is_cut
from vision_attn.processors.base import CHILD, AttnSpec


def convert(  # noqa: PLR0913, the one call that users make
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
    replace: bool = False,
) -> "Conversion":
    """Replace the self-attention over the image of a model, or of a pipeline's denoisers, in place.

    The model is changed only if everything fits.

    Args:
        target: A diffusers pipeline, a diffusers UNet or DiT, or a timm vision transformer; or a list of models.
        spec: The processor, such as `Clear(radius=16)`; a sequence of them, which take turns from layer to layer; or a
            dictionary of them by pattern of layer names, `{"down_blocks.*": HiLo(), "*": Clear()}`: the first pattern
            that matches counts.
        where: Which layers to convert: a pattern as in a shell, a compiled regular expression (searched), or a
            predicate, on names such as 'down_blocks.0.attentions.0.transformer_blocks.0.attn1'.
        min_tokens: Layers whose grid has fewer tokens run their own attention.
        grid: (height, width) in tokens, if the host's grid is always the same or cannot be read (FLUX compiled whole).
        backend: How the processor's operators run: 'auto', 'triton', 'torch' or 'reference'.
        host: For a model that is not known: which modules are its self-attention, and where the grid is.
        components: Names of the components of a pipeline to convert; by default `unet`, `transformer`,
            `transformer_2` and `prior`, as far as the pipeline has them.
        only_if_faster: Layers run their own attention on grids where a step is as fast with it, and their status says
            so. The rates of `estimate` decide, for batch 1 on the device that the model is on now, so
            `Conversion.save` does not keep this. The time of the host counts, unless the model's CUDA graphs are
            enabled already.
        replace: Replace an earlier conversion, which stays if this one is refused.

    Returns:
        The conversion, which can be inspected, bypassed, trained, saved and reverted.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If the model is unknown or converted already, no layer is selected, or a layer cannot be rerouted.
    """
    check_int("min_tokens", min_tokens, 0, "a number of tokens")
    check_bool("only_if_faster", only_if_faster)
    check_bool("replace", replace)
    check_specs(spec)
    check_host(host)
    check_backend(backend)
    models = targets_of(target, components, host)
    if not replace:
        refuse_converted(models)
    plans = []
    for model in models.values():
        model_host = host or find_host(model)
        names = select(model, model_host.layer_names(model), where)
        plans.append(Plan(model, assign(spec, names), model_host, backend))
    refuse_unsynchronised(target, plans)
    for plan in plans:
        if grid is not None:
            fix_grid(plan.contexts, grid)
    for plan in plans:
        if only_if_faster:
            plan.break_even(graphs=replayed_of(plan.model) is not None)
    undo(plan.model for plan in plans if is_converted(plan.model))
    for plan in plans:
        plan.apply(min_tokens)
    return Conversion(models)


def refuse_converted(models: dict[str, nn.Module]) -> None:
    """Refuse models that are converted already.

    Raises:
        ValueError: If there are any; they are named.
    """
    done = [name or type(model).__name__ for name, model in models.items() if is_converted(model)]
    if done:
        raise ValueError(f"{', '.join(done)} is converted already: revert() the conversion first")


def use_grid(target: Any, height: int, width: int) -> AbstractContextManager[None]:
    """Fix the grid of a converted model or pipeline inside a `with` block: see `Conversion.use_grid`.

    Raises:
        ValueError: If nothing of `target` is converted.
    """
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
) -> "Conversion":
    """Convert a model or pipeline as a saved adapter says, and load its weights.

    It reads what `Conversion.save` wrote, and the files that authors released: CLEAR's weights
    (`clear_local_{8,16,32}[_down_4].safetensors`) and LinFusion's repositories. The model is changed only if every
    tensor fits.

    Args:
        target: What `convert` takes.
        source: A folder, a safetensors file, or the name of a repository on the Hugging Face hub.
        weight_name: Name of a file in the folder or repository, if that is not an adapter.
        spec: Replaces the spec that was saved, and must have the same parameters: `Clear(radius=16,
            native_tokens=4608)` for sizes above the training size. A released file of CLEAR whose name does not tell
            its radius needs it. LinFusion's repositories name their own spec, so they take none.
        host: For a model that is not known, as for `convert`.
        backend: How the processors' operators run.
        hub: `subfolder`, which local folders take too, and `revision`, `token`, `cache_dir`, ... of `huggingface_hub`.

    Returns:
        The conversion.

    Raises:
        TypeError: If an option is unknown, or an argument has the wrong type.
        FileNotFoundError: If there is no such folder, file or repository.
        ValueError: If the file is damaged or does not fit the model (missing and unexpected tensors are named), or the
            model is unknown or converted already.
    """
    if spec is not None and not isinstance(spec, AttnSpec):
        raise TypeError(f"spec must be a processor's spec such as Clear(radius=16), got {spec!r}")
    check_host(host)
    check_backend(backend)
    models, plans = {}, []
    for adapter in read_adapter(source, weight_name, spec, **hub):
        name, model = _model_for(adapter, target, host)
        refuse_converted({name: model})
        adapter.check(model)
        model_host = host or find_host(model)
        plan = Plan(model, adapter.specs(model_host.layer_names(model)), model_host, backend)
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


class Row(NamedTuple):
    """One converted layer. `tokens` and `attended` (mean share of tokens seen) describe its last forward, if any."""

    name: str
    heads: int
    tokens: int | None
    attended: float | None
    status: str


class LayerTable(list[Row]):
    """The converted layers; prints as a table."""

    def __str__(self) -> str:
        cells = [("layer", "heads", "tokens", "attended", "status")]
        for row in self:
            attended = "-" if row.attended is None else f"{row.attended:.1%}"
            cells.append(
                (row.name, str(row.heads), "-" if row.tokens is None else str(row.tokens), attended, row.status)
            )
        return aligned(cells)


class Conversion:
    """The converted models of a pipeline, or one model. The models hold all state: `Conversion.of(model)` finds it.

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
        models = distinct({name: model for name, model in candidates_of(target).items() if is_converted(model)})
        if not models:
            raise ValueError(f"this {type(target).__name__} is not converted")
        return cls(models)

    def _converted(self) -> list[tuple[str, nn.Module]]:
        """Return the models by component name.

        Raises:
            ValueError: If one was reverted.
        """
        for name, model in self.models.items():
            if not is_converted(model):
                raise ValueError(f"{name or type(model).__name__} is not converted: it was reverted")
        return list(self.models.items())

    def _rerouted(self) -> Iterator[tuple[str, nn.Module, LayerState]]:
        for component, model in self._converted():
            for module in model.modules():
                if is_rerouted(module):
                    state = state_of(module)
                    yield f"{component}.{state.name}" if len(self.models) > 1 else state.name, module, state

    @property
    def layers(self) -> LayerTable:
        """The converted layers with their heads, tokens, attended share and status."""
        table = LayerTable()
        for name, _, state in self._rerouted():
            grid, attended = state.grid, None
            if grid is not None:
                attended = state.spec.attended(grid) if state.status == "rerouted" else 1.0
            table.append(Row(name, state.num_heads, grid.tokens if grid is not None else None, attended, state.status))
        return table

    @property
    def status(self) -> dict[str, str]:
        """What became of each layer's last call: 'rerouted', 'dense: why', or 'not run yet'."""
        return {name: state.status for name, _, state in self._rerouted()}

    @property
    def spec(self) -> AttnSpec:
        """The spec that the first layer was converted with; `specs` has them all."""
        return next(state.spec for _, _, state in self._rerouted())

    @property
    def specs(self) -> dict[str, AttnSpec]:
        """The spec of each converted layer by name."""
        return {name: state.spec for name, _, state in self._rerouted()}

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the parameters that the conversion added, under their names in the model."""
        for name, module, _ in self._rerouted():
            for inner, parameter in module._modules[CHILD].named_parameters():  # type: ignore[union-attr]
                yield f"{name}.{CHILD}.{inner}", parameter

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the parameters that the conversion added: what to train when the host is frozen.

        They have the dtype of their layer. If the host has 16 bits, train them in float32 under autocast, as
        `vision_attn.distill` does: `for p in conversion.parameters(): p.data = p.data.float()`.
        """
        for _, parameter in self.named_parameters():
            yield parameter

    @contextmanager
    def bypassed(self) -> Iterator[None]:
        """Run the host's own attention inside the `with` block: the model is then its own teacher.

        With gradient checkpointing, call `backward` in the same block as its forward, because it runs layers again.

        Raises:
            ValueError: If `parallel.enable` has cut a model that diffusers has no plan for.
        """
        for _, model in self._converted():
            if is_cut(model):
                raise ValueError(
                    f"the own attention of this {type(model).__name__} would see one process's slice alone"
                )
        shared = [model_state(model).shared for _, model in self._converted()]
        before = [s.bypassed for s in shared]
        for s in shared:
            s.bypassed = True
        try:
            yield
        finally:
            for s, value in zip(shared, before, strict=True):
                s.bypassed = value

    def graphs(self, *, most: int = 8) -> AbstractContextManager[Graphs]:
        """Replay the converted models' forwards from CUDA graphs inside a `with` block: see `graphs.enable`."""
        return replaying(dict(self._converted()), most)

    @contextmanager
    def use_grid(self, height: int, width: int) -> Iterator[None]:
        """Fix the grid, in tokens, inside the `with` block, for hosts whose grid `torch.compile` cannot read.

        Compiled code is specialised on the grid: for more than 8 sizes raise `torch._dynamo.config.recompile_limit`.

        Raises:
            TypeError: If a side is not an int.
            ValueError: If a side is below 1, or the layers have grids of different sizes (a UNet).
        """
        contexts = {id(state.context): state.context for _, _, state in self._rerouted()}.values()
        before = [context.fixed for context in contexts]
        fix_grid(list(contexts), (height, width))
        try:
            yield
        finally:
            for context, fixed in zip(contexts, before, strict=True):
                context.fix(fixed)

    def revert(self) -> None:
        """Put the host back as it was: classes, hooks, switches, state-dict keys, and the weights that `load` replaced.

        Raises:
            ValueError: If it was reverted already, or a LoRA is fused into weights that `load` replaced.
        """
        undo(model for _, model in self._converted())

    @classmethod
    def from_pretrained(cls, target: Any, source: str | Path, **options: Any) -> "Conversion":
        """Convert a model or pipeline as a saved adapter says: `vision_attn.load` under the name that diffusers uses.

        Args, `options` and errors are those of `load`.
        """
        return load(target, source, **options)

    def push_to_hub(
        self, repo_id: str, *, private: bool | None = None, token: str | None = None, commit_message: str = ""
    ) -> str:
        """Upload the adapter folder to the Hugging Face hub, from which `load(target, repo_id)` restores it.

        Args:
            repo_id: Name of the repository, 'user/name'; it is made if it does not exist.
            private: Whether a new repository is private; the account's own default if None.
            token: Token of the account; the account that is logged in if None.
            commit_message: Message of the commit; it names the spec by default.

        Returns:
            The address of the commit.

        Raises:
            ValueError: As for `save_pretrained`.
        """
        from huggingface_hub import HfApi  # noqa: PLC0415, only where one uploads

        api = HfApi(token=token)
        repository = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            message = commit_message or f"Upload a conversion to {self.spec}"
            return str(api.upload_folder(repo_id=repository, folder_path=folder, commit_message=message))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write an adapter folder, from which `load` restores this conversion; `save` is a short name for this.

        It holds `config.json` and one safetensors file with the tensors that the conversion added, and those of the
        host that have changed since, under their names in the model. Several components get a folder each.

        Args:
            folder: Made if it does not exist. Files of an earlier adapter are replaced.

        Raises:
            ValueError: If the conversion was reverted, or projections were fused since the conversion, and trained; or
                if the folder is a model's own, or has adapters of other components.
        """
        root = Path(folder)
        places = {component: root / component if len(self.models) > 1 else root for component in self.models}
        adapters = {component: adapter_of(model, component) for component, model in self._converted()}
        refuse_strangers(root, list(places.values()))
        for component, adapter in adapters.items():
            write_adapter(places[component], adapter, base_name(self.models[component]))
        if root not in places.values():
            remove_adapter(root)  # `load` would read an earlier adapter of one component first

    save = save_pretrained

    def __repr__(self) -> str:
        if not all(is_converted(model) for model in self.models.values()):
            return "a conversion that was reverted"
        table = self.layers
        done = sum(row.status == "rerouted" for row in table)
        specs = dict.fromkeys(str(state.spec) for _, _, state in self._rerouted())
        return f"{', '.join(specs)} on {len(table)} layers, {done} rerouted in the last forward"
