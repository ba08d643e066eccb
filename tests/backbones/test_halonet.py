"""HaloNet: published parameters, attention against its definition and timm's, any image size, checkpoints."""

import pytest
import timm
import torch
from backbone_families import images
from torch import nn

from vision_attn.backbones.halonet import halonet
from vision_attn.backbones.halonet.halonet import HaloBlock, halonet_cfg

# Millions of parameters as the paper has them. Its 43.4 for H6 is 43.46.
PUBLISHED = dict(h0=5.5, h2=9.4, h3=11.8, h4=19.1, h5=30.7, h6=43.4, h7=67.4)
SIZES = dict(h0=256, h2=256, h3=320, h4=384, h5=448, h6=512, h7=600)
VARIANTS = [name if name == "h0" else pytest.param(name, marks=pytest.mark.slow) for name in PUBLISHED]


@pytest.mark.parametrize("name", VARIANTS)
def test_published_sizes(name):
    model = timm.create_model(f"halonet_{name}", device="meta")
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(PUBLISHED[name], abs=0.06)
    cfg, size = model.pretrained_cfg, SIZES[name]
    assert cfg["input_size"] == (3, size, size) and cfg["tag"] == "untrained"
    last = model.forward_features(torch.empty(1, 3, size, size, device="meta"))
    assert tuple(last.shape[1:]) == (model.num_features, *cfg["pool_size"])


def test_what_timm_has_is_not_repeated():
    ours = set(timm.list_models(module="halonet"))
    assert ours == {f"halonet_{name}" for name in PUBLISHED}
    assert "halonet_h1" in timm.list_models(module="byoanet") and "halonet_h1" not in ours


def block_of(model, stage):
    return model.stages[stage][0].eval()


def small(*, block=4, halo=1, values=1.5, bottleneck=0.5, depth=1):
    model = timm.create_model(
        "halonet_h0", model_cfg=halonet_cfg(block, halo, values, bottleneck, depth), num_classes=5
    )
    for p in model.parameters():
        nn.init.normal_(p, std=0.1)
    return model.eval()


def defined(block, x):
    """Attention of a block on a map, query by query: zeros beyond the map are keys too."""
    attn, (height, width) = block.self_attn, x.shape[2:]
    side, halo, H = attn.block_size, attn.halo_size, attn.num_heads
    stride = block.stride
    q = nn.functional.conv2d(x, attn.q.weight)
    kv = nn.functional.conv2d(x, attn.kv.weight).unflatten(1, (H, -1))
    k, v = kv[:, :, : attn.dim_head_qk], kv[:, :, attn.dim_head_qk :]
    q = q.unflatten(1, (H, -1))
    rows, columns = attn.pos_embed.height_rel, attn.pos_embed.width_rel
    out = x.new_zeros(x.shape[0], H, attn.dim_head_v, -(-height // stride), -(-width // stride))
    wide = side + 2 * halo
    for y in range(out.shape[3]):
        for c in range(out.shape[4]):
            top, left = y * stride // side * side - halo, c * stride // side * side - halo
            own = y % (side // stride), c % (side // stride)  # place of the query in its block
            query = q[:, :, :, y * stride, c * stride]
            logits, values = [], []
            for i in range(wide):
                for j in range(wide):
                    there = 0 <= top + i < height and 0 <= left + j < width
                    key = k[:, :, :, top + i, left + j] if there else torch.zeros_like(query)
                    value = v[:, :, :, top + i, left + j] if there else v.new_zeros(v.shape[:3])
                    place = rows[i - own[0] + wide - 1] + columns[j - own[1] + wide - 1]
                    logits.append((query * key).sum(2) * attn.scale + query @ place)
                    values.append(value)
            weights = torch.stack(logits, -1).softmax(-1)
            out[:, :, :, y, c] = torch.einsum("bhs,sbhd->bhd", weights, torch.stack(values))
    return out.flatten(1, 2)


@pytest.mark.parametrize("stage, size", [(0, (6, 7)), (1, (5, 8))], ids=["stride-1", "stride-2"])
def test_attention_equals_its_definition(stage, size):
    block = block_of(small(), stage).double()
    x = torch.randn(2, block.conv1_1x1.conv.in_channels, *size, dtype=torch.float64)
    with torch.no_grad():
        inner = block.conv1_1x1(x)
        o = block.post_attn(defined(block, inner))
        want = block.act(block.conv3_1x1(o) + block.shortcut(x))
        torch.testing.assert_close(block(x), want, atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize("stage", [1, 2])
def test_a_block_equals_timms_where_all_channels_are_alike(stage):
    theirs = block_of(timm.create_model("halonet_h1"), stage)
    ours = block_of(timm.create_model("halonet_h0", model_cfg=halonet_cfg(8, 3, 1, 1, 1)), stage)
    assert isinstance(ours, HaloBlock) and not isinstance(theirs, HaloBlock)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(1, ours.conv1_1x1.conv.in_channels, 16, 24)
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("size", [(64, 96), (61, 47), (33, 130), (7, 7)])
def test_any_image_size(size):
    model = small(block=6, halo=2)
    x = images(*size)
    output, features = model(x), model.forward_intermediates(x, intermediates_only=True)
    assert output.shape == (2, 5) and output.isfinite().all()
    for info, feature in zip(model.feature_info, features, strict=False):
        assert feature.shape == (2, info["num_chs"], *(-(-side // info["reduction"]) for side in size))
    torch.testing.assert_close(model(x[:1]), output[:1])


def test_learns_scripts_and_reads_its_own_checkpoints():
    model, x = small().train(), images(48, 40)
    model(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model.eval()
    torch.testing.assert_close(torch.jit.script(model)(x), model(x))
    overlay = dict(state_dict=model.state_dict(), num_classes=5)
    arguments = dict(model_cfg=halonet_cfg(4, 1, 1.5, 0.5, 1), num_classes=5)
    again = timm.create_model("halonet_h0", pretrained=True, pretrained_cfg_overlay=overlay, **arguments).eval()
    assert torch.equal(again(x), model(x))
    with pytest.raises(
        ValueError, match=r"another model than halonet_h0: stages.0.0.conv3_1x1.conv.weight is \[32, 96"
    ):
        timm.create_model("halonet_h0", pretrained=True, pretrained_cfg_overlay=overlay)
    grey = timm.create_model("halonet_h0", pretrained=True, pretrained_cfg_overlay=overlay, in_chans=1, **arguments)
    assert grey(images(32, 32, channels=1)).isfinite().all()
    maps = timm.create_model("halonet_h0", features_only=True, model_cfg=arguments["model_cfg"])(x)
    assert [m.shape[2:] for m in maps[-2:]] == [(3, 3), (2, 2)]


def test_no_address_is_given():
    assert not any(cfg.cfgs[tag].url for cfg in halonet.default_cfgs.values() for tag in cfg.tags)
