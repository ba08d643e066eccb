"""Tiny SD 1.5 and SDXL UNets with LinFusion's released format, recorded from the authors' code."""

import json
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from golden_case import TOLERANCE
from golden_linfusion import CASES, arguments, read
from interpreted import auto_is_triton
from safetensors.torch import load_file, save_file

from vision_attn import LinFusion, load
from vision_attn.adapters.published import export_linfusion
from vision_attn.conversion.state import is_rerouted, state_of
from vision_attn.grid import Grid
from vision_attn.processors.base import CHILD


def attention_outputs(unet, names):
    """Keep the input and the output of modules while the UNet runs."""
    kept = {}

    def hook(name):
        def keep(module, args, output):
            kept[name] = (args[0], output)

        return keep

    return kept, [unet.get_submodule(name).register_forward_hook(hook(name)) for name in names]


@pytest.mark.parametrize("name", CASES)
def test_released_weights_give_the_authors_output(name):
    meta, io, unet, released = read(name)
    before = {key: tensor.clone() for key, tensor in unet.state_dict().items()}
    with torch.no_grad():
        for g in range(len(meta["grids"])):
            out = unet(**arguments(io, f"g{g}."), return_dict=False)[0]
            torch.testing.assert_close(out, io[f"g{g}.teacher_out"], **TOLERANCE)
        conversion = load(unet, released)
        assert {row.name for row in conversion.layers} == set(meta["modules"])
        assert isinstance(conversion.spec, LinFusion)
        kept, _ = attention_outputs(unet, (meta["modules"][0], meta["modules"][-1]))
        for g in range(len(meta["grids"])):
            out = unet(**arguments(io, f"g{g}."), return_dict=False)[0]
            torch.testing.assert_close(out, io[f"g{g}.student_out"], **TOLERANCE)
            for key, module in (("first", meta["modules"][0]), ("last", meta["modules"][-1])):
                torch.testing.assert_close(kept[module][1], io[f"g{g}.{key}.out"], **TOLERANCE)
        conversion.revert()
    assert all(torch.equal(tensor, before[key]) for key, tensor in unet.state_dict().items())


@pytest.mark.interpreter
@pytest.mark.slow
def test_released_weights_through_triton(monkeypatch):
    ran = auto_is_triton(monkeypatch)
    test_released_weights_give_the_authors_output(CASES[0])
    assert set(ran) == {"linear_attention"}


@pytest.mark.parametrize("name", CASES)
def test_sharp_attention_equals_the_authors(name):
    meta, io, unet, released = read(name)
    load(unet, released)
    first = unet.get_submodule(meta["modules"][0])
    x = io["op_sharp.x"]
    with torch.no_grad():
        first.to_q.weight.mul_(25)
        first.to_k.weight.mul_(25)
        with _grid(unet, x.shape[1]):
            torch.testing.assert_close(first(x), io["op_sharp.out"], **TOLERANCE)


@contextmanager
def _grid(unet, tokens):
    """Let a layer run alone. LinFusion's tokens have no order, so any grid with as many tokens will do."""
    contexts = [state_of(m).context for m in unet.modules() if is_rerouted(m)]
    for context in contexts:
        context.fixed = Grid(1, tokens)
    yield
    for context in contexts:
        context.fixed = None


