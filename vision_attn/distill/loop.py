"""The training loop, from the top to the bottom, and the accelerator that it runs on."""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from vision_attn.distill.config import Config
from vision_attn.distill.curve import Curve
from vision_attn.distill.data import CachedData, Order, batches_of
from vision_attn.distill.denoiser import Batch, denoiser_of, load_pipeline
from vision_attn.distill.losses import Step, explain
from vision_attn.distill.output import Checkpoints, Metrics, flat, is_finished, save_adapter, settings_of, write_sheet
from vision_attn.distill.parameters import Averaging, Shards, is_sharded, make_optimizer, make_schedule
from vision_attn.distill.student import make_student
from vision_attn.distill.transfer import transfer


def train(config: Config, *, pipe: Any = None) -> Path:
    """Distil as the settings say; go on where an earlier run in the same folder was stopped.

    Args:
        config: All settings. With `stages`, each of them is a run of its own, in the folder `stage-1` and so on of
            `run.out`; the last one is in `run.out`.
        pipe: The teacher's pipeline, if it is loaded already. It is converted.

    Returns:
        The folder of the adapter, which `vision_attn.load` takes.

    Raises:
        ValueError: If settings, cache and model do not fit each other.
        FileNotFoundError: If there is no cache.
        OSError: If a checkpoint cannot be written.
        NonFiniteError: If a loss is NaN or infinite.
    """
    *first, last = config.each_stage()
    for stage in first:
        with accelerated(stage) as accelerator, _set_aside(pipe):
            if not is_finished(stage):
                _train(stage, accelerator, load_pipeline(stage.model, prompts=False) if pipe is None else pipe)
    with accelerated(last) as accelerator:
        return _train(last, accelerator, load_pipeline(last.model, prompts=False) if pipe is None else pipe)


@contextmanager
def _set_aside(pipe: Any) -> Iterator[None]:
    """Train a copy of the denoiser inside the `with` block; a next stage begins with the pipeline as it was given."""
    if pipe is None:
        yield
        return
    name, model = denoiser_of(pipe)
    setattr(pipe, name, copy.deepcopy(model))
    try:
        yield
    finally:
        setattr(pipe, name, model)


def _train(config: Config, accelerator: Any, pipe: Any) -> Path:  # noqa: PLR0915, it is read from top to bottom
    run = config.run
    torch.manual_seed(run.seed)  # every process draws the same new parameters
    student = make_student(config, pipe)
    student.to(accelerator.device)
    if run.share > 1:
        student.share(run.share)
    groups, group = accelerator.num_processes // run.share, accelerator.process_index // run.share
    data = CachedData(config.data, config.model.base, type(student.model).__name__)
    computing = Step(config, student, data.interface)
    _leave_frozen(student.model)
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
    batches = _batches(config, accelerator, data, step * run.accumulate)
    main = accelerator.is_main_process
    metrics = Metrics(config, accelerator, step)
    curve = Curve(config, student, data, step, main=main) if run.measure_every else None

    def look(*, sheet: bool, measure: bool) -> None:
        if (sheet or measure) and (main or is_sharded(accelerator) or run.share > 1):
            with averaging.evaluated():
                if sheet:
                    write_sheet(config, student, data, step, main=main)
                if measure and curve is not None:
                    curve.measure(step)
                shards.reshard()

    look(sheet=False, measure=start is None)
    while step < run.steps and metrics.spent <= 1:
        averaging.begin()
        for micro in range(run.accumulate):
            batch = next(batches).to(accelerator.device, student.dtype)
            number = (step * run.accumulate + micro) * groups + group
            noisy = computing.noisy(batch, number)
            with accelerator.accumulate(model), accelerator.autocast():
                losses = computing.losses(model, noisy)
                if not losses["total"].isfinite():
                    raise explain(step + 1, "the loss", computing, noisy)
                accelerator.backward(losses["total"] * run.share)  # gradients are sums over those who share a batch
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(parameters, config.optimizer.clip or float("inf"))
                    skips = run.precision == "fp16"  # the scaler leaves out an update that is not finite
                    if norm is not None and not math.isfinite(norm) and not skips:
                        raise explain(step + 1, "the gradient", computing, noisy)
                    metrics.norm = norm
                optimizer.step()
                optimizer.zero_grad()
            metrics.add(losses)
        # with a limit of time it ends with the clock, if that comes first
        schedule.last_epoch = max(schedule.last_epoch, round(metrics.spent * run.steps) - 1)
        schedule.step()
        averaging.update()
        step += 1
        metrics.log(step, schedule.get_last_lr()[0])
        look(sheet=_due(run.sheet_every, step), measure=_due(run.measure_every, step))
        if _due(run.save_every, step):
            checkpoints.save(step)
            saved = step

    if saved != step:
        checkpoints.save(step)
    look(sheet=True, measure=not _due(run.measure_every, step))
    with averaging.evaluated():
        folder = save_adapter(config, accelerator, student, shards)
    metrics.close()
    return folder


