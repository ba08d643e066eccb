"""What the tokens of a timm ViT attend to, before and after a conversion.

The emoji teacher draws the picture. It is lit where the red token attends in the first layer, in the mean over the
heads. Nothing is downloaded: the ViT's weights are random, and its keys equal its queries, so that a token attends to
tokens like itself (`--pretrained` takes trained weights from the hub).
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from vision_attn import Clear, LinearLocal, Neighborhood, Softmax, convert
from vision_attn.demo import load_teacher

# isort: split
import timm

PIXELS, PATCH = 256, 8
TOKENS = ((6, 7), (25, 20), (15, 12))  # row and column
SPECS = (Softmax(), Neighborhood(kernel_size=13), Clear(radius=8, pool=4), LinearLocal())


def build(pretrained):
    if pretrained:
        return timm.create_model("vit_small_patch8_224", pretrained=True, dynamic_img_size=True).eval()
    torch.manual_seed(0)
    vit = timm.create_model("vit_tiny_patch16_224", patch_size=PATCH, img_size=PIXELS, depth=1).eval()
    query, key, _ = vit.blocks[0].attn.qkv.weight.data.chunk(3)
    key.copy_(query.normal_(std=0.1))
    return vit


def attention_of(vit, image, row, column):
    """Return how a token attends: the derivative of its output by the values, which works for any processor."""
    attn, kept, side = vit.blocks[0].attn, {}, PIXELS // PATCH
    handles = [
        attn.qkv.register_forward_hook(lambda _, __, output: kept.setdefault("qkv", output.detach().requires_grad_())),
        attn.proj.register_forward_pre_hook(lambda _, inputs: kept.update(output=inputs[0])),
    ]
    vit(image)
    [handle.remove() for handle in handles]
    kept["output"][0, vit.num_prefix_tokens + row * side + column].sum().backward()
    return kept["qkv"].grad[0, vit.num_prefix_tokens :].chunk(3, -1)[2].mean(-1).view(side, side)


def lit(picture, seen, row, column):
    light = (30 + 225 * (seen / seen.max()).clamp(0, 1) ** 0.5).byte().numpy()
    light = Image.fromarray(light).resize(picture.size, Image.Resampling.NEAREST)
    shown = Image.composite(picture, Image.new("RGB", picture.size, "#141a30"), light)
    shown.paste("#ff003c", (column * PATCH, row * PATCH, (column + 1) * PATCH, (row + 1) * PATCH))
    return shown


def main(pipe=None, out=Path("vit_attention"), pretrained=False, steps=10):
    out.mkdir(parents=True, exist_ok=True)
    pipe, vit, captions = pipe or load_teacher(), build(pretrained), {}
    picture = pipe("alarm clock", num_inference_steps=steps, generator=torch.Generator().manual_seed(0)).images[0]
    picture = picture.resize((PIXELS, PIXELS))
    image = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 127.5 - 1
    for spec in SPECS:
        conversion = convert(vit, spec)
        shown = [lit(picture, attention_of(vit, image, *token), *token) for token in TOKENS]
        file = f"{type(spec).__name__.lower()}.png"
        Image.fromarray(np.concatenate([np.array(each) for each in shown], 1)).save(out / file)
        captions[file] = f"{spec}: sees {conversion.layers[0].attended:.0%} of the tokens"
        conversion.revert()
    return captions


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("vit_attention"), help="folder for the pictures")
    parser.add_argument("--pretrained", action="store_true", help="use trained weights from the hub")
    options = parser.parse_args()
    main(out=options.out, pretrained=options.pretrained)