@pytest.mark.parametrize("name", CASES)
def test_losses_and_gradients(name):
    meta, io, unet, released = read(name)
    load(unet, released)
    kept, _ = attention_outputs(unet, meta["modules"])
    inputs = arguments(io, "loss.", "noisy", "timesteps")
    with torch.no_grad():
        teacher = read(name)[2]
        teacher_kept, _ = attention_outputs(teacher, meta["modules"])
        prediction_teacher = teacher(**inputs, return_dict=False)[0]
    prediction = unet(**inputs, return_dict=False)[0]
    want = meta["loss"]
    noise = F.mse_loss(prediction, io["loss.noise"])
    distilled = F.mse_loss(prediction, prediction_teacher)
    pairs = [(kept[m][1], teacher_kept[m][1]) for m in meta["modules"]]
    attention = sum(F.mse_loss(a, b) for a, b in pairs) / len(pairs)
    loss = noise + 0.5 * distilled + 0.5 * attention
    got = dict(loss_noise=noise, loss_kd=distilled, loss_feat=attention, loss=loss)
    for key, value in got.items():
        assert value.item() == pytest.approx(want[key], rel=1e-4)
    loss.backward()
    first = unet.get_submodule(meta["modules"][0])
    parameters = dict(first.named_parameters())
    for key, norm in want["grad_norms_first"].items():
        ours = key.removeprefix("0.")
        ours = f"{CHILD}.{ours}" if ".to_q_." in key or ".to_k_." in key else ours
        assert parameters[ours].grad.norm().item() == pytest.approx(norm, rel=1e-3, abs=1e-6), key
    torch.testing.assert_close(first.to_q.weight.grad, io["loss.grad_first_to_q"], **TOLERANCE)
    torch.testing.assert_close(first.vision_attn.to_k_[0].weight.grad, io["loss.grad_first_to_k_0"], **TOLERANCE)


@pytest.mark.parametrize("name", CASES)
def test_export_writes_the_released_format(name, tmp_path):
    _, _, unet, released = read(name)
    conversion = load(unet, released)
    export_linfusion(conversion, tmp_path)
    ours, theirs = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path, released))
    assert ours["modules_list"] == theirs["modules_list"] and ours["_class_name"] == theirs["_class_name"]
    file = "diffusion_pytorch_model.safetensors"
    ours, theirs = load_file(tmp_path / file), load_file(released / file)
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[key].float(), theirs[key].float()) for key in theirs)


@pytest.mark.parametrize("damage", ["missing", "unexpected", "shape", "module", "truncated"])
def test_a_file_for_another_model_is_refused(damage, tmp_path):
    _, _, unet, released = read(CASES[0])
    config, weights = (tmp_path / name for name in ("config.json", "diffusion_pytorch_model.safetensors"))
    content, tensor = json.loads((released / "config.json").read_text()), load_file(released / weights.name)
    message = "to_q"
    if damage == "missing":
        del tensor["0.to_q.weight"]
    elif damage == "unexpected":
        tensor["0.to_q.bias"] = torch.zeros(3)
    elif damage == "shape":
        tensor["0.to_q.weight"] = torch.zeros(3, 5)
    elif damage == "module":
        content["modules_list"][0]["module_name"] = message = "down_blocks.7.attn1"
    config.write_text(json.dumps(content))
    save_file(tensor, weights)
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:100])
        message = "damaged"
    before = {key: value.clone() for key, value in unet.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load(unet, tmp_path)
    assert all(torch.equal(value, before[key]) for key, value in unet.state_dict().items())


def test_a_repository_brings_its_own_spec():
    _, _, unet, released = read(CASES[0])
    with pytest.raises(ValueError, match="leave out spec="):
        load(unet, released, spec=LinFusion(mid_dim=8))
    with pytest.raises(TypeError, match="spec must be"):
        load(unet, released, spec=[LinFusion()])


def test_without_networks_the_residual_is_the_identity(tmp_path):
    """Their residual of width -1 is the identity: W (x + x)."""
    _, _, unet, released = read(CASES[0])
    config, weights = (tmp_path / name for name in ("config.json", "diffusion_pytorch_model.safetensors"))
    content = json.loads((released / "config.json").read_text())
    for module in content["modules_list"]:
        module["projection_mid_dim"] = -1
    kept = {k: t for k, t in load_file(released / weights.name).items() if ".to_q_." not in k and ".to_k_." not in k}
    config.write_text(json.dumps(content))
    save_file(kept, weights)
    conversion = load(unet, tmp_path)
    first = unet.get_submodule(content["modules_list"][0]["module_name"])
    for role, factor in (("to_q", 2), ("to_k", 2), ("to_v", 1)):
        assert torch.equal(getattr(first, role).weight, factor * kept[f"0.{role}.weight"].float())
    export_linfusion(conversion, tmp_path / "export")
    written = load_file(tmp_path / "export" / weights.name)
    assert all(torch.equal(written[key].float(), tensor.float()) for key, tensor in kept.items())
