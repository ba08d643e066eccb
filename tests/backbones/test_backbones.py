"""Backbones in timm's registry: published sizes, any image size, dtypes, timm's conventions, refusals."""

import copy
import gzip
import json
import pkgutil
from itertools import product

import pytest
import timm
import torch
from backbone_families import FAMILIES, images
from covering import quick
from golden_case import GOLDEN
from timm.models import create_feature_extractor, group_parameters
from torch._dynamo.testing import CompileCounterWithBackend

COUNTS = json.loads((GOLDEN / "manifests" / "params_macs.json").read_text())
SHAPES = json.loads(gzip.decompress((GOLDEN / "manifests" / "state_dict_shapes.json.gz").read_bytes()))
PUBLISHED = [(name, manifest) for name, family in FAMILIES.items() for manifest in family.published]
SIZES = [(64, 96), (61, 47), (33, 130), (7, 7), (1, 1)]
TOLERANCE = {torch.bfloat16: 0.05, torch.float16: 0.01, torch.float64: 1e-12}


@pytest.fixture(params=FAMILIES)
def family(request):
    return FAMILIES[request.param]


def quickly(*names):
    """Run a test with these families, and with the others where slow tests run."""
    rows = [pytest.param(name, marks=() if name in names else pytest.mark.slow) for name in FAMILIES]
    return pytest.mark.parametrize("family", rows, indirect=True)


def as_map(x, model, size):
    """Return what `forward_features` gives as `[B, C, height, width]`, without a class token."""
    if model.output_fmt == "NLC":
        return x[:, 1:].transpose(1, 2).unflatten(2, size)
    return x.permute(0, 3, 1, 2) if model.output_fmt == "NHWC" else x


@pytest.mark.parametrize("name, manifest", quick(PUBLISHED, (lambda name, manifest: name, 1)))
def test_published_sizes(name, manifest):
    arch = FAMILIES[name].published[manifest]
    checkpoint = {key: torch.empty(shape, device="meta") for key, shape in SHAPES[manifest].items()}
    overlay = dict(state_dict=dict(model=checkpoint))
    model = timm.create_model(arch, pretrained=True, pretrained_cfg_overlay=overlay, device="meta")
    assert sum(p.numel() for p in model.parameters()) == COUNTS[manifest]["params"]
    size = COUNTS[manifest]["res"]
    assert model.pretrained_cfg["input_size"] == (3, size, size)
    last = model.forward_features(torch.empty(1, 3, size, size, device="meta"))
    cells = model.pretrained_cfg["pool_size"] or (size // 16, size // 16)
    assert tuple(as_map(last, model, cells).shape[2:]) == cells


def test_a_missing_tensor_is_caught():
    checkpoint = {key: torch.empty(shape, device="meta") for key, shape in SHAPES["nat_mini"].items()}
    del checkpoint["levels.3.blocks.0.attn.rpb"]
    with pytest.raises(ValueError, match=r"another model than nat_mini: stages.3.blocks.0.attn.rpb is missing$"):
        timm.create_model("nat_mini", pretrained=True, pretrained_cfg_overlay=dict(state_dict=checkpoint))


def test_every_variant_is_tested_and_has_an_address():
    published = {FAMILIES[name].published[manifest] for name, manifest in PUBLISHED}
    assert {manifest for _, manifest in PUBLISHED} == set(COUNTS)
    architectures = {arch.split(".")[0] for arch in published}
    modules = {timm.models._registry._model_to_module[arch] for arch in architectures}
    assert not modules & {module.name for module in pkgutil.iter_modules(timm.models.__path__)}
    assert set(timm.list_models(module=list(modules))) == architectures
    for arch in timm.list_models(module=list(modules), include_tags=True):
        cfg = timm.models.get_pretrained_cfg(arch)
        assert "." in arch and cfg.license
        assert arch.endswith(".untrained") if not cfg.url else "no download was tried" in cfg.notes[0]


@pytest.mark.parametrize(
    "family, size",
    quick(list(product(FAMILIES, SIZES)), (lambda family, size: family, 2), (lambda family, size: size, 2)),
    indirect=["family"],
)
def test_any_image_size(family, size):
    model = family.build()
    x = images(*size)
    output, features = model(x), model.forward_intermediates(x, intermediates_only=True)
    assert output.shape == (2, 10) and output.isfinite().all()
    for info, feature in zip(model.feature_info, features, strict=True):
        assert feature.shape == (2, info["num_chs"], *family.sides(size, info["reduction"]))
    torch.testing.assert_close(model(x[:1]), output[:1])


@pytest.mark.parametrize(
    "family, dtype",
    quick(list(product(FAMILIES, TOLERANCE)), (lambda family, dtype: family, 1), (lambda family, dtype: dtype, 4)),
    indirect=["family"],
)
def test_dtypes(family, dtype):
    model, x = family.build(), images(48, 64)
    exact = model.double()(x.double())
    output = model.to(dtype)(x.to(dtype))
    assert output.dtype == dtype
    assert (output.double() - exact).norm() / exact.norm() <= TOLERANCE[dtype]
    made = family.build(dtype=dtype)
    assert {p.dtype for p in made.parameters()} == {dtype}


def test_channels_last(family):
    model, x = family.build(), images(48, 64)
    want = model(x)
    parameters = list(model.parameters())
    model.to(memory_format=torch.channels_last)
    assert all(one is other for one, other in zip(model.parameters(), parameters, strict=True))
    assert all(t.is_contiguous(memory_format=torch.channels_last) for t in model.state_dict().values() if t.dim() == 4)
    torch.testing.assert_close(model(x.contiguous(memory_format=torch.channels_last)), want, rtol=1e-4, atol=1e-4)


def test_autocast(family):
    model, x = family.build().train(), images(48, 64)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(x)
    assert output.dtype == torch.bfloat16
    output.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())


