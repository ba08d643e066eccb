"""The families of backbones for tests: one row each, and what their tests share."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
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
        published: The full-size variants: the manifests' names to ours.
        tiny: Arguments that make `arch` small.
        cuts: Whether sides of maps are rounded down.
        feature_classes: timm's ways to features that the family supports.
    """

    arch: str
    arguments: Callable[[dict[str, Any]], dict[str, Any]]
    published: Mapping[str, str]
    tiny: Mapping[str, Any]
    cuts: bool = False
    feature_classes: tuple[str, ...] = ("getter", "list", "fx")

    def sides(self, size: tuple[int, int], reduction: int) -> tuple[int, ...]:
        """Return height and width of the map of an image."""
        return tuple(max(1, side // reduction) if self.cuts else -(-side // reduction) for side in size)

    def build(self, **arguments: Any) -> torch.nn.Module:
        """Return the tiny model, all of its parameters random, in evaluation mode."""
        model = timm.create_model(self.arch, **{"num_classes": 10, **self.tiny, **arguments})
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.2)
        return model.eval()

    def load(self, state_dict: Mapping[str, Any], **arguments: Any) -> torch.nn.Module:
        """Return the tiny model with a checkpoint of ten classes, read as timm reads one, in evaluation mode."""
        overlay = dict(state_dict=state_dict, num_classes=10)
        given = {"num_classes": 10, **self.tiny, **arguments}
        return timm.create_model(self.arch, pretrained=True, pretrained_cfg_overlay=overlay, **given).eval()

    def recorded(self, case: dict[str, Any]) -> torch.nn.Module:
        """Return the model of a golden case with its weights, read as timm reads a checkpoint, in evaluation mode."""
        arguments = self.arguments(dict(case["cfg"]["ctor_kwargs"]))
        size = (arguments.get("in_chans", 3), *case["inputs"]["x"].shape[2:])
        overlay = dict(state_dict=case["state_dict"], num_classes=arguments.get("num_classes", 1000), input_size=size)
        return timm.create_model(self.arch, pretrained=True, pretrained_cfg_overlay=overlay, **arguments).eval()


def images(*size: int, batch: int = 2, channels: int = 3) -> torch.Tensor:
    """Return random images `[batch, channels, *size]`, always the same."""
    return torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(0))


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
    """Dilations are 1 unless they are given."""
    ours = nat_arguments(official, kernel_size=7)
    return dict(dilations=[[1] * depth for depth in ours["depths"]]) | ours


def isotropic_arguments(official: dict[str, Any]) -> dict[str, Any]:
    """The authors choose dense attention by the class of the layer."""
    ours = nat_arguments(official, kernel_size=7, dilation=2)
    if ours.pop("layer", "NATransformerLayer") == "VisionTransformerLayer":
        ours["kernel_size"] = 0
    return ours


def same(*names: str) -> dict[str, str]:
    """Map names to themselves: the manifest's names are ours."""
    return {name: name for name in names}


def litv2_arguments(official: dict[str, Any]) -> dict[str, Any]:
    """The authors' attention has alpha 0.5 by default, and no windows where `has_msa` is 0."""
    ours = dict(alpha=0.5) | official
    for theirs, name in (("local_ws", "window_sizes"), ("drop_rate", "proj_drop_rate")):
        if theirs in ours:
            ours[name] = ours.pop(theirs)
    if "has_msa" in ours and "window_sizes" in ours:
        pairs = zip(ours["window_sizes"], ours["has_msa"], strict=True)
        ours["window_sizes"] = [size if attends else 0 for size, attends in pairs]
    for name in ("img_size", "attn_drop_rate", "use_checkpoint", "has_msa", "ape", "patch_norm"):
        ours.pop(name, None)
    return ours


def ravlt_arguments(official: dict[str, Any]) -> dict[str, Any]:
    """The authors choose linear ('l') or softmax ('v') attention by `flagss`, and have no layer scale by default."""
    ours = dict(mlp_ratios=[3] * len(official["depths"])) | official
    flags = ours.pop("flagss", None)
    if flags is not None:
        ours["linear"] = [level[0] == "l" for level in flags]
    scales, values = ours.pop("layerscales", None), ours.pop("layer_init_values", None)
    scales = scales or [False] * len(ours["depths"])
    values = values or [1e-6] * len(scales)
    ours["layer_scales"] = [v if s else None for s, v in zip(scales, values, strict=True)]
    for name in ("use_checkpoints", "img_size"):
        ours.pop(name, None)
    return ours


