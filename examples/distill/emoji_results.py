"""Distil the emoji teachers to every processor in a given time, and compare each student before and after.

    python examples/distill/emoji_results.py runs/results --minutes 25 --icons emoji.npz      # one H200
    python examples/distill/emoji_results.py runs/toy --minutes 1 --teachers nano --students clear,hedgehog --toy
    python examples/distill/emoji_results.py runs/more --steps 1500 --start runs/results/adapters   # goes on

Writes OUT/results.json, OUT/results.md and OUT/adapters/TEACHER-STUDENT (adapters of at most 2 MB). A second run trains
the students that are missing. examples/emoji/rasterise.py makes the icons; without them the teacher draws the data.
"""

import argparse
import json
import shutil
import time
from pathlib import Path

from vision_attn.demo import load_teacher  # before diffusers: it repairs torchvision

# isort: split
import diffusers
import torch
import torch.nn.functional as F
from PIL import Image

from vision_attn.conversion.conversion import load
from vision_attn.distill.cache import write_cache
from vision_attn.distill.config import (
    Config,
    DataConfig,
    EvalConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    StudentConfig,
)
from vision_attn.distill.evaluate import Evaluation, read_truth
from vision_attn.distill.images import generate, read_prompts
from vision_attn.distill.loop import train
from vision_attn.distill.student import make_student

STUDENTS = {  # processor, fields, where the projections start
    "clear": ("Clear", {"radius": 8}, "inherited"),
    "clear_all": ("Clear", {"radius": 8}, "inherited"),  # trains all four projections
    "clear_pooled": ("Clear", {"radius": 4, "pool": 4}, "inherited"),
    "neighborhood": ("Neighborhood", {"kernel_size": 13}, "inherited"),
    "hilo": ("HiLo", {"window_size": 2, "alpha": 0.5}, "inherited"),
    "agent": ("Agent", {"num_agents": 64}, "inherited"),
    "linear_local": ("LinearLocal", {"window_size": 8}, "inherited"),
    "hedgehog": ("LinFusion", {"mid_dim": -1, "feature_map": "hedgehog"}, "inherited"),
    "linfusion": ("LinFusion", {"mid_dim": 16}, "inherited"),
    "linfusion_random": ("LinFusion", {"mid_dim": 16}, "random"),  # the authors' start, for the steps of 'linfusion'
    "rala": ("RALA", {}, "inherited"),
}
KNOWN = "red apple,octopus,rocket,house,alarm clock,pizza,cat face,sunflower,penguin,snail,key,robot"
MEGABYTES = 2


def settings(args, teacher: str, student: str, steps: int, minutes: float | None, start: Path | None = None) -> Config:
    processor, fields, init = STUDENTS[student]
    all_four = teacher == "unet" or init == "random" or student == "clear_all"  # 2.5 MB in a FLUX of this size
    data = args.out / "data" / teacher
    return Config(
        model=ModelConfig(f"emoji:{teacher}"),
        student=StudentConfig(
            processor,
            fields,
            min_tokens=256,  # the smaller grids of the UNet stay dense
            init=init,
            projections=["q", "k", "v", "out"] if all_four else ["q", "k"],
            adapter=None if start is None else str(start),
        ),
        data=DataConfig(
            cache=data / "cache",
            images=data / "images",
            prompts=args.prompts,
            sizes=[(args.pixels, args.pixels)],
            native=(args.native, args.native) if args.native and teacher != "unet" else None,
            batch_size=args.batch,
            num_inference_steps=1 if args.toy else 0,
        ),
        loss=LossConfig(task=args.task, attention=args.attention),
        optimizer=OptimizerConfig(learning_rate=args.rate, warmup=20, ema=0.99, schedule=args.schedule),
        run=RunConfig(
            args.out / "runs" / f"{teacher}-{student}",
            steps=steps,
            minutes=minutes,
            save_every=0,
            save_dtype="float16",
            sheet_inference_steps=2 if args.toy else 20,
            precision=args.precision or ("bf16" if torch.cuda.is_available() else "no"),
        ),
        eval=EvalConfig(
            count=args.count,
            truth=args.icons,
            num_inference_steps=2 if args.toy else 0,
            prompts=args.out / "known.txt",
        ),
    )


def make_data(args, config: Config, pipe) -> None:
    """Write the icons as images with captions, or let the teacher draw; then write the cache."""
    folder = config.data.images
    if args.icons and not folder.exists():
        part = folder.with_suffix(".part")
        part.mkdir(parents=True, exist_ok=True)
        names, icons = read_truth(args.icons)
        for i, (name, icon) in enumerate(zip(names, icons, strict=True)):
            small = F.interpolate(icon[None].float(), (args.pixels, args.pixels), mode="area")[0].round().byte()
            Image.fromarray(small.permute(1, 2, 0).numpy()).save(part / f"{i:05d}.png")
            (part / f"{i:05d}.txt").write_text(name.replace("-", " "))
        part.rename(folder)
    elif not args.icons:
        generate(config, pipe=pipe)
    write_cache(config, pipe=pipe)


