"""Guiders that perturb a denoiser act on a converted one as on stock: all of diffusers' that hook models."""

from typing import Any

import diffusers
import pytest
import torch
from converted_hosts import CLEAR
from diffusers.hooks import HookRegistry, LayerSkipConfig, SmoothedEnergyGuidanceConfig
from diffusers.hooks.layer_skip import _apply_layer_skip_hook
from host_runs import run
from tiny_hosts import HOST
from torch import Tensor

from vision_attn import Conversion, LinFusion, Softmax, convert

SIZE = (8, 8)  # smoothed energy guidance takes square pictures
BLOCKS = {
    "flux": "transformer_blocks",
    "sd35": "transformer_blocks",
    "sd15-unet": "down_blocks.0.attentions.0.transformer_blocks",
}
SKIPS = {
    "attention": dict(skip_attention=True, skip_ff=False),
    "scores": dict(skip_attention=False, skip_attention_scores=True, skip_ff=False),
    "block": {},
    "feed-forward": dict(skip_attention=False, skip_ff=True),
}


def perturbed(host_id: str, model: Any, skip: dict[str, Any]) -> Tensor:
    config = LayerSkipConfig(indices=[0], fqn=BLOCKS[host_id], **skip)
    _apply_layer_skip_hook(model, config, name="test")
    try:
        return run(HOST[host_id], model, *SIZE)
    finally:
        HookRegistry.check_if_exists_or_initialize(model).remove_hook("test", recurse=True)


@pytest.mark.parametrize(
    ("host_id", "name"),  # what diffusers can skip in each on stock
    [*(("sd15-unet", name) for name in SKIPS), ("flux", "block"), ("flux", "feed-forward"), ("sd35", "feed-forward")],
)
def test_skipped_layers(host_id: str, name: str) -> None:
    skip = SKIPS[name]
    stock, model, local = (HOST[host_id].build() for _ in range(3))
    convert(model, Softmax())
    convert(local, CLEAR)
    want, before = perturbed(host_id, stock, skip), run(HOST[host_id], local, *SIZE)
    torch.testing.assert_close(perturbed(host_id, model, skip), want, rtol=0, atol=1e-5)
    assert not torch.equal(perturbed(host_id, local, skip), before)
    assert torch.equal(run(HOST[host_id], local, *SIZE), before)
    assert set(Conversion.of(local).status.values()) == {"rerouted"}


HOOKED: dict[str, dict[str, Any]] = {
    "AutoGuidance": dict(auto_guidance_config=LayerSkipConfig([0], BLOCKS["sd15-unet"], dropout=0.5), dropout=None),
    "PerturbedAttentionGuidance": dict(
        perturbed_guidance_config=LayerSkipConfig([0], BLOCKS["sd15-unet"], False, True, False)
    ),
    "SkipLayerGuidance": dict(skip_layer_config=LayerSkipConfig([0], BLOCKS["sd15-unet"])),
    "SmoothedEnergyGuidance": dict(
        seg_guidance_config=SmoothedEnergyGuidanceConfig([0], BLOCKS["sd15-unet"]), seg_guidance_start=0.0
    ),
}


def predictions(host_id: str, model: Any, guider: Any) -> list[Tensor]:
    """Run a model once for each condition of a guider, as modular pipelines do."""
    guider.set_state(step=1, num_inference_steps=10, timestep=torch.tensor(600))
    found = []
    for _ in range(guider.num_conditions):
        torch.manual_seed(0)  # some drop blocks at random
        if isinstance(guider, diffusers.SmoothedEnergyGuidance):
            guider._count_prepared += 1  # diffusers 0.42 forgets to count there, and so never smooths
        guider.prepare_models(model)
        found.append(run(HOST[host_id], model, *SIZE))
        guider.cleanup_models(model)
    return found


@pytest.mark.parametrize("name", HOOKED)
def test_guiders(name: str) -> None:
    outputs = {}
    for spec in (None, Softmax(), CLEAR, LinFusion(mid_dim=4)):
        model = HOST["sd15-unet"].build()
        if spec is not None:
            convert(model, spec)
        outputs[spec] = predictions("sd15-unet", model, getattr(diffusers, name)(**HOOKED[name], start=0.0, stop=1.0))
    for got, want in zip(outputs[Softmax()], outputs[None], strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    for each in outputs.values():
        assert len({output.sum().item() for output in each}) > 1  # one condition is perturbed, with the same inputs