def agent_arguments(official: dict[str, Any]) -> dict[str, Any]:
    """Rename what all Agent-* families share, and drop what the authors never used."""
    ours = dict(official)
    for theirs, name in (("agent_num", "agent_nums"), ("attn_type", "attn_types"), ("drop_rate", "proj_drop_rate")):
        if theirs in ours:
            ours[name] = ours.pop(theirs)
    for name in ("attn_drop_rate", "use_checkpoint", "qk_scale", "ape", "patch_norm", "use_chk", "hybrid_backbone"):
        ours.pop(name, None)
    return ours


def agent_pvt_arguments(official: dict[str, Any]) -> dict[str, Any]:
    ours = agent_arguments(official)
    if "agent_sr_ratios" in ours:
        ours["agent_sr_ratios"] = [int(ratio) for ratio in str(ours["agent_sr_ratios"])]
    return ours


def agent_cswin_arguments(official: dict[str, Any]) -> dict[str, Any]:
    ours = agent_arguments(official)
    for theirs, name in (("depth", "depths"), ("split_size", "split_sizes"), ("la_split_size", "agent_split_sizes")):
        if theirs in ours:
            ours[name] = ours.pop(theirs)
    if isinstance(ours.get("agent_split_sizes"), str):
        ours["agent_split_sizes"] = [int(size) for size in ours["agent_split_sizes"].split("-")]
    return ours


def agent_swin_arguments(official: dict[str, Any]) -> dict[str, Any]:
    ours = agent_arguments(official)
    for name in ("img_size", "window_size"):
        if isinstance(ours.get(name), (list, tuple)):
            ours[name] = ours[name][0]
    return ours


def agent_deit_arguments(official: dict[str, Any]) -> dict[str, Any]:
    ours = agent_arguments(official)
    if "agent_layer" in ours:
        layers = ours.pop("agent_layer")
        ours |= dict(agent_layers=layers) if layers > 0 else {}  # 0 means all of them
    for name in ("distilled", "representation_size", "weight_init"):
        ours.pop(name, None)
    return ours


# The authors' defaults where they differ from ours, which are those of their smallest variant.
INLINE_DEFAULTS = {
    "deit": dict(embed_dim=768, num_heads=12),
    "swin": dict(window_size=7, attn_type="IIII"),
    "cswin": dict(embed_dim=96, depth=[2, 2, 6, 2], la_split_size="1-2-7-7", attn_type="IIII"),
    "pvt": dict(
        patch_size=16,
        embed_dims=[64, 128, 256, 512],
        depths=[3, 4, 6, 3],
        num_heads=[1, 2, 4, 8],
        mlp_ratios=[4] * 4,
        qkv_bias=False,
        attn_type="IIII",
    ),
}


