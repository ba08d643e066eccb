"""The families Agent-*, LITv2 and RAVLT, as the tests know them: see `backbone_families`."""

from backbone_families import Family, same


def litv2_arguments(official):
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


def ravlt_arguments(official):
    """The authors choose linear ('l') or softmax ('v') attention by `flagss`, and scale no layers unasked."""
    ours = dict(mlp_ratios=[3] * len(official["depths"])) | official
    flags = ours.pop("flagss", None)
    if flags is not None:
        ours["linear"] = [level[0] == "l" for level in flags]
    scales, values = ours.pop("layerscales", None), ours.pop("layer_init_values", None)
    scales = scales or [False] * len(ours["depths"])
    values = values or [1e-6] * len(scales)
    ours["layer_scales"] = [v if s else None for s, v in zip(scales, values, strict=True)]
    for name in ("in_chans", "use_checkpoints", "img_size"):
        if name != "in_chans":
            ours.pop(name, None)
    return ours


def agent_arguments(official):
    """Rename what is the same in all Agent-* families, and leave out what was never used."""
    ours = dict(official)
    for theirs, name in (("agent_num", "agent_nums"), ("attn_type", "attn_types"), ("drop_rate", "proj_drop_rate")):
        if theirs in ours:
            ours[name] = ours.pop(theirs)
    for name in ("attn_drop_rate", "use_checkpoint", "qk_scale", "ape", "patch_norm", "use_chk", "hybrid_backbone"):
        ours.pop(name, None)
    return ours


def agent_pvt_arguments(official):
    ours = agent_arguments(official)
    if "agent_sr_ratios" in ours:
        ours["agent_sr_ratios"] = [int(ratio) for ratio in str(ours["agent_sr_ratios"])]
    return ours


def agent_cswin_arguments(official):
    ours = agent_arguments(official)
    for theirs, name in (("depth", "depths"), ("split_size", "split_sizes"), ("la_split_size", "agent_split_sizes")):
        if theirs in ours:
            ours[name] = ours.pop(theirs)
    if isinstance(ours.get("agent_split_sizes"), str):
        ours["agent_split_sizes"] = [int(size) for size in ours["agent_split_sizes"].split("-")]
    return ours


def agent_swin_arguments(official):
    ours = agent_arguments(official)
    for name in ("img_size", "window_size"):
        if isinstance(ours.get(name), (list, tuple)):
            ours[name] = ours[name][0]
    return ours


def agent_deit_arguments(official):
    ours = agent_arguments(official)
    if "agent_layer" in ours:
        layers = ours.pop("agent_layer")
        ours |= dict(agent_layers=layers) if layers > 0 else {}  # all of them otherwise
    for name in ("distilled", "representation_size", "weight_init"):
        ours.pop(name, None)
    return ours


ROWS = {
    "agent_deit": Family(
        "agent_deit_tiny",
        agent_deit_arguments,
        same("agent_deit_tiny", "agent_deit_small", "agent_deit_small_448", "agent_deit_base"),
        dict(img_size=64, embed_dim=16, depth=4, num_heads=2, agent_nums=(4, 4, 4, 4), agent_layers=3),
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
    "ravlt": Family(
        "ravlt_tiny",
        ravlt_arguments,
        {f"ravlt_{name[0]}": f"ravlt_{name}" for name in ("tiny", "small", "base", "large")},
        dict(
            embed_dims=(8, 16, 24, 32), depths=(1, 1, 2, 1), num_heads=(1, 2, 2, 4), projection=48, drop_path_rate=0.0
        ),
        layout="NCHW",
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
