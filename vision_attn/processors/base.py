"""What every processor is: a frozen spec with the paper's hyperparameters, which builds a module on q, k, v."""

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from torch import Generator, Tensor, nn

from vision_attn.grid import Grid

CHILD = "substitute"  # name of a processor in its attention module: no pattern of names that others use finds it
_STORED = "vision_attn"  # that name in adapter files, and in state dicts of earlier versions


def stored_name(name: str) -> str:
    """Return the name that a tensor of a converted model has in an adapter file."""
    return name.replace(f".{CHILD}.", f".{_STORED}.")


def model_name(name: str) -> str:
    """Return the name that a tensor of an adapter file has in a converted model."""
    return name.replace(f".{_STORED}.", f".{CHILD}.")


@dataclass(frozen=True)
class Layer:
    """What a spec may know of the attention layer that it builds a processor for.

    Args:
        name: Name of the layer in its model.
        num_heads: H.
        head_dim: D.
        backend: How the processor's operators run.
        dim: Channels of the tokens that the host projects to queries and keys, None if it does not say.
    """

    name: str
    num_heads: int
    head_dim: int
    backend: str = "auto"
    dim: int | None = None


@dataclass(frozen=True)
class Moment:
    """What is known about the forward that runs, for the processors that ask for it by `wants`.

    Args:
        progress: Share of the denoising that is done, 0 at pure noise and 1 at the image; None if the host has no
            timestep.
        finest: Tokens of the host's finest grid, None if all grids are equal.
        block_input: Tokens `[B, n, C]` that entered the block of the layer, before its norm.
        rotary: Cosine and sine `[N, D]` by which the host rotated q and k, None if it does not pass them to the layer.
        random: Returns the generator on a device that all layers of the model share; None if none of them may draw.
    """

    progress: float | None = None
    finest: int | None = None
    block_input: Tensor | None = None
    rotary: tuple[Tensor, Tensor] | None = None
    random: Callable[[torch.device], Generator] | None = None

    def downsample(self, grid: Grid) -> int:
        """Return how much smaller the side of a layer's grid is than that of the host's finest grid."""
        return 1 if self.finest is None else math.ceil(math.sqrt(self.finest // grid.image_tokens))


class Processor(nn.Module, ABC):
    """Attention as one paper defines it, on projected, normalised and (where the host has one) rotated q, k, v.

    Attributes:
        wants: Whether `at` must be called with the moment before each forward. The processor that it returns gets the
            moment as one more argument of `forward` if it wants it too.
        heads_alike: Whether it computes all heads alike, so that a group of heads may stand in the batch.
        counts_calls: Whether what it computes depends on how often it was called, so no CUDA graph can replay it.
        apart: Names of modules that `forward` does not run.
        repeats_itself: Whether it does more than launch kernels, and repeats the launches in it by tapes of its own.
        changes: How often an attribute was set, by which those see it who remember calls.
    """

    wants: bool = False
    heads_alike: bool = False
    counts_calls: bool = False
    repeats_itself: bool = False
    apart: tuple[str, ...] = ()
    changes: int = 0

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name != "training":
            self.__dict__["changes"] = self.changes + 1

    @abstractmethod
    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, mask: Tensor | None = None, scale: float | None = None
    ) -> Tensor:
        """Attend over the tokens of one sequence.

        Args:
            q: Queries `[B, N, H, D]`.
            k: Keys, like `q`.
            v: Values, like `q`.
            grid: Where the image tokens lie, `grid.tokens == N`.
            mask: Bool `[B, prefix + suffix]`, False for padding keys outside the grid.
            scale: The host's factor of the logits, `D ** -0.5` if None.

        Returns:
            `[B, N, H, D]` in the dtype of `q`.
        """

    def biased(self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, bias: Tensor, scale: float | None = None) -> Tensor:
        """Attend as `forward` does, with a bias that is added to the logits of each pair of tokens.

        Args:
            q: Queries `[B, N, H, D]`.
            k: Keys, like `q`.
            v: Values, like `q`.
            grid: Where the image tokens lie, `grid.tokens == N`.
            bias: Broadcasts to `[B, H, N, N]`.
            scale: The host's factor of the logits, `D ** -0.5` if None.

        Raises:
            ValueError: If the processor has no logits of pairs.
        """
        raise ValueError(
            f"the host adds relative positions to the logits of each pair of tokens, and {type(self).__name__} cannot: "
            "use Clear without pool, Halo, Neighborhood, or Softmax"
        )

    def at(self, moment: Moment) -> "Processor":
        """Return the processor that runs at this moment: this one, unless it is a schedule."""
        return self

    def residuals(self) -> Mapping[str, nn.Module]:
        """Return modules f by 'q' and 'k': the host then projects x + f(x) instead of x."""
        return {}

    def add_residuals(self, x: Tensor, roles: Sequence[str]) -> Sequence[Tensor] | None:
        """Return x + f(x) of some of `residuals` at once; None if each of them is to be called by itself.

        Args:
            x: Tokens `[B, N, C]`.
            roles: The names of the modules f.
        """
        return None


class AttnSpec(ABC):
    """A processor's hyperparameters. Subclasses are frozen dataclasses that check their fields.

    Raises:
        TypeError: If a field has the wrong type.
        ValueError: If a field has a value that is not allowed.
    """

    def __str__(self) -> str:
        """Name the spec with the fields that differ from their defaults."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}  # type: ignore[arg-type]
        shown = {name: str(value) if isinstance(value, AttnSpec) else repr(value) for name, value in values.items()}
        given = [f.name for f in dataclasses.fields(self) if values[f.name] != f.default]  # type: ignore[arg-type]
        return f"{type(self).__name__}({', '.join(f'{name}={shown[name]}' for name in given)})"

    @abstractmethod
    def build(self, layer: Layer) -> Processor:
        """Return the processor of one layer.

        Raises:
            ValueError: If the spec does not fit the layer.
        """

    @property
    def thresholds(self) -> tuple[float, ...]:
        """Shares of the denoising at which the processor changes; none unless it is a schedule."""
        return ()

    @abstractmethod
    def attended(self, grid: Grid) -> float:
        """Return the mean share of a sequence's tokens that one of its tokens attends to, 1.0 if dense.

        Raises:
            ValueError: If the spec does not fit the grid.
        """

    def tones(self, grid: Grid, row: int, column: int) -> Tensor | None:
        """Return in how much detail a token meets each token of the grid, for a picture.

        Args:
            grid: The sequence.
            row: Row of the token.
            column: Column of the token.

        Returns:
            `[height, width]` in [0, 1]; None if the weights of equal keys say it all.
        """
        return None

    def flops(self, grid: Grid, layer: Layer) -> float:
        """Return the floating point operations that the attention needs for one sequence, without projections."""
        return 4 * grid.tokens**2 * self.attended(grid) * layer.num_heads * layer.head_dim

    def products(self, grid: Grid, layer: Layer) -> float:
        """Return those of `flops` that are products of tokens with weights, which run faster than attention does."""
        return 0.0

    @property
    def passes(self) -> float:
        """How often q, k, v and o go through memory, in units of one read or write of each of them."""
        return 1.0

    @property
    def calls(self) -> float:
        """About how many operations the host calls for one attention; a kernel of Triton counts as two."""
        return 8.0


@dataclass(frozen=True)
class Registration:
    """What the package's lists know about a processor: every list is made from these.

    Attributes:
        spec: The class of its spec. `set_attn_processor`, commands and settings take its name, in any case.
        tests: Specs for tiny hosts, by name: the tests run each of them.
        demo: Specs that the demo draws with.
        bench: Specs that the benchmark of pipelines times, by name.
        draws_untrained: Whether a converted model is worth drawing with before it is trained.
        first: Whether it is recommended before the others.
    """

    spec: type[AttnSpec]
    tests: Mapping[str, AttnSpec]
    demo: tuple[AttnSpec, ...]
    bench: Mapping[str, AttnSpec]
    draws_untrained: bool
    first: bool = False


REGISTRY: dict[str, Registration] = {}


def registrations() -> list[Registration]:
    """Return all processors in the order of tables: the recommended one, then those that draw well untrained."""
    return sorted(REGISTRY.values(), key=lambda known: (not known.first, not known.draws_untrained))


_Spec = TypeVar("_Spec", bound=AttnSpec)


def register(
    *,
    tests: Mapping[str, Mapping[str, Any]],
    demo: Sequence[Mapping[str, Any]] = (),
    bench: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
    draws_untrained: bool = False,
    first: bool = False,
) -> Callable[[type[_Spec]], type[_Spec]]:
    """Make a processor known by its name, and to the lists of the tests, the demo and the benchmark.

        @register(tests={"clear": dict(radius=2)}, demo=[dict(radius=8)], bench={"clear r16": dict(radius=16)})
        @dataclass(frozen=True)
        class Clear(AttnSpec): ...

    Args:
        tests: Fields that fit a grid of a few tokens, by the name of the test's row; empty for a processor that has
            tests of its own.
        demo: Fields that the demo shows.
        bench: Fields that the benchmark of pipelines times, by the candidate's name.
        draws_untrained: Whether a converted model is worth drawing with before it is trained.
        first: Whether it is recommended before the others.

    Raises:
        ValueError: If another class has the name.
    """

    def add(spec: type[_Spec]) -> type[_Spec]:
        name = spec.__name__.lower()
        if name in REGISTRY and REGISTRY[name].spec.__qualname__ != spec.__qualname__:
            raise ValueError(f"the name {name!r} is taken by {REGISTRY[name].spec!r}")
        REGISTRY[name] = Registration(
            spec,
            {row: spec(**fields) for row, fields in tests.items()},
            tuple(spec(**fields) for fields in demo),
            {row: spec(**fields) for row, fields in bench.items()},
            draws_untrained,
            first,
        )
        return spec

    return add
