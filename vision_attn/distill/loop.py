"""The training loop, from the top to the bottom."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from vision_attn.distill.averaging import Averaging
from vision_attn.distill.checkpoint import Checkpoints
from vision_attn.distill.config import Config
from vision_attn.distill.data import CachedData, Order, batches_of
from vision_attn.distill.denoiser import Batch, load_pipeline
from vision_attn.distill.finish import save_adapter, write_sheet
from vision_attn.distill.launch import leave_frozen, make_accelerator
from vision_attn.distill.metrics import Metrics
from vision_attn.distill.nonfinite import explain
from vision_attn.distill.optimizers import make_optimizer, make_schedule
from vision_attn.distill.sharding import Shards, is_sharded
from vision_attn.distill.step import Step
from vision_attn.distill.student import make_student
from vision_attn.distill.transfer import transfer


def train(config: Config, *, pipe: Any = None) -> Path:  # noqa: PLR0915, it is read from the top to the bottom
    """Distil as the settings say; goes on where an earlier run in the same folder was stopped.

    Args:
        config: All settings.
        pipe: The teacher's pipeline, if it is loaded already. It is converted.

    Returns:
        The folder of the adapter, which `vision_attn.load` takes.

    Raises:
        ValueError: If settings, cache and model do not fit each other.
        FileNotFoundError: If there is no cache.
        OSError: If a checkpoint cannot be written.
        NonFiniteError: If a loss is NaN or infinite.
    """
    run = config.run
    accelerator = make_accelerator(config)
    torch.manual_seed(run.seed)  # every process draws the same new parameters
    student = make_student(config, load_pipeline(config.model, prompts=False) if pipe is None else pipe)
    student.to(accelerator.device)
    data = CachedData(config.data, config.model.base, type(student.model).__name__)
    computing = Step(config, student, data.interface)
    leave_frozen(student.model)
    shards = Shards(student)
    bare = make_optimizer(config.optimizer, list(student.parameters.values()))
    schedule = make_schedule(config.optimizer, bare, run.steps)
    model, optimizer = accelerator.prepare(student.model, bare)
    shards.look_up()
    parameters = list(student.parameters.values())
    averaging = Averaging(config.optimizer, parameters, bare)
    accelerator.register_for_checkpointing(schedule, *([averaging] if averaging.ema else []))
    checkpoints = Checkpoints(config, accelerator, student.parameters)

    start = checkpoints.resume()
    if start is None and config.transfer.steps:
        transfer(config, accelerator, computing, _batches(config, accelerator, data, 0))
        checkpoints.save(0)
    step = saved = start or 0
    torch.manual_seed(run.seed + 1 + accelerator.process_index)  # dropout, if the host has any
    batches = _batches(config, accelerator, data, step * run.accumulate)
    metrics = Metrics(config, accelerator, step)

    def sheet() -> None:
        if accelerator.is_main_process or is_sharded(accelerator):
            with averaging.evaluated():
                write_sheet(config, student, data, step, main=accelerator.is_main_process)
                shards.reshard()

    while step < run.steps and not metrics.out_of_time:
        averaging.begin()
        for micro in range(run.accumulate):
            batch = next(batches).to(accelerator.device, student.dtype)
            number = (step * run.accumulate + micro) * accelerator.num_processes + accelerator.process_index
            noisy = computing.noisy(batch, number)
            with accelerator.accumulate(model), accelerator.autocast():
                losses = computing.losses(model, noisy)
                if not losses["total"].isfinite():
                    raise explain(step + 1, "the loss", computing, noisy)
                accelerator.backward(losses["total"])
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(parameters, config.optimizer.clip or float("inf"))
                    skips = run.precision == "fp16"  # an update that is not finite
                    if norm is not None and not math.isfinite(norm) and not skips:
                        raise explain(step + 1, "the gradient", computing, noisy)
                    metrics.norm = norm
                optimizer.step()
                optimizer.zero_grad()
            metrics.add(losses)
        schedule.step()
        averaging.update()
        step += 1
        metrics.log(step, schedule.get_last_lr()[0])
        if run.sheet_every and step % run.sheet_every == 0:
            sheet()
        if run.save_every and step % run.save_every == 0:
            checkpoints.save(step)
            saved = step

    if saved != step:
        checkpoints.save(step)
    sheet()
    with averaging.evaluated():
        folder = save_adapter(config, accelerator, student, shards)
    metrics.close()
    return folder


def _batches(config: Config, accelerator: Any, data: CachedData, start: int) -> Iterator[Batch]:
    order = Order(
        data.buckets,
        batch_size=config.data.batch_size,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        seed=config.run.seed,
        start=start,
    )
    return batches_of(data, order, config.data.workers)
