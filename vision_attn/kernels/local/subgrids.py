"""Cuts a grid into the sub-grids of a dilation: on each of them a dilated window is an undilated one."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Subgrid:
    """`n_y * n_x` sub-grids of one shape, by their rows `[n_y, L_y]` and columns `[n_x, L_x]` in the whole grid."""

    size: tuple[int, int]
    rows: Tensor
    columns: Tensor

    @property
    def _whole(self) -> bool:
        return self.size == (self.rows.shape[1], self.columns.shape[1])

    @property
    def _index(self) -> tuple[slice, Tensor, Tensor]:
        return slice(None), self.rows[:, None, :, None], self.columns[None, :, None, :]

    def take(self, t: Tensor) -> Tensor:
        """`[B, height * width, H, D]` to `[B, n_y * n_x, L_y, L_x, H, D]`; a view if nothing is dilated."""
        t = t.unflatten(1, self.size)
        if self._whole:
            return t[:, None]
        return t[self._index].flatten(1, 2)

    def put(self, part: Tensor, whole: Tensor) -> None:
        """Write a sub-grid back into `whole`."""
        whole = whole.unflatten(1, self.size)
        if self._whole:
            whole.copy_(part[:, 0])
        else:
            whole[self._index] = part.unflatten(1, (len(self.rows), len(self.columns)))


def subgrids(size: Sequence[int], steps: Sequence[int], device: torch.device) -> Iterator[Subgrid]:
    """Yield the sub-grids of a dilation, those of one shape together."""

    def groups(length: int, d: int) -> list[Tensor]:
        long = length % d  # the first `long` groups have one token more
        first = torch.arange(d, device=device)[:, None]
        cuts = ((first[:long], length // d + 1), (first[long:], length // d))
        return [g + d * torch.arange(n, device=device) for g, n in cuts if len(g)]

    for rows in groups(size[0], steps[0]):
        for columns in groups(size[1], steps[1]):
            yield Subgrid((size[0], size[1]), rows, columns)
