"""The settings of a distillation, and of its stages."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_type_hints

from vision_attn._checks import check_number, check_one_of, fitting
from vision_attn.processors import AttnSpec, from_config

PROJECTIONS = ("q", "k", "v", "out")
_OF_THE_FIRST = ("where", "layers", "min_tokens", "init", "adapter")  # a later stage has them from the one before


@dataclass(frozen=True)
class ModelConfig:
    """The pipeline whose denoiser is the teacher.

    Args:
        base: Folder or hub name of a diffusers pipeline, or 'emoji:' and the name of a teacher that comes with this
            package, such as 'emoji:base'.
        dtype: Dtype of the frozen weights. What is trained is always float32.
        quantisation: How the denoiser's frozen weights are kept: in 'int8' or 'float8' of torchao, or in 'nf4' of
            bitsandbytes, which needs a GPU.
        variant: Variant of the weight files, such as 'fp16'.
        revision: Branch, tag or commit of the hub repository.
        guidance: Guidance for models that take it as an input (FLUX.1-dev). Other models train without guidance.
    """

    base: str
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    quantisation: Literal["int8", "float8", "nf4"] | None = None
    variant: str | None = None
    revision: str | None = None
    guidance: float = 3.5


@dataclass(frozen=True)
class StudentConfig:
    """The attention of the student, and what of it is trained.

    Args:
        processor: Name of a processor, such as 'Clear'.
        fields: Fields of the processor, such as `radius: 16`; a spec among them as `spec: {class: Clear, radius: 8}`.
        layers: Other processors by pattern of layer names, as `"*.0.attn": {class: Multipole}`; the first match counts.
        where: Which layers to convert: a pattern of layer names, as for `vision_attn.convert`. All layers if None.
        min_tokens: Layers with fewer grid tokens keep their own attention, as for `vision_attn.convert`.
        init: Where the projections start: 'inherited' from the host, or 'random', as in LinFusion's released training
            code.
        trainable: 'new' trains the processor's own parameters, 'attention' also the projections, 'model' the whole
            denoiser, 'lora' trains LoRA layers on the projections beside the processor's own parameters.
        projections: Which projections train with 'attention' and 'lora', of q, k, v and out.
        rank: Rank of LoRA. Its alpha is twice the rank.
        adapter: Trained weights of this processor to start from: anything that `vision_attn.load` takes. The adapter
            decides about `where`, `layers` and `min_tokens`.
    """

    processor: str
    fields: dict[str, Any] = field(default_factory=dict)
    layers: dict[str, dict[str, Any]] = field(default_factory=dict)
    where: str | None = None
    min_tokens: int = 0
    init: Literal["inherited", "random"] = "inherited"
    trainable: Literal["new", "attention", "model", "lora"] = "attention"
    projections: list[str] = field(default_factory=lambda: list(PROJECTIONS))
    rank: int = 16
    adapter: str | None = None

    def __post_init__(self) -> None:
        _at_least("student", self, 0, "min_tokens")
        _at_least("student", self, 1, "rank")
        for role in self.projections:
            check_one_of("student.projections", role, PROJECTIONS)
        if self.init == "random" and not self.trains_weights:
            raise ValueError(
                f"student.init: random projections must be trained: student.trainable must be 'attention' or 'model', "
                f"got {self.trainable!r}"
            )
        if self.adapter is not None and (self.init == "random" or self.where is not None):
            raise ValueError("student.adapter decides about start and layers: leave out student.where and init: random")
        self.spec()

    @property
    def trains_weights(self) -> bool:
        """Whether weights of the host are trained."""
        return self.trainable in ("attention", "model")

    def spec(self) -> AttnSpec | dict[str, AttnSpec]:
        """Return the processor's spec; with `layers`, specs by pattern."""
        own = _spec("student.processor", {"class": self.processor, **self.fields})
        if not self.layers:
            return own
        others = {pattern: _spec(f"student.layers: {pattern}", values) for pattern, values in self.layers.items()}
        return {**others, "*": own}


