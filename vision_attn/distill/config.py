"""The settings of a distillation: a YAML file, and single values from the command line."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from vision_attn._checks import check_number, check_one_of
from vision_attn.processors import AttnSpec, make_spec


@dataclass(frozen=True)
class ModelConfig:
    """The pipeline whose denoiser is the teacher.

    Args:
        base: Folder or hub name of a diffusers pipeline, or 'emoji:base', 'emoji:nano', 'emoji:unet' for a teacher that
            this package ships.
        dtype: Of the frozen weights. What is trained is always float32.
        variant: Of the weights, such as 'fp16'.
        revision: Of the hub repository.
        guidance: Of models that take guidance as an input (FLUX.1-dev); other models run without guidance in training.
    """

    base: str
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    variant: str | None = None
    revision: str | None = None
    guidance: float = 3.5


@dataclass(frozen=True)
class StudentConfig:
    """What the student's attention is, and what of it is trained.

    Args:
        processor: Name of a processor such as 'Clear'.
        fields: Its fields, such as `radius: 16`.
        where: Pattern of the layers to convert, all if None.
        min_tokens: Layers with fewer grid tokens keep their own attention.
        init: 'inherited' from the host's projections, or 'random' (the start of LinFusion's released training code).
        trainable: 'new' parameters of the processor, 'attention' for those and projections, or 'lora' on projections.
        projections: Which of q, k, v, out train with 'attention' and 'lora'.
        rank: Of LoRA; its alpha is twice that.
        adapter: Trained weights to start from: what `vision_attn.load` takes, of this processor. `where` and
            `min_tokens` are those that it was saved with.
    """

    processor: str
    fields: dict[str, Any] = field(default_factory=dict)
    where: str | None = None
    min_tokens: int = 0
    init: Literal["inherited", "random"] = "inherited"
    trainable: Literal["new", "attention", "lora"] = "attention"
    projections: list[str] = field(default_factory=lambda: ["q", "k", "v", "out"])
    rank: int = 16
    adapter: str | None = None

    def __post_init__(self) -> None:
        _at_least("student", self, 0, "min_tokens")
        _at_least("student", self, 1, "rank")
        for role in self.projections:
            check_one_of("student.projections", role, ("q", "k", "v", "out"))
        if self.init == "random" and self.trainable != "attention":
            raise ValueError(f"student.init: random projections must be trained: trainable is {self.trainable!r}")
        if self.adapter is not None and (self.init == "random" or self.where is not None):
            raise ValueError("student.adapter brings its own start and layers: it goes without init: random and where")
        self.spec()

    def spec(self) -> AttnSpec:
        """Return the processor's spec."""
        try:
            return make_spec(self.processor, **self.fields)
        except (TypeError, ValueError) as error:
            raise ValueError(f"student.processor: {error}") from None


@dataclass(frozen=True)
class LossConfig:
    """Weights of the losses, and the noise levels of training.

    Args:
        task: Of the error of the student to the data.
        prediction: Of the error of its prediction to the teacher's.
        attention: Of the error of the outputs of attention layers to the teacher's.
        variance: Of the error of learned variances to the teacher's (LiT: 0.05); models without them have no such loss.
        layers: Pattern of the layers whose outputs are compared.
        every: One in so many converted layers is, the first among them, if it fits the pattern.
        noise_levels: 'none' for all alike, 'logit_normal' or 'mode' as in diffusers' scripts.
    """

    task: float = 1.0
    prediction: float = 0.5
    attention: float = 0.5
    variance: float = 0.05
    layers: str = "*"
    every: int = 1
    noise_levels: Literal["none", "logit_normal", "mode"] = "none"

    def __post_init__(self) -> None:
        _at_least("loss", self, 0, "task", "prediction", "attention", "variance")
        _at_least("loss", self, 1, "every")
        if not (self.task or self.prediction or self.attention):
            raise ValueError("loss: all weights are zero: nothing would be trained")


@dataclass(frozen=True)
class TransferConfig:
    """The optional first stage: each layer learns its teacher's outputs from its teacher's inputs.

    Args:
        steps: 0 for none.
        learning_rate: Of the processors' new parameters, all that this stage trains.
    """

    steps: int = 0
    learning_rate: float = 1e-3

    def __post_init__(self) -> None:
        _at_least("transfer", self, 0, "steps", "learning_rate")


@dataclass(frozen=True)
class DataConfig:
    """What the student learns from.

    Args:
        cache: Folder of the cached latents and prompt embeddings.
        images: Folder of images with captions of the same name (.txt, or .json with a 'caption'), a WebDataset tar, or
            a folder of these.
        prompts: Text file, one prompt a line, for images that the teacher draws itself into the folder `images`.
        sizes: (height, width) in pixels; an image goes to the size that is nearest to its shape.
        native: (height, width) in pixels that a FLUX knows: positions of larger sizes are scaled into it. As the
            pipeline has them if None.
        batch_size: Per process.
        null_prob: How often a prompt is replaced by the empty one, for the guidance at inference.
        shard_size: Samples of a file of the cache.
        workers: Processes that load.
        steps: Denoising steps of images that the teacher draws; the pipeline's own number if 0.
    """

    cache: Path
    images: Path | None = None
    prompts: Path | None = None
    sizes: list[tuple[int, int]] = field(default_factory=lambda: [(1024, 1024)])
    native: tuple[int, int] | None = None
    batch_size: int = 1
    null_prob: float = 0.1
    shard_size: int = 64
    workers: int = 0
    steps: int = 0

    def __post_init__(self) -> None:
        _at_least("data", self, 1, "batch_size", "shard_size")
        _at_least("data", self, 0, "workers", "steps", "null_prob")
        if self.null_prob > 1:
            raise ValueError(f"data.null_prob must be at most 1, got {self.null_prob}")
        if not self.sizes or any(min(size) < 1 for size in self.sizes):
            raise ValueError(f"data.sizes must be pairs (height, width) in pixels, got {self.sizes}")

    def stretch(self, size: tuple[int, int]) -> float:
        """Return the side of pictures of a size over that of `native`; 1 without one."""
        return math.sqrt(size[0] * size[1] / (self.native[0] * self.native[1])) if self.native else 1.0


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
        _at_least("optimizer", self, 0, "learning_rate", "weight_decay", "warmup", "clip", "ema")
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
        _at_least("run", self, 1, "steps", "accumulate", "keep", "sheet_steps")
        _at_least("run", self, 0, "save_every", "sheet_every", "seed")
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
        _at_least("eval", self, 1, "count", "batch_size")
        _at_least("eval", self, 0, "steps")
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


def _at_least(section: str, values: Any, least: float, *names: str) -> None:
    """Refuse numbers of a section that are too small."""
    for name in names:
        check_number(f"{section}.{name}", getattr(values, name), least=least)
