"""Draw emoji far above the teachers' 128 px, directly and from coarse to fine, with dense and distilled attention.

    python examples/distill/highres_results.py runs/highres --icons emoji.npz --sizes 512,1024
    python examples/distill/highres_results.py runs/highres --icons emoji.npz --attention clear     # on a CPU
    python examples/distill/highres_results.py runs/eight --icons emoji.npz --sizes 1024 --attention dense,multipole

Writes OUT/results.json, OUT/results.md and the pictures. A second run adds the rows that are missing. Attention is
'dense'; the name of a teacher's adapter, 'clear' for the folder TEACHER-clear of --adapters; or a processor that is not
trained, such as 'multipole' or 'clear:radius=8', which draws the levels above the first. PSNR is that to the icon, and
that to the pictures of the dense row of the same way and size.
"""

import argparse
import json
import time
from pathlib import Path

from vision_attn.demo import load_teacher, shipped_adapters  # before diffusers: it repairs torchvision

# isort: split
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file

from vision_attn.conversion.conversion import convert, load
from vision_attn.distill.evaluate import read_truth
from vision_attn.distill.measures import agreement, copies
from vision_attn.highres.levels import Options, generate_highres
from vision_attn.processors import spec_of_text

ADAPTERS = ("clear", "hedgehog")  # names of adapters; a teacher that has none of that name is left out
PROMPTS = "red apple,rocket,alarm clock,octopus"


def draw(pipe, way: str, prompt: str, side: int, args):
    """Return one picture as a tensor `[3, side, side]` in [0, 1]."""
    noise = torch.Generator().manual_seed(args.seed)
    if way == "direct":
        call = dict(num_inference_steps=args.num_inference_steps, generator=noise, output_type="pt")
        return pipe(prompt, height=side, width=side, **call).images[0].float().cpu()
    untrained = {} if args.spec is None else {"spec": args.spec}
    options = Options(
        num_inference_steps=args.num_inference_steps,
        level_inference_steps=args.level_inference_steps,
        strength=(0.35, 0.25, 0.2),
    )
    image = generate_highres(pipe, prompt, side, side, options=options, generator=noise, **untrained).images[0]
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255


def row(teacher: str, attention: str, way: str, side: int, args) -> dict:
    """Draw all prompts in one way and measure the pictures."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe = load_teacher(teacher).to(device)
    pipe.set_progress_bar_config(disable=True)
    adapter, args.spec = adapter_of(teacher, attention, args), None
    if adapter is not None:
        load(pipe, adapter)
    elif attention != "dense" and way == "levels":
        args.spec = spec_of_text(attention)
    elif attention != "dense":
        convert(pipe, spec_of_text(attention))
    names, icons = read_truth(args.icons)
    prompts = args.prompts.split(",")
    if device == "cuda":
        draw(pipe, way, prompts[0], side, args)  # compiles the kernels
        torch.cuda.reset_peak_memory_stats()
    start, pictures = time.perf_counter(), [draw(pipe, way, prompt, side, args) for prompt in prompts]
    seconds = time.perf_counter() - start
    place = place_of(args.out, teacher, attention, way, side)
    save_file({"pictures": torch.stack(pictures)}, place.with_suffix(".safetensors"))
    dense = place_of(args.out, teacher, "dense", way, side).with_suffix(".safetensors")
    reference = load_file(dense)["pictures"] if attention != "dense" and dense.exists() else None
    sheet = torch.cat(list(F.interpolate(torch.stack(pictures), (256, 256), mode="area")), 2)
    Image.fromarray((sheet.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()).save(place)
    right = [names.index("-".join(prompt.split())) for prompt in prompts]
    truth = F.interpolate(icons[right].float() / 255, (side, side), mode="bicubic", antialias=True).clamp(0, 1)
    return {
        "teacher": teacher,
        "attention": attention,
        "way": way,
        "pixels": side,
        "copies": sum(copies(picture) for picture in pictures) / len(pictures),
        "truth_copies": sum(copies(icon) for icon in truth) / len(truth),
        "truth_psnr_db": agreement(torch.stack(pictures), truth)["psnr_db"],
        "dense_psnr_db": None if reference is None else agreement(torch.stack(pictures), reference)["psnr_db"],
        "seconds": seconds / len(prompts),
        "peak_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else None,
        "device": torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads",
        "prompts": prompts,
        "steps": [args.num_inference_steps, args.level_inference_steps],
    }


def adapter_of(teacher: str, attention: str, args) -> Path | None:
    """Return the folder of a teacher's adapter of that name, None if there is none."""
    folder = (args.adapters or shipped_adapters(teacher)[0].parent) / f"{teacher}-{attention}"
    return folder if folder.is_dir() else None


def place_of(out: Path, teacher: str, attention: str, way: str, side: int) -> Path:
    """Return where the sheet of a row lies."""
    return out / f"{teacher}-{attention.replace(':', '_')}-{way}-{side}.png"


def table(rows: list[dict]) -> str:
    """Return the results as Markdown."""
    lines = ["| teacher | attention | way | px | copies | PSNR to the icon | to dense | s |", "|---" * 8 + "|"]
    for r in rows:
        cells = (r["teacher"], r["attention"], r["way"], r["pixels"], f"{r['copies']:.2f}")
        dense = "" if r["dense_psnr_db"] is None else f"{r['dense_psnr_db']:.1f} dB"
        lines.append(f"| {' | '.join(map(str, cells))} | {r['truth_psnr_db']:.1f} dB | {dense} | {r['seconds']:.1f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--icons", type=Path, required=True, help="the npz of examples/emoji/rasterise.py")
    parser.add_argument("--teachers", default="base,unet")
    parser.add_argument("--attention", default="dense,clear,hedgehog", help="with commas between them")
    parser.add_argument("--ways", default="direct,levels")
    parser.add_argument("--sizes", default="512")
    parser.add_argument("--prompts", default=PROMPTS)
    parser.add_argument("--adapters", type=Path, help="folder of the adapters TEACHER-NAME; the package's by default")
    parser.add_argument("--num-inference-steps", type=int, default=10, help="of the first level, or of all")
    parser.add_argument("--level-inference-steps", type=int, default=3, help="of each level above the first")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "results.json"
    rows = json.loads(path.read_text()) if path.exists() else []
    for side in map(int, args.sizes.split(",")):
        for teacher in args.teachers.split(","):
            for attention in args.attention.split(","):
                if attention in ADAPTERS and adapter_of(teacher, attention, args) is None:
                    continue
                for way in args.ways.split(","):
                    wanted = (teacher, attention, way, side)
                    if wanted in [(r["teacher"], r["attention"], r["way"], r["pixels"]) for r in rows]:
                        continue
                    rows.append(row(*wanted, args))
                    path.with_suffix(".part").write_text(json.dumps(rows, indent=2) + "\n")
                    path.with_suffix(".part").replace(path)
                    (args.out / "results.md").write_text(table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
