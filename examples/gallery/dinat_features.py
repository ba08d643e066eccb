"""DiNAT's feature maps, on a picture that is not square.

The backbone is one of timm's registry and takes any height and width. The picture is two emoji, drawn by the teacher.
Each level is shown by its first three principal components. Nothing is downloaded: the backbone's weights are random,
so colours only tell which places look alike (`--weights` reads the authors' file).
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import vision_attn.backbones  # noqa: F401, adds the names to timm
from vision_attn.demo import load_teacher

# isort: split
import timm

NAME = "dinat_mini"


def colours(features):
    """Return the three strongest components of `[1, height, width, C]` as a picture."""
    _, height, width, channels = features.shape
    tokens = features.reshape(-1, channels)
    tokens = tokens - tokens.mean(0)
    shown = tokens @ torch.linalg.svd(tokens, full_matrices=False)[2][:3].T
    low, high = shown.quantile(0.02, 0), shown.quantile(0.98, 0)
    shown = ((shown - low) / (high - low)).clamp(0, 1).view(height, width, 3)
    return Image.fromarray((255 * shown).byte().numpy())


def main(pipe=None, out=Path("dinat_features"), weights=None, steps=10):
    out.mkdir(parents=True, exist_ok=True)
    pipe = pipe or load_teacher()
    noise = [torch.Generator().manual_seed(0) for _ in range(2)]
    drawn = pipe(["red apple", "alarm clock"], num_inference_steps=steps, generator=noise).images
    picture = Image.fromarray(np.concatenate([np.array(image) for image in drawn], 1)).resize((512, 256))
    picture.save(out / "picture.png")
    image = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 127.5 - 1
    torch.manual_seed(0)
    source = dict(pretrained=True, pretrained_cfg_overlay=dict(file=str(weights))) if weights else {}
    model = timm.create_model(NAME, features_only=True, **source).eval()
    captions = {"picture.png": f"the picture, {picture.width} x {picture.height} pixels"}
    with torch.no_grad():
        levels = model(image)
    for level, features in enumerate(levels, 1):
        shown = colours(features).resize(picture.size, Image.Resampling.NEAREST)
        shown.save(out / f"level-{level}.png")
        height, width, channels = features.shape[1:]
        captions[f"level-{level}.png"] = f"level {level}: {height} x {width} tokens, {channels} channels"
    return captions


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("dinat_features"), help="folder for the pictures")
    parser.add_argument("--weights", type=Path, help="the authors' checkpoint, if you have it")
    options = parser.parse_args()
    main(out=options.out, weights=options.weights)