def inline_arguments(family: str, official: dict[str, Any]) -> dict[str, Any]:
    """As for Agent-*, whose code base the authors share; keys of linear attention are never reduced."""
    ours = agent_deit_arguments(agent_swin_arguments(INLINE_DEFAULTS[family] | official))
    ratios = str(ours.pop("la_sr_ratios", "1111"))
    assert all(r == "1" for r, kind in zip(ratios, ours.get("attn_types", ""), strict=False) if kind == "I")
    if family == "cswin":
        ours = agent_cswin_arguments(ours)
        ours["linear_split_sizes"] = ours.pop("agent_split_sizes")
        ours.pop("patch_size", None)  # their stem has one stride
    ours.pop("num_stages", None)
    return ours


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
    "agent_deit": Family(
        "agent_deit_tiny",
        agent_deit_arguments,
        same("agent_deit_tiny", "agent_deit_small", "agent_deit_small_448", "agent_deit_base"),
        dict(img_size=64, embed_dim=16, depth=4, num_heads=2, agent_nums=(4, 4, 4, 4), agent_layers=3),
        feature_classes=("getter",),
    ),
    "agent_swin": Family(
        "agent_swin_tiny",
        agent_swin_arguments,
        same("agent_swin_tiny", "agent_swin_small", "agent_swin_small_288", "agent_swin_base", "agent_swin_base_384"),
        dict(
            img_size=64,
            embed_dim=8,
            depths=(1, 1, 2, 2),
            num_heads=(1, 2, 2, 4),
            window_size=16,
            agent_nums=(4, 4, 4, 4),
            attn_types="AAMB1",
            drop_path_rate=0.0,
        ),
    ),
    "agent_cswin": Family(
        "agent_cswin_tiny",
        agent_cswin_arguments,
        same("agent_cswin_tiny", "agent_cswin_small", "agent_cswin_base", "agent_cswin_base_384"),
        dict(
            img_size=64,
            embed_dim=8,
            depths=(1, 1, 2, 1),
            num_heads=(2, 2, 4, 4),
            split_sizes=(1, 2, 2, 2),
            agent_split_sizes=(16, 4, 4, 2),
            agent_nums=(4, 4, 4, 4),
            drop_path_rate=0.0,
        ),
    ),
    "agent_pvt": Family(
        "agent_pvt_tiny",
        agent_pvt_arguments,
        same("agent_pvt_tiny", "agent_pvt_small", "agent_pvt_medium", "agent_pvt_medium_256", "agent_pvt_large"),
        dict(
            img_size=64,
            embed_dims=(8, 16, 24, 32),
            depths=(1, 1, 2, 1),
            num_heads=(1, 2, 2, 4),
            mlp_ratios=(2, 2, 2, 2),
            agent_nums=(4, 4, 4, 4),
            drop_path_rate=0.0,
        ),
        cuts=True,
    ),
    "inline_deit": Family(
        "inline_deit_tiny",
        partial(inline_arguments, "deit"),
        same("inline_deit_tiny", "inline_deit_small", "inline_deit_base"),
        dict(img_size=64, embed_dim=16, depth=4, num_heads=2),
        feature_classes=("getter",),
    ),
    "inline_swin": Family(
        "inline_swin_tiny",
        partial(inline_arguments, "swin"),
        same("inline_swin_tiny", "inline_swin_small", "inline_swin_base", "inline_swin_base_384"),
        dict(
            img_size=64,
            embed_dim=8,
            depths=(2, 1, 2, 2),
            num_heads=(1, 2, 2, 4),
            window_size=10,
            attn_types="IIMS1",
            drop_path_rate=0.0,
        ),
    ),
    "inline_cswin": Family(
        "inline_cswin_tiny",
        partial(inline_arguments, "cswin"),
        same("inline_cswin_tiny", "inline_cswin_small", "inline_cswin_base", "inline_cswin_base_384"),
        dict(
            img_size=64,
            embed_dim=8,
            depths=(1, 1, 2, 1),
            num_heads=(2, 2, 4, 4),
            split_sizes=(1, 2, 2, 2),
            linear_split_sizes=(16, 4, 4, 2),
            attn_types="IISS",
            drop_path_rate=0.0,
        ),
    ),
    "inline_pvt": Family(
        "inline_pvt_tiny",
        partial(inline_arguments, "pvt"),
        same("inline_pvt_tiny", "inline_pvt_small", "inline_pvt_medium", "inline_pvt_large"),
        dict(
            img_size=64,
            embed_dims=(8, 16, 24, 32),
            depths=(1, 1, 2, 1),
            num_heads=(1, 2, 2, 4),
            mlp_ratios=(2, 2, 2, 2),
            attn_types="IIIS",
            drop_path_rate=0.0,
        ),
        cuts=True,
    ),
    "ravlt": Family(
        "ravlt_tiny",
        ravlt_arguments,
        {f"ravlt_{name[0]}": f"ravlt_{name}" for name in ("tiny", "small", "base", "large")},
        dict(
            embed_dims=(8, 16, 24, 32), depths=(1, 1, 2, 1), num_heads=(1, 2, 2, 4), projection=48, drop_path_rate=0.0
        ),
    ),
    "svit": Family(
        "svit_s",
        dict,  # there are no golden cases: see test_svit.py
        {},
        dict(
            embed_dims=(8, 16, 24, 32),
            depths=(1, 1, 2, 1),
            num_heads=(1, 2, 2, 4),
            sizes=(4, 2, 1, 1),
            iterations=(1, 2, 1, 1),
            layer_scales=(None, None, 0.5, 0.5),
            projection=48,
            drop_path_rate=0.0,
        ),
    ),
    "litv2": Family(
        "litv2_small",
        litv2_arguments,
        same("litv2_small", "litv2_medium", "litv2_base", "litv2_base_384")
        | {
            f"litv2_small_alpha{a}": f"litv2_small_alpha{float(a) * 10:02.0f}"
            for a in ("0", "0.2", "0.4", "0.5", "0.7", "1")
        },
        dict(embed_dim=16, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 4), alpha=0.5, drop_path_rate=0.0),
    ),
}
