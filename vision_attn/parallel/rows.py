"""Whole rows of an image over processes: who holds which, convolutions with rows of the neighbours, group norms.

A process holds some rows of each level of a UNet. A convolution that sees beyond them gets a row from each neighbour,
and zeros where the picture ends; a group norm takes its mean and variance over the rows of all.
"""

from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vision_attn.grid import Grid
from vision_attn.parallel.ranks import Cut, cuts_of
from vision_attn.parallel.transfers import gather, transfer

ROWS, LEVEL = "_vision_attn_rows", "_vision_attn_level"  # attributes of a module


@dataclass
class Rows:
    """The rows of a picture that each process holds, at every level of a UNet.

    Args:
        cut: The processes.
        levels: How many levels there are; each has half the rows of the one before, rounded up.

    Attributes:
        size: Height and width of the picture whose forward began last.
        modules: Classes of the model's modules when all of them were last looked at.
    """

    cut: Cut
    levels: int
    size: tuple[int, int] = (0, 0)
    modules: list[type[nn.Module]] = field(default_factory=list, compare=False, repr=False)

    def begin(self, height: int, width: int) -> None:
        """Note the size of the picture whose forward begins.

        Raises:
            ValueError: If a process would hold no row of the lowest level.
        """
        unit = 2 ** (self.levels - 1)
        if -(-height // unit) < self.cut.size:
            raise ValueError(
                f"{height} rows of latents have {-(-height // unit)} at the lowest of {self.levels} levels, and "
                f"{self.cut.size} processes need one each: draw at least {(self.cut.size - 1) * unit + 1} rows"
            )
        self.size = height, width

    def cuts(self, level: int = 0) -> tuple[int, ...]:
        """Return where the rows of each process begin at a level, and the end of the last."""
        unit = 2 ** (self.levels - 1)
        units = cuts_of(-(-self.size[0] // unit), self.cut.size)
        return tuple(min(n * unit >> level, self.grid(level).height) for n in units)

    def counts(self, level: int = 0) -> list[int]:
        """Return how many rows of a level each process holds."""
        return [stop - first for first, stop in pairwise(self.cuts(level))]

    def grid(self, level: int) -> Grid:
        """Return the whole grid of a level."""
        height, width = (-(-side // 2**level) for side in self.size)
        return Grid(height, width)

    def own(self, image: Tensor) -> Tensor:
        """Return the own rows of a whole image `[B, C, height, width]` of any level.

        Raises:
            ValueError: If it is of no level.
        """
        level = next((n for n in range(self.levels) if image.shape[-2:] == self.sides(n)), None)
        if level is None:
            raise ValueError(f"an input of {tuple(image.shape)} has the size of no level of a {self.size} picture")
        first, stop = self.cuts(level)[self.cut.rank : self.cut.rank + 2]
        return image[..., first:stop, :]

    def sides(self, level: int) -> torch.Size:
        """Return height and width of a level."""
        grid = self.grid(level)
        return torch.Size((grid.height, grid.width))

    def whole(self, image: Tensor) -> Tensor:
        """Return the whole of an image `[B, C, own rows, width]` of the first level.

        Its gradient is that of the own rows: every process computes the same from the whole, and the gradients of
        parameters are added over the processes.
        """
        found: Tensor = _Whole.apply(image, self.counts(), self.cut)
        return found

    def around(self, x: Tensor, above: int, below: int, end: int) -> Tensor:
        """Return the own rows with those of the neighbours around them.

        Args:
            x: The own rows of an image `[B, C, rows, width]`.
            above: How many rows come from the process before, or are zero where there is none.
            below: How many come from the process after.
            end: How many are zero where there is none.
        """
        rank, size = self.cut.rank, self.cut.size
        rows, take, give, sent = x.movedim(2, 0), [0] * size, [0] * size, []
        if rank:
            take[rank - 1], give[rank - 1] = above, below
            sent.append(rows[:below])
        if rank + 1 < size:
            take[rank + 1], give[rank + 1] = below, above
            sent.append(rows[len(rows) - above :])
        found = transfer(torch.cat(sent), take, give, self.cut, "rows of neighbours").wait().movedim(0, 2)
        before = above if rank else 0
        last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        layout = torch.channels_last if last else torch.contiguous_format
        zeros = [x.new_zeros((*x.shape[:2], n, x.shape[3])) for n in (above - before, 0 if rank + 1 < size else end)]
        parts = [zeros[0], found[:, :, :before], x, found[:, :, before:], zeros[1]]
        # an empty part keeps the transfer in the graph: backward, all processes take part in it
        return torch.cat([part.contiguous(memory_format=layout) for part in parts], 2)


@dataclass(frozen=True)
class Level:
    """A level of a UNet: where its attention finds its grid.

    Args:
        rows: Who holds which rows.
        number: 0 for the finest.
    """

    rows: Rows
    number: int

    def cut(self, last: Cut | None) -> Cut:
        """Return how the grid of the forward that begins is cut; `last` is kept if it is cut alike."""
        cuts = self.rows.cuts(self.number)
        return replace(self.rows.cut, rows=cuts) if last is None or last.rows != cuts else last

    @property
    def grid(self) -> Grid:
        """The whole grid."""
        return self.rows.grid(self.number)


class RowConv(nn.Conv2d):
    """A convolution of the rows that this process holds, and what it sees of the neighbours' rows."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _convolved(self, input, weight, bias)


@torch.compiler.disable  # what travels is known only when it runs
def _convolved(conv: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    rows: Rows = vars(conv)[ROWS]
    above, below = reach(conv)
    padding: Any = conv.padding
    x = rows.around(x, above, below, padding[0])
    return F.conv2d(x, weight, bias, conv.stride, (0, padding[1]), conv.dilation, conv.groups)


def reach(conv: nn.Conv2d) -> tuple[int, int]:
    """Return how many rows a convolution sees above and below rows of which its stride divides the number."""
    padding: Any = conv.padding
    side = conv.dilation[0] * (conv.kernel_size[0] - 1) + 1
    return padding[0], max(side - conv.stride[0] - padding[0], 0)


class RowNorm(nn.GroupNorm):
    """A group norm of the rows that this process holds, by mean and variance of the rows of all processes."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise `[B, C, ...]`."""
        return _normalised(self, input)


@torch.compiler.disable
def _normalised(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    if x.is_cuda and torch.is_autocast_enabled("cuda"):  # as for `group_norm` itself
        x = x.float()
    rows: Rows = vars(norm)[ROWS]
    y: Tensor = _GroupNorm.apply(x, norm.weight, norm.bias, norm.num_groups, norm.eps, rows.cut)
    return y


class _GroupNorm(torch.autograd.Function):
    """y = (x - mean) / sqrt(var + eps) * weight + bias, with mean and var over the rows of all processes."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float, cut: Cut
    ) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        x5 = x.unflatten(1, (groups, -1))  # [B, G, C / G, ...]
        mean, var = _moments(x5)  # [B, G]
        count = torch.full_like(mean, x5[0, 0].numel())
        counts, means, variances = _from_all(torch.stack([count, mean, var]), cut).unbind(1)
        total = counts.sum(0)
        share = counts / total
        mean = (share * means).sum(0)
        rstd = ((share * (variances + (means - mean).square())).sum(0) + eps).rsqrt()
        by_group, sides = (groups, -1), (*x5.shape[:3], *[1] * (x5.dim() - 3))
        scale = rstd[..., None].expand(x5.shape[:3])
        scale = scale if weight is None else scale * weight.to(wide).view(by_group)
        shift = -mean[..., None] * scale
        shift = shift if bias is None else shift + bias.to(wide).view(by_group)
        y = torch.empty_like(x)
        torch.addcmul(shift.view(sides), x5, scale.reshape(sides), out=y.unflatten(1, by_group))
        ctx.save_for_backward(x, weight, mean, rstd, total)
        ctx.about = groups, cut, None if bias is None else bias.dtype
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, rstd, total = ctx.saved_tensors
        groups, cut, bias_dtype = ctx.about
        x5, dy5 = (t.to(mean.dtype).unflatten(1, (groups, -1)) for t in (x, dy))
        rest = tuple(range(3, x5.dim()))
        sides = (*mean.shape, *[1] * (x5.dim() - 2))
        normal = (x5 - mean.view(sides)) * rstd.view(sides)
        db, dw = dy5.sum(rest), (dy5 * normal).sum(rest)  # [B, G, C / G]
        scaled = x5.new_ones(()) if weight is None else weight.to(mean.dtype).view(groups, -1)
        sums = _from_all(torch.stack([(db * scaled).sum(2), (dw * scaled).sum(2)]), cut).sum(0) / total
        by_channel = (scaled.expand(x5.shape[1:3])[None]).reshape(1, *x5.shape[1:3], *[1] * len(rest))
        dx = (dy5 * by_channel - sums[0].view(sides) - normal * sums[1].view(sides)) * rstd.view(sides)
        grads = [None if weight is None else dw.sum(0).flatten().to(weight.dtype)]
        grads += [None if bias_dtype is None else db.sum(0).flatten().to(bias_dtype)]
        return dx.flatten(1, 2).to(x.dtype), *grads, None, None, None


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and variance `[B, G]` of `[B, G, ...]`, in float32 or wider."""
    rest = tuple(range(2, x.dim()))
    if x.dtype in (torch.float32, torch.float64):
        var, mean = torch.var_mean(x, rest, correction=0)
        return mean, var
    # a copy in float32 would not be worth it: these read 16 bits, and add in 32
    mean = x.sum(rest, dtype=torch.float32) / x[0, 0].numel()
    squares = torch.linalg.vector_norm(x, dim=rest, dtype=torch.float32).square() / x[0, 0].numel()
    return mean, (squares - mean.square()).clamp(min=0)


def _from_all(own: Tensor, cut: Cut) -> Tensor:
    """Return a small tensor of every process: `[processes, ...]`."""
    found = gather(own.reshape(1, -1), [1] * cut.size, cut, "statistics of norms").wait()
    return found.view(cut.size, *own.shape)


class _Whole(torch.autograd.Function):
    """Rows of all processes; backward, the gradient of the own ones."""

    @staticmethod
    def forward(ctx: Any, image: Tensor, counts: list[int], cut: Cut) -> Tensor:
        ctx.own = sum(counts[: cut.rank]), counts[cut.rank]
        return gather(image.movedim(2, 0), counts, cut, "rows of the output").wait().movedim(0, 2).contiguous()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.narrow(2, *ctx.own), None, None
