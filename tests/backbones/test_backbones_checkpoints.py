"""Checkpoints of backbones: the authors' layouts and transformers', wrappers, adaptation, refusals."""

import re

import pytest
import torch
from backbone_families import FAMILIES
from covering import quick
from golden_case import GOLDEN, mechanism
from transformers import DinatConfig
from transformers.models.dinat import modeling_dinat

from vision_attn.backbones import NAT

TO_TRANSFORMERS = (
    (r"^patch_embed\.proj\.", "dinat.embeddings.patch_embeddings.projection."),
    (r"^patch_embed\.norm\.", "dinat.embeddings.norm."),
    (r"^levels\.(\d+)\.blocks\.", r"dinat.encoder.levels.\1.layers."),
    (r"^levels\.", "dinat.encoder.levels."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.attn\.rpb", ".attention.self.rpb"),
    (r"\.attn\.proj\.", ".attention.output.dense."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
    (r"^norm\.", "dinat.layernorm."),
    (r"^head\.", "classifier."),
)
OPEN = [(name, path.stem) for name in FAMILIES for path in sorted((GOLDEN / name).glob("*_open.json"))]


def in_transformers_layout(official):
    """Write the authors' names as transformers does, with query, key and value apart and layer scales together."""
    layout = {}
    for name, tensor in official.items():
        new = name
        for pattern, replacement in TO_TRANSFORMERS:
            new = re.sub(pattern, replacement, new)
        if ".attn.qkv." in new:
            for part, piece in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                layout[new.replace("attn.qkv", f"attention.self.{part}")] = piece
        elif new.endswith("gamma1"):
            pair = torch.stack([tensor, official[name.replace("gamma1", "gamma2")]])
            layout[new.replace("gamma1", "layer_scale_parameters")] = pair
        elif not new.endswith("gamma2"):
            layout[new] = tensor
    return layout


def with_layer_scale(case):
    """The open cases have no layer scale; add one that is not 1."""
    official = dict(case["state_dict"])
    for name in case["state_dict"]:
        if name.endswith("norm2.bias"):
            for i in (1, 2):
                gamma = torch.linspace(0.5, 1.5, len(official[name])) * i
                official[name.replace("norm2.bias", f"gamma{i}")] = gamma
    case["cfg"]["ctor_kwargs"]["layer_scale"] = 1e-5
    return dict(case, state_dict=official)


@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "layer-scale"])
@pytest.mark.parametrize("family", ["nat", "dinat"])
def test_transformers_layout(family, scaled, monkeypatch):
    case = mechanism(f"{family}/m_open")
    case = with_layer_scale(case) if scaled else case
    layout = in_transformers_layout(case["state_dict"])
    ctor = case["cfg"]["ctor_kwargs"]
    monkeypatch.setattr(modeling_dinat, "requires_backends", lambda *_: None)  # its attention needs NATTEN to run
    config = DinatConfig(
        **{name: ctor[name] for name in ("embed_dim", "depths", "num_heads", "kernel_size")},
        mlp_ratio=float(ctor["mlp_ratio"]),
        dilations=ctor.get("dilations") or [[1] * depth for depth in ctor["depths"]],
        layer_scale_init_value=1e-5 if scaled else 0.0,
        num_labels=ctor["num_classes"],
    )
    theirs = modeling_dinat.DinatForImageClassification(config).state_dict()
    assert {name: t.shape for name, t in theirs.items()} == {name: t.shape for name, t in layout.items()}
    x = case["inputs"]["x"]
    want = FAMILIES[family].recorded(case)(x)
    if not scaled:
        torch.testing.assert_close(want, case["output"], rtol=0, atol=case["cfg"]["suggested_atol"])
    assert torch.equal(FAMILIES[family].recorded(dict(case, state_dict=layout))(x), want)
    as_nat = {name.replace("dinat.", "nat.", 1): t for name, t in layout.items()}
    assert torch.equal(FAMILIES[family].recorded(dict(case, state_dict=as_nat))(x), want)


WRAPPED = quick(
    [(wrap, *row) for wrap in ("module", "model", "state_dict", "own") for row in OPEN],
    (lambda wrap, family, case: (family, case), 1),
    (lambda wrap, family, case: wrap, 4),
)


@pytest.mark.parametrize("wrap, family, case", WRAPPED)
def test_wrapped_checkpoints(family, case, wrap):
    case = mechanism(f"{family}/{case}")
    model = FAMILIES[family].recorded(case)
    state_dict = {
        "module": {f"module.{key}": t for key, t in case["state_dict"].items()},
        "model": {"model": case["state_dict"], "epoch": 300, "optimizer": {"state": {}}},
        "state_dict": {"state_dict": {f"module.{key}": t for key, t in case["state_dict"].items()}},
        "own": model.state_dict(),
    }[wrap]
    again = FAMILIES[family].recorded(dict(case, state_dict=state_dict))
    for key, t in model.state_dict().items():
        assert torch.equal(t, again.state_dict()[key])


