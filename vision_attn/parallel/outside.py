"""The tokens outside the grid (text): every process gets their keys, and each sees every key of every process.

Each process attends its own keys for all these tokens, and the parts are merged by their log-sum-exp. While a halo is
under way this is the work to do.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from vision_attn.kernels.agent.parts import dense_part, dense_part_gradients
from vision_attn.parallel.ranks import Ranks
from vision_attn.parallel.transfers import Pending, apart, as_rows, gather, transfer


class Shared(NamedTuple):
    """Keys and values `[B, E, H, D]` that every token of the grid sees; `mask` is bool `[B, E]`."""

    k: Tensor
    v: Tensor
    mask: Tensor | None


class Outside:
    """All tokens outside the grid, which are gathered when this is made: those of rank 0 first.

    Args:
        q: Queries of the own slice `[B, tokens, H, D]`.
        k: Keys, like `q`.
        v: Values, like `q`.
        ranks: Who holds what.
        mask: Bool `[B, own tokens outside the grid]`, False for padding keys, or None on all processes.
        scale: Factor of the logits.

    Attributes:
        image: Queries, keys and values of the own tokens of the grid.
    """

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, ranks: Ranks, mask: Tensor | None, scale: float) -> None:
        self.ranks, self.scale, self._own_mask = ranks, scale, mask
        self._local = k, v
        self.count = sum(ranks.outside)
        self._rows = self._mask = None
        self._parts: Pending | None = None
        pieces = [ranks.pieces(t) for t in (q, k, v)]
        self.image = tuple(image for _, image, _ in pieces)
        if self.count:
            rows = as_rows(*(torch.cat([prefix, suffix], 1) for prefix, _, suffix in pieces))
            self._rows = gather(rows, ranks.outside, ranks, "outside")
            if mask is not None:
                self._mask = gather(mask.mT.to(torch.uint8), ranks.outside, ranks, "mask")

    def own_mask(self) -> Tensor | None:
        """Return which keys of the own slice are seen, `[B, tokens]`; None for all."""
        if self._own_mask is None:
            return None
        image = self._own_mask.new_ones(len(self._own_mask), self.ranks.count(self.ranks.image))
        return self.ranks.together(self._own_mask, image)

    def wait(self) -> "Outside":
        """Wait for the keys, and attend the own keys for the tokens outside the grid; parts are then under way."""
        if self._rows is None:
            self.k, self.v, self.mask = *(t.detach()[:, :0] for t in self._local), None
            return self
        self.q, self.k, self.v = apart(self._rows.wait(), (self._local[0], *self._local))
        self.mask = None if self._mask is None else self._mask.wait().mT.bool()
        own = self.ranks.outside[self.ranks.rank]
        with torch.no_grad():
            rows = packed(*dense_part(self.q, *self._local, self.own_mask(), self.scale))
            self._parts = transfer(rows, [own] * self.ranks.size, self.ranks.outside, self.ranks, "parts")
        return self

    def heads(self, part: slice) -> "Shared":
        """Return the keys of some heads, once they are there."""
        return Shared(self.k[:, :, part], self.v[:, :, part], self.mask)

    def rows(self) -> Tensor:
        """Return the merged outputs of the own tokens outside the grid `[B, own, H, D]`."""
        if self._parts is None:
            return self._local[1].detach()[:, :0]
        out: Tensor = _Merged.apply(self.q, *self._local, self)
        return out

    def merged(self) -> tuple[Tensor, Tensor]:
        """Wait for the parts, and merge them: `[B, own, H, D]`, and the log-sum-exp `[B, H, own]`."""
        assert self._parts is not None
        B, _, H, D = self.q.shape
        parts = self._parts.wait().unflatten(0, (self.ranks.size, -1))
        return merge_parts(*unpacked(parts, (B, H, D), self.q.dtype), self.q.dtype)


class _Merged(torch.autograd.Function):
    """The merged rows. Backward, each process gets the gradients of all rows, for its own keys."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, outside: Outside) -> Tensor:
        o, lse = outside.merged()
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.about = outside.ranks, outside.own_mask(), outside.scale
        return o

    @staticmethod
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, o, lse = ctx.saved_tensors
        ranks, hidden, scale = ctx.about
        return *rows_gradients(send_gradients(do, o, lse, ranks), q, k, v, hidden, ranks, scale), None


def send_gradients(do: Tensor, o: Tensor, lse: Tensor, ranks: Ranks) -> Pending:
    """Begin to give all processes the gradients of the merged rows, the rows and their log-sum-exp."""
    rows = torch.cat([do.transpose(0, 1).flatten(1), packed(o, lse)], 1)
    return gather(rows, ranks.outside, ranks, "outside gradients")


def rows_gradients(
    sent: Pending, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, ranks: Ranks, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what the own keys give to the gradients of all queries outside the grid, and their own gradients.

    Args:
        sent: What `send_gradients` began.
        q: The queries outside the grid of all processes `[B, E, H, D]`.
        k: Keys of the own slice.
        v: Values, like `k`.
        hidden: Which keys of the own slice are seen `[B, tokens]`, None for all.
        ranks: Who holds what.
        scale: Factor of the logits.
    """
    B, _, H, D = q.shape
    rows = sent.wait()
    do = rows[:, : B * H * D].unflatten(1, (B, H, D)).transpose(0, 1)
    o, lse = unpacked(rows[:, B * H * D :], (B, H, D), q.dtype)
    return dense_part_gradients(do, o.transpose(0, 1), lse.permute(1, 2, 0), q, k, v, hidden, scale)[:3]


def packed(o: Tensor, lse: Tensor) -> Tensor:
    """Lay outputs `[B, N, H, D]` and log-sum-exps `[B, H, N]` out as rows `[N, ...]` of one dtype, bit by bit."""
    sums = lse.permute(2, 0, 1).flatten(1).contiguous()
    return torch.cat([o.transpose(0, 1).flatten(1), sums.view(o.dtype)], 1)


def unpacked(rows: Tensor, sides: tuple[int, int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Undo `packed`, but for the order of axes: `[..., N, B, H, D]` and `[..., N, B, H]`."""
    B, H, D = sides
    wide = torch.promote_types(dtype, torch.float32)
    o = rows[..., : B * H * D].unflatten(-1, (B, H, D))
    return o, rows[..., B * H * D :].contiguous().view(wide).unflatten(-1, (B, H))


def merge_parts(o: Tensor, lse: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Merge parts `[parts, N, B, H, D]` by their log-sum-exps `[parts, N, B, H]` in base 2.

    Returns:
        `[B, N, H, D]` in `dtype`, and the log-sum-exp `[B, H, N]`.
    """
    top = lse.amax(0)
    weight = (lse - top).exp2()
    total = weight.sum(0)
    merged = (o.to(lse.dtype) * (weight / total)[..., None]).sum(0)
    return merged.to(dtype).transpose(0, 1), (top + total.log2()).permute(1, 2, 0)
