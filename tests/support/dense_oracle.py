"""What a local processor must compute: the host's own attention with the dense mask of a window."""

from typing import Any

import torch
import torch.nn.functional as F
from tiny_hosts import Layout
from torch import Tensor
from torch.overrides import TorchFunctionMode

from vision_attn import Grid
from vision_attn.kernels.local import Window

RADIUS_2, KERNEL_3 = Window(radius=2), Window(kernel_size=3)


def grid_of(layout: Layout) -> Grid:
    """Write a row's layout as the package does: reference images are suffix tokens."""
    image = layout.grid[0] * layout.grid[1]
    return Grid(*layout.grid, prefix=layout.prefix, suffix=layout.tokens - layout.prefix - image)


def mask_of(grid: Grid, window: Window) -> Tensor:
    """Return which keys each query sees, `[N, N]`: the window inside the grid, and everything elsewhere."""
    seen = torch.ones(grid.tokens, grid.tokens, dtype=torch.bool)
    seen[grid.image, grid.image] = window.allowed(grid)
    return seen


class DenseOracle(TorchFunctionMode):
    """Adds the mask of a window to every self-attention call over one of the layouts.

    Calls that have a mask already keep their own alone if `masked_dense`. With `more_keys`, the queries of a call may
    be the last tokens of the sequence only; the first ones if it is 'last'.
    """

    def __init__(
        self, layouts: set[Layout], window: Window, masked_dense: bool = False, *, more_keys: bool | str = False
    ) -> None:
        super().__init__()
        self.masks = {layout.tokens: mask_of(grid_of(layout), window) for layout in layouts}
        assert len(self.masks) == len(layouts)
        self.masked_dense, self.more_keys = masked_dense, more_keys
        self.calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
        inputs = dict(zip(names, args, strict=False)) | kwargs
        mask, queries, tokens = inputs.get("attn_mask"), inputs["query"].shape[-2], inputs["key"].shape[-2]
        own = queries == tokens or (self.more_keys and queries < tokens)
        if own and tokens in self.masks and not (self.masked_dense and mask is not None):
            seen = self.masks[tokens][:queries] if self.more_keys == "last" else self.masks[tokens][-queries:]
            if mask is None or mask.dtype == torch.bool:
                inputs["attn_mask"] = seen if mask is None else seen & mask
            else:  # relative positions
                inputs["attn_mask"] = mask.masked_fill(~seen, -torch.inf)
            self.calls += 1
        return func(**inputs)
