"""Vision encoders of transformers: their embeddings see the pixels, class and register tokens come first."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from vision_attn.grid import Grid
from vision_attn.hosts.host import Found, Host, is_a, one_or_each
from vision_attn.hosts.vit import features_grid, global_blocks

_ENCODERS = (
    *("Dinov2Model", "Dinov2Backbone", "Dinov2WithRegistersModel", "Dinov2WithRegistersBackbone"),
    *("DINOv3ViTModel", "DINOv3ViTBackbone", "CLIPVisionModel", "SiglipVisionModel", "Siglip2VisionModel", "ViTModel"),
    *(
        "CLIPVisionTransformer",
        "SiglipVisionTransformer",
        "Siglip2VisionTransformer",
    ),  # inside older ones of the line above
)
_FAMILIES = ("Dinov2", "Dinov2WithRegisters", "DINOv3ViT", "CLIP", "Siglip", "ViT", "DepthAnything")


def _encoders(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the model itself if it is an encoder, or those in it: of images beside text, or behind a head."""
    return [
        (name, module)
        for name, module in model.named_modules()
        if is_a(module, *_ENCODERS) and hasattr(module, "embeddings")
    ]


def _embeddings(encoder: nn.Module) -> nn.Module:
    return encoder.embeddings  # type: ignore[return-value]


def _sides(told_by: Any, height: int, width: int) -> tuple[int, int]:
    patch = told_by.patch_size
    rows, columns = patch if isinstance(patch, (tuple, list)) else (patch, patch)
    return height // rows, width // columns


def _pixels(module: Any, inputs: Mapping[str, Any]) -> Grid | str:
    told_by = module.patch_embeddings if is_a(module, "ViTEmbeddings") else module.config
    return Grid(*_sides(told_by, *inputs["pixel_values"].shape[-2:]))


def _shapes(module: nn.Module, inputs: Mapping[str, Any]) -> Found:
    """Read rows and columns of each sample; patches that pad a sample come last."""
    return one_or_each([Grid(height, width) for height, width in inputs["spatial_shapes"].tolist()])


def _size(model: nn.Module, layer: str, height: int, width: int) -> tuple[int, int]:
    return _sides(_encoders(model)[0][1].config, height, width)


def _sam_size(model: Any, layer: str, height: int, width: int) -> tuple[int, int]:
    config = getattr(model.config, "vision_config", model.config)
    return _sides(config, height, width)


def _problem(model: nn.Module) -> str | None:
    for name, encoder in _encoders(model):
        found = getattr(encoder.config, "_attn_implementation", "sdpa")
        if found != "sdpa":
            where = f"model.{name}" if name else "model"
            return f"its attention is {found!r}: call {where}.set_attn_implementation('sdpa') first"
    return None


def _sam_problem(model: nn.Module) -> str | None:
    if any(
        is_a(module, "SamVisionAttention") and not is_a(module, "SamVisionSdpaAttention") for module in model.modules()
    ):
        return "its attention is 'eager': load it with attn_implementation='sdpa'"
    return None


ENCODERS = (
    Host(
        models=tuple(f"{family}PreTrainedModel" for family in _FAMILIES),
        layers=(
            "encoder.layer.*.attention",
            "model.layer.*.attention",
            "encoder.layers.*.self_attn",
            "layers.*.attention",
            "layer.*.attention",
        ),
        parts=_encoders,
        watched=_embeddings,
        probe=_pixels,
        others="prefix",
        size=_size,
        problem=_problem,
    ),
    Host(
        models=("Siglip2PreTrainedModel",),
        layers=("encoder.layers.*.self_attn",),
        parts=_encoders,
        watched=_embeddings,
        probe=_shapes,
        others="suffix",
        reads="spatial_shapes",
        size=_size,
        problem=_problem,
    ),
    Host(
        models=("SamPreTrainedModel",),
        layers=("attn",),
        parts=global_blocks,
        probe=features_grid,
        biases=True,
        size=_sam_size,
        problem=_sam_problem,
    ),
)
