"""What only the NAT families have: dilations, windows larger than a map, dense twins."""

import pytest
import timm
import torch
from backbone_families import FAMILIES

from vision_attn.backbones.nat.attention import NeighborhoodAttention


def test_padded_cells_are_keys_with_the_value_of_the_bias():
    layer = NeighborhoodAttention(4, 1, 3).double()
    torch.nn.init.zeros_(layer.rpb)
    torch.nn.init.normal_(layer.qkv.bias)
    x = torch.randn(1, 1, 1, 4, dtype=torch.float64)
    q, k, v = layer.qkv(torch.cat([x.flatten(0, 2), torch.zeros(8, 4).double()])).chunk(3, -1)
    want = layer.proj((q[:1] @ k.T / 2).softmax(-1) @ v)
    torch.testing.assert_close(layer(x).flatten(0, 2), want)


def dilations(model):
    return [[block.attn.dilation for block in stage.blocks] for stage in model.stages]


@pytest.mark.parametrize("arch, size, same_as", [
    ("dinat_large", 384, "dinat_large_384"),
    ("dinat_large_384", (224, 448), "dinat_large"),
    ("dinat_s_large", 384, "dinat_s_large_384"),
    ("dinat_mini", 224, "dinat_mini"),
    ("nat_mini", 768, "nat_mini"),
])  # fmt: skip
def test_input_size_sets_dilations(arch, size, same_as):
    model = timm.create_model(arch, device="meta")
    model.set_input_size(img_size=size)
    assert dilations(model) == dilations(timm.create_model(same_as, device="meta"))


def test_dilations_of_a_window_of_11():
    model = timm.create_model("dinat_large_384_11x11", device="meta")
    before = dilations(model)
    model.set_input_size(384)
    assert dilations(model) == before and before[0] == [1, 8, 1]


def test_dense_twin_sees_a_trained_bias_at_its_own_size_and_a_resized_one_elsewhere():
    model = FAMILIES["vitrpb"].build()
    attention = model.stages[0].attn
    bias = attention.bias(8, 8)
    assert bias.shape == (2, 64, 64)
    assert torch.equal(bias[:, 0, 63], attention.rpb[:, 14, 14])  # first query, last key: key - query = (7, 7)
    assert torch.equal(bias[:, 9, 2], attention.rpb[:, 6, 8])  # (1, 1) to (0, 2)
    resized = attention.bias(16, 4)
    assert resized.shape == (2, 64, 64) and not torch.equal(resized, bias)
    torch.testing.assert_close(resized.diagonal(dim1=1, dim2=2).std(-1), torch.zeros(2))
