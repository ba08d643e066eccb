"""Distil the two pretrained models of `vision-attn bench quality` without their data, in a given time.

    vision-attn bench quality --download --quick                                   # once: fetches the weights
    python examples/distill/real_weights.py runs/real --minutes 3 --workers 8      # one GPU
    vision-attn bench quality --adapters runs/real                                 # measures them, on other pictures

Each student learns its dense teacher's outputs, and those of the teacher's attention layers. All parameters of the
attention modules are trained. The UNet of height maps draws its own data. DINOv2 learns from pictures that are in no
evaluation: crops of the two photos of scikit-learn if it is installed (or of `--photos`), emoji that an embedded
teacher draws, and random discs and rectangles that occlude each other. Writes OUT/MODEL/STUDENT (an adapter and its
losses, when it is trained), OUT/results.json with all losses, and OUT/pictures.npy.

Papers: 'Learning to See by Looking at Noise' - https://arxiv.org/abs/2106.05963 (shapes that occlude each other)
"""

# ruff: noqa: D102

import argparse
import copy
import importlib.util
import itertools
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from vision_attn.bench.quality import dinov2, terrain
from vision_attn.bench.quality.contenders import DEFAULT, EVERY, Contender, folder_of
from vision_attn.bench.quality.weights import DINOV2, TERRAIN, default_folder, read_weights
from vision_attn.bench.workers import Workers
from vision_attn.demo import load_teacher
from vision_attn.distill.student import attention_outputs

STUDENTS = ("clear r16", DEFAULT.name, "linear local", "linfusion")
# learning rates of the host's weights and of the processor's own: what is near already must not be led away
RATES = {"multipole": (3e-5, 1e-3), "clear": (1e-4, 1e-3), "linear": (1e-4, 1e-3), "linfusion": (2e-4, 1e-3)}
PROMPTS = Path(__file__).parent / "emoji_prompts.txt"
PICTURES, PIXELS = 384, 518
RUN = "run.json"  # what a student's training was, beside its adapter


class Vision:
    """DINOv2: features of pictures."""

    host, least, batch = None, 0, 8

    def __init__(self, args, device):
        self.model = dinov2.build_backbone(dinov2.within(read_weights(DINOV2, args.files), "backbone.")).to(device)
        self.pictures = np.load(args.out / "pictures.npy", mmap_mode="r")
        self.scale = [torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (dinov2.MEAN, dinov2.STD)]

    def inputs(self, draw, device, held_out=False):
        first = len(self.pictures) - kept_out(len(self.pictures))
        among = (first, len(self.pictures)) if held_out else (0, first)
        chosen = torch.randint(*among, (self.batch,), generator=draw)
        x = torch.from_numpy(self.pictures[np.sort(chosen.numpy())]).to(device).permute(0, 3, 1, 2) / 255
        return ((x - self.scale[0]) / self.scale[1],)

    def run(self, model, inputs):
        return model.forward_features(*inputs)


