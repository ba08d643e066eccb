"""Draw 48 known prompts with a teacher, and measure how near the pictures come to the icons that it was trained on.

    python examples/emoji/sheet.py emoji.npz base sheet.png --json sheet.json

PSNR is the mean over the prompts, of each 128 px picture to its icon. It is low for an icon that is drawn well but a
little larger or to one side, as in training. Retrieval asks whether the nearest of all icons, by the distance of the
pixels at 64 px, is the right one.
"""

import argparse
import json
import platform
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from train import load_icons

from vision_attn.demo import TEACHERS, load_teacher

# isort: split
import diffusers

KNOWN = """
red-apple avocado octopus fire-engine house angry-face alarm-clock pizza cat-face sunflower rocket umbrella
guitar cherries dog-face airplane soccer-ball key heart-on-fire jack-o-lantern banana strawberry hamburger doughnut
birthday-cake hot-beverage tropical-fish penguin frog pig-face panda butterfly lady-beetle snail cactus mushroom
deciduous-tree rainbow snowman crescent-moon bicycle sailboat balloon trophy light-bulb camera grinning-face robot
"""
PROMPTS = KNOWN.split()


def generate(pipe: diffusers.DiffusionPipeline, num_inference_steps: int, guidance: float, batch: int) -> torch.Tensor:
    """Draw each prompt from its own seed; return the pictures `[48, 3, 128, 128]` in [0, 1]."""
    pictures, name = [], "guidance_scale" if hasattr(pipe, "unet") else "true_cfg_scale"
    for first in range(0, len(PROMPTS), batch):
        prompts = PROMPTS[first : first + batch]
        seeds = [torch.Generator().manual_seed(first + i) for i in range(len(prompts))]
        call = {"num_inference_steps": num_inference_steps, name: guidance, "generator": seeds, "output_type": "pt"}
        pictures.append(pipe(prompts, **call).images.float().cpu())
    return torch.cat(pictures)


def measure(pictures: torch.Tensor, names: list[str], icons: torch.Tensor) -> dict[str, float]:
    """Compare pictures `[48, 3, 128, 128]` in [0, 1] with all icons `[icons, 3, 256, 256]` uint8."""
    right = torch.tensor([names.index(prompt) for prompt in PROMPTS])
    error = (pictures - F.avg_pool2d(icons[right].float() / 255, 2)).square().mean((1, 2, 3))
    small = torch.cat([F.avg_pool2d(part.float() / 255, 4).flatten(1) for part in icons.split(64)])
    order = torch.cdist(F.avg_pool2d(pictures, 2).flatten(1), small).argsort(1)
    hits = order == right[:, None]
    return {
        "psnr_db": round((-10 * error.log10()).mean().item(), 2),
        "top1": round(hits[:, :1].any(1).float().mean().item(), 3),
        "top5": round(hits[:, :5].any(1).float().mean().item(), 3),
    }


def sheet(pictures: torch.Tensor, columns: int = 8) -> Image.Image:
    """Lay out pictures `[48, 3, 128, 128]` in rows, each picture above its prompt."""
    cell_width, cell_height = 136, 152
    page = Image.new("RGB", (columns * cell_width, -(-len(pictures) // columns) * cell_height), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(13)
    for i, (picture, prompt) in enumerate(zip(pictures, PROMPTS, strict=True)):
        x, y = i % columns * cell_width, i // columns * cell_height
        pixels = (picture * 255).round().byte().permute(1, 2, 0).numpy()
        page.paste(Image.fromarray(pixels), (x + 4, y + 2))
        pen.text((x + cell_width // 2, y + 132), prompt.replace("-", " "), "black", font, anchor="ma")
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("icons", type=Path, help="the npz of rasterise.py")
    parser.add_argument("teacher", help=f"{', '.join(TEACHERS)}, or the folder of a pipeline")
    parser.add_argument("out", type=Path, help="the PNG to write")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--num-inference-steps", type=int, default=28)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--batch", type=int, default=12)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()

    folder = Path(args.teacher)
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder) if folder.is_dir() else load_teacher(args.teacher)
    pipe.to(args.device).set_progress_bar_config(disable=True)
    steps = args.num_inference_steps
    pictures = generate(pipe, steps, args.guidance, args.batch)
    names, icons = load_icons(args.icons)
    figures = measure(pictures, names, icons)
    figures |= {"prompts": len(PROMPTS), "icons": len(names), "steps": steps, "guidance": args.guidance}
    figures["parameters"] = sum(
        model.num_parameters() for model in pipe.components.values() if isinstance(model, torch.nn.Module)
    )
    figures["device"] = torch.cuda.get_device_name() if args.device.startswith("cuda") else platform.machine() + " CPU"
    figures |= {"torch": torch.__version__, "diffusers": diffusers.__version__}
    page = sheet(pictures).quantize(256, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    page.save(args.out, optimize=True)
    print(json.dumps(figures))
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
