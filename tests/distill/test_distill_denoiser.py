"""Every family of pipelines is called in training as its own code calls it, and learns."""

from itertools import product

import diffusers
import pytest
import torch
from covering import quick
from distill_case import settings
from tiny_hosts import HOST, TEXT_DIM, noise
from tiny_pipelines import PIPELINE, PipelineCase, _pipeline, _vae

from vision_attn.distill.denoiser import (
    Batch,
    Interface,
    denoiser_of,
    encode_images,
    interface_of,
    load_pipeline,
    record,
)
from vision_attn.distill.losses import Step
from vision_attn.distill.student import make_student
from vision_attn.processors.base import CHILD


def build_pixart():
    model = HOST["pixart"].build()
    parts = dict(tokenizer=None, text_encoder=None, vae=_vae(), transformer=model)
    return _pipeline(diffusers.PixArtAlphaPipeline, scheduler=diffusers.DPMSolverMultistepScheduler(), **parts)


def pixart_call(height, width):
    mask = torch.tensor([[1, 1, 1, 1, 1, 0, 0]])
    return dict(prompt_embeds=noise(1, 7, TEXT_DIM, seed=3), prompt_attention_mask=mask, negative_prompt=None)


CASES = [PIPELINE[name] for name in ("sd", "sdxl", "sd3", "flux")]
CASES.append(PipelineCase("pixart", "transformer", 16, build_pixart, pixart_call))
SIZE = (64, 96)


def call_of(case):
    keep = ("prompt_embeds", "pooled_prompt_embeds", "prompt_attention_mask")
    call = {name: value for name, value in case.call(*SIZE).items() if name in keep}
    if case.id == "pixart":
        call |= dict(negative_prompt=None, use_resolution_binning=False)
    return call


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_the_denoiser_is_called_as_the_pipeline_does(case):
    pipe = case.build()
    call = call_of(case)
    interface = interface_of(pipe, *SIZE, 3.5, **call)
    assert interface == Interface.from_config(interface.config())
    recorded = record(pipe, *SIZE, 3.5, generator=torch.Generator().manual_seed(0), **call)
    kept = []
    hook = denoiser_of(pipe)[1].register_forward_hook(lambda m, a, out: kept.append(out[0]))
    steps = dict(num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="latent")
    flux = case.id == "flux"
    with torch.no_grad():
        pipe(height=SIZE[0], width=SIZE[1], guidance_scale=3.5 if flux else 1.0, **steps, **call)
        hook.remove()
        tensors = {k: v for k, v in recorded.items() if isinstance(v, torch.Tensor)}
        latents, _ = tensors.pop(interface.latents), tensors.pop("timestep")
        again = denoiser_of(pipe)[1](**interface.arguments(latents, pipe.scheduler.timesteps[:1], tensors))[0]
    torch.testing.assert_close(again, kept[0])
    assert set(interface.batched) <= set(tensors)
    assert not (set(interface.batched) & {"img_ids", "txt_ids"})


CASE = {case.id: case for case in CASES}


@pytest.mark.parametrize(("name", "trainable"), quick(
    list(product(CASE, ("new", "attention", "lora"))), (lambda name, _: name, 1), (lambda _, trainable: trainable, 2)
))  # fmt: skip
def test_every_family_learns_what_is_chosen(name, trainable, tmp_path):
    case = CASE[name]
    torch.manual_seed(0)
    pipe, call = case.build(), call_of(case)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False)
    interface = interface_of(pipe, *SIZE, 3.5, **call)
    tensors = {k: v for k, v in record(pipe, *SIZE, 3.5, **call).items() if isinstance(v, torch.Tensor)}
    clean = encode_images(pipe, torch.rand(2, 3, *SIZE) * 2 - 1)
    assert clean.shape[1:] == tensors.pop(interface.latents).shape[1:]
    del tensors["timestep"]
    rows = {k: v.repeat(2, *[1] * (v.dim() - 1)) if k in interface.batched else v for k, v in tensors.items()}
    null = {k: torch.zeros_like(tensors[k]) for k in interface.batched if tensors[k].is_floating_point()}
    null |= {k: tensors[k] for k in interface.batched if k not in null}
    config = settings(tmp_path, student__trainable=trainable, student__fields={"feature_map": "hedgehog"})
    before = {k: v.clone() for k, v in denoiser_of(pipe)[1].state_dict().items()}
    student = make_student(config, pipe)
    computing = Step(config, student, interface)
    noisy = computing.noisy(Batch(SIZE, clean, rows, null), 0)
    with student.teaching(student.model) as teacher:
        taught = teacher(**noisy.call)[0]
        if trainable != "attention":  # the same weights are the teacher
            assert student.copy is None
    other = case.build()
    wanted = denoiser_of(other)[1](**noisy.call)[0]
    torch.testing.assert_close(taught, wanted)
    losses = computing.losses(student.model, noisy)
    assert set(losses) == {"prediction", "attention", "total"} | ({"variance"} if case.id == "pixart" else set())
    losses["total"].backward()
    with_gradient = {name for name, p in student.model.named_parameters() if p.grad is not None}
    assert with_gradient and with_gradient <= set(student.parameters)
    assert any(f".{CHILD}." in name for name in with_gradient)
    assert any("lora_" in name for name in with_gradient) == (trainable == "lora")
    assert any(name.endswith("to_q.weight") for name in with_gradient) == (trainable == "attention")
    after = student.model.state_dict()
    assert all(torch.equal(v, after.get(k, v)) for k, v in before.items())


def test_the_unet_teacher_has_its_pooled_row():
    pipe = load_pipeline(settings_of("emoji:unet"))
    interface = interface_of(pipe, 32, 64, 3.5, prompt="octopus")
    assert interface.latents == "sample" and interface.batched == ("encoder_hidden_states",)
    assert record(pipe, 32, 64, 3.5, prompt=["octopus", ""])["encoder_hidden_states"].shape == (2, 9, 96)


def settings_of(base):
    from vision_attn.distill.config import ModelConfig

    return ModelConfig(base)


def test_unknown_teacher():
    with pytest.raises(ValueError, match="'base', 'nano', 'unet'"):
        load_pipeline(settings_of("emoji:large"))
    with pytest.raises(ValueError, match="nowhere/to-be-found could not be loaded"):
        load_pipeline(settings_of("nowhere/to-be-found"))
