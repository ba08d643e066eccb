"""A schedule: different processors in different parts of the denoising."""

from dataclasses import dataclass

from torch import Tensor, nn

from vision_attn.grid import Grid
from vision_attn.processors.base import AttnSpec, Layer, Moment, Processor, register


@register(tests={})  # its stages are other processors
@dataclass(frozen=True)
class Schedule(AttnSpec):
    """Runs each stage's processor until a share of the denoising is done.

    The share is read from the host's timestep: 0 at pure noise, 1 at the image. If the scheduler spaces its timesteps
    evenly, as DDIM does, it is the share of the steps.

    Args:
        stages: (until, spec) pairs, with rising shares; the last share is 1.
    """

    stages: tuple[tuple[float, AttnSpec], ...]

    def __post_init__(self) -> None:
        stages = tuple((until, spec) for until, spec in self.stages)
        object.__setattr__(self, "stages", stages)
        ends = [until for until, _ in stages]
        if not stages or ends != sorted(set(ends)) or ends[0] <= 0 or ends[-1] != 1:
            raise ValueError(f"stages must end at rising shares of the denoising, the last at 1.0, got {ends}")
        for _, spec in stages:
            if not isinstance(spec, AttnSpec) or isinstance(spec, Schedule):
                raise TypeError(f"a stage must be the spec of a processor, got {spec!r}")

    @property
    def thresholds(self) -> tuple[float, ...]:
        """Shares of the denoising at which the stages begin."""
        return (0.0, *(until for until, _ in self.stages[:-1]))

    def build(self, layer: Layer) -> "ScheduledAttention":
        """Return the processor of one layer."""
        return ScheduledAttention(self, layer)

    @property
    def shares(self) -> tuple[tuple[float, AttnSpec], ...]:
        """The stages' specs, each after its share of the denoising; the shares sum to 1."""
        return tuple((until - begin, spec) for begin, (until, spec) in zip(self.thresholds, self.stages, strict=True))

    def attended(self, grid: Grid) -> float:
        """Return the mean over the denoising of the share of tokens that one token attends to."""
        return sum(share * spec.attended(grid) for share, spec in self.shares)

    def flops(self, grid: Grid, layer: Layer) -> float:
        """Return the mean over the denoising of the stages' operations."""
        return sum(share * spec.flops(grid, layer) for share, spec in self.shares)

    @property
    def passes(self) -> float:
        """The mean over the denoising of the stages' passes."""
        return sum(share * spec.passes for share, spec in self.shares)

    def products(self, grid: Grid, layer: Layer) -> float:
        """Return the mean over the denoising of the stages' products with weights."""
        return sum(share * spec.products(grid, layer) for share, spec in self.shares)

    @property
    def calls(self) -> float:
        """The mean over the denoising of the stages' calls."""
        return sum(share * spec.calls for share, spec in self.shares)


class ScheduledAttention(Processor):
    """Holds the processors of all stages, and returns the one for the moment."""

    wants = True

    def __init__(self, spec: Schedule, layer: Layer) -> None:
        super().__init__()
        self.spec = spec
        self.stages = nn.ModuleList(stage.build(layer) for _, stage in spec.stages)

    def at(self, moment: Moment) -> Processor:
        """Return the processor of the stage; the first one if the host's progress is not known."""
        progress = 0.0 if moment.progress is None else moment.progress
        number = sum(progress >= until for until, _ in self.spec.stages[:-1])
        processor: Processor = self.stages[number]  # type: ignore[assignment]
        return processor

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, mask: Tensor | None = None, scale: float | None = None
    ) -> Tensor:
        """Run the first stage: see `Processor.forward`. A converted host runs `at(moment)` instead."""
        return self.at(Moment())(q, k, v, grid, mask, scale)
