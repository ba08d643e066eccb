"""The command `distill`: what to do, and the settings to do it with."""

import dataclasses
import json
import logging
import sys
from collections.abc import Sequence
from typing import Any

import torch

from vision_attn.distill.config import Config, read_config

ACTIONS = ("train", "generate", "cache", "eval")
_USAGE = f"""usage: vision-attn distill [{" | ".join(ACTIONS)}] --config FILE [--section.key VALUE ...] [--print-config]

  generate  images that the teacher draws from data.prompts into data.images
  cache     latents and prompt embeddings of data.images into data.cache
  train     the student into run.out; on several GPUs: accelerate launch -m vision_attn.distill --config FILE
  eval      the adapter beside the teacher, into run.out/eval.json

All keys: vision-attn distill train --help
"""


def main(arguments: Sequence[str]) -> int:
    """Run the command; the exit status is 2 for bad input and 1 for training that failed, with one line that says why.

    Args:
        arguments: What follows 'distill': an action, 'train' if there is none, and settings.
    """
    rest = list(arguments)
    if not rest or rest in (["--help"], ["-h"]):
        print(_USAGE, end="")
        return 0 if rest else 2
    action = rest.pop(0) if not rest[0].startswith("-") else "train"
    try:
        if action not in ACTIONS:
            raise ValueError(f"{action!r} is none of {', '.join(ACTIONS)}")
        config = read_config(rest, f"vision-attn distill {action}")
        if isinstance(config, str):
            print(config, end="")
            return 0
        print(json.dumps(run(action, config), indent=2))
    except (ValueError, TypeError, OSError) as error:
        print(f"vision-attn distill: {error}", file=sys.stderr)
        return 2
    except ArithmeticError as error:
        print(f"vision-attn distill: {error}", file=sys.stderr)
        return 1
    return 0


def run(action: str, config: Config) -> dict[str, Any]:
    """Do one thing and return what there is to say of it."""
    from vision_attn._compat import ensure_torchvision  # noqa: PLC0415, before diffusers

    ensure_torchvision()
    import diffusers  # noqa: PLC0415, optional

    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    logging.basicConfig(level=logging.WARNING)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if action == "cache":
        from vision_attn.distill.cache import write_cache  # noqa: PLC0415, each action imports its own

        return write_cache(config, device=device)
    if action == "generate":
        from accelerate import PartialState  # noqa: PLC0415

        from vision_attn.distill.images import generate  # noqa: PLC0415

        state = PartialState()
        return generate(config, device=str(state.device), rank=state.process_index, world=state.num_processes)
    if action == "train":
        from vision_attn.distill.loop import train  # noqa: PLC0415

        return {"adapter": str(train(config))}
    return _evaluate(config, device)


def _evaluate(config: Config, device: str) -> dict[str, Any]:
    """Compare the adapter with its teacher."""
    from vision_attn.conversion.conversion import load  # noqa: PLC0415
    from vision_attn.distill.denoiser import load_pipeline  # noqa: PLC0415
    from vision_attn.distill.evaluate import Evaluation  # noqa: PLC0415

    adapter = config.eval.adapter or config.run.out / "adapter"
    if not adapter.exists():
        raise FileNotFoundError(f"eval.adapter: {adapter} does not exist: train first")
    pipe = load_pipeline(config.model).to(device)
    evaluation = Evaluation(config, pipe)
    teacher = evaluation.draw("teacher")
    load(pipe, adapter)
    student = evaluation.draw("student")
    report = {
        "adapter": str(adapter),
        "prompts": len(evaluation.prompts),
        "size": list(evaluation.size),
        "eval": json.loads(json.dumps(dataclasses.asdict(config.eval), default=str)),
        "teacher": evaluation.describe(teacher),
        "student": evaluation.compare(student, teacher),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "torch": torch.__version__,
    }
    config.run.out.mkdir(parents=True, exist_ok=True)
    (config.run.out / "eval.json").write_text(json.dumps(report, indent=2) + "\n")
    return report
