"""Emoji at 512 px, from a teacher trained at 128 px.

At twice its training size the teacher repeats the object. `generate_highres` draws at 128 px, enlarges the picture,
adds noise and removes it again, with local attention (a disc of radius 8) above the first level. Nothing is downloaded.
"""

import argparse
from pathlib import Path

import torch

from vision_attn import Clear, Options, generate_highres
from vision_attn.demo import load_teacher


def main(pipe=None, out=Path("emoji_highres"), prompt="alarm clock", side=512, steps=10, level_inference_steps=3):
    out.mkdir(parents=True, exist_ok=True)
    pipe = pipe or load_teacher()
    noise = torch.Generator().manual_seed(0)
    direct = pipe(prompt, height=256, width=256, num_inference_steps=steps // 2, generator=noise).images[0]
    direct.save(out / "direct-256.png")
    captions = {"direct-256.png": "drawn directly at 256 px, dense attention"}

    options = Options(num_inference_steps=steps, level_inference_steps=level_inference_steps, strength=(0.35, 0.25))
    noise = torch.Generator().manual_seed(0)
    drawn = generate_highres(pipe, prompt, side, side, options=options, spec=Clear(radius=8), generator=noise)
    for level in drawn.levels:
        file = f"level-{level.height}.png"
        level.images[0].save(out / file)
        captions[file] = f"level of {level.height} px, {level.seconds:.0f} s"
    return captions


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("emoji_highres"), help="folder for the pictures")
    main(out=parser.parse_args().out)
