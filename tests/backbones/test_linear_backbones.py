"""Agent-*, LITv2 and RAVLT in timm's registry: all that `test_backbones` asks, and what is their own."""

import copy
import gzip
import json

import pytest
import timm
import torch
from golden_case import GOLDEN
from linear_families import ROWS
from test_backbones import (  # noqa: F401 - run here as well, for the families of this file
    images,
    test_any_image_size,
    test_autocast,
    test_compiled_whole,
    test_dtypes,
    test_every_parameter_learns_with_drop_path,
    test_gradient_checkpointing_changes_nothing,
    test_heads,
    test_scripted_features,
    test_torchscript_equals_eager_and_can_be_saved,
    test_traced_by_fx,
)
from timm.models import group_parameters

from vision_attn.backbones.position import resize_for, resized_positions

COUNTS = json.loads((GOLDEN / "manifests" / "params_macs.json").read_text())
SHAPES = json.loads(gzip.decompress((GOLDEN / "manifests" / "state_dict_shapes.json.gz").read_bytes()))
PUBLISHED = {name: ours for family in ROWS.values() for name, ours in family.published.items()}


@pytest.fixture(params=ROWS)
def family(request):
    return ROWS[request.param]


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    checkpoint = {key: torch.empty(shape, device="meta") for key, shape in SHAPES[name].items()}
    overlay = dict(state_dict=dict(model=checkpoint))
    model = timm.create_model(PUBLISHED[name], pretrained=True, pretrained_cfg_overlay=overlay, device="meta")
    assert sum(p.numel() for p in model.parameters()) == COUNTS[name]["params"]
    size = COUNTS[name]["res"]
    assert model.pretrained_cfg["input_size"] == (3, size, size)


def test_all_published_variants_are_here_and_have_addresses():
    prefixes = ("agent_", "litv2_", "ravlt_")
    assert {name for name in COUNTS if name.startswith(prefixes)} == set(PUBLISHED)
    ours = [name for name in timm.list_models() if name.startswith(prefixes)]
    assert set(ours) == set(PUBLISHED.values())
    for name in ours:
        cfg = timm.models.get_pretrained_cfg(name)
        assert cfg.tag and cfg.url and cfg.license and "no download was tried" in cfg.notes[0]


def test_features_have_their_channels_and_reductions(family):
    whole, x = family.build(), images(64, 48)
    model = family.build(features_only=True, feature_cls="getter", out_indices=(0, 2))
    model.load_state_dict({f"model.{name}": t for name, t in whole.state_dict().items()}, strict=False)
    features = model(x)
    torch.testing.assert_close(features, whole.forward_intermediates(x, [0, 2], intermediates_only=True))
    for i, feature in enumerate(features):
        channels, reduction = model.feature_info.channels()[i], model.feature_info.reduction()[i]
        assert feature.shape == (2, channels, *family.sides((64, 48), reduction))


def test_intermediates_and_pruning(family):
    model, x = family.build(), images(48, 64)
    last, features = model.forward_intermediates(x)
    torch.testing.assert_close(last, model.forward_features(x))
    end = len(features) - 1
    kept = copy.deepcopy(model)
    assert kept.prune_intermediate_layers([end], prune_head=False) == [end]
    torch.testing.assert_close(kept(x), model(x))
    for i in range(end):
        pruned = copy.deepcopy(model)
        pruned.prune_intermediate_layers([i], prune_norm=True)
        assert len(pruned.stages) == i + 1 and pruned.num_features == features[i].shape[1]
        torch.testing.assert_close(pruned.forward_intermediates(x, [i], intermediates_only=True)[0], features[i])
        pruned.reset_classifier(4, "avg")
        assert pruned(x).shape == (2, 4)


def test_optimizer_groups(family):
    model = family.build()
    names = [name for name, _ in model.named_parameters()]
    assert model.no_weight_decay() == {
        name
        for name in names
        if name.endswith(("_bias", "pos_embed", "cls_token", "bias_table")) and not name.endswith(".bias")
    }
    fine = group_parameters(model, model.group_matcher(), reverse=True)
    coarse = group_parameters(model, model.group_matcher(coarse=True), reverse=True)
    assert set(fine) == set(coarse) == set(names)
    assert len(set(fine.values())) >= len(set(coarse.values())) > 3


def test_made_empty_then_initialized(family):
    model = timm.create_model(family.arch, **family.tiny, device="meta")
    model.to_empty(device="cpu").init_weights()
    assert all(p.isfinite().all() for p in model.parameters())
    assert all(0 < model.get_parameter(name).abs().max() < 0.2 for name in model.no_weight_decay())
    assert model.eval()(images(32, 32)).isfinite().all()