def result_of(args, teacher: str, student: str, minutes: float, done: dict) -> dict:
    """Measure a student, train it and measure it again."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    equal = done.get(f"{teacher}-linfusion", {}).get("steps") if student == "linfusion_random" else None
    steps = equal or (args.steps or 1_000_000)
    start = args.start / f"{teacher}-{student}" if args.start else None
    limit = None if equal or args.steps else minutes
    config = settings(args, teacher, student, steps, limit)
    pipe = load_teacher(teacher).to(device)
    pipe.set_progress_bar_config(disable=True)
    make_data(args, config, pipe)
    evaluation = Evaluation(config, pipe)
    reference = evaluation.draw(f"{teacher} teacher")
    torch.manual_seed(config.run.seed)
    untrained = make_student(config, pipe)
    before = evaluation.compare(evaluation.draw(f"{student} before"), reference)
    untrained.conversion.revert()
    shutil.rmtree(config.run.out, ignore_errors=True)
    began = time.perf_counter()
    adapter = train(settings(args, teacher, student, steps, limit, start))
    seconds = time.perf_counter() - began
    fresh = load_teacher(teacher).to(device)
    load(fresh, adapter)
    trained = Evaluation(config, fresh)
    after = trained.compare(trained.draw(f"{student} after"), reference)
    lines = (config.run.out / "metrics.jsonl").read_text().splitlines()
    size = sum(path.stat().st_size for path in adapter.iterdir()) / 1e6
    if size <= MEGABYTES:
        shutil.copytree(adapter, args.out / "adapters" / f"{teacher}-{student}", dirs_exist_ok=True)
    return {
        "teacher": evaluation.describe(reference),
        "before": before,
        "after": after,
        "steps": json.loads(lines[-1])["step"],
        "seconds": round(seconds, 1),
        "megabytes": round(size, 3),
        "spec": str(config.student.spec()),
        "init": config.student.init,
        "start": None if start is None else str(start),
        "batch": args.batch,
        "pixels": args.pixels,
        "losses": {name: getattr(config.loss, name) for name in ("task", "prediction", "attention")},
        "rate": args.rate,
        "schedule": args.schedule,
        "device": torch.cuda.get_device_name() if device == "cuda" else "CPU",
    }


def table(results: dict) -> str:
    """Return the results as Markdown."""
    keys = ("kd_error_mean", "psnr_db", "kid_pixels_x1000", "retrieval_top1", "truth_psnr_db", "copies")
    rows = [f"| student | steps | {' | '.join(keys)} |", "|---" * (len(keys) + 2) + "|"]
    for name, result in results.items():
        cells = [
            f"{result['before'][key]:.3g} -> {result['after'][key]:.3g}" if key in result["after"] else ""
            for key in keys
        ]
        rows.append(f"| {name} | {result['steps']} | {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=25, help="of training, for all students together")
    parser.add_argument("--steps", type=int, help="updates of each student, instead of a time")
    parser.add_argument("--icons", type=Path, help="the npz of examples/emoji/rasterise.py: the data and the truth")
    parser.add_argument("--prompts", type=Path, default=Path(__file__).parent / "emoji_prompts.txt")
    parser.add_argument("--teachers", default="base,unet")
    parser.add_argument("--students", default=",".join(STUDENTS))
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=5e-4)
    parser.add_argument("--schedule", default="constant", choices=("constant", "cosine", "linear"))
    parser.add_argument("--task", type=float, default=1.0, help="weight of the error to the data")
    parser.add_argument("--attention", type=float, default=0.5, help="weight of the error of attention outputs")
    parser.add_argument("--precision", choices=("bf16", "no"), help="bf16 on a GPU by default; a CPU needs AMX for it")
    parser.add_argument("--start", type=Path, help="folder of the adapters TEACHER-STUDENT to start from")
    parser.add_argument("--count", type=int, default=12, help="prompts to draw")
    parser.add_argument("--pixels", type=int, default=128)
    parser.add_argument("--native", type=int, help="side in pixels that the positions of a FLUX are scaled into")
    parser.add_argument("--toy", action="store_true", help="few denoising steps at a small size, to see that it runs")
    args = parser.parse_args()
    if args.toy:
        args.pixels, args.batch, args.count = 64, 2, 2
    diffusers.utils.logging.disable_progress_bar()
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "known.txt").write_text("\n".join(KNOWN.split(",")) + "\n")
    read_prompts(args.prompts, "--prompts")
    path = args.out / "results.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    pairs = [(t, s) for t in args.teachers.split(",") for s in args.students.split(",")]
    minutes = args.minutes / len(pairs)
    for teacher, student in pairs:
        if f"{teacher}-{student}" in results:
            continue
        results[f"{teacher}-{student}"] = result_of(args, teacher, student, minutes, results)
        path.with_suffix(".part").write_text(json.dumps(results, indent=2) + "\n")
        path.with_suffix(".part").replace(path)
        (args.out / "results.md").write_text(table(results))
    print(table(results))


if __name__ == "__main__":
    main()
