"""FLUX.1 at 4096 px with CLEAR's released weights.

Each of the 65536 image tokens attends to a disc of radius 16, to one pooled key per 4 x 4 cell, and to the text. The
picture is first drawn at 1024 px and then refined twice. `native_tokens` is the size of the training, above which CLEAR
scales its logits.
"""

import argparse
import sys
from pathlib import Path

import diffusers
import torch

from vision_attn import Clear, generate_highres, load
from vision_attn._compat import ensure_torchvision

WEIGHTS = ("black-forest-labs/FLUX.1-dev", "Huage001/CLEAR")
FILE = "clear_local_16_down_4.safetensors"
SPEC = Clear(radius=16, pool=4, native_tokens=64 * 64 + 512)
PROMPT = "a lighthouse on a cliff in a storm, waves, a beam of light, oil painting"


def weights():
    ensure_torchvision()
    try:
        pipe = diffusers.FluxPipeline.from_pretrained(WEIGHTS[0], torch_dtype=torch.bfloat16)
        load(pipe, WEIGHTS[1], weight_name=FILE, spec=SPEC)
    except OSError:
        sys.exit(f"this example needs the weights of {' and '.join(WEIGHTS)}, which could not be loaded")
    return pipe.to("cuda")


def main(pipe=None, out=Path("flux_clear_4k"), side=4096, options=None, **call):
    pipe = pipe or weights()
    out.mkdir(parents=True, exist_ok=True)
    call = {"prompt": PROMPT, "guidance_scale": 3.5, "generator": torch.Generator().manual_seed(0), **call}
    drawn = generate_highres(pipe, height=side, width=side, options=options, **call)
    for level in drawn.levels:
        level.images[0].save(out / f"level-{level.height}.png")
    return {f"level-{level.height}.png": f"{level.height} px, {level.seconds:.0f} s" for level in drawn.levels}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("flux_clear_4k"), help="folder for the pictures")
    main(out=parser.parse_args().out)
