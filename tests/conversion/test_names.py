"""No pattern of names that diffusers, peft or timm use finds what a conversion adds; stored names load as before."""

import copy
import fnmatch
import re
from pathlib import Path
from typing import Any

import diffusers
import peft
import pytest
import torch
from converted_hosts import POOLED, SIZE, converted, expected
from diffusers import TaylorSeerCacheConfig
from diffusers.hooks import _common, apply_layerwise_casting, faster_cache, layerwise_casting, taylorseer_cache
from host_runs import run
from peft.utils import constants
from processor_table import PROCESSORS
from put_on_things import THINGS
from safetensors.torch import load_file
from timm.utils.attention_extract import AttentionExtract
from tiny_hosts import HOST
from torch import nn

from vision_attn import Conversion, LinFusion, Softmax, convert, load
from vision_attn.processors.base import CHILD

SPECS = dict(softmax=Softmax(), linfusion=LinFusion(mid_dim=4, feature_map="hedgehog"))


def added(host_id: str, spec: Any) -> list[str]:
    """Return the names of the modules that a conversion adds."""
    model = HOST[host_id].build()
    before = {name for name, _ in model.named_modules()}
    convert(model, spec)
    return [name for name, _ in model.named_modules() if name not in before]


def patterns_of_models() -> set[str]:
    """Return the patterns by which diffusers' models leave out modules."""
    found = set(layerwise_casting.DEFAULT_SKIP_MODULES_PATTERN)
    for name in dir(diffusers):
        if name.endswith(("Model", "Transformer", "Transformer2DModel", "Transformer3DModel")):
            model = getattr(diffusers, name)
            found |= set(getattr(model, "_skip_layerwise_casting_patterns", None) or ())
            found |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    return found


@pytest.mark.parametrize("host_id", ["flux", "sd15-unet", "vit"])
def test_patterns(host_id: str) -> None:
    inside = patterns_of_models()
    assert {"norm", "pos_embed", "patch_embed"} <= inside
    targets = {
        name for names in constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.values() for name in names
    }
    targets |= {"to_q", "to_k", "to_v", "to_out.0", "qkv", "proj", "attn", "add_q_proj", "ff.net.2", "norm1"}
    whole = [
        *taylorseer_cache._TRANSFORMER_BLOCK_IDENTIFIERS, *taylorseer_cache._PROJ_OUT_IDENTIFIERS,
        *taylorseer_cache._BLOCK_IDENTIFIERS,
    ]  # fmt: skip
    timm = [*AttentionExtract.default_module_names, *AttentionExtract.default_node_names]
    for name in sorted({name for spec in [*PROCESSORS.values(), *SPECS.values()] for name in added(host_id, spec)}):
        ours = name[name.index(CHILD) :]
        assert not [pattern for pattern in whole if re.fullmatch(pattern, name)]
        assert not [pattern for pattern in timm if fnmatch.fnmatch(name, pattern)]
        assert not [pattern for pattern in inside if re.search(pattern, ours)]
        assert not [target for target in targets if name.endswith(f".{target}")], name
        assert not [word for word in ("attn", "attention", "norm", "block", "proj", "mlp") if word in ours]
        assert not set(ours.split(".")) & set(_common._ALL_TRANSFORMER_BLOCK_IDENTIFIERS)
    assert faster_cache._TRANSFORMER_BLOCK_IDENTIFIERS  # of attention classes only, which ours are not


def hooked(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if name and hasattr(module, "_diffusers_hook")]


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("name", ["pyramid", "faster", "taylor", "first-block", "mag"])
def test_caches_hook_what_they_hook_without_us(name: str, spec: Any) -> None:
    plain, model = HOST["flux"].build(), HOST["flux"].build()
    convert(model, spec)
    for one in (plain, model):
        THINGS[name].on(one)
    assert hooked(model) == hooked(plain) != []


def test_taylorseer_changes_nothing_more_with_softmax() -> None:
    results = []
    for spec in (None, Softmax()):
        model: Any = HOST["flux"].build()
        if spec is not None:
            convert(model, spec)
        model.enable_cache(TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=1, max_order=1))
        inputs = HOST["flux"].inputs(*SIZE, 1, 7)
        with torch.no_grad(), model.cache_context("test"):
            for time in (0.9, 0.7, 0.5, 0.3):
                inputs["timestep"] = torch.tensor([time])
                step = model(**inputs).sample
                inputs["hidden_states"] = inputs["hidden_states"] - 0.2 * step
        results.append(inputs["hidden_states"])
    assert torch.equal(*results)


@pytest.mark.parametrize("host_id", ["vit", "flux"])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_all_linear_layers_are_those_of_the_host(host_id: str, spec: Any) -> None:
    adapted, cast = [], []
    for one in (None, spec):
        model = HOST[host_id].build()
        if one is not None:
            convert(model, one)
        low = copy.deepcopy(model)
        apply_layerwise_casting(low, torch.float16, torch.float32)
        cast.append(hooked(low))
        peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear"))
        adapted.append([name for name, module in model.named_modules() if hasattr(module, "lora_A")])
    assert adapted[0] == adapted[1] != [] and cast[0] == cast[1] != []


def test_names_of_earlier_versions_load(tmp_path: Path) -> None:
    """Files have `vision_attn` where the model has another name; state dicts had it too."""
    model = converted("sd15-unet", POOLED)
    state = model.state_dict()
    assert any(f".{CHILD}." in name for name in state)
    fresh = HOST["sd15-unet"].build()
    convert(fresh, POOLED)
    earlier = {name.replace(f".{CHILD}.", ".vision_attn."): tensor for name, tensor in state.items()}
    assert not fresh.load_state_dict(earlier).missing_keys
    assert torch.equal(run(HOST["sd15-unet"], fresh, *SIZE), expected("sd15-unet", POOLED))
    assert any(".vision_attn." in name for name in earlier)

    Conversion.of(model).save(tmp_path)
    names = set(load_file(tmp_path / "vision_attn.safetensors"))
    assert names and all(".vision_attn.spatial_weight" in name for name in names)
    again = HOST["sd15-unet"].build()
    load(again, tmp_path)
    assert torch.equal(run(HOST["sd15-unet"], again, *SIZE), expected("sd15-unet", POOLED))
