"""`generate_highres` over processes, beside the same in one process."""

from contextlib import nullcontext
from unittest.mock import patch

import torch
from sliced_models import HOST  # noqa: F401, diffusers' stand-ins come first
from tiny_pipelines import PIPELINE

import vision_attn
from vision_attn import Clear, LinFusion, generate_highres
from vision_attn.highres.levels import Options
from vision_attn.parallel import enable, shared_decoding


def drawn(kind, over):
    """Return the pixels of each level's picture.

    FLUX.1 is converted level by level, and its first level attends as diffusers plans. A UNet and SD3 must be converted
    as long as they are cut.
    """
    pipe = PIPELINE[kind].build()
    call = PIPELINE[kind].call(16, 16)
    for name in ("height", "width", "num_inference_steps", "output_type", "generator"):
        call.pop(name)
    if kind == "flux":  # gloo gathers equal slices only
        call["prompt_embeds"] = torch.cat([call["prompt_embeds"], call["prompt_embeds"][:, :1]], 1)
    else:
        vision_attn.convert(pipe, LinFusion() if kind == "sdxl" else Clear(radius=2))
    with patch("torch.accelerator.device_count", lambda: 1):
        if over:
            enable(pipe)
    base = 4 * pipe.vae_scale_factor * 2
    options = Options(num_inference_steps=3, level_inference_steps=2, quiet=True, base=(base, base))
    pipe.vae.enable_tiling()
    with shared_decoding(pipe.vae) if over else nullcontext():
        result = generate_highres(
            pipe,
            None,
            2 * base,
            2 * base,
            options=options,
            spec=Clear(radius=2) if kind == "flux" else None,
            generator=torch.Generator().manual_seed(0),
            **call,
        )
    return [torch.tensor(list(level.images[0].tobytes())) for level in result.levels]


def over(rank, kind):
    """Return the same over all processes."""
    return drawn(kind, True)
