"""Lets a processor add to what its host projects to queries and keys: x + f(x) instead of x.

The host's projections stay as they are; hooks on them change their inputs. So whatever a projection has become by the
time it runs, with adapters (peft), other weights (offloading, parametrizations) or no weights that one could multiply
by (quantised layers), it gets x + f(x). Where one layer projects to queries, keys and values at once, a plain layer
multiplies f(x) by the rows of the queries and keys alone, and any other one runs once more for each.
"""

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vision_attn.conversion.grids import remove_hooks
from vision_attn.hosts.host import heads_of

_ROLES = {f"{before}{role}{after}": role for role in "qk" for before, after in (("to_", ""), ("", "_proj"))}
_ROLES |= {"query": "q", "key": "k"}  # of transformers
_ROLES |= {"to_query": "q", "to_key": "k"}  # of Kandinsky 5
FUSED = dict.fromkeys(("to_qkv", "to_qkv_mlp_proj", "qkv", "img_qkv_proj", "img_attn_qkv"))
PROJECTIONS = frozenset((*_ROLES, *FUSED))  # names of the layers that project to queries or keys
_SLOT = "_vision_attn_projections"  # attribute of an attention module and of its projections


class _Rows(NamedTuple):
    """The rows `start:stop` of a weight, which project to the queries or keys."""

    role: str
    start: int
    stop: int


class _Ahead(NamedTuple):
    """x + f(x) of a role, computed before its projection runs, and how often x had been written to."""

    role: str
    x: Tensor
    version: int
    sum: Tensor


class _Slot:
    """Where the hooks on projections find the `Projections` of the forward that runs, in each thread its own.

    Code that is compiled shares one, because it is traced once.

    Attributes:
        alike: Whether all projections have projected the same tensor up to now.
    """

    def __init__(self) -> None:
        self.traced: Projections | None = None
        self.thread = threading.local()
        self.alike = True

    @property
    def running(self) -> "Projections | None":
        """The projections of the forward that runs, None outside of one."""
        return self.traced if torch.compiler.is_compiling() else getattr(self.thread, "running", None)

    @running.setter
    def running(self, value: "Projections | None") -> None:
        if torch.compiler.is_compiling():
            self.traced = value
        else:
            self.thread.running = value

    def __reduce__(self) -> Any:
        return _Slot, ()


