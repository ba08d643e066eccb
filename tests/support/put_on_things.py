"""What others put on a model and take off again: caches, hooks, offloading, parametrizations."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from accelerate import cpu_offload
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module, remove_hook_from_submodules
from diffusers import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    LayerSkipConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)
from diffusers.hooks import HookRegistry, apply_group_offloading, apply_layer_skip
from torch import Tensor, nn
from torch.nn.utils import parametrize

CPU = torch.device("cpu")


class Thing(NamedTuple):
    """What somebody puts on a model, and takes off again."""

    on: Callable[[Any], Any]
    off: Callable[[Any], Any]
    hosts: tuple[str, ...] = ("flux",)


def each(layer: str, do: Callable[[Any], Any]) -> Callable[[nn.Module], None]:
    """Return a function that does something to every module whose name ends with `layer`."""

    def every(model: nn.Module) -> None:
        found = [module for name, module in model.named_modules() if name.endswith(layer)]
        assert found
        for module in found:
            do(module)

    return every


def _cache(config: Callable[[], Any]) -> Thing:
    return Thing(lambda model: model.enable_cache(config()), lambda model: model.disable_cache())


def _without(hook: str) -> Callable[[Any], None]:
    return lambda model: HookRegistry.check_if_exists_or_initialize(model).remove_hook(hook, recurse=True)


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def _group_offload(model: Any) -> None:
    apply_group_offloading(model, onload_device=CPU, offload_type="leaf_level")


_RANGES = dict(spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500)
THINGS = {
    "pyramid": _cache(
        lambda: PyramidAttentionBroadcastConfig(**_RANGES, spatial_attention_timestep_skip_range=(-1, 1001))
    ),
    "faster": _cache(
        lambda: FasterCacheConfig(
            **_RANGES, spatial_attention_timestep_skip_range=(-1, 99), is_guidance_distilled=True, tensor_format="BCHW"
        )
    ),
    "taylor": _cache(lambda: TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=1)),
    "first-block": _cache(lambda: FirstBlockCacheConfig(threshold=0.5)),
    "mag": _cache(lambda: MagCacheConfig(mag_ratios=torch.ones(4), num_inference_steps=4)),
    "layer-skip": Thing(
        lambda model: apply_layer_skip(
            model, LayerSkipConfig([0], "mid_block.attentions.0.transformer_blocks", skip_attention=False,
                                   skip_attention_scores=True, skip_ff=False)
        ),
        _without("layer_skip_hook"),
        ("sd15-unet",),
    ),
    "group-offload": Thing(_group_offload, _without("group_offloading")),
    "accelerate": Thing(
        each(".attn", lambda attn: add_hook_to_module(attn, ModelHook())), each(".attn", remove_hook_from_module),
        ("flux", "vit"),
    ),
    "offload": Thing(lambda model: cpu_offload(model, execution_device=CPU), remove_hook_from_submodules,
                     ("flux", "vit", "sd15-unet")),
    "weight": Thing(
        each(".to_q", lambda linear: parametrize.register_parametrization(linear, "weight", Doubled())),
        each(".to_q", lambda linear: parametrize.remove_parametrizations(linear, "weight", leave_parametrized=False)),
        ("flux", "sd15-unet"),
    ),
    "bias": Thing(
        each(".attn", lambda attn: parametrize.register_parametrization(attn, "q_bias", Doubled())),
        each(".attn", lambda attn: parametrize.remove_parametrizations(attn, "q_bias", leave_parametrized=False)),
        ("eva02",),
    ),
    "two-biases": Thing(
        each(".attn", lambda attn: [parametrize.register_parametrization(attn, name, Doubled())
                                     for name in ("q_bias", "v_bias")]),
        each(".attn", lambda attn: [parametrize.remove_parametrizations(attn, name, leave_parametrized=False)
                                     for name in ("v_bias", "q_bias")]),
        ("eva02",),
    ),
}  # fmt: skip