@pytest.mark.parametrize("name", FAMILIES)
def test_other_classes_channels_and_features(name):
    family = FAMILIES[name]
    whole = family.build()
    adapted = family.load(whole.state_dict(), in_chans=1)
    first = whole.pretrained_cfg["first_conv"] + ".weight"
    torch.testing.assert_close(adapted.state_dict()[first], whole.state_dict()[first].sum(1, keepdim=True))
    fine_tuned = family.load(whole.state_dict(), num_classes=3)
    assert fine_tuned.head.fc.out_features == 3
    for key, t in whole.state_dict().items():
        assert key.startswith("head.") or torch.equal(fine_tuned.state_dict()[key], t)
    features = family.load(whole.state_dict(), features_only=True, out_indices=(0, 1))
    x = torch.randn(1, 3, 48, 64)
    want = whole.forward_intermediates(x, indices=[0, 1], intermediates_only=True)
    for got, expected in zip(features(x), want, strict=True):
        torch.testing.assert_close(got if got.shape == expected.shape else got.permute(0, 3, 1, 2), expected)


@pytest.mark.parametrize("name, best, other", [("agent_cswin", "state_dict_ema", "model"),
                                               ("ravlt", "model_ema", "model")])  # fmt: skip
def test_the_moving_average_is_taken(name, best, other):
    good = FAMILIES[name].build().state_dict()
    bad = {key: torch.zeros_like(t) for key, t in good.items()}
    model = FAMILIES[name].load({other: bad, best: good})
    assert all(torch.equal(t, good[key]) for key, t in model.state_dict().items())


REFUSED = {
    "width": (dict(embed_dim=16), r"patch_embed.norm.bias is \[16\] instead of \[8\]"),
    "depth": (dict(depths=(1, 2, 3, 1), dilations=None), r"stages.2.blocks.2.attn.proj.bias \[32\] is unknown"),
    "kernel": (dict(kernel_size=5), r"stages.0.blocks.0.attn.rpb is \[1, 9, 9\] instead of \[1, 5, 5\]"),
    "layer-scale": (dict(layer_scale=None), "stages.0.blocks.0.ls1.gamma is missing"),
    "stem": (dict(patch_size=4), "patch_embed.proj.0.bias is missing"),
}


@pytest.mark.parametrize("row", REFUSED)
def test_another_variant_is_refused(row):
    arguments, message = REFUSED[row]
    other = NAT(**{"num_classes": 10, **FAMILIES["nat"].tiny, **arguments})
    with pytest.raises(ValueError, match=f"is of another model than nat_mini: .*{message}.* and .* more"):
        FAMILIES["nat"].load(other.state_dict())


@pytest.mark.parametrize("name", FAMILIES)
def test_another_shape_is_refused(name):
    checkpoint = FAMILIES[name].build().state_dict()
    changed = next(key for key in checkpoint if key.endswith("fc1.weight"))
    checkpoint[changed] = checkpoint[changed][:-1]
    del checkpoint[next(key for key in reversed(checkpoint) if "fc2" in key)]
    with pytest.raises(ValueError, match=f"another model than {FAMILIES[name].arch}: .*{changed} is .* instead of"):
        FAMILIES[name].load(checkpoint)


def test_another_family_is_refused():
    with pytest.raises(ValueError, match="another model than nat_iso_small"):
        FAMILIES["nat_isotropic"].load(FAMILIES["nat"].build().state_dict())


@pytest.mark.parametrize("checkpoint", [{"epoch": 3}, {"model": {}}], ids=["no-tensors", "empty"])
def test_no_tensors_are_refused(checkpoint):
    with pytest.raises(ValueError, match="the checkpoint has no tensors"):
        FAMILIES["nat"].load(checkpoint)


@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "wrapped"])
@pytest.mark.parametrize("family", ["nat", "dinat", "dinat_s"])
def test_backbones_of_detectors(family, wrapped):
    """The authors' detectors have `backbone.` before the names, a norm for each stage, no head, and much else."""
    case = mechanism(f"{family}/m_open")
    official = case["state_dict"]
    detector = {f"backbone.{name}": t for name, t in official.items() if not name.startswith(("norm.", "head."))}
    for stage in range(4):
        for kind in ("weight", "bias"):
            own = official[f"norm.{kind}"]
            detector[f"backbone.norm{stage}.{kind}"] = own if stage == 3 else own[: len(own) >> (3 - stage)] + 1
    detector |= {"neck.lateral_convs.0.conv.weight": torch.zeros(2, 2, 1, 1), "rpn_head.rpn_cls.bias": torch.zeros(3)}
    given = {"meta": {"epoch": 12}, "state_dict": detector} if wrapped else detector
    want, model = FAMILIES[family].recorded(case), FAMILIES[family].recorded(dict(case, state_dict=given))
    for name, tensor in want.state_dict().items():
        assert name.startswith("head.") or torch.equal(tensor, model.state_dict()[name])
    x = case["inputs"]["x"]
    assert torch.equal(model.forward_features(x), want.forward_features(x))
    del detector["backbone.patch_embed.norm.weight"]
    with pytest.raises(ValueError, match=r"patch_embed.norm.weight is missing"):
        FAMILIES[family].recorded(dict(case, state_dict=detector))
