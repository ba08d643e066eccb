"""Distil the emoji teachers to every processor in a given time, and compare each student before and after.

    python examples/distill/emoji_results.py runs/results --minutes 25 --icons emoji.npz      # one H200
    python examples/distill/emoji_results.py runs/toy --minutes 1 --teachers nano --students clear,hedgehog --toy
    python examples/distill/emoji_results.py runs/more --steps 1500 --start runs/results/adapters   # goes on
    python examples/distill/emoji_results.py runs/recipes --recipes examples/distill/recipes.yaml --jobs 16

Writes OUT/results.json, OUT/results.md and OUT/adapters/TEACHER-STUDENT (adapters of at most 2 MB). A second run trains
the students that are missing. examples/emoji/rasterise.py makes the icons; without them the teacher draws the data.
With --recipes the students are those of a file, each with settings of its own. --jobs trains several at a time, on all
GPUs in turn.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Lock

from vision_attn.demo import load_teacher  # before diffusers: it repairs torchvision

# isort: split
import diffusers
import torch
import torch.nn.functional as F
import yaml
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
from vision_attn.distill.curve import CURVE
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
    "multipole": ("Multipole", {}, "inherited"),
    "halo": ("Halo", {"block": 8, "halo": 3}, "inherited"),
    "inline": ("InLine", {}, "inherited"),
    "super_token": ("SuperToken", {"size": 2}, "inherited"),
    "moh": ("MoH", {"share": 0.75}, "inherited"),
}
KNOWN = "red apple,octopus,rocket,house,alarm clock,pizza,cat face,sunflower,penguin,snail,key,robot"
MEGABYTES = 2


def settings(args, teacher: str, student: str, steps: int, minutes: float | None, start: Path | None = None) -> Config:
    recipe = dict(args.known[student]) if args.recipes else {}
    own = recipe.get("student", {})
    processor, fields, init = (own["processor"], own.get("fields", {}), "inherited") if recipe else STUDENTS[student]
    all_four = teacher == "unet" or init == "random" or student == "clear_all"  # 2.5 MB in a FLUX of this size
    data = args.out / "data" / teacher
    config = Config(
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
    stages = recipe.pop("stages", [])
    recipe.pop("about", None)
    return replace(config.changed(recipe, student), stages=stages)


def scaled(recipe: dict, factor: float) -> dict:
    """Return a recipe of which each stage has more or fewer steps; it is measured as often."""
    found = dict(recipe)
    if "stages" in recipe:
        found["stages"] = [scaled(stage, factor) for stage in recipe["stages"]]
    for section in ("run", "transfer"):
        counts = {name: count for name, count in recipe.get(section, {}).items() if name in ("steps", "measure_every")}
        if counts:
            found[section] = {**recipe[section], **{name: max(round(factor * n), 1) for name, n in counts.items()}}
    return found


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
    if args.row is None:  # else who started this process has made the data
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
    stages = config.each_stage()
    lines = [json.loads(stage_lines(stage, "metrics.jsonl")[-1]) for stage in stages]
    size = sum(path.stat().st_size for path in adapter.iterdir()) / 1e6
    if size <= MEGABYTES:
        shutil.copytree(adapter, args.out / "adapters" / f"{teacher}-{student}", dirs_exist_ok=True)
    return {
        "teacher": evaluation.describe(reference),
        "before": before,
        "after": after,
        "steps": sum(line["step"] for line in lines),
        "curve": curve(stages),
        "recipe": args.known[student] if args.recipes else None,
        "seconds": round(seconds, 1),
        "megabytes": round(size, 3),
        "spec": spec_of(config),
        "init": config.student.init,
        "start": None if start is None else str(start),
        "batch": config.data.batch_size,
        "pixels": args.pixels,
        "losses": {name: getattr(config.loss, name) for name in ("task", "prediction", "attention")},
        "rate": config.optimizer.learning_rate,
        "schedule": config.optimizer.schedule,
        "device": torch.cuda.get_device_name() if device == "cuda" else "CPU",
    }


def stage_lines(stage: Config, name: str) -> list[str]:
    """Return the lines that a stage wrote into one of its files."""
    path = stage.run.out / name
    return path.read_text().splitlines() if path.exists() else []


def curve(stages: list[Config]) -> list[list[float]]:
    """Return [step, mean KD error] of all stages; the steps go on from stage to stage."""
    points, done = [], 0
    for stage in stages:
        found = [json.loads(line) for line in stage_lines(stage, CURVE)]
        points += [[done + point["step"], point["kd_error_mean"]] for point in found]
        done += json.loads(stage_lines(stage, "metrics.jsonl")[-1])["step"]
    return points


def spec_of(config: Config) -> str:
    """Return what a student attends with; other specs of some layers follow."""
    spec = config.student.spec()
    if not isinstance(spec, dict):
        return str(spec)
    *others, own = spec.items()
    return "; ".join([str(own[1]), *(f"{other} on {pattern}" for pattern, other in others)])


def in_processes(args, pairs: list[tuple[str, str]], minutes: float, keep) -> None:
    """Train `args.jobs` students at a time, each in a process of its own, and keep each result when it is there."""
    listed = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    gpus = listed.split(",") if listed else [str(n) for n in range(max(torch.cuda.device_count(), 1))]
    rows = args.out / "rows"
    rows.mkdir(exist_ok=True)
    for teacher in dict.fromkeys(teacher for teacher, _ in pairs):
        student = next(student for of, student in pairs if of == teacher)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        make_data(args, settings(args, teacher, student, 1, None), load_teacher(teacher).to(device))

    def one(number: int) -> None:
        teacher, student = pairs[number]
        row, log = (rows / f"{teacher}-{student}.{kind}" for kind in ("json", "log"))
        command = [sys.executable, __file__, *sys.argv[1:], "--teachers", teacher, "--students", student]
        place = {"CUDA_VISIBLE_DEVICES": gpus[number % len(gpus)]} if torch.cuda.is_available() else {}
        with log.open("w") as written:
            done = subprocess.run(
                [*command, "--jobs", "1", "--minutes", str(minutes), "--row", str(row)],
                env={**os.environ, **place},
                stderr=written,
                check=False,
                stdout=written,
            )
        if done.returncode:
            print(f"{teacher}-{student} failed: {log}", file=sys.stderr)
        else:
            keep(f"{teacher}-{student}", json.loads(row.read_text()))

    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(one, range(len(pairs))))


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


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    """Return the arguments; `known` are all students by name, and `students` those to train."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument(
        "--minutes", type=float, default=25, help="of training, of all students; with --recipes of each"
    )
    parser.add_argument("--steps", type=int, help="updates of each student, instead of a time")
    parser.add_argument("--icons", type=Path, help="the npz of examples/emoji/rasterise.py: the data and the truth")
    parser.add_argument("--prompts", type=Path, default=Path(__file__).parent / "emoji_prompts.txt")
    parser.add_argument("--teachers", default="base,unet")
    parser.add_argument("--students", help="names, with commas between them; all by default")
    parser.add_argument("--recipes", type=Path, help="YAML of students with settings of their own")
    parser.add_argument("--scale", type=float, default=1, help="factor on the steps that recipes name")
    parser.add_argument("--jobs", type=int, default=1, help="students that are trained at a time")
    parser.add_argument("--row", type=Path, help=argparse.SUPPRESS)  # where a process of --jobs writes its result
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
    args = parser.parse_args(given)
    if args.toy:
        args.pixels, args.batch, args.count = 64, 2, 2
    args.known = STUDENTS
    if args.recipes:
        read = yaml.safe_load(args.recipes.read_text())
        args.known = {name: scaled(recipe, args.scale) for name, recipe in read.items() if not name.startswith("_")}
    args.students = args.students.split(",") if args.students else list(args.known)
    if unknown := [student for student in args.students if student not in args.known]:
        parser.error(f"--students: {', '.join(unknown)} not among {', '.join(args.known)}")
    return args


def main() -> None:
    args = arguments()
    diffusers.utils.logging.disable_progress_bar()
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "known.txt").write_text("\n".join(KNOWN.split(",")) + "\n")
    read_prompts(args.prompts, "--prompts")
    path = args.out / "results.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    pairs = [(t, s) for t in args.teachers.split(",") for s in args.students]
    missing = [pair for pair in pairs if "-".join(pair) not in results]
    minutes = args.minutes if args.recipes else args.minutes / len(pairs)
    kept = Lock()

    def keep(name: str, result: dict) -> None:
        with kept:
            results[name] = result
            path.with_suffix(".part").write_text(json.dumps(results, indent=2) + "\n")
            path.with_suffix(".part").replace(path)
            (args.out / "results.md").write_text(table(results))

    if args.row is not None:
        args.row.write_text(json.dumps(result_of(args, *missing[0], minutes, results)))
        return
    if args.jobs > 1:
        in_processes(args, missing, minutes, keep)
    else:
        for teacher, student in missing:
            keep(f"{teacher}-{student}", result_of(args, teacher, student, minutes, results))
    print(table(results))


if __name__ == "__main__":
    main()
