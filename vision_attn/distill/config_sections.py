"""The settings of what is learned: the model, the student, the losses and the data."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from vision_attn.distill.checks import at_least, one_of
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
        at_least("student", self, 0, "min_tokens")
        at_least("student", self, 1, "rank")
        for role in self.projections:
            one_of("student.projections", role, ("q", "k", "v", "out"))
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
        at_least("loss", self, 0, "task", "prediction", "attention", "variance")
        at_least("loss", self, 1, "every")
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
        at_least("transfer", self, 0, "steps", "learning_rate")


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
        at_least("data", self, 1, "batch_size", "shard_size")
        at_least("data", self, 0, "workers", "steps", "null_prob")
        if self.null_prob > 1:
            raise ValueError(f"data.null_prob must be at most 1, got {self.null_prob}")
        if not self.sizes or any(min(size) < 1 for size in self.sizes):
            raise ValueError(f"data.sizes must be pairs (height, width) in pixels, got {self.sizes}")

    def stretch(self, size: tuple[int, int]) -> float:
        """Return the side of pictures of a size over that of `native`; 1 without one."""
        return math.sqrt(size[0] * size[1] / (self.native[0] * self.native[1])) if self.native else 1.0