def _due(every: int, step: int) -> bool:
    """Whether a step is one in `every`; never if that is 0."""
    return bool(every) and step % every == 0


def _batches(config: Config, accelerator: Any, data: CachedData, start: int) -> Iterator[Batch]:
    order = Order(
        data.buckets,
        batch_size=config.data.batch_size,
        rank=accelerator.process_index // config.run.share,
        world=accelerator.num_processes // config.run.share,
        seed=config.run.seed,
        start=start,
    )
    return batches_of(data, order, config.data.workers)


@contextmanager
def accelerated(config: Config) -> Iterator[Any]:
    """Give a run its accelerator: processes, device and precision, as `accelerate launch` and the settings say.

    Accelerate keeps one precision and one device for the whole process and refuses a second run with another
    precision. So each run begins anew, and what the process had before comes back afterwards.

    Raises:
        ValueError: If accelerate or a tracker is not installed, or weights would be sharded in an unknown way.
    """
    try:
        from accelerate.state import AcceleratorState, GradientState, PartialState  # noqa: PLC0415, of the extra
    except ModuleNotFoundError:
        raise ValueError("training needs accelerate: pip install 'vision_attn[distill]'") from None
    states = [kind._shared_state for kind in (PartialState, AcceleratorState, GradientState)]
    before = [dict(state) for state in states]
    cudnn = torch.backends.cuda.cudnn_sdp_enabled()
    AcceleratorState._reset_state()
    # cuDNN attention's backward ends in an illegal memory access for short sequences (264 tokens, D=64, H200)
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        accelerator = _make_accelerator(config)
        yield accelerator
        # DDP must go before its process group: the last owner of the group waits for gloo's threads, DDP with Python's
        # lock held, for which these threads may be waiting
        accelerator.free_memory()
        accelerator.end_training()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
        for state, values in zip(states, before, strict=True):
            state.clear()
            state.update(values)


def _make_accelerator(config: Config) -> Any:
    from accelerate import Accelerator, DistributedDataParallelKwargs  # noqa: PLC0415, of the extra 'distill'
    from accelerate.tracking import get_available_trackers  # noqa: PLC0415
    from accelerate.utils import ProjectConfiguration  # noqa: PLC0415

    known = {str(getattr(tracker, "value", tracker)) for tracker in get_available_trackers()}
    missing = [tracker for tracker in config.run.trackers if tracker not in known]
    if missing:
        raise ValueError(f"run.trackers: {', '.join(missing)} cannot be had: pip install it, or leave it out")
    config.run.out.mkdir(parents=True, exist_ok=True)
    # layers that stay dense on small grids have processors without gradients, and a whole model has unused outputs
    whole = config.student.trainable == "model"
    unused = DistributedDataParallelKwargs(find_unused_parameters=config.student.min_tokens > 0 or whole)
    accelerator = Accelerator(
        mixed_precision=config.run.precision,
        gradient_accumulation_steps=config.run.accumulate,
        log_with=config.run.trackers or None,
        project_config=ProjectConfiguration(project_dir=str(config.run.out), logging_dir=str(config.run.out / "logs")),
        kwargs_handlers=[unused],
        step_scheduler_with_optimizer=False,
    )
    if str(accelerator.distributed_type).endswith("FSDP") and not accelerator.is_fsdp2:
        raise ValueError("FSDP 1 hides the parameters that are trained: set fsdp_version: 2 in accelerate's config")
    if str(accelerator.distributed_type).endswith("DEEPSPEED"):
        _set_up_deepspeed(config, accelerator.state.deepspeed_plugin)
    if config.run.trackers:
        accelerator.init_trackers(
            "vision_attn_distill", config={name: str(value) for name, value in flat(settings_of(config)).items()}
        )
    return accelerator


def _set_up_deepspeed(config: Config, plugin: Any) -> None:
    """Give DeepSpeed the batch size, which it would ask a data loader for, and the norm that it clips at."""
    if plugin.zero_stage == 3:
        raise ValueError("DeepSpeed's stage 3 shards the weights: take stage 1 or 2, or FSDP with fsdp_version: 2")
    plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = config.data.batch_size
    plugin.deepspeed_config["gradient_clipping"] = config.optimizer.clip or 0.0


def _leave_frozen(model: nn.Module) -> None:
    """Make `DistributedDataParallel` ignore frozen parameters and buffers, which are equal in all processes.

    It would write to them, and a parameter that was written to is saved as a changed one.
    """
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    buffers = [name for name, _ in model.named_buffers()]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, frozen + buffers)
