"""How a model's tokens are cut over processes: by diffusers' plan of its class, or by `enable`."""

import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from vision_attn._checks import check_int
from vision_attn.grid import Grid
from vision_attn.hosts.host import Found
from vision_attn.hosts.selection import denoisers_of, unwrapped
from vision_attn.parallel.ranks import Cut
from vision_attn.parallel.rows import LEVEL, ROWS, Level
from vision_attn.parallel.unets import UNETS, EnabledUNet, refuse, unconverted

_TEXT = "encoder_hidden_states"


_TEXT_BEFORE = ("FluxTransformer2DModel", "Flux2Transformer2DModel", "QwenImageTransformer2DModel")  # by diffusers
_TEXT_AFTER = {"SD3Transformer2DModel": True, "PixArtTransformer2DModel": False}  # models that `enable` cuts


def _kind(model: Any) -> str:
    """Return the name of a model's class as it is known here: FSDP and users derive classes from it."""
    names = [cls.__name__ for cls in type(model).__mro__]
    return next((name for name in names if name in (*_TEXT_BEFORE, *_TEXT_AFTER, *UNETS)), names[0])


class Enabled:
    """A model that `enable` has cut over processes.

    Attributes:
        group: The processes that share a picture with this one.
    """

    def __init__(self, model: Any, plan: Any, group: Any) -> None:
        self._model, self._plan, self.group = model, plan, group

    def disable(self) -> None:
        """Let the model run in one process again."""
        from diffusers.hooks.context_parallel import remove_context_parallel  # noqa: PLC0415

        remove_context_parallel(self._model, self._plan)
        self._model._parallel_config = None
        for module in self._model.modules():
            processor = vars(module).get("processor") or module._modules.get("processor")
            if getattr(processor, "_parallel_config", None) is not None:
                processor._parallel_config = None


