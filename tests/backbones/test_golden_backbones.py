"""Whole backbones, recorded from the authors' code: outputs, features and gradients.

A case is a pair of files `golden/<family>/<case>.{json,safetensors}`; all that lie there are run.
"""

import pytest
import timm
import torch
from backbone_families import FAMILIES
from golden_case import GOLDEN, mechanism, tensors

CASES = [f"{family}/{path.stem}" for family in FAMILIES for path in sorted((GOLDEN / family).glob("*.json"))]


def build(family, case):
    """Build the case's model and load its weights the way timm loads a checkpoint."""
    arguments = FAMILIES[family].arguments(dict(case["cfg"]["ctor_kwargs"]))
    overlay = dict(
        state_dict=case["state_dict"],
        num_classes=arguments.get("num_classes", 1000),
        input_size=(arguments.get("in_chans", 3), *case["inputs"]["x"].shape[2:]),
    )
    arch = FAMILIES[family].arch
    return timm.create_model(arch, pretrained=True, pretrained_cfg_overlay=overlay, **arguments).eval()


def our_name(model, tensor):
    """Return the parameter that holds this tensor of the checkpoint: all are random, so the values tell."""
    holders = [name for name, p in model.named_parameters() if p.shape == tensor.shape and torch.equal(p, tensor)]
    assert len(holders) == 1
    return holders[0]


def official_features(name):
    """Return the recorded outputs of the stages, in order, and what the head classifies."""
    stored = {key.removeprefix("feat."): t for key, t in tensors(f"{name}.safetensors").items() if "feat." in key}
    pre_logits = stored.pop("pre_logits")
    order = sorted(stored, key=lambda key: int("".join(filter(str.isdigit, key))))
    return [stored[key] for key in order], pre_logits


def assert_near(actual, expected, share, what):
    """Compare with an error of at most `share` of the largest value."""
    atol = share * expected.abs().max().item()
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol, msg=lambda text: f"{what}: {text}")


@pytest.mark.parametrize("name", CASES)
def test_backbone_equals_the_authors(name):
    family, case = name.split("/")[0], mechanism(name)
    cfg = case["cfg"]
    share = cfg["suggested_atol"] / cfg["output_absmax"]
    model = build(family, case)
    x = case["inputs"]["x"].requires_grad_()
    output = model(x)
    assert_near(output, case["output"], share, "output")

    last, features = model.forward_intermediates(x)
    recorded, pre_logits = official_features(name)
    assert len(features) == len(recorded)
    for i, (feature, want) in enumerate(zip(features, recorded, strict=True)):
        ours = feature if FAMILIES[family].layout == "NCHW" else feature.permute(0, 2, 3, 1)
        assert_near(ours.reshape(want.shape), want, share, f"feature {i}")
    assert_near(model.forward_head(last, pre_logits=True), pre_logits, share, "pre_logits")

    output.backward(case["cotangent"])
    assert x.grad.norm().item() == pytest.approx(cfg["input_grad_l2"]["x"], rel=1e-4)
    for official, norm in cfg["param_grad_l2"].items():
        ours = our_name(model, case["state_dict"][official])
        assert model.get_parameter(ours).grad.norm().item() == pytest.approx(norm, rel=1e-4, abs=1e-6), official


def test_every_family_has_a_case():
    assert {name.split("/")[0] for name in CASES} == set(FAMILIES) - {"vitrpb"}  # among the isotropic cases


@pytest.mark.parametrize("wrong", ["dilation", "pre-scaled bias"])
def test_a_wrong_model_is_caught(wrong):
    case = mechanism("dinat/m_open")
    model = build("dinat", case)
    attention = model.stages[0].blocks[1].attn
    if wrong == "dilation":
        attention.dilation -= 1
    else:
        attention.rpb.data *= attention.scale
    error = (model(case["inputs"]["x"]) - case["output"]).abs().max().item()
    assert error > 10 * case["cfg"]["suggested_atol"]
