"""The command `distill`: one of its actions, and the settings for it."""

import json
import logging
import sys
from collections.abc import Sequence
from typing import Any

from vision_attn.distill.config import Config
from vision_attn.distill.reading import read_config

ACTIONS = ("train", "generate", "cache", "eval", "run")
_USAGE = f"""usage: vision-attn distill [{" | ".join(ACTIONS)}] --config FILE [--section.key VALUE ...] [--print-config]

  generate  draw images from data.prompts into data.images, by the teacher
  cache     encode data.images into data.cache: latents and prompt embeddings
  train     train the student into run.out; on several GPUs: accelerate launch -m vision_attn.distill --config FILE
  eval      compare the adapter with its teacher, into run.out/eval.json
  run       do whatever is missing: generate, cache, train, eval

All keys: vision-attn distill train --help
"""


def main(arguments: Sequence[str]) -> int:
    """Run the command and return its exit status: 2 for bad input, 1 for a training that met a NaN, with a line of why.

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
    """Do one action and return what it reports."""
    from vision_attn._compat import ensure_torchvision  # noqa: PLC0415, before diffusers

    ensure_torchvision()
    import diffusers  # noqa: PLC0415, optional

    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    logging.basicConfig(level=logging.WARNING)
    if action == "train":
        from vision_attn.distill.loop import train  # noqa: PLC0415, each action imports its own

        return {"adapter": str(train(config))}
    state = _this_process()
    device = str(state.device)
    if action == "run":
        from vision_attn.distill.run import run_all  # noqa: PLC0415

        return run_all(config, state)
    if action == "generate":
        from vision_attn.distill.images import generate  # noqa: PLC0415

        return generate(config, device=device, rank=state.process_index, world=state.num_processes)
    if action == "cache":
        from vision_attn.distill.cache import write_cache  # noqa: PLC0415

        return write_cache(config, device=device)
    from vision_attn.distill.evaluate import evaluate  # noqa: PLC0415

    return evaluate(config, device=device)


def _this_process() -> Any:
    """Return accelerate's state: the device, the number and the count of processes, as a training has them."""
    from accelerate import PartialState  # noqa: PLC0415, of the extra 'distill'
    from accelerate.utils import parse_flag_from_env  # noqa: PLC0415

    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
