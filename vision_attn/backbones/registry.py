"""Registers the variants of a family with timm, and functions with torch, for TorchScript."""

import sys
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, register_model
from torch import nn

F = TypeVar("F", bound=Callable[..., object])

_LIBRARY = torch.library.Library("vision_attn", "FRAGMENT")
UNTESTED = "The address is the authors'; no download was tried where this package is developed."


def cfg(url: str = "", size: int = 224, **fields: Any) -> dict[str, Any]:
    """Return a pretrained configuration with ImageNet's mean, deviation and 1000 classes, and bicubic interpolation.

    Args:
        url: The authors' address of the weights.
        size: Side in pixels of the square images that the weights were trained on.
        fields: Other fields: `first_conv` always, `pool_size` unless the cells of the last map are 32 pixels wide.
    """
    return dict(
        url=url,
        num_classes=1000,
        input_size=(3, size, size),
        pool_size=(size // 32, size // 32),
        crop_pct=0.875 if size == 224 else 1.0,
        interpolation="bicubic",
        mean=IMAGENET_DEFAULT_MEAN,
        std=IMAGENET_DEFAULT_STD,
        classifier="head.fc",
        notes=(UNTESTED,) if url else (),
    ) | dict(fields)


def register(
    module: str,
    model: type[nn.Module],
    variants: Mapping[str, Mapping[str, Any]],
    filter_fn: Callable[[dict[str, Any], nn.Module], dict[str, Any]],
    **feature_cfg: Any,
) -> None:
    """Register an entry point of timm for each variant, and add it to the module as a function.

    Args:
        module: Name of the family's module, which has the `default_cfgs`. timm lists models by the last part of this
            name, so it must differ from all of timm's own modules.
        model: The family's class.
        variants: Constructor arguments by name of the variant.
        filter_fn: Turns a checkpoint of any layout into one in the model's layout.
        feature_cfg: How `features_only=True` finds features; at least `out_indices`.
    """
    for name, arguments in variants.items():
        entry = _entry_point(name, model, dict(arguments), filter_fn, feature_cfg)
        entry.__name__ = entry.__qualname__ = name
        entry.__module__ = module
        entry.__doc__ = f"Build {name}; keyword arguments go to timm's builder and to `{model.__name__}`."
        setattr(sys.modules[module], name, register_model(entry))


def _entry_point(
    name: str, model: type[nn.Module], arguments: dict[str, Any], filter_fn: Callable, feature_cfg: dict[str, Any]
) -> Callable[..., nn.Module]:
    def entry(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return build_model_with_cfg(
            model,
            name,
            pretrained,
            pretrained_filter_fn=filter_fn,
            feature_cfg=dict(feature_cfg),
            **{**arguments, **kwargs},
        )

    return entry


def operator(schema: str) -> Callable[[F], F]:
    """Register the decorated function as the operator `torch.ops.vision_attn.<name>`; its gradient is by autograd.

    TorchScript cannot compile the package's operators and their arguments, so a scripted layer calls such an operator.
    A saved script runs wherever `vision_attn.backbones` has been imported.

    Args:
        schema: Name, arguments and result as torch writes them: 'name(Tensor x, int[] sizes) -> Tensor'.
    """
    _LIBRARY.define(schema)

    def register(function: F) -> F:
        _LIBRARY.impl(schema.split("(", maxsplit=1)[0], function, "CompositeImplicitAutograd")
        return function

    return register