class Projections:
    """The projections of one attention module while its forward runs, inside a `with` block.

    Args:
        module: Attention module of diffusers or timm, to which `bind` was applied.
        residuals: Modules f by role: 'q' or 'k'.
        at_once: Takes x and some roles and returns x + f(x) of each, or None if each f is to be called by itself.
    """

    def __init__(
        self, module: nn.Module, residuals: Mapping[str, nn.Module],
        at_once: Callable[[Tensor, Sequence[str]], Sequence[Tensor] | None],
    ) -> None:  # fmt: skip
        if not torch.compiler.is_compiling():
            bind(module)  # somebody may have put a layer there without `setattr`
        self.module, self.residuals, self.at_once = module, residuals, at_once
        self.slot: _Slot = vars(module)[_SLOT]
        self.seen: set[str] = set()
        self.inside = False  # whether a layer that is not plain runs: what it multiplies by is its own affair
        self.ahead: _Ahead | None = None

    def __enter__(self) -> "Projections":
        self.before, self.slot.running = self.slot.running, self
        return self

    def __exit__(self, *error: object) -> None:
        self.slot.running, self.ahead = self.before, None

    @property
    def fused(self) -> bool:
        """Whether one layer projects to everything, so that its calls of `linear` must be looked at."""
        return not FUSED.keys().isdisjoint(self.module._modules)

    def missing(self) -> list[str]:
        """Return the roles whose projection was not seen."""
        return [] if self.seen >= self.residuals.keys() else sorted(self.residuals.keys() - self.seen)

    def enter(self, projection: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Change the arguments of a projection that is about to run; None leaves them as they are."""
        modules = self.module._modules
        for name, role in _ROLES.items():
            if modules.get(name) is projection and role in self.residuals:
                self.seen.add(role)
                return (self._sum(role, args[0]), *args[1:])
        if self._fused(projection) and not _is_plain(projection):
            self.inside = True
        return None

    def _sum(self, role: str, x: Tensor) -> Tensor:
        """Return x + f(x) of a role; those of the roles to come are computed with it, if they can be."""
        if torch.compiler.is_compiling():
            return x + self.residuals[role](x)
        ahead, self.ahead = self.ahead, None
        if ahead is not None:
            if ahead.role == role and ahead.x is x and ahead.version == x._version:
                return ahead.sum
            self.slot.alike = False
        roles = [role]
        if self.slot.alike and not x.is_inference():  # nobody counts how often such a tensor was written to
            roles += self.residuals.keys() - self.seen
        sums = self.at_once(x, roles)
        if sums is None:
            return x + self.residuals[role](x)
        if len(sums) > 1:
            self.ahead = _Ahead(roles[1], x, x._version, sums[1])
        return sums[0]

    def leave(self, projection: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """Change what a layer that projects to everything at once has computed; None leaves it as it is."""
        if not self.inside or not self._fused(projection):
            return None
        self.slot.running = None
        try:
            x = args[0]
            return self._in_rows(x, output, lambda f, row: projection(x + f(x))[..., row.start : row.stop])
        finally:
            self.inside, self.slot.running = False, self

    def linear(self, run: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Answer one call of `torch.nn.functional.linear`; `run` is the function itself."""
        for name in () if self.inside else FUSED:
            projection = self.module._modules.get(name)
            if projection is not None and not _is_parametrized(projection) and projection.weight is weight:
                y = run(x, weight, bias)
                return self._in_rows(
                    x,
                    y,
                    lambda f, row: y[..., row.start : row.stop] + run(f(x), weight[row.start : row.stop], None),  # noqa: B023
                )
        return run(x, weight, bias)

    def _in_rows(self, x: Tensor, y: Tensor, part: Callable[[nn.Module, _Rows], Tensor]) -> Tensor:
        """Replace the rows of queries and keys in the output y of x."""
        inner = math.prod(heads_of("", self.module))
        parts = []
        for row in (_Rows("q", 0, inner), _Rows("k", inner, 2 * inner)):
            f = self.residuals.get(row.role)
            self.seen.add(row.role)
            parts.append(y[..., row.start : row.stop] if f is None else part(f, row))
        return torch.cat([*parts, y[..., 2 * inner :]], -1)

    def _fused(self, projection: nn.Module) -> bool:
        return any(self.module._modules.get(name) is projection for name in FUSED)


def bind(module: nn.Module) -> None:
    """Put hooks on the projections that an attention module has now. `unbind` undoes it."""
    slot: _Slot | None = vars(module).get(_SLOT)
    if slot is None:
        slot = vars(module).setdefault(_SLOT, _Slot())
    for name, projection in module._modules.items():
        if name in PROJECTIONS and projection is not None and projection.__dict__.get(_SLOT) is not slot:
            setattr(projection, _SLOT, slot)
            projection.register_forward_pre_hook(_enter)
            if name in FUSED:
                projection.register_forward_hook(_leave)


def unbind(module: nn.Module) -> None:
    """Take off all hooks that `bind` put on projections of a module, also on those that adapters wrap."""
    for inner in module.modules():
        if vars(inner).pop(_SLOT, None) is not None:
            remove_hooks(inner, _enter)
            remove_hooks(inner, _leave)


def is_bound(module: nn.Module) -> bool:
    """Whether `bind` was applied to an attention module."""
    return _SLOT in vars(module)


def _enter(projection: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    running = vars(projection)[_SLOT].running
    return None if running is None else running.enter(projection, args)


def _leave(projection: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
    running = vars(projection)[_SLOT].running
    return None if running is None else running.leave(projection, args, output)


def _is_plain(projection: nn.Module) -> bool:
    """Whether a layer multiplies by its weight, in one call of `torch.nn.functional.linear`."""
    return type(projection) is nn.Linear and type(projection.weight) in (nn.Parameter, Tensor)


def _is_parametrized(projection: nn.Module) -> bool:
    """Whether the weight of a layer is computed anew each time that one looks at it."""
    return "parametrizations" in projection._modules
