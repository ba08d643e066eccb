"""The settings of a distillation: a YAML file, and single values from the command line."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from vision_attn.distill.checks import at_least
from vision_attn.distill.config_sections import DataConfig, LossConfig, ModelConfig, StudentConfig, TransferConfig


@dataclass(frozen=True)
class OptimizerConfig:
    """How parameters are updated.

    Args:
        name: 'adamw'; 'adamw8bit' (bitsandbytes), 'schedulefree' or 'prodigy' (prodigyopt) if they are installed.
        learning_rate: 1 for Prodigy.
        betas: Of Adam.
        weight_decay: Of Adam.
        schedule: 'constant', 'cosine' or 'linear', after the warmup.
        warmup: Steps.
        clip: Largest norm of the gradient, 0 for none.
        ema: Decay of the mean of the parameters that is evaluated and saved, 0 for none.
    """

    name: Literal["adamw", "adamw8bit", "schedulefree", "prodigy"] = "adamw"
    learning_rate: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    warmup: int = 0
    clip: float = 1.0
    ema: float = 0.0

    def __post_init__(self) -> None:
        at_least("optimizer", self, 0, "learning_rate", "weight_decay", "warmup", "clip", "ema")
        if self.ema >= 1:
            raise ValueError(f"optimizer.ema must be below 1, got {self.ema}")


@dataclass(frozen=True)
class RunConfig:
    """How long, how and where.

    Args:
        out: Folder for checkpoints, sheets, `metrics.jsonl` and the adapter.
        steps: Updates.
        minutes: Training ends after so many, if that is earlier.
        accumulate: Batches of an update.
        precision: Of the computation: 'no' for that of the weights.
        checkpointing: Whether activations are computed again in the backward pass.
        seed: Of everything.
        save_every: Steps between checkpoints, 0 for one at the end.
        keep: Checkpoints to keep.
        sheet_every: Steps between sheets of validation pictures, 0 for one at the end.
        sheet_steps: Denoising steps of these pictures.
        trackers: 'tensorboard', 'wandb', or others that accelerate knows.
        save_dtype: Of the adapter.
        export: Also write the format of 'clear' or 'linfusion'.
        quiet: No progress bar.
    """

    out: Path
    steps: int = 1000
    minutes: float | None = None
    accumulate: int = 1
    precision: Literal["no", "bf16", "fp16"] = "no"
    checkpointing: bool = False
    seed: int = 0
    save_every: int = 500
    keep: int = 2
    sheet_every: int = 0
    sheet_steps: int = 20
    trackers: list[str] = field(default_factory=list)
    save_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    export: Literal["clear", "linfusion"] | None = None
    quiet: bool = False

    def __post_init__(self) -> None:
        at_least("run", self, 1, "steps", "accumulate", "keep", "sheet_steps")
        at_least("run", self, 0, "save_every", "sheet_every", "seed")
        if self.minutes is not None and self.minutes <= 0:
            raise ValueError(f"run.minutes must be above 0, got {self.minutes}")


@dataclass(frozen=True)
class EvalConfig:
    """What the finished student is measured on.

    Args:
        adapter: Folder to load; `run.out`/adapter if None.
        prompts: Text file, one prompt a line; the captions of the cache if None.
        count: Prompts to draw.
        batch_size: Pictures at a time.
        steps: Denoising steps; the pipeline's own number if 0.
        size: (height, width) in pixels; the first of `data.sizes` if None.
        sigmas: Noise levels of the error to the teacher's prediction.
        features: Of the kernel distance: 'pixels', or the name of a timm model.
        truth: npz of icons by `examples/emoji/rasterise.py`, for the emoji teachers.
    """

    adapter: Path | None = None
    prompts: Path | None = None
    count: int = 16
    batch_size: int = 8
    steps: int = 0
    size: tuple[int, int] | None = None
    sigmas: list[float] = field(default_factory=lambda: [0.15, 0.4, 0.65, 0.9])
    features: str = "pixels"
    truth: Path | None = None

    def __post_init__(self) -> None:
        at_least("eval", self, 1, "count", "batch_size")
        at_least("eval", self, 0, "steps")
        if not self.sigmas or not all(0 < sigma < 1 for sigma in self.sigmas):
            raise ValueError(f"eval.sigmas must be at least one number between 0 and 1, got {self.sigmas}")


@dataclass(frozen=True)
class Config:
    """All settings of a distillation."""

    model: ModelConfig
    student: StudentConfig
    data: DataConfig
    run: RunConfig
    loss: LossConfig = field(default_factory=LossConfig)
    transfer: TransferConfig = field(default_factory=TransferConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)

    def __post_init__(self) -> None:
        if self.model.dtype != "float32" and self.run.precision == "no":
            wanted = "bf16" if self.model.dtype == "bfloat16" else "fp16"
            raise ValueError(
                f"run.precision must be '{wanted}' with model.dtype '{self.model.dtype}': what is trained is float32"
            )


def read_config(arguments: Sequence[str], program: str) -> Config | str:
    """Read `--config FILE` and values such as `--optimizer.learning_rate 1e-4`, which have the last word.

    Returns:
        The settings; or, with `--print-config`, what to print.

    Raises:
        ValueError: If a key does not exist or a value does not fit.
        FileNotFoundError: If there is no such file.
    """
    try:
        import jsonargparse  # noqa: PLC0415, of the extra 'distill'
    except ModuleNotFoundError:
        raise ValueError("settings are read by jsonargparse: pip install 'vision_attn[distill]'") from None
    arguments, printed = list(arguments), "--print-config" in arguments
    if printed:
        arguments.remove("--print-config")
    for flag, value in itertools.pairwise(arguments):
        if flag == "--config" and not Path(value).is_file():
            raise FileNotFoundError(f"--config: {value} does not exist")
    parser = jsonargparse.ArgumentParser(
        prog=program, description=__doc__, exit_on_error=False, default_env=False, print_config=None, allow_abbrev=False
    )
    parser.add_argument("--config", action="config", help="YAML file; values that follow have the last word")
    parser.add_class_arguments(Config, None, fail_untyped=True)
    try:
        values: Any = parser.parse_args(arguments)
        if printed:
            return parser.dump(values, skip_none=False)
        made = parser.instantiate_classes(values)
    except jsonargparse.ArgumentError as error:
        raise ValueError(str(error)) from None
    return Config(**{name: getattr(made, name) for name in Config.__dataclass_fields__})
