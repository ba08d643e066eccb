"""What only the Agent families and RAVLT have: weights for oblong maps, shifted windows, pointwise products."""

import pytest
import timm
import torch
from backbone_families import FAMILIES, images

from vision_attn.backbones.conv_layers import PointwiseConv2d
from vision_attn.backbones.position import resize_for, resized_positions

AGENTS = [name for name in FAMILIES if name.startswith("agent")]
WHOLE = {
    "agent_swin": dict(attn_types="AAAA", window_size=64),
    "agent_cswin": dict(agent_split_sizes=(64, 4, 4, 2)),
}


@pytest.mark.parametrize("name", AGENTS)
def test_weights_of_another_size_are_resized(name):
    small, x = FAMILIES[name].build(), images(64, 64)
    larger = {"agent_swin": dict(window_size=24), "agent_cswin": dict(agent_split_sizes=(24, 4, 4, 3))}.get(name, {})
    model = FAMILIES[name].load(small.state_dict(), img_size=96, **larger)
    assert any(p.shape != small.state_dict()[key].shape for key, p in model.named_parameters())
    assert model(images(96, 96)).isfinite().all()
    back = FAMILIES[name].load(model.state_dict())
    assert (back(x) - small(x)).norm() < 0.5 * small(x).norm()


def test_tables_of_relative_positions_are_resized_bicubically():
    table, model = torch.randn(13 * 13, 3), torch.nn.Module()
    for window in ((9, 9), (6, 7)):
        size = (2 * window[0] - 1, 2 * window[1] - 1)
        model.window_size = window
        model.relative_position_bias_table = torch.nn.Parameter(torch.empty(size[0] * size[1], 3))
        resized = resize_for({"relative_position_bias_table": table}, model)["relative_position_bias_table"]
        image = torch.nn.functional.interpolate(table.T.reshape(1, 3, 13, 13), size, mode="bicubic")
        torch.testing.assert_close(resized, image.reshape(3, -1).T)


# (32, 128) has as many tokens as the square of the weights, (48, 96) has another number.
@pytest.mark.parametrize("size", [(32, 128), (128, 32), (48, 96)])
@pytest.mark.parametrize("name", AGENTS)
def test_weights_of_a_square_in_a_model_for_oblong_images(name, size):
    more = WHOLE.get(name, {})
    square, x = FAMILIES[name].build(**more), images(*size)
    model = FAMILIES[name].load(square.state_dict(), img_size=size, **more)
    for key, p in square.named_parameters():
        if key.endswith("positions.pos_embed"):  # bilinear on the fly, bicubic where it is loaded
            module = model.get_submodule(key.rpartition(".")[0])
            old = square.get_submodule(key.rpartition(".")[0]).size
            exact = resized_positions(p, old, module.size, "bicubic").flatten(1, 2)
            torch.testing.assert_close(module.pos_embed, exact)
            module.pos_embed.data = resized_positions(p, old, module.size).flatten(1, 2)
    torch.testing.assert_close(model(x), square(x), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", AGENTS)
def test_weights_of_an_oblong_model_come_back_as_they_are(name):
    oblong = FAMILIES[name].build(img_size=(32, 128))
    again = FAMILIES[name].load(oblong.state_dict(), img_size=(32, 128))
    assert all(torch.equal(t, oblong.state_dict()[key]) for key, t in again.state_dict().items())
    turned, x = FAMILIES[name].load(oblong.state_dict(), img_size=(128, 32)), images(128, 32)
    assert turned(x).isfinite().all()
    if name == "agent_deit":
        torch.testing.assert_close(turned(x), oblong(x), atol=1e-5, rtol=1e-4)


def test_windows_are_cut_to_oblong_maps():
    square = FAMILIES["agent_swin"].build()
    model = FAMILIES["agent_swin"].load(square.state_dict(), img_size=(48, 96))
    windows = {module.window_size for module in model.modules() if hasattr(module, "relative_position_bias_table")}
    assert (2, 3) in windows and model(images(48, 96)).isfinite().all()


def test_whole_maps_are_not_read_as_stripes():
    whole = FAMILIES["agent_cswin"].build().state_dict()
    with pytest.raises(ValueError, match=r"stage 1 .*the whole map, but in stripes .* img_size \(24 x 24 .* 24$"):
        FAMILIES["agent_cswin"].load(whole, img_size=96)
    striped = FAMILIES["agent_cswin"].build(img_size=96).state_dict()
    with pytest.raises(ValueError, match=r"stage 1 .* in stripes, but over the whole map .* \(16 x 16 .* below 16$"):
        FAMILIES["agent_cswin"].load(striped)
    model = FAMILIES["agent_cswin"].load(whole, img_size=96, agent_split_sizes=(24, 4, 4, 3))
    assert model(images(96, 96)).isfinite().all()


def test_agent_swin_shifts_windows_that_are_smaller_than_the_map():
    first, second = FAMILIES["agent_swin"].build(window_size=8, attn_types="AAAA", depths=(2, 1, 1, 1)).stages[0].blocks
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
    model, x = FAMILIES["agent_pvt"].build(), images(70, 67)
    assert torch.equal(model(x), model(x[:, :, :68, :64]))


@pytest.mark.parametrize("size", [(5, 7), (1, 1)])
def test_a_pointwise_convolution_is_the_convolution_in_both_formats(size):
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
