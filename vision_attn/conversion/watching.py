"""Hooks that tell converted layers what their own arguments do not: the grid of the forward, and their block's input.

They are plain functions that find all state on the hooked module, so they survive copies and pickles.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from vision_attn.conversion.grids import GridContext
from vision_attn.conversion.state import LayerState

_GRID, _LAYERS = "_vision_attn_grid", "_vision_attn_layers"


def keep_input(block: nn.Module, state: LayerState) -> None:
    """Let a layer know the tokens that enter its block."""
    vars(block).setdefault(_LAYERS, []).append(state)
    remove_hooks(block, _hand_over)
    block.register_forward_pre_hook(_hand_over, with_kwargs=True)


def _hand_over(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    tokens = next((t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.dim() == 3), None)
    for state in vars(block)[_LAYERS]:
        state.block_input = tokens


def forget_input(block: nn.Module) -> None:
    """Undo `keep_input`, if it was done."""
    remove_hooks(block, _hand_over)
    vars(block).pop(_LAYERS, None)


def watch(module: nn.Module, context: GridContext) -> None:
    """Let `context` see the grid of every forward of `module`."""
    setattr(module, _GRID, context)
    module.register_forward_pre_hook(_see_grid, with_kwargs=True)


def unwatch(module: nn.Module) -> None:
    """Undo `watch`, if the module is watched."""
    remove_hooks(module, _see_grid)
    vars(module).pop(_GRID, None)


def _see_grid(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    context: GridContext = module.__dict__[_GRID]
    context.see(module, args, kwargs)


def remove_hooks(module: nn.Module, function: Callable[..., Any]) -> None:
    """Remove a forward hook by its function: unlike handles, this works on a copy of the module too."""
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key in [key for key, hook in hooks.items() if hook is function]:
            del hooks[key]
            for flags in (module._forward_pre_hooks_with_kwargs, module._forward_hooks_with_kwargs):
                flags.pop(key, None)
