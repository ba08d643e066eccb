"""A quantised host is distilled like any other, as with QLoRA: its weights stay, what was added and LoRA learn."""

import shutil

import numpy as np
import pytest
import safetensors.torch
import torch
from distill_case import metrics, settings, write_images
from quantised_hosts import QUANTISATIONS, row

import vision_attn
from vision_attn.demo import load_teacher
from vision_attn.distill.cache import write_cache
from vision_attn.distill.config import ModelConfig
from vision_attn.distill.denoiser import load_pipeline
from vision_attn.distill.evaluate import evaluate
from vision_attn.distill.loop import train
from vision_attn.distill.student import load_lora

LORA = "pytorch_lora_weights.safetensors"
CALL = dict(height=32, width=32, num_inference_steps=2, output_type="np")


@pytest.fixture(scope="module")
def cached(tmp_path_factory):
    root = tmp_path_factory.mktemp("quantised")
    write_images(root / "images")
    write_cache(settings(root))
    return root


@pytest.fixture
def root(cached, tmp_path):
    shutil.copytree(cached / "cache", tmp_path / "cache")
    return tmp_path


def quantised(name):
    pipe = load_teacher("nano")
    QUANTISATIONS[name].quantise(pipe.transformer)
    return pipe


def frozen(pipe):
    """Return what the linear layers of the host make of 1."""
    with torch.no_grad():
        return {
            name: layer(torch.eye(layer.in_features, device=pipe.device)).cpu()
            for name, layer in pipe.transformer.named_modules()
            if isinstance(layer, torch.nn.Linear) and "lora" not in name and "substitute" not in name
        }


def picture(pipe):
    return pipe("octopus", generator=torch.Generator().manual_seed(0), **CALL).images


NAMES = [name for name in QUANTISATIONS if name != "torchao-int8-dynamic"]  # which has no gradients
QUICK = ("torchao-int8", "bitsandbytes-nf4", "layerwise-bfloat16")  # one of each package
ROWS = [row(name, package=QUANTISATIONS[name].package, slow=name not in QUICK) for name in NAMES]


@pytest.mark.parametrize("name", ROWS)
def test_what_was_added_learns_on_a_quantised_host(name, root):
    config = settings(root, student__trainable="new", run__steps=10, run__save_every=0, optimizer__learning_rate=3e-3)
    pipe = quantised(name)
    before = frozen(pipe)
    folder = train(config, pipe=pipe)
    losses = [line["prediction"] for line in metrics(root)]
    assert np.mean(losses[-4:]) < 0.9 * np.mean(losses[:2])
    assert all(torch.equal(value, before[n]) for n, value in frozen(pipe).items())
    tensors = safetensors.torch.load_file(folder / "vision_attn.safetensors")
    assert tensors and all(".vision_attn." in tensor for tensor in tensors)
    other = quantised(name)
    vision_attn.load(other, folder)
    np.testing.assert_allclose(picture(other), picture(pipe), atol=2e-2 if QUANTISATIONS[name].rounding else 1e-4)


@pytest.mark.parametrize("name", [r for r in ROWS if "layerwise-float8" not in r.values])  # peft takes no float8
def test_lora_lies_beside_the_adapter(name, root):
    """It cannot be merged into codes, so diffusers loads it by itself."""
    config = settings(root, student__trainable="lora", student__rank=2, run__steps=3, optimizer__learning_rate=1e-2)
    pipe = quantised(name)
    folder = train(config, pipe=pipe)
    if name == "layerwise-bfloat16":  # 16 bits are weights like others
        assert not (folder / LORA).exists()
        return
    assert any(
        "lora_B" in tensor and value.any() for tensor, value in safetensors.torch.load_file(folder / LORA).items()
    )
    without, other = quantised(name), quantised(name)
    for each in (without, other):
        vision_attn.load(each, folder)
    other.transformer.load_lora_adapter(folder, weight_name=LORA, prefix=None)
    trained = picture(pipe)
    np.testing.assert_allclose(picture(other), trained, atol=2e-2 if QUANTISATIONS[name].rounding else 1e-4)
    assert np.abs(picture(without) - trained).max() > 1e-3
    around = quantised(name)
    vision_attn.load(around, folder.parent)  # it finds the adapter in the folder around it too
    load_lora(around.transformer, folder.parent)
    np.testing.assert_allclose(picture(around), picture(other), atol=1e-5)
    for adapter in (folder, folder.parent):
        with pytest.raises(ValueError, match="has LoRA layers beside it, which would be left out"):
            train(settings(root, student__adapter=adapter, student__trainable="new", run__out=root / "next"))


@pytest.mark.parametrize("name", [row(name, package="torchao", slow=name != "int8") for name in ("int8", "float8")])
def test_the_settings_quantise(name, root):
    pipe = load_pipeline(ModelConfig("emoji:nano", quantisation=name))
    assert "torchao" in type(pipe.transformer.transformer_blocks[0].attn.to_q.weight).__module__
    how = dict(model__quantisation=name, student__trainable="lora", student__rank=2, run__steps=1)
    config = settings(root, **how, eval__num_inference_steps=1, eval__count=2)
    train(config)
    assert (root / "out" / "adapter" / LORA).exists()
    assert evaluate(config)["student"]


def test_what_quantised_weights_cannot_is_refused(root):
    for changes in (dict(), dict(student__trainable="new", run__export="linfusion")):
        with pytest.raises(ValueError, match="quantised projections are not trained, and not exported"):
            settings(root, model__quantisation="int8", **changes)
    with pytest.raises(ValueError, match="no folder that diffusers could load in 4 bits"):
        load_pipeline(ModelConfig("emoji:nano", quantisation="nf4"))


@pytest.mark.parametrize("name", [row("torchao-int8", package="torchao")])
def test_projections_of_a_pipeline_that_is_quantised_are_not_trained(name, root):
    with pytest.raises(ValueError, match=r"to_q is quantised: student\.trainable must be 'new' or 'lora'"):
        train(settings(root, student__trainable="attention"), pipe=quantised(name))