@quickly("nat", "vitrpb", "agent_deit", "agent_cswin", "agent_pvt", "ravlt", "litv2")  # each operator and layer once
def test_torchscript_equals_eager_and_can_be_saved(family, tmp_path):
    model, x = family.build(), images(48, 40).requires_grad_()
    torch.jit.script(model).save(tmp_path / "model.pt")
    scripted = torch.jit.load(tmp_path / "model.pt")
    for size in ((48, 40), (31, 96)):
        torch.testing.assert_close(scripted(images(*size)), model(images(*size)), rtol=1e-5, atol=1e-5)
    want = torch.autograd.grad(model(x).square().sum(), [x, *model.parameters()])
    got = torch.autograd.grad(scripted(x).square().sum(), [x, *scripted.parameters()])
    for actual, expected in zip(got, want, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


@quickly("nat_isotropic", "agent_deit", "ravlt")  # one for each format of maps
def test_scripted_features(family):
    model = family.build(features_only=True, feature_cls="getter", out_indices=(0, 2))
    x = images(48, 40)
    torch.testing.assert_close(torch.jit.script(model)(x), model(x))


@quickly("nat_isotropic")
def test_compiled_whole(family):
    torch._dynamo.reset()
    model, x = family.build(), images(48, 64)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")(x), model(x))


@pytest.mark.slow  # compiles for dynamic sizes; its twin compiles for one
def test_another_size_compiles_nothing_anew():
    torch._dynamo.reset()
    model = FAMILIES["dinat"].build(depths=(2,), num_heads=(1,), dilations=((1, 2),))
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=graphs)
    frames = []
    for size in ((48, 64), (64, 40), (96, 72), (80, 112), (56, 104)):
        torch.testing.assert_close(compiled(images(*size)), model(images(*size)))
        frames.append(graphs.frame_count)
    # How many the first sizes need is torch's affair: it may take a size for a constant until it sees another.
    assert frames[-1] == frames[2]


def test_ways_to_features_agree(family):
    x, whole = images(64, 48), family.build()
    want = whole.forward_intermediates(x, indices=[0, 1, 2], intermediates_only=True)
    for feature_cls in family.feature_classes:
        model = family.build(features_only=True, feature_cls=feature_cls, out_indices=(0, 1, 2))
        assert model.feature_info.channels() == [info["num_chs"] for info in whole.feature_info[:3]]
        missing = model.load_state_dict(renamed_for(feature_cls, whole.state_dict()), strict=False).missing_keys
        assert not missing
        channels_last = feature_cls != "getter" and whole.output_fmt == "NHWC"
        torch.testing.assert_close([f.permute(0, 3, 1, 2) if channels_last else f for f in model(x)], want)
        for info, feature in zip(model.feature_info.get_dicts(), want, strict=False):
            assert feature.shape == (2, info["num_chs"], *family.sides((64, 48), info["reduction"]))


def renamed_for(feature_cls, state_dict):
    """timm's wrappers hold the model's modules under names of their own."""
    if feature_cls == "list":
        return {name.replace("stages.", "stages_", 1): t for name, t in state_dict.items()}
    prefix = {"getter": "model.", "fx": "graph_module."}[feature_cls]
    return {prefix + name: t for name, t in state_dict.items()}


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
    normed = model.forward_intermediates(x, norm=True, intermediates_only=True)[-1]
    torch.testing.assert_close(normed, as_map(last, model, normed.shape[2:]))


def test_traced_by_fx(family):
    model, x = family.build(), images(48, 64)
    traced = create_feature_extractor(model, {"head.fc": "logits"})
    torch.testing.assert_close(traced(x)["logits"], model(x))


def test_gradient_checkpointing_changes_nothing(family):
    model, x = family.build(drop_path_rate=0.5).train(), images(32, 48)

    def gradients():
        torch.manual_seed(0)
        return torch.autograd.grad(model(x).square().sum(), list(model.parameters()), allow_unused=True)

    want = gradients()
    model.set_grad_checkpointing()
    assert sum(getattr(m, "grad_checkpointing", False) for m in model.modules()) >= 3
    torch.testing.assert_close(gradients(), want)


