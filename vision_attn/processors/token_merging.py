"""Token merging: averages tokens of a grid into similar ones, and copies the results back.

Paper: 'Token Merging for Fast Stable Diffusion' - https://arxiv.org/abs/2303.17604
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from vision_attn.grid import Grid
from vision_attn.kernels.backend import exporting


@dataclass(frozen=True)
class Matching:
    """Which tokens of a grid stay, and which are merged into which, the most similar first.

    Attributes:
        kept: Index of the tokens that always stay, one for each cell `[K]`.
        others: Index of all other tokens, by falling similarity `[B, n - K]`.
        partner: Place in `kept` of the token that each of `others` is most similar to `[B, n - K]`.
    """

    kept: Tensor
    others: Tensor
    partner: Tensor

    @classmethod
    def of(cls, metric: Tensor, grid: Grid, cell: tuple[int, int], generator: torch.Generator | None) -> "Matching":
        """Match the tokens of a grid.

        Args:
            metric: Tokens of length 1 `[B, height * width, C]`.
            grid: The grid; only its height and width are used.
            cell: Height and width of a cell; tokens in rows and columns that no whole cell covers are `others`.
            generator: Draws the token that a cell keeps; if None, it is the top left one.
        """
        height, width = cell
        rows, columns = grid.height // height, grid.width // width
        inside = torch.zeros(rows, columns, dtype=torch.long, device=metric.device)
        if generator is not None:
            shape = (rows, columns, 1)
            inside = torch.randint(height * width, shape, generator=generator, device=metric.device)[..., 0]
        y = torch.arange(rows, device=metric.device)[:, None] * height + inside // width
        x = torch.arange(columns, device=metric.device) * width + inside % width
        kept = (y * grid.width + x).flatten()
        n = grid.image_tokens
        order = torch.arange(n, device=metric.device).index_add(0, kept, torch.full_like(kept, n))
        others = order.argsort()[: n - len(kept)]  # those of `nonzero` would be of a number that export does not know
        best, partner = (metric[:, others] @ metric[:, kept].transpose(1, 2)).max(-1)
        order = best.argsort(dim=-1, descending=True)
        return cls(kept, others[order], partner.gather(1, order))

    def merge(self, t: Tensor, merged: int) -> Tensor:
        """Average the `merged` most similar of the others into their partners.

        Returns:
            `[B, n - merged, H, D]` for t `[B, n, H, D]`: what remains of the others, then the kept tokens.
        """
        rest = _take(t, self.others)
        kept = t[:, self.kept]
        index = self.partner[:, :merged, None, None].expand(-1, -1, *t.shape[2:])
        if exporting():  # ONNX has no mean, and what PyTorch writes instead is silently another number
            count = torch.ones_like(kept).scatter_add(1, index, torch.ones_like(rest[:, :merged]))
            kept = kept.scatter_add(1, index, rest[:, :merged]) / count
        else:
            kept = kept.scatter_reduce(1, index, rest[:, :merged], "mean", include_self=True)
        return torch.cat([rest[:, merged:], kept], 1)

    def unmerge(self, t: Tensor, merged: int) -> Tensor:
        """Give each token the result of the one it was merged into: `[B, n - merged, H, D]` to `[B, n, H, D]`."""
        remaining = self.others.shape[1] - merged
        rest, kept = t[:, :remaining], t[:, remaining:]
        others = torch.cat([_take(kept, self.partner[:, :merged]), rest], 1)
        places = torch.cat([self.others, self.kept.expand(t.shape[0], -1)], 1)
        return _take(torch.cat([others, kept], 1), places.argsort(1))


def _take(t: Tensor, index: Tensor) -> Tensor:
    """Pick tokens `[B, M, H, D]` of `[B, N, H, D]` by index `[B, M]`."""
    return t.gather(1, index[:, :, None, None].expand(-1, -1, *t.shape[2:]))
