"""`distill generate`: images that the teacher draws itself, from a list of prompts, as CLEAR was trained on.

Image i is drawn from seed `run.seed + i`, alone or in a batch, so a run that was stopped goes on where it was. An image
whose caption is no longer line i of the prompts is drawn again.
"""

from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from vision_attn.distill.config import Config
from vision_attn.distill.denoiser import load_pipeline


def read_prompts(path: Path, setting: str) -> list[str]:
    """Read prompts, one a line; empty lines are left out.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it has no prompts.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{setting}: {path} does not exist")
    prompts = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    if not prompts:
        raise ValueError(f"{setting}: {path} has no prompts")
    return prompts


def generate(config: Config, *, device: str = "cpu", pipe: Any = None, rank: int = 0, world: int = 1) -> dict[str, int]:
    """Draw one image per prompt into the folder `data.images`, each with its caption.

    Args:
        config: `model`, `data` and `run.seed` are used; `data.sizes` take turns.
        device: Where to draw.
        pipe: The pipeline, if it is loaded already.
        rank: Of this process, each of which draws its share.
        world: Number of processes.

    Returns:
        How many images were drawn, and how many there were before.
    """
    data = config.data
    if data.images is None or data.prompts is None:
        raise ValueError("data.images and data.prompts are needed: where to draw, and what")
    prompts = read_prompts(data.prompts, "data.prompts")
    pipe = load_pipeline(config.model).to(device) if pipe is None else pipe
    pipe.set_progress_bar_config(disable=True)
    data.images.mkdir(parents=True, exist_ok=True)
    own = range(rank, len(prompts), world)
    missing = [i for i in own if not _is_drawn(_path(data.images, i), prompts[i])]
    steps = {"num_inference_steps": data.steps} if data.steps else {}
    with tqdm(total=len(own), initial=len(own) - len(missing), unit="image", disable=config.run.quiet) as bar:
        for turn, size in enumerate(data.sizes):
            mine = [i for i in missing if i % len(data.sizes) == turn]
            for first in range(0, len(mine), data.batch_size):
                part = mine[first : first + data.batch_size]
                seeds = [torch.Generator().manual_seed(config.run.seed + i) for i in part]
                chosen = [prompts[i] for i in part]
                images = pipe(chosen, height=size[0], width=size[1], generator=seeds, **steps).images
                for i, prompt, image in zip(part, chosen, images, strict=True):
                    path = _path(data.images, i)
                    path.unlink(missing_ok=True)  # an old image never lies beside a new caption
                    path.with_suffix(".txt").write_text(prompt + "\n")
                    image.save(path.with_suffix(".part"), "PNG")
                    path.with_suffix(".part").replace(path)
                bar.update(len(part))
    return {"drawn": len(missing), "before": len(own) - len(missing)}


def _is_drawn(path: Path, prompt: str) -> bool:
    """Whether there is an image, and it was drawn from this prompt."""
    caption = path.with_suffix(".txt")
    return path.exists() and caption.exists() and caption.read_text().strip() == prompt


def _path(folder: Path, i: int) -> Path:
    return folder / f"{i:08d}.png"
