"""Small settings, images and icons for the tests of distillation: the nano teacher at 32 px, 64 tokens."""

import dataclasses
import io
import json

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from vision_attn.distill.reading import read_config

WORDS = ("red apple", "octopus", "rocket", "house", "penguin", "snail")


def write_images(folder, sizes=((32, 32),), count=6):
    """Write coloured blocks with captions."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for i in range(count):
        height, width = sizes[i % len(sizes)]
        blocks = rng.integers(0, 255, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(blocks).resize((width, height), Image.Resampling.NEAREST).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(WORDS[i % len(WORDS)])


def blob(side=128, seed=0):
    """A picture of one object on white."""
    generator = torch.Generator().manual_seed(seed)
    texture = F.interpolate(torch.rand(1, 3, 16, 16, generator=generator), side, mode="bicubic")[0].clamp(0, 1)
    axis = torch.linspace(-1, 1, side)
    inside = (axis[:, None] ** 2 + axis**2 < 0.3).float()
    return inside * texture + 1 - inside


def write_truth(path, names, side=64):
    """Write icons as rasterise.py does."""
    files = []
    for i in range(len(names)):
        buffer = io.BytesIO()
        Image.fromarray((blob(side, i) * 255).byte().permute(1, 2, 0).numpy()).save(buffer, "WEBP", lossless=True)
        files.append(buffer.getvalue())
    data = np.frombuffer(b"".join(files), np.uint8)
    np.savez(path, data=data, len=np.array([len(file) for file in files]), names=np.array(names))


def arguments(root, **settings):
    """Return settings as on the command line: `loss__task=0` is `--loss.task=0`."""
    values = {
        "model.base": "emoji:nano",
        "student.processor": "LinFusion",
        "student.fields": {"mid_dim": -1, "feature_map": "hedgehog"},
        "loss.task": 0,
        "data.cache": root / "cache",
        "data.images": root / "images",
        "data.sizes": [[32, 32]],
        "data.batch_size": 2,
        "optimizer.learning_rate": 1e-3,
        "run.out": root / "out",
        "run.steps": 4,
        "run.save_every": 2,
        "run.sheet_inference_steps": 1,
        "run.quiet": "true",
    } | {name.replace("__", "."): value for name, value in settings.items()}
    return [
        f"--{name}={json.dumps(value) if isinstance(value, (dict, list)) else value}" for name, value in values.items()
    ]


def settings(root, **changes):
    """Return the settings that `arguments` says."""
    return read_config(arguments(root, **changes), "test")


def with_run(config, **changes):
    """Return settings whose `run` is another."""
    return dataclasses.replace(config, run=dataclasses.replace(config.run, **changes))


def metrics(root):
    """Return the lines of `metrics.jsonl` without their times."""
    lines = [json.loads(line) for line in (root / "out" / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]
