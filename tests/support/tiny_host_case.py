"""What a tiny host is, and what all of them are built with.

Nothing in these tables imports `vision_attn`: the rows state what diffusers and timm do, and `test_tiny_hosts.py`
proves it.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

TEXT_DIM, POOLED_DIM, CHANNELS = 32, 16, 4
TEXT = 7  # tokens of text that the tests give, unless a test is about their number
REFERENCE = (3, 5)  # grid of the reference image in the rows that have one


class Layout(NamedTuple):
    """One sequence of a self-attention layer: `prefix` tokens, the grid, grids of reference images, `suffix` tokens."""

    prefix: int
    grid: tuple[int, int]
    suffix: int = 0
    reference: tuple[tuple[int, int], ...] = ()

    @property
    def tokens(self) -> int:
        return self.prefix + sum(height * width for height, width in (self.grid, *self.reference)) + self.suffix


@dataclass(frozen=True)
class HostCase:
    """A tiny host. `height, width` count tokens of its top attention level, `text` its text tokens.

    Attributes:
        build: Returns the model: equal weights on every call, eval mode, fp32, no parameter left at zero.
        inputs: `(height, width, batch, text)` -> keyword arguments of the model, equal on every call.
        output: Picks the tensor out of what the model returns.
        shape: `(height, width, batch)` -> shape of that tensor.
        layouts: `(height, width, text)` -> the sequences of all self-attention layers that hold the grid.
        text_only: `text` -> lengths of self-attention over text alone (token refiners), which is not to be touched.
        fixed_size: True if only square grids run.
        more_keys: True if layers have keys without a query, before the others; 'last' if behind them.
        autocast: False if the model itself does not run under autocast.
        patch: How much of the input's side, in latents or pixels, makes the side of a token.
    """

    id: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int, int, int, int], dict[str, Any]]
    output: Callable[[Any], Tensor]
    shape: Callable[[int, int, int], tuple[int, ...]]
    layouts: Callable[[int, int, int], set[Layout]]
    text_only: Callable[[int], set[int]] = field(default=lambda text: set())
    fixed_size: bool = False
    more_keys: bool | str = False
    autocast: bool = True
    patch: int = 2
    notes: str = ""

    def joint(self, height: int, width: int, text: int) -> Layout:
        """Return the longest sequence: text and image together where the family attends jointly."""
        return max(self.layouts(height, width, text), key=lambda layout: layout.tokens)

    def prefix(self, text: int) -> int:
        """Return the number of tokens before the grid in the joint sequence."""
        return self.joint(4, 6, text).prefix

    def suffix(self, height: int, width: int, text: int) -> int:
        """Return the number of tokens after the grid in the joint sequence, reference images not counted."""
        return self.joint(height, width, text).suffix

    def grids(self, height: int, width: int) -> set[tuple[int, int]]:
        """Return the grids of its self-attention layers, reference images not counted."""
        return {layout.grid for layout in self.layouts(height, width, 8)}


def randomise(model: nn.Module) -> nn.Module:
    """Redraw all parameters, so that no gate or projection is zero and a wrong attention changes the output."""
    generator = torch.Generator().manual_seed(0)
    linear = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d | nn.Conv3d)}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if id(parameter) in linear:
                fan_in = parameter[0].numel()
                parameter.copy_(noise / fan_in**0.5)
            elif parameter.ndim > 1:
                parameter.copy_(0.5 * noise)
            else:
                is_scale = name.endswith("weight") or "gamma" in name
                parameter.copy_(is_scale + 0.05 * noise)
    return model.eval()


def build(model_class: Callable[..., nn.Module], *args: Any, **config: Any) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return randomise(model_class(*args, **config))


def noise(*shape: int, seed: int = 0) -> Tensor:
    """Return fp32 normal noise that depends on nothing but its shape and `seed`."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def half(grid: tuple[int, int]) -> tuple[int, int]:
    return (grid[0] + 1) // 2, (grid[1] + 1) // 2


def sample(output: Any) -> Tensor:
    return output.sample


def pixels(channels: int, patch: int = 2) -> Callable[[int, int, int], tuple[int, ...]]:
    return lambda height, width, batch: (batch, channels, patch * height, patch * width)


def packed(channels: int, reference: int = 0) -> Callable[[int, int, int], tuple[int, ...]]:
    return lambda height, width, batch: (batch, height * width + reference, channels)


def alone(height: int, width: int, text: int) -> set[Layout]:
    return {Layout(0, (height, width))}


def text_first(height: int, width: int, text: int, *, extra: int = 0, reference: tuple = ()) -> set[Layout]:
    return {Layout(extra + text, (height, width), reference=reference)}
