"""The families of backbones that the tests know: a new family is a row."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import timm
import torch

import vision_attn.backbones  # noqa: F401


@dataclass(frozen=True)
class Family:
    """How a family is tested.

    Attributes:
        arch: The variant that builds the golden cases, and that timm's own tests run.
        arguments: Turns the authors' constructor arguments into ours.
        published: The full-size variants, as the manifests call them and as we do.
        tiny: Arguments that make `arch` small.
        layout: Of the golden features, 'NHWC' or 'NCHW'.
        cuts: Whether sides are rounded down.
    """

    arch: str
    arguments: Callable[[dict[str, Any]], dict[str, Any]]
    published: Mapping[str, str]
    tiny: Mapping[str, Any]
    layout: str = "NHWC"
    cuts: bool = False

    def sides(self, size: tuple[int, int], reduction: int) -> tuple[int, ...]:
        """Return height and width of the map of an image."""
        return tuple(max(1, side // reduction) if self.cuts else -(-side // reduction) for side in size)

    def build(self, **arguments: Any) -> torch.nn.Module:
        """Return the tiny model, all of its parameters random, in evaluation mode."""
        model = timm.create_model(self.arch, **{"num_classes": 10, **self.tiny, **arguments})
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.2)
        return model.eval()


def nat_arguments(official: dict[str, Any], **defaults: Any) -> dict[str, Any]:
    """Rename, and fill in the authors' defaults; timm's `create_model` drops arguments that are None.

    Their `drop_rate` is dropout inside blocks; their dropout of attention weights was never used.
    """
    ours = {name: value for name, value in (defaults | official).items() if value is not None}
    for name in ("attn_drop_rate", "use_checkpoint"):
        ours.pop(name, None)
    if "drop_rate" in ours:
        ours["proj_drop_rate"] = ours.pop("drop_rate")
    return ours


def pyramid_arguments(official: dict[str, Any]) -> dict[str, Any]:
    """Without dilations there is none."""
    ours = nat_arguments(official, kernel_size=7)
    return dict(dilations=[[1] * depth for depth in ours["depths"]]) | ours


def isotropic_arguments(official: dict[str, Any]) -> dict[str, Any]:
    """The authors choose dense attention by the class of the layer."""
    ours = nat_arguments(official, kernel_size=7, dilation=2)
    if ours.pop("layer", "NATransformerLayer") == "VisionTransformerLayer":
        ours["kernel_size"] = 0
    return ours


def same(*names: str) -> dict[str, str]:
    return {name: name for name in names}


PYRAMID = dict(embed_dim=8, depths=(1, 2, 2, 1), num_heads=(1, 2, 4, 8), kernel_size=3, layer_scale=0.5)
DILATED = dict(dilations=((1,), (1, 5), (1, 2), (1,)))

FAMILIES = {
    "nat": Family(
        "nat_mini",
        pyramid_arguments,
        same("nat_mini", "nat_tiny", "nat_small", "nat_base"),
        PYRAMID,
    ),
    "dinat": Family(
        "dinat_mini",
        pyramid_arguments,
        same("dinat_mini", "dinat_tiny", "dinat_small", "dinat_base", "dinat_large", "dinat_large_384")
        | {"dinat_large_384_11x11": "dinat_large_384_11x11", "dinat_large_21k": "dinat_large.shi_in22k"},
        PYRAMID | DILATED,
    ),
    "dinat_s": Family(
        "dinat_s_tiny",
        pyramid_arguments,
        same("dinat_s_tiny", "dinat_s_small", "dinat_s_base", "dinat_s_large", "dinat_s_large_384"),
        PYRAMID | DILATED,
    ),
    "nat_isotropic": Family(
        "nat_iso_small",
        isotropic_arguments,
        {
            f"{manifest}_{size}": f"{arch}_{size}"
            for manifest, arch in (("nat_isotropic", "nat_iso"), ("dinat_isotropic", "dinat_iso"))
            for size in ("small", "base")
        },
        dict(embed_dim=16, depth=3, num_heads=2, kernel_size=3, dilation=2, patch_size=8),
    ),
    "vitrpb": Family(
        "vitrpb_small",
        isotropic_arguments,
        same("vitrpb_small", "vitrpb_base"),
        dict(embed_dim=16, depth=3, num_heads=2, patch_size=8, img_size=64),
    ),
}