def enable(target: Any, *, share: int | None = None) -> Enabled | EnabledUNet:
    """Cut a converted model over processes: one picture over several GPUs.

    A model with a plan of diffusers (FLUX.1, FLUX.2, Qwen-Image) is cut by its own `enable_parallelism`. For SD3 and
    PixArt, which have none, the tokens are cut before the first block and gathered after the last. A UNet (Stable
    Diffusion 1.5, 2.1, XL) is cut into whole rows, which its convolutions and group norms know of.

    Args:
        target: A model of diffusers, or a pipeline with one denoiser. Without a plan, every self-attention over the
            image must be converted.
        share: How many processes share one picture: ranks 0 to share - 1 the first, and so on. All if None.

    Returns:
        What takes it back.

    Raises:
        TypeError: If `target` is neither a model nor a pipeline, or `share` no int.
        ValueError: If the model cannot be cut, a layer is not converted, there is no process group, or `share` does not
            divide the processes.
    """
    model = target if isinstance(target, nn.Module) else _denoiser(target)
    name = _kind(model)
    if name not in (*_TEXT_BEFORE, *_TEXT_AFTER, *UNETS):
        raise ValueError(
            f"a {name} cannot be cut over processes: known are {', '.join((*_TEXT_BEFORE, *_TEXT_AFTER, *UNETS))}"
        )
    if name not in _TEXT_BEFORE + UNETS and (stock := unconverted(model)):
        raise ValueError(f"convert every self-attention of this {name} before it is cut: {stock} is not")
    if name in UNETS:
        refuse(model)
    world = torch.distributed.get_world_size()
    share = world if share is None else share
    check_int("share", share, least=2)
    if world % share:
        raise ValueError(f"share={share} does not divide {world} processes")
    device = torch._C._get_accelerator().type if torch.accelerator.is_available() else "cpu"
    sides = (world // share, 1, share)
    mesh = torch.distributed.device_mesh.init_device_mesh(device, sides, mesh_dim_names=("pictures", "ring", "ulysses"))
    return EnabledUNet(model, mesh["ulysses"].get_group()) if name in UNETS else _enable(model, name, mesh)


def has_plan(model: nn.Module) -> bool:
    """Whether diffusers cuts a model itself, so that layers which no processor answers attend over processes too."""
    return _kind(model) in _TEXT_BEFORE


def _denoiser(pipe: Any) -> nn.Module:
    if not hasattr(pipe, "components"):
        raise TypeError(f"give a model or a pipeline of diffusers to cut, got {pipe!r}")
    found = denoisers_of(pipe)
    if len(found) != 1:
        raise ValueError(f"give one model to cut: this {type(pipe).__name__} has the denoisers {', '.join(found)}")
    return unwrapped(next(iter(found.values())))


def _enable(model: Any, name: str, mesh: Any) -> Enabled:
    """Cut the tokens of a transformer."""
    from diffusers import ContextParallelConfig  # noqa: PLC0415
    from diffusers.models._modeling_parallel import (  # noqa: PLC0415
        ContextParallelInput,
        ContextParallelOutput,
    )

    plan = model._cp_plan if name in _TEXT_BEFORE else None
    if plan is None:
        inputs = {"hidden_states": ContextParallelInput(split_dim=1, expected_dims=3)}
        if _TEXT_AFTER[name]:
            inputs[_TEXT] = ContextParallelInput(split_dim=1, expected_dims=3)
        plan = {"transformer_blocks.0": inputs, "proj_out": ContextParallelOutput(gather_dim=1, expected_dims=3)}
    config = ContextParallelConfig(ulysses_degree=mesh["ulysses"].size(), ulysses_anything=True, mesh=mesh)
    model.enable_parallelism(config=config, cp_plan=plan)
    return Enabled(model, plan, mesh["ulysses"].get_group())


def is_cut(model: nn.Module) -> bool:
    """Whether `enable` has cut a model whose own attention would not know of it."""
    return ROWS in vars(model) or (_kind(model) in _TEXT_AFTER and getattr(model, "_parallel_config", None) is not None)


def cut_of(model: nn.Module, inputs: Mapping[str, Any], found: Found, last: Cut | None) -> tuple[Cut | None, Found]:
    """Return over which processes the forward that begins cuts its tokens, and the grid of the whole sequence.

    Args:
        model: The model, whose arguments are still whole.
        inputs: Its arguments by name.
        found: The grid that its probe found, without the text.
        last: The cut of the forward before, which is kept if it is the same.

    Returns:
        None if nothing is cut; the grid with its text, or the reason why it cannot be told.

    Raises:
        ValueError: If processes could wait for each other for ever, as they decide on their own what they skip.
    """
    level: Level | None = vars(model).get(LEVEL)
    if level is not None:
        return level.cut(last), found if isinstance(found, str) else level.grid
    config = getattr(getattr(model, "_parallel_config", None), "context_parallel_config", None)
    if config is None:
        return None, found
    _refuse_first_block_cache(model)
    group, own = config._flattened_mesh.get_group(), _kind(model) in _TEXT_AFTER
    cut = last if last is not None and last.group == group.group_name else replace(Cut.over(group), apart=own)
    if isinstance(found, (str, tuple)):
        return cut, found if isinstance(found, str) else "each sample has its own grid, and their tokens are cut"
    if own:
        text = inputs[_TEXT].shape[1] if _TEXT_AFTER[_kind(model)] else 0
        return cut, Grid(found.height, found.width, suffix=text)
    if _kind(model) not in _TEXT_BEFORE or not isinstance(inputs.get(_TEXT), Tensor):
        return cut, f"how a {_kind(model)} cuts its tokens over processes is not known"
    return cut, Grid(found.height, found.width, prefix=inputs[_TEXT].shape[1], suffix=found.suffix)


def _refuse_first_block_cache(model: nn.Module) -> None:
    """Refuse diffusers' FirstBlockCache, by which each process compares its part of two steps."""
    for blocks in model.children():
        first = next(iter(blocks), None) if isinstance(blocks, nn.ModuleList) else None
        hooks = getattr(first, "_diffusers_hook", None)
        if hooks is not None and hooks.get_hook("fbc_leader_block_hook") is not None:
            raise ValueError(
                f"FirstBlockCache lets each process decide by its slice of the tokens whether it skips the blocks of "
                f"this {type(model).__name__}, so that they wait for each other: disable_cache(), or take MagCache or "
                "pyramid attention broadcast, which skip by the step"
            )


def stock_attention(
    name: str, processor: Any, config: Any, tensors: tuple[Tensor, Tensor, Tensor], attn_mask: Tensor | None,
    scale: float | None,
) -> Tensor:  # fmt: skip
    """Attend over processes as diffusers does, with its own exchange of heads or keys.

    Args:
        name: Name of the layer.
        processor: diffusers' processor of the layer.
        config: The configuration of its parallelism, None if `enable` has cut a model without a plan.
        tensors: Queries, keys and values of the own slice, each `[B, H, tokens, D]`.
        attn_mask: Key padding of the own slice, or None.
        scale: Factor of the logits.

    Raises:
        ValueError: If diffusers has no way to attend over processes.
    """
    if config is None:
        raise ValueError(
            f"{name} would attend to this process's slice alone: every self-attention of a model that parallel.enable "
            "has cut must be answered by a processor"
        )
    dispatch = sys.modules["diffusers.models.attention_dispatch"].dispatch_attention_fn
    q, k, v = (t.transpose(1, 2) for t in tensors)
    backend = getattr(processor, "_attention_backend", None)
    output: Tensor = dispatch(q, k, v, attn_mask=attn_mask, scale=scale, backend=backend, parallel_config=config)
    return output.transpose(1, 2)