def _spec(key: str, values: dict[str, Any]) -> AttnSpec:
    """Return a spec from its class and fields; an error names the key of the settings."""
    try:
        return from_config(values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{key}: {error}") from None


@dataclass(frozen=True)
class LossConfig:
    """Weights of the losses, and the noise levels of training.

    Args:
        task: Weight of the student's error against the data.
        prediction: Weight of the student's error against the teacher's prediction.
        attention: Weight of the error of attention outputs against the teacher's.
        relative: Divide each layer's error by the mean square of the teacher's output, so that all layers count alike.
        guided: Weight of the error of the guided prediction against the teacher's. Half of each batch then is the other
            half without its prompts, in place of `data.null_prob`.
        guidance: Guidance of this prediction, that of later use.
        variance: Weight of the error of learned variances against the teacher's (LiT: 0.05). It counts only for models
            that learn variances.
        balance: Weight of the loss of the load of a mixture of heads (MoH: 0.01). It counts only for `MoH`.
        layers: Pattern of the layers whose outputs are compared.
        every: Compare one in this many converted layers, beginning with the first, if it fits the pattern.
        noise_levels: How noise levels are drawn: 'none' draws all equally often, 'logit_normal' and 'mode' as
            diffusers' training scripts do.
    """

    task: float = 1.0
    prediction: float = 0.5
    attention: float = 0.5
    relative: bool = False
    guided: float = 0.0
    guidance: float = 3.0
    variance: float = 0.05
    balance: float = 0.01
    layers: str = "*"
    every: int = 1
    noise_levels: Literal["none", "logit_normal", "mode"] = "none"

    def __post_init__(self) -> None:
        _at_least("loss", self, 0, "task", "prediction", "attention", "guided", "guidance", "variance", "balance")
        _at_least("loss", self, 1, "every")
        if not (self.task or self.prediction or self.attention or self.guided):
            raise ValueError("loss: all weights are zero: nothing would be trained")


@dataclass(frozen=True)
class TransferConfig:
    """The optional first stage: each layer learns its teacher's outputs from its teacher's inputs.

    Args:
        steps: Updates of this stage, 0 for none.
        learning_rate: Learning rate of the processors' own parameters. This stage trains nothing else.
    """

    steps: int = 0
    learning_rate: float = 1e-3

    def __post_init__(self) -> None:
        _at_least("transfer", self, 0, "steps", "learning_rate")


@dataclass(frozen=True)
class DataConfig:
    """The data that the student learns from.

    Args:
        cache: Folder for the cached latents and prompt embeddings.
        images: Folder of images, each with a caption of the same name (.txt, or .json with a 'caption'); or a
            WebDataset tar, or a folder of such tars.
        prompts: Text file with one prompt per line, for images that the teacher draws into the folder `images`.
        sizes: Sizes (height, width) in pixels. Each image goes to the size that is nearest to its shape.
        native: Size (height, width) in pixels that a FLUX was trained at. Positions of larger sizes are scaled into it;
            if None, they are as the pipeline makes them.
        batch_size: Samples of a batch, per process or per `run.share` processes.
        null_prob: Share of the prompts that are replaced by the empty prompt, for the guidance at inference.
        shard_size: Samples per file of the cache.
        workers: Processes that load data.
        num_inference_steps: Denoising steps for images that the teacher draws; 0 for the pipeline's own number.
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
    num_inference_steps: int = 0

    def __post_init__(self) -> None:
        _at_least("data", self, 1, "batch_size", "shard_size")
        _at_least("data", self, 0, "workers", "num_inference_steps", "null_prob")
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
        name: 'adamw'; or 'adamw8bit', 'schedulefree' or 'prodigy', which need bitsandbytes, schedulefree or prodigyopt.
        learning_rate: Learning rate after the warmup; 1 for Prodigy.
        betas: Adam's betas.
        weight_decay: Adam's weight decay.
        schedule: Schedule of the learning rate after the warmup.
        warmup: Steps until the full learning rate.
        clip: Largest norm of the gradient, 0 to clip nothing.
        ema: Decay of the mean of the parameters. Sheets and the adapter use the mean; 0 for no mean.
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
    """How long the training runs, how it computes, and what it writes.

    Args:
        out: Folder for checkpoints, sheets, `metrics.jsonl` and the adapter.
        steps: Stop after this many updates.
        minutes: Stop after this many minutes, even before `steps`. The schedule of the learning rate ends with them.
        accumulate: Batches per update.
        share: How many processes compute one batch together, each a part of its tokens: for pictures that are too large
            or too slow for one GPU. FLUX.1, FLUX.2 and Qwen-Image only; 1 for a batch per process.
        precision: Precision of the computation; 'no' for that of the weights.
        checkpointing: Compute activations again in the backward pass, to save memory.
        seed: Seed of all random numbers.
        save_every: Steps between checkpoints, 0 for one checkpoint at the end.
        keep: How many checkpoints to keep.
        sheet_every: Steps between sheets of validation pictures, 0 for one sheet at the end.
        sheet_inference_steps: Denoising steps of these pictures.
        measure_every: Steps between measurements of the KD error, which go to `curve.jsonl`; 0 for none.
        trackers: Where to send the metrics: 'tensorboard', 'wandb', or any other tracker that accelerate knows.
        save_dtype: Dtype of the saved adapter.
        export: Also write the adapter in the released format of 'clear' or 'linfusion'.
        quiet: Show no progress bar.
    """

    out: Path
    steps: int = 1000
    minutes: float | None = None
    accumulate: int = 1
    share: int = 1
    precision: Literal["no", "bf16", "fp16"] = "no"
    checkpointing: bool = False
    seed: int = 0
    save_every: int = 500
    keep: int = 2
    sheet_every: int = 0
    sheet_inference_steps: int = 20
    measure_every: int = 0
    trackers: list[str] = field(default_factory=list)
    save_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    export: Literal["clear", "linfusion"] | None = None
    quiet: bool = False

    def __post_init__(self) -> None:
        _at_least("run", self, 1, "steps", "accumulate", "share", "keep", "sheet_inference_steps")
        _at_least("run", self, 0, "save_every", "sheet_every", "measure_every", "seed")
        if self.minutes is not None and self.minutes <= 0:
            raise ValueError(f"run.minutes must be above 0, got {self.minutes}")


@dataclass(frozen=True)
class EvalConfig:
    """How the trained student is measured.

    Args:
        adapter: Folder of the adapter; `run.out`/adapter if None.
        prompts: Text file with one prompt per line; the captions of the cache if None.
        count: How many prompts to draw.
        batch_size: Pictures drawn at a time.
        num_inference_steps: Denoising steps; 0 for the pipeline's own number.
        size: Size (height, width) in pixels; the first of `data.sizes` if None.
        sigmas: Noise levels at which predictions are compared with the teacher's.
        features: Features of the kernel distance: 'pixels', or the name of a timm model.
        truth: The npz of icons that `examples/emoji/rasterise.py` writes, for the emoji teachers.
    """

    adapter: Path | None = None
    prompts: Path | None = None
    count: int = 16
    batch_size: int = 8
    num_inference_steps: int = 0
    size: tuple[int, int] | None = None
    sigmas: list[float] = field(default_factory=lambda: [0.15, 0.4, 0.65, 0.9])
    features: str = "pixels"
    truth: Path | None = None

    def __post_init__(self) -> None:
        _at_least("eval", self, 1, "count", "batch_size")
        _at_least("eval", self, 0, "num_inference_steps")
        if not self.sigmas or not all(0 < sigma < 1 for sigma in self.sigmas):
            raise ValueError(f"eval.sigmas must be at least one number between 0 and 1, got {self.sigmas}")


@dataclass(frozen=True)
class Config:
    """All settings of a distillation.

    Args:
        stages: Settings that stages of the training have instead of these, such as `{loss: {task: 0}, run: {steps:
            200}}`. Each stage starts from what the one before it trained, and counts its own steps. `transfer` belongs
            to the first stage.
    """

    model: ModelConfig
    student: StudentConfig
    data: DataConfig
    run: RunConfig
    loss: LossConfig = field(default_factory=LossConfig)
    transfer: TransferConfig = field(default_factory=TransferConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    stages: list[dict[str, dict[str, Any]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.model.dtype != "float32" and self.run.precision == "no":
            wanted = "bf16" if self.model.dtype == "bfloat16" else "fp16"
            raise ValueError(
                f"run.precision must be '{wanted}' with model.dtype '{self.model.dtype}': what trains is float32"
            )
        if self.loss.guided and self.data.batch_size % 2:
            raise ValueError(f"loss.guided: data.batch_size must be even, got {self.data.batch_size}")
        if self.model.quantisation and (self.student.trains_weights or self.run.export):
            raise ValueError(
                "model.quantisation: quantised projections are not trained, and not exported: student.trainable must "
                f"be 'new' or 'lora', got {self.student.trainable!r}, and run.export left out"
            )
        self.each_stage()

    def changed(self, changes: Mapping[str, Mapping[str, Any]], of: str) -> "Config":
        """Return settings with other values, by section and key; `of` says where these come from.

        Raises:
            TypeError: If a value has another type.
            ValueError: If a key does not exist or a value does not fit.
        """
        sections = {}
        for name, values in fitting(of, changes, dict[str, dict[str, Any]]).items():
            check_one_of(of, name, ("student", "data", "run", "loss", "transfer", "optimizer"))
            section = getattr(self, name)
            kinds = get_type_hints(type(section))
            for key in values:
                check_one_of(f"{of}: {name}", key, kinds)
            fields = {key: fitting(f"{of}: {name}.{key}", value, kinds[key]) for key, value in values.items()}
            try:
                sections[name] = replace(section, **fields)
            except (TypeError, ValueError) as error:
                raise ValueError(f"{of}: {error}") from None
        return replace(self, **sections)

    def each_stage(self) -> list["Config"]:
        """Return the settings of each stage; the last one has the run's own folder.

        Raises:
            TypeError: If a value has another type.
            ValueError: If a stage cannot have a setting, or cannot start from the one before it.
        """
        stages: list[Config] = []
        for number, changes in enumerate(self.stages, 1):
            of = f"stages: {number}"
            stage = replace(self, stages=[]).changed(changes, of)
            for section, key in (("run", "out"), *(("student", key) for key in _OF_THE_FIRST if stages)):
                if key in changes.get(section, {}):
                    whose = "the first stage decides" if section == "student" else "each stage has a folder in run.out"
                    raise ValueError(f"{of}: {section}.{key} cannot be set here: {whose}")
            out = self.run.out if number == len(self.stages) else self.run.out / f"stage-{number}"
            stage = replace(stage, run=replace(stage.run, out=out))
            if stages:
                if self.model.quantisation and stages[-1].student.trainable == "lora":
                    raise ValueError(
                        f"{of}: nothing can start from the LoRA layers of the stage before, because they are not "
                        f"merged into weights in {self.model.quantisation}: train 'new' there, or leave out "
                        "model.quantisation"
                    )
                before = str(stages[-1].run.out / "adapter")
                start = replace(stage.student, adapter=before, where=None, init="inherited")
                own = stage.transfer if "transfer" in changes else TransferConfig()
                stage = replace(stage, student=start, transfer=own)
            stages.append(stage)
        return stages or [self]


def _at_least(section: str, values: Any, least: float, *names: str) -> None:
    """Refuse numbers of a section that are too small."""
    for name in names:
        check_number(f"{section}.{name}", getattr(values, name), least=least)
