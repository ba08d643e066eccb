"""SDXL with LinFusion's released weights.

The cost of linear attention grows with the number of pixels, not with its square. The program draws one prompt from one
noise at 1024 px, SDXL's own size, with dense attention and with LinFusion, and goes on to 2048 px.
"""

import argparse
import sys
from pathlib import Path

import diffusers
import torch

from vision_attn import generate_highres, load
from vision_attn._compat import ensure_torchvision

WEIGHTS = ("stabilityai/stable-diffusion-xl-base-1.0", "Yuanshi/LinFusion-XL")
PROMPT = "an astronaut floating above the ocean of another planet, cinematic"


def weights():
    ensure_torchvision()
    try:
        pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(
            WEIGHTS[0], torch_dtype=torch.float16, variant="fp16"
        )
        load(pipe, WEIGHTS[1]).revert()  # checks that both exist before anything is drawn
    except OSError:
        sys.exit(f"this example needs the weights of {' and '.join(WEIGHTS)}, which could not be loaded")
    return pipe.to("cuda")


def main(pipe=None, out=Path("sdxl_linfusion"), adapter=WEIGHTS[1], side=2048, options=None, **call):
    pipe = pipe or weights()
    out.mkdir(parents=True, exist_ok=True)
    call = {"prompt": PROMPT, "guidance_scale": 7.0, **call}
    conversion = load(pipe, adapter)

    def draw(side):
        noise = torch.Generator().manual_seed(0)
        return generate_highres(pipe, height=side, width=side, options=options, generator=noise, **call).levels

    levels = draw(side)
    with conversion.bypassed():
        dense = draw(levels[0].height)
    conversion.revert()
    captions = {"dense.png": f"SDXL's dense attention, {dense[0].height} px, {dense[0].seconds:.1f} s"}
    dense[0].images[0].save(out / "dense.png")
    for level in levels:
        level.images[0].save(out / f"linfusion-{level.height}.png")
        captions[f"linfusion-{level.height}.png"] = f"LinFusion, {level.height} px, {level.seconds:.1f} s"
    return captions


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("sdxl_linfusion"), help="folder for the pictures")
    main(out=parser.parse_args().out)