def test_bad_input(family):
    model = family.build()
    for shape in ((2, 4, 32, 32), (3, 32, 32), (2, 3, 0, 32)):
        for run in (model, model.forward_intermediates):
            with pytest.raises(ValueError, match=rf"images must be \[B, 3, height, width\].*got shape \[{shape[0]}, "):
                run(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"output_fmt must be 'NCHW'.*, got 'NHWC'"):
        model.forward_intermediates(images(32, 32), output_fmt="NHWC")
    with pytest.raises(TypeError, match="windows"):
        family.build(windows=7)
    assert family.build(in_chans=5)(images(32, 32, channels=5)).shape == (2, 10)


REFUSED = {
    "agent_deit": (dict(agent_nums=(4, 4, 4)), "agent_nums must be four numbers"),
    "agent_pvt": (dict(attn_types="AAC"), "one value per stage"),
    "agent_swin": (dict(attn_types="AAM"), "attn_types must be 4 letters A, B or M"),
    "agent_cswin": (dict(split_sizes=(1, 2)), "one value per stage"),
    "litv2": (dict(window_sizes=(0, 0, 2)), "must fit each other"),
    "ravlt": (dict(num_heads=(1, 2, 5, 8)), r"not a multiple of 4 \* num_heads"),
}


@pytest.mark.parametrize("name", ROWS)
def test_bad_arguments(name):
    arguments, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        ROWS[name].build(**arguments)


@pytest.mark.parametrize("name", [name for name in ROWS if name.startswith("agent")])
def test_weights_of_another_size_are_resized(name):
    small, x = ROWS[name].build(), images(64, 64)
    larger = dict(img_size=96)
    if name == "agent_swin":
        larger["window_size"] = 24
    overlay = dict(state_dict=small.state_dict(), num_classes=10)
    arguments = ROWS[name].tiny | larger
    if name == "agent_cswin":
        arguments["agent_split_sizes"] = (24, 4, 4, 3)
    model = timm.create_model(
        ROWS[name].arch, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=10, **arguments
    )
    assert any(p.shape != small.state_dict()[key].shape for key, p in model.named_parameters())
    assert model.eval()(images(96, 96)).isfinite().all()
    again = dict(state_dict=model.state_dict(), num_classes=10)
    back = timm.create_model(
        ROWS[name].arch, pretrained=True, pretrained_cfg_overlay=again, num_classes=10, **ROWS[name].tiny
    ).eval()
    assert (back(x) - small(x)).norm() < 0.5 * small(x).norm()


def test_another_variant_is_refused(family):
    checkpoint = family.build().state_dict()
    name = next(name for name in checkpoint if name.endswith("fc1.weight"))
    checkpoint[name] = checkpoint[name][:-1]
    missing = next(reversed([key for key in checkpoint if "fc2" in key]))
    del checkpoint[missing]
    with pytest.raises(ValueError, match=f"another model than {family.arch}: .*{name} is .* instead of"):
        family.build(pretrained=True, pretrained_cfg_overlay=dict(state_dict=checkpoint, num_classes=10))


@pytest.mark.parametrize(("name", "best", "other"), [("agent_cswin", "state_dict_ema", "model"),
                                                     ("ravlt", "model_ema", "model")])  # fmt: skip
def test_the_moving_average_is_taken(name, best, other):
    good = ROWS[name].build().state_dict()
    bad = {key: torch.zeros_like(t) for key, t in good.items()}
    overlay = dict(state_dict={other: bad, best: good}, num_classes=10)
    loaded = ROWS[name].arch, dict(pretrained=True, pretrained_cfg_overlay=overlay, num_classes=10)
    model = timm.create_model(loaded[0], **loaded[1], **ROWS[name].tiny)
    assert all(torch.equal(t, good[key]) for key, t in model.state_dict().items())


def test_tables_of_relative_positions_are_resized_bicubically():
    table, model = torch.randn(13 * 13, 3), torch.nn.Module()
    for window in ((9, 9), (6, 7)):
        size = (2 * window[0] - 1, 2 * window[1] - 1)
        model.window_size = window
        model.relative_position_bias_table = torch.nn.Parameter(torch.empty(size[0] * size[1], 3))
        resized = resize_for({"relative_position_bias_table": table}, model)["relative_position_bias_table"]
        image = torch.nn.functional.interpolate(table.T.reshape(1, 3, 13, 13), size, mode="bicubic")
        torch.testing.assert_close(resized, image.reshape(3, -1).T)


def loaded(name, state_dict, **arguments):
    """Return the tiny model with other arguments, its weights read as a checkpoint."""
    overlay = dict(state_dict=state_dict, num_classes=10)
    given = ROWS[name].tiny | arguments
    return timm.create_model(
        ROWS[name].arch, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=10, **given
    ).eval()


WHOLE = {
    "agent_swin": dict(attn_types="AAAA", window_size=64),
    "agent_cswin": dict(agent_split_sizes=(64, 4, 4, 2)),
}


