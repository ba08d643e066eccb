"""A change of the model that a recorded forward would miss is noticed, and a change that it reads itself is not one."""

import copy

import pytest
import torch
from tiny_hosts import HOST
from tiny_pipelines import add_lora
from torch import nn

from vision_attn import Clear, Multipole, Schedule, convert
from vision_attn.graphs.watch import Watch, keys_of, reason_of, settings


def lora():
    return add_lora(HOST["sd15-unet"].build())


def first(model, word):
    return next(module for name, module in model.named_modules() if name.endswith(word))


def tuner(model):
    return next(module for module in model.modules() if hasattr(module, "lora_A"))


def new_data(model):
    weight = next(model.parameters())
    weight.data = weight.data.clone()


CHANGES = {
    "weight-moved": (HOST["sd15-unet"].build, new_data),
    "weight-replaced": (
        HOST["sd15-unet"].build,
        lambda m: setattr(m.conv_in, "bias", nn.Parameter(m.conv_in.bias.clone())),
    ),
    "layer-replaced": (HOST["sd15-unet"].build, lambda m: setattr(m, "conv_in", copy.deepcopy(m.conv_in))),
    "layer-wrapped": (HOST["sd15-unet"].build, lambda m: setattr(m, "conv_act", nn.Sequential(m.conv_act))),
    "dtype": (HOST["sd15-unet"].build, lambda m: m.to(torch.float16)),
    "train": (HOST["sd15-unet"].build, lambda m: m.train()),
    "scale": (HOST["sd15-unet"].build, lambda m: setattr(first(m, "attn1"), "scale", 0.25)),
    "processor": (HOST["sd15-unet"].build, lambda m: m.set_attn_processor(type(first(m, "attn1").processor)())),
    "processor-attribute": (HOST["sd15-unet"].build, lambda m: setattr(first(m, "attn1").processor, "scale", [0.5])),
    "freeu": (HOST["sd15-unet"].build, lambda m: m.enable_freeu(s1=0.9, s2=0.2, b1=1.1, b2=1.2)),
    "forward-hook": (HOST["sd15-unet"].build, lambda m: m.conv_in.register_forward_hook(lambda *args: None)),
    "lora-loaded": (HOST["sd15-unet"].build, add_lora),
    "lora-scale": (lora, lambda m: m.set_adapters(["default"], weights=[0.3])),
    "lora-off": (lora, lambda m: m.disable_adapters()),
    "lora-fused": (lora, lambda m: m.fuse_lora()),
    "lora-layer-scale": (lora, lambda m: tuner(m).scaling.update(default=0.1)),
    "converted": (HOST["sd15-unet"].build, lambda m: convert(m, Clear(radius=1))),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_noticed_once(name):
    build, change = CHANGES[name]
    model = build()
    watch = Watch(model)
    assert not watch.changed()
    change(model)
    assert watch.changed() and not watch.changed()


def in_place(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.mul_(2)


@pytest.mark.parametrize(
    ("build", "change"),
    [
        pytest.param(lora, in_place, id="weights-in-place"),
        pytest.param(lora, lambda m: m.set_adapters(["default"], weights=[1.0]), id="same-lora-scale"),
        pytest.param(lora, lambda m: m(**HOST["sd15-unet"].inputs(4, 6, 1, 5)), id="a-forward"),
    ],
)
def test_what_the_graph_reads_itself_is_no_change(build, change):
    model = build()
    with torch.no_grad():
        change(model)  # adapters note things when they are first used
        watch = Watch(model)
        change(model)
    assert not watch.changed()


def test_a_forward_of_a_converted_model_is_no_change():
    model = HOST["flux"].build()
    convert(model, Multipole(cell=2, pool=1))
    with torch.no_grad():
        model(**HOST["flux"].inputs(4, 6, 1, 5))
        watch = Watch(model)
        model(**HOST["flux"].inputs(6, 4, 1, 5))
    assert not watch.changed()


def test_the_grid_and_the_moment_of_a_conversion_are_part_of_a_kind():
    """FLUX with 4 x 6 and 6 x 4 tokens has arguments of the same shapes."""
    model, inputs = HOST["flux"].build(), HOST["flux"].inputs
    schedule = Schedule(((0.5, Clear(radius=1)), (1.0, Clear(radius=2))))
    conversion = convert(model, schedule)
    (key,) = keys_of(model)
    found = []
    with torch.no_grad():
        for grid, time in (((4, 6), 0.9), ((6, 4), 0.9), ((6, 4), 0.1)):
            model(**{**inputs(*grid, 1, 5), "timestep": torch.tensor([time])})
            found.append(key())
        with conversion.bypassed():
            found.append(key())
    assert len(set(found)) == 4


def test_settings_are_part_of_a_kind():
    before = settings()
    with torch.inference_mode():
        assert settings() != before
    with torch.autocast("cuda", torch.bfloat16, enabled=True, cache_enabled=False):
        assert settings() != before or not torch.cuda.is_available()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert settings() != before
    assert settings() == before


def test_counted_calls_are_a_reason():
    model = HOST["sd15-unet"].build()
    convert(model, Multipole(cell=2, pool=1, hold=2))
    assert "counts calls" in reason_of(model)


def test_hooks_and_devices_are_reasons():
    from accelerate.hooks import ModelHook, add_hook_to_module

    model = HOST["sd15-unet"].build()
    assert "not on a CUDA device" in reason_of(model)
    model.conv_in.register_forward_hook(test_hooks_and_devices_are_reasons)
    assert reason_of(model) == "conv_in has a forward hook (test_hooks_and_devices_are_reasons)"
    model = HOST["sd15-unet"].build()
    add_hook_to_module(model.mid_block, ModelHook())
    assert "mid_block has a hook of accelerate (ModelHook)" in reason_of(model)


def test_a_cache_of_diffusers_is_a_reason():
    import diffusers

    model = HOST["flux"].build()
    model.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.1))
    assert "hook of diffusers" in reason_of(model)
    model.disable_cache()
    assert "not on a CUDA device" in reason_of(model)
