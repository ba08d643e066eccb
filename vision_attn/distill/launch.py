"""The accelerator: processes, precision, sharding and trackers, by `accelerate launch` and the settings."""

from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from vision_attn.distill.config import Config


def make_accelerator(config: Config) -> Any:
    """Return the accelerator of a run, its trackers begun.

    Raises:
        ValueError: If accelerate or a tracker is not installed, or weights would be parted in a way that is not known.
    """
    try:
        from accelerate import Accelerator, DistributedDataParallelKwargs  # noqa: PLC0415, of the extra 'distill'
        from accelerate.tracking import get_available_trackers  # noqa: PLC0415
        from accelerate.utils import ProjectConfiguration  # noqa: PLC0415
    except ModuleNotFoundError:
        raise ValueError("training needs accelerate: pip install 'vision_attn[distill]'") from None
    known = {str(getattr(tracker, "value", tracker)) for tracker in get_available_trackers()}
    missing = [tracker for tracker in config.run.trackers if tracker not in known]
    if missing:
        raise ValueError(f"run.trackers: {', '.join(missing)} cannot be had: pip install it, or leave it out")
    config.run.out.mkdir(parents=True, exist_ok=True)
    # cuDNN attention's backward ends in an illegal memory access for short sequences (264 tokens, D=64, H200)
    torch.backends.cuda.enable_cudnn_sdp(False)
    # layers that stay dense on small grids have processors without gradients
    unused = DistributedDataParallelKwargs(find_unused_parameters=config.student.min_tokens > 0)
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
        accelerator.init_trackers("vision_attn_distill")
    return accelerator


def _set_up_deepspeed(config: Config, plugin: Any) -> None:
    """Tell DeepSpeed what it would otherwise ask a data loader, and how it is to clip."""
    if plugin.zero_stage == 3:
        raise ValueError("DeepSpeed's stage 3 parts the weights: take stage 1 or 2, or FSDP with fsdp_version: 2")
    plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = config.data.batch_size
    plugin.deepspeed_config["gradient_clipping"] = config.optimizer.clip or 0.0


def leave_frozen(model: nn.Module) -> None:
    """Have `DistributedDataParallel` neither send frozen parameters and buffers nor write to them.

    All processes read them from the same files; what was written to would be saved as changed.
    """
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    buffers = [name for name, _ in model.named_buffers()]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, frozen + buffers)
