"""A ControlNet with neighborhood attention.

One call converts the UNet and the ControlNet. Levels with few tokens keep their attention. The program draws the edges
itself. Nothing is trained, so the picture lacks long-range detail until a fine-tuning (`vision-attn distill`).
"""

import argparse
import sys
from pathlib import Path

import diffusers
import torch
from PIL import Image, ImageDraw

from vision_attn import Neighborhood, convert
from vision_attn._compat import ensure_torchvision

WEIGHTS = ("lllyasviel/sd-controlnet-canny", "stable-diffusion-v1-5/stable-diffusion-v1-5")
SPEC = Neighborhood(kernel_size=13)
PROMPT = "a farmhouse in the evening light, photograph"


def weights():
    ensure_torchvision()
    try:
        controlnet = diffusers.ControlNetModel.from_pretrained(WEIGHTS[0], torch_dtype=torch.float16)
        pipe = diffusers.StableDiffusionControlNetPipeline.from_pretrained(
            WEIGHTS[1], controlnet=controlnet, torch_dtype=torch.float16
        )
    except OSError:
        sys.exit(f"this example needs the weights of {' and '.join(WEIGHTS)}, which could not be loaded")
    return pipe.to("cuda")


def edges(side):
    """Draw the outline of a house, white on black."""
    image = Image.new("RGB", (512, 512))
    pen = ImageDraw.Draw(image)
    for line in ([(96, 240), (256, 96), (416, 240)], [(120, 220), (120, 440), (392, 440), (392, 220)]):
        pen.line(line, "white", 4)
    for box in ((220, 320, 292, 440), (150, 270, 200, 320), (312, 270, 362, 320)):
        pen.rectangle(box, outline="white", width=4)
    return image.resize((side, side))


def main(pipe=None, out=Path("controlnet_neighborhood"), side=768, spec=SPEC, **call):
    pipe = pipe or weights()
    out.mkdir(parents=True, exist_ok=True)
    conversion = convert(pipe, spec, components=("unet", "controlnet"), min_tokens=spec.kernel_size**2)
    edges(side).save(out / "edges.png")
    call = {"prompt": PROMPT, "image": edges(side), "height": side, "width": side, **call}
    pipe(generator=torch.Generator().manual_seed(0), **call).images[0].save(out / "house.png")
    rerouted = [layer.status == "rerouted" for layer in conversion.layers]
    conversion.revert()
    return {"edges.png": "the edges", "house.png": f"{spec} in {sum(rerouted)} of {len(rerouted)} layers"}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("controlnet_neighborhood"), help="folder for the pictures")
    main(out=parser.parse_args().out)