def test_every_parameter_learns_with_drop_path(family):
    model = family.build(drop_path_rate=0.5, drop_rate=0.1, proj_drop_rate=0.1).train()
    rates = [m.drop_prob for m in model.modules() if type(m).__name__ == "DropPath"]
    assert rates == sorted(rates) and rates[-1] == pytest.approx(0.5)
    model(images(32, 48, batch=16)).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_heads(family):
    model, x = family.build(), images(32, 48)
    assert model.get_classifier() is model.head.fc
    assert model.forward_head(model.forward_features(x), pre_logits=True).shape == (2, model.head_hidden_size)
    model.reset_classifier(3, "max")
    assert model(x).shape == (2, 3) and model.global_pool == "max"
    model.reset_classifier(0, "")
    assert model(x).shape == model.forward_features(x).shape
    assert family.build(num_classes=0)(x).shape == (2, model.num_features)


def test_optimizer_groups(family):
    model = family.build()
    names = {name for name, _ in model.named_parameters()}
    positions = (".rpb", "_bias", "_bias_table", ".pos_embed", ".cls_token")
    assert model.no_weight_decay() == {name for name in names if name.endswith(positions)}
    fine = group_parameters(model, model.group_matcher(), reverse=True)
    coarse = group_parameters(model, model.group_matcher(coarse=True), reverse=True)
    assert set(fine) == set(coarse) == names
    assert all((fine[name] == 0) == name.startswith("patch_embed.") for name in names)
    assert len(set(fine.values())) >= len(set(coarse.values())) > 3


def test_made_empty_then_initialized(family):
    model = timm.create_model(family.arch, **family.tiny, device="meta")
    model.to_empty(device="cpu").init_weights()
    assert all(p.isfinite().all() for p in model.parameters())
    assert all(0 < model.get_parameter(name).abs().max() < 0.2 for name in model.no_weight_decay())
    assert model.eval()(images(32, 32)).isfinite().all()


def test_bad_input(family):
    model = family.build()
    for shape in ((2, 4, 32, 32), (2, 1, 32, 32), (3, 32, 32), (2, 3, 0, 32)):
        for run in (model, model.forward_intermediates):
            with pytest.raises(ValueError, match=rf"images must be \[B, 3, height, width\].*got shape \[{shape[0]}, "):
                run(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"output_fmt must be 'NCHW'.*, got 'NHWC'"):
        model.forward_intermediates(images(32, 32), output_fmt="NHWC")
    with pytest.raises(TypeError, match="windows"):
        family.build(windows=7)
    assert family.build(in_chans=5)(images(32, 32, channels=5)).shape == (2, 10)


BAD = {
    "nat-depths": (dict(depths=(1, 1), num_heads=(2, 4, 8)), r"depths, num_heads and dilations must fit .*\(2, 4, 8\)"),
    "nat-dilations": (dict(depths=(2,), num_heads=(2,), dilations=[[1]]), r"dilations=\[\[1\]\]"),
    "nat-heads": (dict(num_heads=(3, 4, 8, 16)), "dim 8 is not a multiple of num_heads 3"),
    "nat-kernel": (dict(kernel_size=0), "kernel_size must be at least 1, got 0"),
    "nat_isotropic-dilation": (dict(dilation=0), "dilation must be at least 1, got 0"),
    "agent_deit-agents": (dict(agent_nums=(4, 4, 4)), "agent_nums must be four numbers"),
    "agent_pvt-types": (dict(attn_types="AAC"), "one value per stage"),
    "agent_swin-types": (dict(attn_types="AAM"), "attn_types must be 4 letters A, B or M"),
    "agent_cswin-splits": (dict(split_sizes=(1, 2)), "one value per stage"),
    "litv2-windows": (dict(window_sizes=(0, 0, 2)), "must fit each other"),
    "ravlt-heads": (dict(num_heads=(1, 2, 5, 8)), r"not a multiple of 4 \* num_heads"),
}


@pytest.mark.parametrize("row", BAD)
def test_bad_arguments(row):
    arguments, message = BAD[row]
    with pytest.raises(ValueError, match=message):
        FAMILIES[row.split("-", maxsplit=1)[0]].build(**arguments)


def test_forward_mode_equals_two_reverse_modes(family):
    model = family.build().double()
    x, t = images(64, 64, batch=1).double(), images(64, 64, batch=1).flip(3).double()
    if family is FAMILIES["litv2"]:
        with pytest.raises(NotImplementedError, match="grid_sampler"):  # PyTorch's own has reverse mode only
            torch.func.jvp(model, (x,), (t,))
        return
    tangent = torch.func.jvp(model, (x,), (t,))[1]
    torch.testing.assert_close(tangent, torch.autograd.functional.jvp(model, x, t)[1])
