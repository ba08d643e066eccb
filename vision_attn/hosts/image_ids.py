"""Decodes FLUX's position ids into a grid: the one host whose grid is in the values of a tensor.

`img_ids` is `[N, 3 or 4]` (or with a batch axis): segment, row, column. Its dtype is that of the prompt, and bfloat16
cannot tell 256 from 257, so the grid is read from where rows change, never from the largest id.
"""

import torch
from torch import Tensor

from vision_attn.grid import Grid


def grid_of_ids(ids: Tensor) -> Grid | str:
    """Return the grid of the first segment, with all further segments as its suffix, or why there is none.

    Args:
        ids: `[N, 3 or 4]` or `[B, N, 3 or 4]`: segment, row and column of each image token.
    """
    positions = (ids[0] if ids.dim() == 3 else ids)[:, :3].cpu().double()
    segments, rows, columns = positions.unbind(1)
    tokens = _first(segments != segments[0], len(segments))
    rows, columns = rows[:tokens], columns[:tokens]
    width = _first(rows != rows[0], tokens)
    height = tokens // width
    if height * width == tokens and (tokens > 1 or len(segments) == 1):
        rows, columns = rows.view(height, width), columns.view(height, width)
        in_rows = bool((rows == rows[:, :1]).all() and (columns == columns[:1]).all())
        if in_rows and bool((columns[0].diff() >= 0).all() and (rows[:, 0].diff() >= 0).all()):
            return Grid(height, width, suffix=len(segments) - tokens)
    return f"the values of img_ids {tuple(ids.shape)} are not those of a grid"


def _first(true: Tensor, otherwise: int) -> int:
    """Index of the first True."""
    found = torch.nonzero(true)
    return int(found[0]) if len(found) else otherwise
