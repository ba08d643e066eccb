"""SViT: published sizes, the authors' layout, and super token attention against a loop over tokens in float64."""

import math

import pytest
import timm
import torch
import torch.nn.functional as F
from backbone_families import FAMILIES, images

import vision_attn.backbones  # noqa: F401
from vision_attn.backbones.svit.attention import SuperTokenSelfAttention

# millions of parameters and billions of multiply-accumulates at 224 px, as the authors' README has them in its table
PUBLISHED = {"svit_s": (25, 4.4), "svit_b": (52, 9.9), "svit_l": (95, 15.6)}
TO_AUTHORS = (
    ("stages.{i}.downsample.reduction.", "layers.{j}.downsample.proj.0."),
    ("stages.{i}.downsample.norm.", "layers.{j}.downsample.proj.1."),
    ("stages.", "layers."),
    (".pos.", ".pos_embed.conv."),
    (".norm1.", ".norm1.norm."),
    (".attn.attend.", ".attn.stoken_refine."),
    (".ffn.dwconv.", ".mlp2.conv.conv."),
    (".ffn.", ".mlp2."),
    (".ls1.gamma", ".gamma_1"),
    (".ls2.gamma", ".gamma_2"),
    ("norm.proj.", "proj."),
    ("norm.norm.", "norm."),
    ("head.fc.", "head."),
)


def in_authors_layout(state_dict):
    """Write our names as the authors do, with the constants of their unfolding and with the shape of their gammas."""
    layout = {}
    for name, tensor in state_dict.items():
        new = name
        for ours, theirs in TO_AUTHORS:
            if "{i}" in ours:
                for i in range(1, 4):
                    new = new.replace(ours.format(i=i), theirs.format(j=i - 1))
            elif ours.startswith(("norm", "head")):
                new = theirs + new.removeprefix(ours) if new.startswith(ours) else new
            else:
                new = new.replace(ours, theirs)
        layout[new] = tensor.view(1, -1, 1, 1) if "gamma" in new else tensor
        if new.endswith("stoken_refine.qkv.weight"):
            for way in ("unfold", "fold"):
                layout[new.replace("stoken_refine.qkv.weight", f"{way}.weights")] = torch.eye(9).view(9, 1, 3, 3)
    return layout


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "svit_s" else pytest.mark.slow) for name in PUBLISHED]
)
def test_published_sizes(name):
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        model = timm.create_model(name).eval()
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, 224, 224, device="meta"))
    params, macs = PUBLISHED[name]
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == params
    assert counter.get_total_flops() / 2e9 == pytest.approx(macs, rel=0.02)


@pytest.mark.parametrize("wrapper", ["", "model", "model_ema"])
def test_the_authors_layout(wrapper):
    family = FAMILIES["svit"]
    whole = family.build()
    layout = in_authors_layout(whole.state_dict())
    assert "layers.0.blocks.0.attn.unfold.weights" in layout and "layers.2.downsample.proj.1.running_mean" in layout
    assert layout["layers.3.blocks.0.gamma_2"].shape == (1, 32, 1, 1)
    model = family.load({wrapper: layout} if wrapper else layout)
    assert all(torch.equal(model.state_dict()[name], t) for name, t in whole.state_dict().items())
    assert torch.equal(model(images(48, 40)), whole(images(48, 40)))


def defined(layer, x):
    """Attend by the definition, from token to token in a map that is filled up with zeros to whole cells."""
    C, height, width = x.shape[1:]
    size = layer.size
    x = F.pad(x, (0, -width % size, 0, -height % size))
    rows, columns = x.shape[2] // size, x.shape[3] // size
    places = [(y, column) for y in range(x.shape[2]) for column in range(x.shape[3])]
    around = [(r, c) for r in range(-1, rows + 1) for c in range(-1, columns + 1)]  # with those beyond the border
    real = torch.tensor([0 <= r < rows and 0 <= c < columns for r, c in around])
    near = torch.tensor(
        [[abs(y // size - r) <= 1 and abs(column // size - c) <= 1 for r, c in around] for y, column in places]
    )
    own = torch.tensor([[(y // size, column // size) == cell for cell in around] for y, column in places]).to(x.dtype)
    outputs = []
    for sample in x.flatten(2).mT:  # [N, C]
        f, w = sample.detach(), own
        for _ in range(layer.iterations):
            s = torch.where(real[:, None], w.T @ f / w.sum(0).clamp(min=1e-12)[:, None], 0.0)
            w = (f @ s.T / C**0.5).masked_fill(~near, -torch.inf).softmax(1)
        w = w[:, real]  # what super tokens beyond the border took is lost
        s = w.T @ sample / w.sum(0)[:, None]
        qkv = s @ layer.attend.qkv.weight.flatten(1).T + layer.attend.qkv.bias
        q, k, v = qkv.unflatten(1, (layer.attend.num_heads, 3, -1)).unbind(2)
        weights = (torch.einsum("mhd,nhd->hmn", q, k) / math.sqrt(q.shape[-1])).softmax(-1)
        o = torch.einsum("hmn,nhd->mhd", weights, v).flatten(1)
        o = o @ layer.attend.proj.weight.flatten(1).T + layer.attend.proj.bias
        outputs.append((w @ o).T.unflatten(1, x.shape[2:])[:, :height, :width])
    return torch.stack(outputs)


@pytest.mark.parametrize(
    ("size", "iterations", "shape"),
    [(2, 1, (4, 6)), (3, 2, (5, 7)), (4, 1, (3, 9))],
    ids=["divides", "padded", "one-row"],
)
def test_super_token_attention_is_its_definition(size, iterations, shape):
    layer = SuperTokenSelfAttention(8, 2, size=size, iterations=iterations).double()
    x = torch.randn(2, 8, *shape, dtype=torch.float64, requires_grad=True)
    o, expected = layer(x), defined(layer, x)
    torch.testing.assert_close(o, expected, rtol=0, atol=1e-12)
    do = torch.randn_like(o)
    leaves = [x, *layer.parameters()]
    for ours, theirs in zip(torch.autograd.grad(o, leaves, do), torch.autograd.grad(expected, leaves, do), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_cells_of_one_token_are_softmax_attention():
    layer = SuperTokenSelfAttention(8, 2, size=1).double()
    x = torch.randn(2, 8, 3, 4, dtype=torch.float64)
    tokens = x.flatten(2).mT
    qkv = F.linear(tokens, layer.attend.qkv.weight.flatten(1), layer.attend.qkv.bias)
    q, k, v = qkv.unflatten(2, (2, 3, 4)).permute(3, 0, 2, 1, 4)
    o = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    o = F.linear(o, layer.attend.proj.weight.flatten(1), layer.attend.proj.bias).mT.unflatten(2, (3, 4))
    torch.testing.assert_close(layer(x), o)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(sizes=(4, 2)), "one value per stage"),
        (dict(sizes=(0, 2, 1, 1)), "size and iterations of super tokens must be at least 1"),
        (dict(iterations=(1, 0, 1, 1)), "at least 1, got 2 and 0"),
        (dict(num_heads=(3, 2, 2, 4)), "dim 8 is not a multiple of num_heads 3"),
    ],
    ids=["stages", "size", "iterations", "heads"],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        FAMILIES["svit"].build(**arguments)
