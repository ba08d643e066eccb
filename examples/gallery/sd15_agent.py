"""Stable Diffusion 1.5 with agent attention, training-free.

This is the schedule of the paper's authors: in the early steps, and only at full resolution, tokens are merged and
attend through a few agents. The weights do not change.
"""

import argparse
import sys
import time
from pathlib import Path

import diffusers
import torch

from vision_attn import AgentSD, convert
from vision_attn._compat import ensure_torchvision

WEIGHTS = ("stable-diffusion-v1-5/stable-diffusion-v1-5",)
PROMPT = "a watercolour of a fox in the snow"


def weights():
    ensure_torchvision()
    try:
        pipe = diffusers.StableDiffusionPipeline.from_pretrained(WEIGHTS[0], torch_dtype=torch.float16)
    except OSError:
        sys.exit(f"this example needs the weights of {WEIGHTS[0]}, which could not be loaded")
    return pipe.to("cuda")


def main(pipe=None, out=Path("sd15_agent"), side=768, **call):
    pipe, captions = pipe or weights(), {}
    out.mkdir(parents=True, exist_ok=True)
    call = {"prompt": PROMPT, "height": side, "width": side, **call}
    for name, spec in (("dense", None), ("agent", AgentSD.schedule())):
        conversion = convert(pipe, spec) if spec else None
        start = time.perf_counter()
        image = pipe(generator=torch.Generator().manual_seed(0), **call).images[0]
        image.save(out / f"{name}.png")
        captions[f"{name}.png"] = f"{name}, {time.perf_counter() - start:.1f} s"
    conversion.revert()
    return captions


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("sd15_agent"), help="folder for the pictures")
    main(out=parser.parse_args().out)
