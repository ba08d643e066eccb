"""`Conversion`: what one can do with a converted model."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from vision_attn.adapters.adapter_writing import remove_adapter, write_adapter
from vision_attn.conversion.layer_table import LayerTable, Row
from vision_attn.conversion.model_state import is_converted, model_state, undo
from vision_attn.conversion.plan import fix_grid
from vision_attn.conversion.rerouting import is_rerouted, state_of
from vision_attn.conversion.state import LayerState
from vision_attn.hosts.targets import candidates_of
from vision_attn.processors.base import AttnSpec


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

    def _converted(self) -> list[tuple[str, nn.Module]]:
        """The models by component name.

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

    def status(self) -> dict[str, str]:
        """Return what became of each layer's last call: 'rerouted', 'dense: why', or 'not run yet'."""
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
            for inner, parameter in module.vision_attn.named_parameters():  # type: ignore[union-attr]
                yield f"{name}.vision_attn.{inner}", parameter

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the parameters that the conversion added: what to train when the host is frozen.

        They have the dtype of their layer. Of a 16-bit host, train them in float32 under autocast, as
        `vision_attn.distill` does: `for p in conversion.parameters(): p.data = p.data.float()`.
        """
        for _, parameter in self.named_parameters():
            yield parameter

    @contextmanager
    def bypassed(self) -> Iterator[None]:
        """Run the host's own attention inside the `with` block: the teacher of the same weights.

        With gradient checkpointing, which runs layers again, `backward` belongs inside the same block as its forward.
        """
        shared = [model_state(model).shared for _, model in self._converted()]
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
        """Fix the grid, in tokens, inside the `with` block, for hosts whose grid `torch.compile` cannot read.

        Compiled code is specialised on the grid: for more than 8 sizes raise `torch._dynamo.config.recompile_limit`.
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
        """Give the host back as it was: classes, hooks, switches, keys, and the weights that `load` replaced."""
        for _, model in self._converted():
            undo(model)

    def save(self, folder: str | Path) -> None:
        """Write an adapter folder, from which `load` restores this conversion.

        It holds `config.json` and one safetensors file with the tensors that the conversion added, and those of the
        host that have changed since, under their names in the model. Several components get a folder each.

        Args:
            folder: Is made if it does not exist. Files of an earlier adapter are replaced.
        """
        root = Path(folder)
        places = {component: root / component if len(self.models) > 1 else root for component in self.models}
        for component, model in self._converted():
            write_adapter(places[component], model, component, model_state(model))
        if root not in places.values():
            remove_adapter(root)  # of one component, which would be read first

    def __repr__(self) -> str:
        if not all(is_converted(model) for model in self.models.values()):
            return "a conversion that was reverted"
        table = self.layers
        done = sum(row.status == "rerouted" for row in table)
        specs = dict.fromkeys(str(state.spec) for _, _, state in self._rerouted())
        return f"{', '.join(specs)} on {len(table)} layers, {done} rerouted in the last forward"