class Maps:
    """The UNet of height maps: predictions of its own maps with noise of all levels, and of noise alone."""

    host, least, batch = terrain.HOST, terrain.MIN_TOKENS, 16

    def __init__(self, args, device):
        self.whole = terrain.Terrain(read_weights(TERRAIN, args.files)).to(device)
        self.model, self.dense = self.whole.unet, copy.deepcopy(self.whole)

    def inputs(self, draw, device, held_out=False):  # no noise is drawn twice
        noise = torch.randn(2, self.batch, 1, terrain.SIDE, terrain.SIDE, generator=draw).to(device)
        difficulty = torch.rand(self.batch, generator=draw).to(device)
        most, least = terrain.SIGMAS[0], terrain.SIGMAS[-1]
        highest = torch.full((self.batch,), most, device=device)
        with torch.no_grad():
            clean = self.dense(most * noise[0], highest, difficulty)
        level = torch.rand(self.batch, generator=draw).to(device)
        level[: self.batch // 2] = 1  # drawing begins, and ends, at the highest
        sigma = least * (most / least) ** level
        return clean * (level < 1).view(-1, 1, 1, 1) + noise[1] * sigma.view(-1, 1, 1, 1), sigma, difficulty

    def run(self, model, inputs):
        self.whole.unet = model
        return self.whole(*inputs)


MODELS = {"dinov2": Vision, "terrain": Maps}


def relative(a, b):
    """The squared error of each sample over its teacher's square, in the mean."""
    over = tuple(range(1, a.dim()))
    return ((a - b).square().sum(over) / b.square().sum(over).clamp(min=1e-12)).mean()


def losses_of(task, teacher, student, names, inputs):
    with torch.no_grad(), attention_outputs(teacher, names) as wanted:
        right = task.run(teacher, inputs)
    with attention_outputs(student, names) as found:
        own = task.run(student, inputs)
    layers = torch.stack([relative(found[name], wanted[name]) for name in names]).mean()
    return relative(own, right), layers


def distil(work):
    """Train one student; return its record."""
    args, name, contender = work
    device = torch.device(args.device)
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    torch.backends.cuda.enable_cudnn_sdp(False)  # its backward fails for short sequences
    task = MODELS[name](args, device)
    task.batch = args.batch or task.batch
    student = task.model
    teacher = copy.deepcopy(student)
    conversion = contender.put_into(student, host=task.host, min_tokens=task.least)
    with torch.no_grad():  # says which layers are not too small
        task.run(student, task.inputs(torch.Generator().manual_seed(0), device))
    layers = [row.name for row in conversion.layers if row.status == "rerouted"]
    own = {id(p) for p in conversion.parameters()}
    attention = [p for layer in layers for p in student.get_submodule(layer).parameters()]
    host = [p.requires_grad_(True) for p in attention if id(p) not in own]
    new = [p.requires_grad_(True) for p in attention if id(p) in own]
    rates = RATES[contender.name.split()[0]]
    groups = [dict(params=part, lr=rate, base=rate) for part, rate in zip((host, new), rates, strict=True) if part]
    optimizer = torch.optim.AdamW(groups, weight_decay=0)
    draw, record, step = torch.Generator().manual_seed(1), [], 0
    before = held_out(task, teacher, student, layers, device)
    began = time.perf_counter()
    while (done := max(step / args.steps, (time.perf_counter() - began) / (60 * args.minutes))) < 1:
        warm = min(1.0, (step + 1) / 20)
        for group in optimizer.param_groups:
            group["lr"] = group["base"] * warm * 0.5 * (1 + math.cos(math.pi * done))
        output, inner = losses_of(task, teacher, student, layers, task.inputs(draw, device))
        (output + 0.5 * inner).backward()
        norm = torch.nn.utils.clip_grad_norm_(host + new, 1.0)
        if not norm.isfinite():
            raise ArithmeticError(f"{name}, {contender.name}: the gradient of step {step} is not finite")
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if step % args.every == 0:
            record.append([step, output.item(), inner.item()])
    seconds = time.perf_counter() - began
    after = held_out(task, teacher, student, layers, device)
    folder = args.out / name / folder_of(contender.name)
    conversion.save(folder)
    about = dict(steps=step, batch=task.batch, seconds=seconds, rates=rates, trained=sum(p.numel() for p in host + new))
    row = dict(model=name, student=contender.name, **about, before=before, after=after, losses=record)
    (folder / RUN).write_text(json.dumps(row))  # the others may be stopped
    return row


def held_out(task, teacher, student, layers, device):
    """The losses on four batches that are not trained on: other noise, or pictures with the photo that is kept out."""
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        found = [losses_of(task, teacher, student, layers, task.inputs(draw, device, held_out=True)) for _ in range(4)]
    return dict(zip(("output", "attention"), torch.tensor(found).mean(0).tolist(), strict=True))


def make_pictures(args):
    """Write the pictures that DINOv2 learns from, `[pictures, side, side, 3]` bytes."""
    rng = np.random.default_rng(0)
    emoji, photos = drawn_emoji(args, min(96, args.pictures)), training_photos(args)
    made = np.empty((args.pictures, args.side, args.side, 3), np.uint8)
    learnt, kept = photos[: max(1, len(photos) - 1)], photos[-1:]
    for i in range(args.pictures):
        among = kept if i >= args.pictures - kept_out(args.pictures) else learnt
        back = crop(among[i // 2 % len(among)], args.side, rng) if among and i % 2 else shapes(args.side, rng)
        for _ in range(rng.integers(0, 5)):  # on half of the photos and shapes alike
            size = int(args.side * rng.uniform(0.15, 0.6))
            icon = emoji[rng.integers(len(emoji))].resize((size, size))
            mask = Image.fromarray((np.asarray(icon).min(2) < 245).astype(np.uint8) * 255)
            back.paste(icon, tuple(int(v) for v in rng.integers(-size // 4, args.side - size // 2, 2)), mask)
        made[i] = np.asarray(back)
    np.save(args.out / "pictures.npy", made)


def kept_out(pictures):
    """How many of the pictures are not learnt from: those with the last photo."""
    return max(1, pictures // 8)


def drawn_emoji(args, count):
    pipe = load_teacher(args.teacher).to(args.device)
    pipe.set_progress_bar_config(disable=True)
    prompts = PROMPTS.read_text().splitlines()[:: max(1, 1593 // count)][:count]
    batches = itertools.batched(prompts, 32) if hasattr(itertools, "batched") else [prompts]
    draw = torch.Generator().manual_seed(0)
    return [
        image for part in batches for image in pipe(list(part), generator=draw, num_inference_steps=args.draw).images
    ]


def training_photos(args):
    """Photos of a folder, or those of scikit-learn: none of them is measured on."""
    folder = args.photos
    if folder is None:
        spec = importlib.util.find_spec("sklearn")
        folder = Path(spec.origin).parent / "datasets" / "images" if spec and spec.origin else None
    paths = sorted(p for p in folder.glob("*") if p.suffix.lower() in (".jpg", ".jpeg", ".png")) if folder else []
    return [Image.open(path).convert("RGB") for path in paths]


def crop(photo, side, rng):
    edge = int(min(photo.size) * rng.uniform(0.3, 1))
    x, y = (int(rng.integers(0, length - edge + 1)) for length in photo.size)
    found = photo.crop((x, y, x + edge, y + edge)).resize((side, side), Image.Resampling.BICUBIC)
    return found.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else found


def shapes(side, rng):
    """Discs and rectangles that occlude each other, sizes by a power law, with a texture of noise."""
    image = Image.new("RGB", (side, side), tuple(int(v) for v in rng.integers(0, 255, 3)))
    pen = ImageDraw.Draw(image)
    for _ in range(250):
        radius = side * 0.02 / rng.uniform(0.05, 1)
        x, y = rng.uniform(0, side, 2)
        kind = pen.ellipse if rng.random() < 0.6 else pen.rectangle
        tall = radius * rng.uniform(0.4, 1)
        kind((x - radius, y - tall, x + radius, y + tall), fill=tuple(int(v) for v in rng.integers(0, 255, 3)))
    coarse = Image.fromarray(rng.integers(0, 255, (side // 8, side // 8, 3), dtype=np.uint8))
    return Image.blend(image, coarse.resize((side, side), Image.Resampling.BICUBIC), rng.uniform(0, 0.4))


def chosen(text):
    known = {contender.name: contender for contender in (*EVERY, DEFAULT)}
    names = [name.strip() for name in text.split(",")]
    if unknown := [name for name in names if name not in known or name.split()[0] not in RATES]:
        fitting = [name for name in known if name.split()[0] in RATES]
        raise SystemExit(f"unknown student {', '.join(unknown)}: known are {', '.join(fitting)}")
    return [Contender(name, known[name].spec) for name in names]


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=3, help="of each student")
    parser.add_argument("--steps", type=int, default=10**9, help="of each student, at most")
    parser.add_argument("--models", default="dinov2,terrain")
    parser.add_argument("--students", default=",".join(STUDENTS))
    parser.add_argument("--workers", type=int, default=1, help="students that learn side by side")
    parser.add_argument("--files", type=Path, default=default_folder(), help="folder of the weights")
    parser.add_argument("--photos", type=Path, help="folder of photos to learn from; scikit-learn's two by default")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, help="8 pictures and 16 maps by default")
    parser.add_argument("--pictures", type=int, default=PICTURES)
    parser.add_argument("--side", type=int, default=PIXELS, help="of the pictures, in pixels")
    parser.add_argument("--teacher", default="base", help="draws the emoji")
    parser.add_argument("--draw", type=int, default=12, help="steps of drawing them")
    parser.add_argument("--every", type=int, default=20, help="steps between records of the losses")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    models = args.models.split(",")
    if unknown := [model for model in models if model not in MODELS]:
        parser.error(f"--models: {', '.join(unknown)} not among {', '.join(MODELS)}")
    if "dinov2" in models and not (args.out / "pictures.npy").exists():
        make_pictures(args)
    work = [(args, model, student) for model in models for student in chosen(args.students)]
    with Workers(args.workers) as workers:
        rows = workers.map(distil, work)
    device = torch.cuda.get_device_name() if args.device.startswith("cuda") else args.device
    about = dict(device=device, torch=torch.__version__, workers=args.workers)
    every = [json.loads(path.read_text()) for path in sorted(args.out.glob(f"*/*/{RUN}"))]
    (args.out / "results.json").write_text(json.dumps(about | dict(rows=every), indent=1) + "\n")
    for row in rows:
        change = ", ".join(f"{key} {row['before'][key]:.3g} -> {row['after'][key]:.3g}" for key in row["before"])
        print(f"{row['model']}, {row['student']}: {row['steps']} steps in {row['seconds']:.0f} s: {change}")


if __name__ == "__main__":
    main()
