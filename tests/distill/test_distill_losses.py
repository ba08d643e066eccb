"""The losses of distillation give the golden losses and gradients of LinFusion's and CLEAR's own training code."""

import diffusers
import pytest
import torch
from golden_clear import CASES as CLEAR_CASES
from golden_clear import pack, teacher_of
from golden_clear import read as read_clear
from golden_linfusion import CASES as LINFUSION_CASES
from golden_linfusion import arguments as unet_arguments
from golden_linfusion import read as read_linfusion

from vision_attn import load
from vision_attn.distill.config import LossConfig
from vision_attn.distill.losses import Noising, Outputs, distillation_losses
from vision_attn.distill.student import attention_outputs

TOLERANCE = dict(atol=1e-5, rtol=1e-4)
FLOW = diffusers.FlowMatchEulerDiscreteScheduler
SD = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


def forward(model, layers, latents, **inputs):
    with attention_outputs(model, layers) as attention:
        output = model(**inputs, return_dict=False)[0]
    return Outputs.of(output, latents, dict(attention))


@pytest.mark.parametrize("name", LINFUSION_CASES)
def test_linfusion(name):
    meta, io, unet, released = read_linfusion(name)
    inputs = unet_arguments(io, "loss.", "noisy", "timesteps")
    with torch.no_grad():
        teacher = forward(read_linfusion(name)[2], meta["modules"], io["loss.noisy"], **inputs)
    load(unet, released)
    student = forward(unet, meta["modules"], io["loss.noisy"], **inputs)
    losses = distillation_losses(student, teacher, io["loss.noise"], LossConfig())
    names = {"task": "loss_noise", "prediction": "loss_kd", "attention": "loss_feat", "total": "loss"}
    for ours, theirs in names.items():
        assert losses[ours].item() == pytest.approx(meta["loss"][theirs], rel=1e-4)
    losses["total"].backward()
    first = unet.get_submodule(meta["modules"][0])
    torch.testing.assert_close(first.to_q.weight.grad, io["loss.grad_first_to_q"], **TOLERANCE)
    torch.testing.assert_close(first.substitute.to_k_[0].weight.grad, io["loss.grad_first_to_k_0"], **TOLERANCE)


@pytest.mark.parametrize("name", CLEAR_CASES)
def test_clear(name):
    meta, io, inputs, checkpoint = read_clear(name)
    model = teacher_of(name)
    inputs = {**inputs[0], "hidden_states": io["loss.packed"], "timestep": io["loss.sigmas"].flatten()}
    layers = [layer.removesuffix(".processor") for layer in meta["loss"]["distill_layers"]]
    with torch.no_grad():
        teacher = forward(model, layers, io["loss.packed"], **inputs)
    load(model, checkpoint)
    student = forward(model, layers, io["loss.packed"], **inputs)
    target = Noising(FLOW()).target(pack(io["loss.latents"]), pack(io["loss.noise"]), io["loss.sigmas"])
    losses = distillation_losses(student, teacher, target, LossConfig())
    names = {"task": "loss_fm", "prediction": "loss_distill", "attention": "loss_attn", "total": "loss"}
    for ours, theirs in names.items():
        assert losses[ours].item() == pytest.approx(meta["loss"][theirs], rel=1e-4)
    losses["total"].backward()
    grad = model.single_transformer_blocks[0].attn.to_q.weight.grad
    torch.testing.assert_close(grad, io["loss.grad_single0_to_q"], **TOLERANCE)
    if "loss.grad_double0_spatial" in io:
        grad = model.transformer_blocks[0].attn.substitute.spatial_weight.grad
        torch.testing.assert_close(grad, io["loss.grad_double0_spatial"], **TOLERANCE)


def test_a_wrong_weight_is_caught():
    ones = Outputs(torch.ones(2), None, {"a": torch.ones(2)})
    zeros = Outputs(torch.zeros(2), None, {"a": torch.zeros(2)})
    losses = distillation_losses(ones, zeros, torch.zeros(2), LossConfig(task=1, prediction=2, attention=4))
    assert losses["total"] == 7
    assert distillation_losses(ones, zeros, torch.zeros(2), LossConfig(task=0))["total"] == 1


def test_learned_variances_are_parted_and_compared():
    latents = torch.zeros(1, 4, 2, 2)
    both = Outputs.of(torch.cat([torch.ones(1, 4, 2, 2), torch.full((1, 4, 2, 2), 3.0)], 1), latents, {})
    none = Outputs.of(torch.zeros(1, 8, 2, 2), latents, {})
    losses = distillation_losses(both, none, latents, LossConfig())
    assert {k: v.item() for k, v in losses.items()} == pytest.approx(
        {"task": 1, "prediction": 1, "variance": 9, "total": 1 + 0.5 + 0.05 * 9}
    )
    assert Outputs.of(latents, latents, {}).variance is None


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("scheduler", [diffusers.DDIMScheduler, diffusers.DPMSolverMultistepScheduler])
def test_noise_and_targets_are_the_schedulers(kind, scheduler):
    made = scheduler(prediction_type=kind, **SD)
    reference = diffusers.DDPMScheduler(prediction_type=kind, **SD)
    clean, noise, t = torch.randn(3, 4, 5, 6), torch.randn(3, 4, 5, 6), torch.tensor([0, 500, 999])
    noising = Noising(made)
    torch.testing.assert_close(noising.add(clean, noise, t), reference.add_noise(clean, noise, t))
    wanted = {"epsilon": noise, "sample": clean, "v_prediction": reference.get_velocity(clean, noise, t)}[kind]
    torch.testing.assert_close(noising.target(clean, noise, t), wanted)


@pytest.mark.parametrize("config", [dict(shift=3.0), dict(use_dynamic_shifting=True)])
def test_noise_of_flow_matching_is_the_schedulers(config):
    scheduler = FLOW(**config)
    clean, noise = torch.randn(2, 9, 4), torch.randn(2, 9, 4)
    t = scheduler.timesteps[[10, 800]].clone()
    torch.testing.assert_close(Noising(scheduler).add(clean, noise, t), scheduler.scale_noise(clean, t, noise))
    scheduler.set_timesteps(4, mu=1.0)  # a pipeline was called: the grid of training stays
    torch.testing.assert_close(Noising(scheduler).timesteps, Noising(FLOW(**config)).timesteps)


def test_noise_levels_are_drawn_from_the_grid():
    noising = Noising(FLOW(shift=3.0))
    drawn = noising.draw(4000, "none", torch.Generator().manual_seed(0))
    assert set(drawn.tolist()) <= set(noising.timesteps.tolist())
    assert drawn.median().item() == pytest.approx(750, abs=20)  # 0.5 shifted by 3
    assert noising.at_level(0.75).item() == pytest.approx(750, abs=2)
    logit = noising.draw(4000, "logit_normal", torch.Generator().manual_seed(0))
    assert logit.std() < drawn.std()
    sd = Noising(diffusers.DDIMScheduler(**SD))
    assert sd.draw(4000, "none", torch.Generator().manual_seed(0)).float().mean().item() == pytest.approx(500, abs=20)


def test_an_unknown_prediction_is_refused():
    with pytest.raises(ValueError, match="flow_prediction"):
        Noising(diffusers.DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True))
