"""`distill run`: whatever is missing of generate, cache, train and eval, in this order.

    generate  if a picture of `data.prompts` was not drawn; without `data.prompts` pictures are given
    cache     if it was not made of the pictures that are there, at these sizes; without `data.images` it is given
    train     if there is no adapter that is newer than the last checkpoint, with `run.steps` behind it
    eval      if there is no report that is newer than the adapter, with the settings of `eval`

Each stage goes on where it was stopped. With several processes each draws its share and all train; the first one
encodes and evaluates.
"""

import gc
import json
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch

from vision_attn.distill.cache import is_current, write_cache
from vision_attn.distill.config import Config
from vision_attn.distill.data import INDEX
from vision_attn.distill.evaluate import REPORT, adapter_of, evaluate
from vision_attn.distill.images import generate, undrawn
from vision_attn.distill.loop import train
from vision_attn.distill.output import is_finished

DONE = "nothing to do"


def run_all(config: Config, state: Any) -> dict[str, Any]:
    """Do what is missing.

    Args:
        config: All settings.
        state: Accelerate's `PartialState`: the device, and which process this is.

    Returns:
        What each stage reported, or `DONE`.

    Raises:
        What the stages raise.
    """
    device, report = str(state.device), {}
    share = dict(device=device, rank=state.process_index, world=state.num_processes)
    report["generate"] = _stage(needs_images(config), lambda: generate(config, **share))
    state.wait_for_everyone()  # the others read what this one writes
    if state.is_main_process:
        report["cache"] = _stage(needs_cache(config), lambda: write_cache(config, device=device))
    state.wait_for_everyone()
    report["train"] = _stage(not is_finished(config), lambda: {"adapter": str(train(config))})
    if state.is_main_process:
        report["eval"] = _stage(needs_report(config), lambda: evaluate(config, device=device))
    return report


def _stage(needed: bool, work: Callable[[], Any]) -> Any:
    """Do a stage, and give back the memory of its pipeline."""
    if not needed:
        return DONE
    found = work()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return found


def needs_images(config: Config) -> bool:
    """Whether the teacher has pictures to draw."""
    return config.data.prompts is not None and bool(undrawn(config))


def needs_cache(config: Config) -> bool:
    """Whether the cache was made of other pictures, or of none."""
    given = config.data.images is None and (config.data.cache / INDEX).exists()
    return not given and not is_current(config)


def needs_report(config: Config) -> bool:
    """Whether the adapter was not evaluated with these settings."""
    path, adapter = config.run.out / REPORT, adapter_of(config)
    if not path.exists() or not adapter.exists() or path.stat().st_mtime < adapter.stat().st_mtime:
        return True
    return json.loads(path.read_text()).get("eval") != json.loads(json.dumps(asdict(config.eval), default=str))
