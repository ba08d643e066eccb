"""Whole backbones, recorded from the authors' code: outputs, features and gradients, and LITv2's merging.

A case is a pair of files `golden/<family>/<case>.{json,safetensors}`; all that lie there are run. Those of InLine lie
beside the repository (see `golden_case.py`): they are larger than it takes files. LITv2's case has a
batch of one. For it, torch's CPU kernel of `batch_norm` returns a shuffled gradient if the output goes through the
authors' `.flatten(2).transpose(1, 2)` (torch 2.13, evaluation mode), and that gradient was recorded below the last
merging. So the merging is given the authors' layout for the comparison, and our own gradient is compared with
differences of the output.
"""

import pytest
import torch
import torch.nn.functional as F
from backbone_families import FAMILIES
from golden_case import TOLERANCE, case_names, mechanism, tensors

from vision_attn.backbones.litv2.layers import DeformableMerging

CASES = [name for family in FAMILIES for name in case_names(family)]
MERGINGS = case_names("dcn_v1")
LARGE = [family for family in FAMILIES if family.startswith("inline_") and not case_names(family)]
ABSENT = [
    pytest.param(f"{family}/absent", marks=pytest.mark.skip("its files are too large, and no folder beside has them"))
    for family in LARGE
]


def build(name, case):
    return FAMILIES[name.split("/")[0]].recorded(case)


def our_name(model, tensor):
    """Return the parameter that holds this tensor of the checkpoint: all are random, so the values tell."""
    flat = tensor.flatten()
    holders = [name for name, p in model.named_parameters() if torch.equal(p.flatten(), flat)]
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


def authors_layout(self, x):
    y = self.act(self.norm(self.dconv(x.permute(0, 3, 1, 2))))
    return y.flatten(2).transpose(1, 2).unflatten(1, y.shape[2:])


@pytest.mark.parametrize("name", CASES + ABSENT)
def test_backbone_equals_the_authors(name, monkeypatch):
    case = mechanism(name)
    cfg, x = case["cfg"], case["inputs"]["x"].requires_grad_()
    share = cfg["suggested_atol"] / cfg["output_absmax"]
    model = build(name, case)
    assert_near(model(x), case["output"], share, "output")

    last, features = model.forward_intermediates(x)
    recorded, pre_logits = official_features(name)
    assert len(features) == len(recorded)
    for i, (feature, want) in enumerate(zip(features, recorded, strict=True)):
        ours = feature if want.dim() == 4 and model.output_fmt == "NCHW" else feature.permute(0, 2, 3, 1)
        cells = want[:, -ours[0, ..., 0].numel() :] if want.dim() == 3 else want  # without the class token
        assert_near(ours.reshape(cells.shape), cells, share, f"feature {i}")
    assert_near(model.forward_head(last, pre_logits=True), pre_logits.flatten(1), share, "pre_logits")

    monkeypatch.setattr(DeformableMerging, "forward", authors_layout)
    model(x).backward(case["cotangent"])
    assert x.grad.norm().item() == pytest.approx(cfg["input_grad_l2"]["x"], rel=1e-4)
    for official, norm in cfg["param_grad_l2"].items():
        ours = our_name(model, case["state_dict"][official])
        assert model.get_parameter(ours).grad.norm().item() == pytest.approx(norm, rel=1e-4, abs=1e-6), official


def test_every_family_has_a_case():
    assert {name.split("/")[0] for name in CASES} == set(FAMILIES) - {"vitrpb", "svit", *LARGE}  # isotropic ones; none
    assert MERGINGS


@pytest.mark.parametrize("wrong", ["dilation", "pre-scaled bias", "agents' bias"])
def test_a_wrong_model_is_caught(wrong):
    name = "agent_swin/m_open" if wrong == "agents' bias" else "dinat/m_open"
    case = mechanism(name)
    model = build(name, case)
    if wrong == "dilation":
        model.stages[0].blocks[1].attn.dilation -= 1
    elif wrong == "pre-scaled bias":
        model.stages[0].blocks[1].attn.rpb.data *= model.stages[0].blocks[1].attn.scale
    else:
        model.stages[0].blocks[0].attn.ha_bias.data.mul_(2)
    error = (model(case["inputs"]["x"]) - case["output"]).abs().max().item()
    assert error > 10 * case["cfg"]["suggested_atol"]


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("litv2")])
def test_gradient_of_litv2_is_that_of_its_output(name):
    case = mechanism(name)
    model = build(name, case).double()
    x, cotangent = case["inputs"]["x"].double(), case["cotangent"].double()
    (gradient,) = torch.autograd.grad((model(x.requires_grad_()) * cotangent).sum(), x)
    direction = torch.randn_like(x)
    with torch.no_grad():
        change = ((model(x + 1e-6 * direction) - model(x - 1e-6 * direction)) * cotangent).sum() / 2e-6
    assert (gradient * direction).sum().item() == pytest.approx(change.item(), rel=1e-5)


@pytest.mark.parametrize("name", MERGINGS)
def test_deformable_merging_equals_the_authors(name):
    case = mechanism(name)
    kwargs = case["cfg"]["ctor_kwargs"]
    merging = DeformableMerging(kwargs["dim"]).eval()
    merging.load_state_dict({key.replace("norm_layer.", "norm."): t for key, t in case["state_dict"].items()})
    x = case["inputs"]["x"].requires_grad_()
    o = merging(x.unflatten(1, tuple(kwargs["input_resolution"]))).flatten(1, 2)
    torch.testing.assert_close(o, case["output"], **TOLERANCE)
    o.backward(case["cotangent"])
    torch.testing.assert_close(x.grad, case["grad_input"]["x"], **TOLERANCE)
    for official, norm in case["cfg"]["param_grad_l2"].items():
        ours = merging.get_parameter(official.replace("norm_layer.", "norm."))
        assert ours.grad.norm().item() == pytest.approx(norm, rel=1e-4), official


def test_merging_without_offsets_is_a_convolution():
    merging, x = DeformableMerging(6).eval(), torch.randn(2, 5, 7, 6)
    padded = F.pad(x, (0, 0, 0, 1, 0, 1)).permute(0, 3, 1, 2)
    plain = F.conv2d(padded, merging.dconv.weight, merging.dconv.bias, stride=2)
    torch.testing.assert_close(merging(x), merging.act(merging.norm(plain)).permute(0, 2, 3, 1))
