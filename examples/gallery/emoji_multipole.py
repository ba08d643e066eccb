"""Multipole attention needs no training.

The emoji teacher, as it was trained, draws with its own dense attention, with a local window (CLEAR, a disc of radius
8) and with multipole attention, from the same noise. Then it draws above its training size, from coarse to fine.
Nothing is downloaded and nothing is trained.
"""

import argparse
from pathlib import Path

import torch
from PIL import Image

from vision_attn import Clear, Multipole, Options, Softmax, convert, generate_highres
from vision_attn.demo import load_teacher

SPECS = {"dense": Softmax(), "clear": Clear(radius=8), "multipole": Multipole()}


def direct(pipe, prompt, spec, side, steps):
    """Draw in one pass."""
    conversion, noise = convert(pipe, spec), torch.Generator().manual_seed(0)
    image = pipe(prompt, height=side, width=side, num_inference_steps=steps, generator=noise).images[0]
    conversion.revert()
    return image


def levels(pipe, prompt, spec, side, steps):
    """Draw from coarse to fine, the larger levels with the spec."""
    options, noise = Options(num_inference_steps=steps, level_inference_steps=3), torch.Generator().manual_seed(0)
    return generate_highres(pipe, prompt, side, side, options=options, spec=spec, generator=noise).images[0]


def to_tensor(image):
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).float() / 255


def main(pipe=None, out=Path("emoji_multipole"), prompt="octopus", sides=(128,), highres=256, steps=10):
    out.mkdir(parents=True, exist_ok=True)
    pipe, captions = pipe or load_teacher(), {}
    for draw, side in (*((direct, side) for side in sides), (levels, highres)):
        pictures = {}
        for name, spec in SPECS.items():
            pictures[name] = draw(pipe, prompt, spec, side, steps)
            file = f"{side}-{draw.__name__}-{name}.png"
            pictures[name].save(out / file)
            error = (to_tensor(pictures[name]) - to_tensor(pictures["dense"])).square().mean()
            psnr = "" if name == "dense" else f", {-10 * error.log10():.1f} dB to dense"
            captions[file] = f"{spec}, {side} px {'in levels' if draw is levels else 'in one pass'}{psnr}"
    return captions


def sheet(out, captions, cell=192):
    """Lay the pictures out: a row for each attention, a column for each size."""
    files = list(captions)
    columns = len(files) // len(SPECS)
    whole = Image.new("RGB", (cell * columns, cell * len(SPECS)), "white")
    for i, file in enumerate(files):
        picture = Image.open(out / file).resize((cell, cell), Image.Resampling.LANCZOS)
        whole.paste(picture, (i // len(SPECS) * cell, i % len(SPECS) * cell))
    whole.save(out / "sheet.jpg", quality=88)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("emoji_multipole"), help="folder for the pictures")
    parser.add_argument("--prompt", default="octopus")
    parser.add_argument("--sides", type=int, nargs="+", default=[128], help="sizes that are drawn in one pass")
    parser.add_argument("--highres", type=int, default=256, help="size that is drawn from coarse to fine")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    teacher = load_teacher().to(options.device)
    shown = main(teacher, options.out, options.prompt, options.sides, options.highres)
    sheet(options.out, shown)
    print("\n".join(f"{file}: {caption}" for file, caption in shown.items()))
