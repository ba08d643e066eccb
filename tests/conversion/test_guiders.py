"""Guiders that perturb a denoiser act on a converted one as on stock: all of diffusers' that hook models."""

import importlib.util
from itertools import product
from typing import Any

import diffusers
import pytest
import torch
from converted_hosts import CLEAR
from covering import quick
from diffusers import guiders
from diffusers.hooks import HookRegistry, LayerSkipConfig, SmoothedEnergyGuidanceConfig
from diffusers.hooks.layer_skip import _apply_layer_skip_hook
from host_runs import TEXT, distance, run
from processor_table import PROCESSORS
from tiny_hosts import HOST
from torch import Tensor

from vision_attn import Conversion, Softmax, convert

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


COMBINING = [
    name
    for name in dir(guiders)
    if name.endswith("Guidance") and name not in HOOKED and name not in ("BaseGuidance", "LTX2Guidance")  # of LTX alone
]
KORNIA = pytest.mark.skipif(importlib.util.find_spec("kornia") is None, reason="kornia is not installed")
GUIDERS = [
    pytest.param(name, marks=KORNIA, id=f"{name}, where kornia is installed") if name.startswith("Frequency") else name
    for name in (*HOOKED, *COMBINING)
]
OWN = {name: spec for name, spec in PROCESSORS.items() if name != "softmax"}


def guided(model: Any, name: str) -> list[Tensor]:
    """Run a UNet once for each condition of a guider; return the answers, and what the guider makes of them."""
    guider: Any = getattr(guiders, name)(**HOOKED.get(name, {}), start=0.0, stop=1.0)
    guider.set_state(step=1, num_inference_steps=10, timestep=torch.tensor(600))
    inputs, found = HOST["sd15-unet"].inputs(*SIZE, 2, TEXT), []
    for _ in range(guider.num_conditions):
        torch.manual_seed(0)  # some drop blocks at random
        if isinstance(guider, diffusers.SmoothedEnergyGuidance):
            guider._count_prepared += 1  # diffusers 0.42 forgets to count there, and so never smooths
        guider.prepare_models(model)
        with torch.no_grad():
            found.append(HOST["sd15-unet"].output(model(**inputs)))
        guider.cleanup_models(model)
        if name in COMBINING:  # the second condition has no prompt
            inputs["encoder_hidden_states"] = torch.zeros_like(inputs["encoder_hidden_states"])
    tokens = name == "MagnitudeAwareGuidance"  # which takes those of a DiT alone
    return [*found, guider.forward(*(t.flatten(2) for t in found) if tokens else found)[0]]


@pytest.mark.parametrize("name", GUIDERS)
def test_guiders_act_as_on_stock(name: str) -> None:
    model, plain = HOST["sd15-unet"].build(), HOST["sd15-unet"].build()
    convert(model, Softmax())
    for got, want in zip(guided(model, name), guided(plain, name), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


ROWS = quick(list(product(HOOKED, OWN)), (lambda name, spec: name, 1), (lambda name, spec: spec, 1))


@pytest.mark.parametrize("name, spec", ROWS)
def test_every_processor_under_guiders_that_hook(name: str, spec: str) -> None:
    model = HOST["sd15-unet"].build()
    convert(model, OWN[spec], min_tokens=9)  # the lowest grid is 2 x 2
    torch.manual_seed(0)
    before = run(HOST["sd15-unet"], model, *SIZE)
    *conditions, combined = guided(model, name)
    assert combined.isfinite().all() and distance(conditions[0], conditions[-1]) > 1e-3  # one of them is perturbed
    torch.manual_seed(0)
    assert torch.equal(run(HOST["sd15-unet"], model, *SIZE), before)
    assert "rerouted" in Conversion.of(model).status.values()


def test_every_guider_has_a_row() -> None:
    known = {name for name in dir(guiders) if name.endswith("Guidance")}
    assert known - {*HOOKED, *COMBINING} == {"BaseGuidance", "LTX2Guidance"}
