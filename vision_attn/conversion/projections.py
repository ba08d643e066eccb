"""Lets a processor add to what its host projects to queries and keys: x + f(x) instead of x.

The host's projections stay as they are. They are recognised by the weight that reaches `torch.nn.functional.linear`,
so this follows the host when it fuses or unfuses them, wraps them in adapters (peft), or multiplies by the weight
itself (timm's EVA), and there is nothing to undo.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class _Rows(NamedTuple):
    """The rows `start:stop` of a weight, which project to the queries or keys; `stop` is None for the whole weight."""

    role: str
    start: int = 0
    stop: int | None = None


class Projections:
    """The projections of one attention module while its forward runs.

    Args:
        module: Attention module of diffusers or timm.
        residuals: Modules f by role: 'q' or 'k'.
    """

    def __init__(self, module: nn.Module, residuals: Mapping[str, nn.Module]) -> None:
        self.residuals, self.table = residuals, _table(module)
        self.seen: set[str] = set()

    def missing(self) -> list[str]:
        """Return the roles whose projection was not seen."""
        return sorted(set(self.residuals) - self.seen)

    def linear(self, run: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Answer one call of `torch.nn.functional.linear`; `run` is the function itself."""
        for known, rows in self.table:
            if weight is known:
                return self._project(run, x, weight, bias, rows)
        return run(x, weight, bias)

    def _project(
        self, run: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor | None, rows: list[_Rows]
    ) -> Tensor:
        if not torch.compiler.is_compiling():
            self.seen |= {row.role for row in rows}
        if rows[0].stop is None:
            residual = self.residuals.get(rows[0].role)
            return run(x if residual is None else x + residual(x), weight, bias)
        y, done, parts = run(x, weight, bias), 0, []
        for row in rows:
            parts.append(y[..., row.start : row.stop])
            if row.role in self.residuals:
                parts[-1] = parts[-1] + run(self.residuals[row.role](x), weight[row.start : row.stop], None)
            done = row.stop or 0
        return torch.cat([*parts, y[..., done:]], -1)


def _table(module: nn.Module) -> list[tuple[Tensor, list[_Rows]]]:
    """Return the weights that project queries and keys, with their rows."""
    found = []
    for role in ("q", "k"):
        for name in (f"to_{role}", f"{role}_proj"):
            found += [(weight, [_Rows(role)]) for weight in _weights_on_input(getattr(module, name, None))]
    for name in ("to_qkv", "to_qkv_mlp_proj", "qkv"):
        for weight in _weights_on_input(getattr(module, name, None))[:1]:
            inner = _inner_dim(module)
            found.append((weight, [_Rows("q", 0, inner), _Rows("k", inner, 2 * inner)]))
    return found


def _weights_on_input(projection: nn.Module | None) -> list[Tensor]:
    """Return the weights of a projection that multiply its input: its own, then those of low-rank adapters."""
    if projection is None:
        return []
    base = getattr(projection, "base_layer", projection)
    adapters: Any = getattr(projection, "lora_A", {})
    weights: list[Any] = [getattr(base, "weight", None), *(adapter.weight for adapter in adapters.values())]
    return [weight for weight in weights if isinstance(weight, Tensor)]


def _inner_dim(module: Any) -> int:
    inner = getattr(module, "inner_dim", None)
    heads = getattr(module, "heads", None) or getattr(module, "num_heads", None)
    return int(inner if inner is not None else heads * module.head_dim)