# (32, 128) has as many tokens as the square that the weights are for; (48, 96) has others
@pytest.mark.parametrize("size", [(32, 128), (128, 32), (48, 96)], ids=str)
@pytest.mark.parametrize("name", [name for name in ROWS if name.startswith("agent")])
def test_weights_of_a_square_in_a_model_for_oblong_images(name, size):
    more = WHOLE.get(name, {})
    square, x = ROWS[name].build(**more), images(*size)
    model = loaded(name, square.state_dict(), img_size=size, **more)
    for key, p in square.named_parameters():
        if key.endswith("positions.pos_embed"):  # bilinear on the fly, bicubic where it is loaded
            module = model.get_submodule(key.rpartition(".")[0])
            old = square.get_submodule(key.rpartition(".")[0]).size
            exact = resized_positions(p, old, module.size, "bicubic").flatten(1, 2)
            torch.testing.assert_close(module.pos_embed, exact)
            module.pos_embed.data = resized_positions(p, old, module.size).flatten(1, 2)
    torch.testing.assert_close(model(x), square(x), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", [name for name in ROWS if name.startswith("agent")])
def test_weights_of_an_oblong_model_come_back_as_they_are(name):
    oblong = ROWS[name].build(img_size=(32, 128))
    again = loaded(name, oblong.state_dict(), img_size=(32, 128))
    assert all(torch.equal(t, oblong.state_dict()[key]) for key, t in again.state_dict().items())
    turned, x = loaded(name, oblong.state_dict(), img_size=(128, 32)), images(128, 32)
    assert turned(x).isfinite().all()
    if name == "agent_deit":
        torch.testing.assert_close(turned(x), oblong(x), atol=1e-5, rtol=1e-4)


def test_windows_are_cut_to_oblong_maps():
    square = ROWS["agent_swin"].build()
    model = loaded("agent_swin", square.state_dict(), img_size=(48, 96))
    windows = {module.window_size for module in model.modules() if hasattr(module, "relative_position_bias_table")}
    assert (2, 3) in windows and model(images(48, 96)).isfinite().all()


def test_whole_maps_are_not_read_as_stripes():
    whole = ROWS["agent_cswin"].build().state_dict()
    with pytest.raises(ValueError, match=r"stage 1 .*the whole map, but in stripes .* img_size \(24 x 24 .* 24$"):
        loaded("agent_cswin", whole, img_size=96)
    striped = ROWS["agent_cswin"].build(img_size=96).state_dict()
    with pytest.raises(ValueError, match=r"stage 1 .* in stripes, but over the whole map .* \(16 x 16 .* below 16$"):
        loaded("agent_cswin", striped)
    assert loaded("agent_cswin", whole, img_size=96, agent_split_sizes=(24, 4, 4, 3))(images(96, 96)).isfinite().all()


def test_agent_swin_shifts_windows_that_are_smaller_than_the_map():
    first, second = ROWS["agent_swin"].build(window_size=8, attn_types="AAAA", depths=(2, 1, 1, 1)).stages[0].blocks
    x = torch.randn(2, 16, 16, 8)
    attn = second.attn
    moved = attn(x)
    attn.shift = False
    torch.testing.assert_close(moved, attn(x.roll((-4, -4), (1, 2))).roll((4, 4), (1, 2)))
    assert not torch.allclose(moved, attn(x)) and not first.attn.shift
    whole = attn(x[:, :8, :8])
    attn.shift = True
    torch.testing.assert_close(attn(x[:, :8, :8]), whole)


def test_agent_pvt_leaves_out_what_is_beside_whole_patches():
    model, x = ROWS["agent_pvt"].build(), images(70, 67)
    assert torch.equal(model(x), model(x[:, :, :68, :64]))


@pytest.mark.parametrize("size", [(5, 7), (1, 1)])
def test_a_pointwise_convolution_is_the_convolution_in_both_formats(size):
    from vision_attn.backbones.pointwise import PointwiseConv2d

    layer = PointwiseConv2d(12, 20).double()
    x = torch.randn(2, 12, *size, dtype=torch.float64)
    want = torch.nn.functional.conv2d(x, layer.weight, layer.bias)
    torch.testing.assert_close(layer(x), want)
    o = layer(x.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(o, want)
    assert o.is_contiguous(memory_format=torch.channels_last)
    with torch.profiler.profile() as found:
        layer(torch.randn(2, 12, 4, 4, dtype=torch.float64).contiguous(memory_format=torch.channels_last))
    assert not any("convolution" in event.key for event in found.key_averages())


def test_ravlt_computes_the_same_channels_last():
    torch.manual_seed(0)
    model = timm.create_model("ravlt_tiny", num_classes=5).eval().double()
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        want = model(x)
        last = model.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(last, want)
