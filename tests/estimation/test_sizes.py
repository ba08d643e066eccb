"""`estimate` refuses the sizes that the model, or its pipeline, refuses."""

from typing import Any

import pytest
import torch
from tiny_hosts import HOST
from tiny_pipelines import PIPELINE

from vision_attn import Clear, estimate

SIZES = {  # in latents or pixels: what the model takes, and what it refuses
    "dit": ((12, 12), (14, 12)),
    "sd3": ((12, 14), (400, 16)),
    "auraflow": ((12, 14), (13, 12), (12, 13), (400, 16)),
    "cogview4": ((12, 14), (13, 12), (12, 13)),
    "lumina2": ((12, 14), (13, 12), (400, 16)),
    "lumina-next": ((12, 14), (13, 12), (12, 13), (800, 16), (16, 800)),
    "kandinsky5": ((12, 14), (13, 12), (12, 13), (260, 16), (16, 260)),
    "vit": ((48, 56), (53, 48), (48, 53)),
    "dinov3": ((48, 56), (53, 48)),
}


@pytest.mark.parametrize("host_id, size", [(name, size) for name, sizes in SIZES.items() for size in sizes], ids=str)
def test_sizes_of_models(host_id: str, size: tuple[int, int]) -> None:
    model: Any = HOST[host_id].build()
    inputs = HOST[host_id].inputs(6, 6, 1, 7)
    key = "x" if "x" in inputs else "hidden_states"
    inputs[key] = torch.randn(*inputs[key].shape[:2], *size, *inputs[key].shape[4:])
    if "visual_rope_pos" in inputs:
        inputs["visual_rope_pos"] = [torch.arange(side) for side in (1, size[0] // 2, size[1] // 2)]
    scale = 8 if key == "hidden_states" else 1
    try:
        with torch.no_grad():
            model(**inputs)
    except (AssertionError, IndexError, RuntimeError, ValueError):
        with pytest.raises(
            ValueError, match=rf"does not take an image of {scale * size[0]} x {scale * size[1]} pixels"
        ):
            estimate(model, Clear(2), height=scale * size[0], width=scale * size[1])
        assert size != SIZES[host_id][0]
    else:
        estimate(model, Clear(2), height=scale * size[0], width=scale * size[1])
        assert size == SIZES[host_id][0]


@pytest.mark.parametrize("size", [(11, 12), (12, 11)], ids=str)
def test_sides_that_are_not_halves(size: tuple[int, int]) -> None:
    """A UViT that halves the sides answers more codes than it was given, if a side is odd."""
    case, model = HOST["uvit-down"], HOST["uvit-down"].build()
    inputs = case.inputs(6, 6, 1, 7)
    inputs["input_ids"] = inputs["input_ids"][:, : size[0], : size[1]]
    with torch.no_grad():
        assert model(**inputs).shape[-2:] == (12, 12)
    with pytest.raises(ValueError, match="its sides must be even"):
        estimate(model, Clear(2), height=16 * size[0], width=16 * size[1], vae_scale_factor=16)
    estimate(model, Clear(2), height=16 * 12, width=16 * 12, vae_scale_factor=16)
    whole: Any = HOST["uvit"].build()
    estimate(whole, Clear(2), height=16 * size[0], width=16 * size[1], vae_scale_factor=16)


def test_sizes_of_a_model_with_one_size() -> None:
    import timm

    model = timm.create_model("vit_tiny_patch16_224", depth=1)
    estimate(model, Clear(2), height=224, width=224)
    with pytest.raises(ValueError, match=r"VisionTransformer does not take an image of 256 x 224 pixels: .*256.*224"):
        estimate(model, Clear(2), height=256, width=224)


@pytest.mark.parametrize("pipeline_id", ["sd", "sdxl", "sd3", "flux"])
def test_pixels_that_make_no_whole_latents(pipeline_id: str) -> None:
    pipe: Any = PIPELINE[pipeline_id].build()
    call = PIPELINE[pipeline_id].call(64, 68)
    if pipeline_id == "flux":  # it rounds
        assert pipe(**call).images.shape[2] == 64
        estimate(pipe, Clear(2), height=64, width=68)
        return
    with pytest.raises(ValueError, match="divisible"):
        pipe(**call)
    with pytest.raises(ValueError, match=r"does not take an image of 64 x 68 pixels: .*no whole latents"):
        estimate(pipe, Clear(2), height=64, width=68)
