"""The tokens of a grid as an image of channels, for pooling and convolution."""

from collections.abc import Callable

from torch import Tensor

from vision_attn.grid import Grid


def on_image(t: Tensor, grid: Grid, function: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply a function of images to the tokens of a grid.

    Args:
        t: Tokens `[B, height * width, H, D]`.
        grid: Its height and width; prefix and suffix are not in `t`.
        function: Maps `[B, C, height, width]` to `[B, C, rows, columns]`.

    Returns:
        `[B, rows * columns, H, D]`.
    """
    image = t.flatten(2).unflatten(1, (grid.height, grid.width)).permute(0, 3, 1, 2)  # [B, C, height, width]
    return function(image).permute(0, 2, 3, 1).flatten(1, 2).unflatten(2, t.shape[2:])
