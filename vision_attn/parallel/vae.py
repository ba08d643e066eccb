"""Decoding one picture by several processes: each decodes some rows of diffusers' tiles, and all get the picture."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from vision_attn.parallel.ranks import Cut, cuts_of
from vision_attn.parallel.transfers import gather


@contextmanager
def shared_decoding(vae: Any, group: Any = None) -> Iterator[None]:
    """Let all processes decode a picture together inside the `with` block, tile by tile.

        with shared_decoding(pipe.vae):
            image = pipe(prompt, height=8192, width=8192).images[0]

    The result is that of diffusers' `enable_tiling` in one process. All processes have the same latents.

    Args:
        vae: An `AutoencoderKL` (Stable Diffusion, SD3, FLUX.1).
        group: The process group, all processes if None.

    Raises:
        ValueError: If the autoencoder has other tiles, or there is no process group.
    """
    if not all(hasattr(vae, name) for name in ("tile_latent_min_size", "tile_overlap_factor", "tiled_decode")):
        raise ValueError(f"a {type(vae).__name__} is not cut into the tiles of an AutoencoderKL, so it is not shared")
    cut = Cut.over(torch.distributed.group.WORLD if group is None else group)
    before, whole = vae.use_tiling, vae.tiled_decode
    vae.use_tiling, vae.tiled_decode = True, partial(_decode, vae, whole, cut)
    try:
        yield
    finally:
        vae.use_tiling = before
        del vae.tiled_decode


def _decode(vae: Any, whole: Any, cut: Cut, z: Tensor, return_dict: bool = True) -> Any:
    """Decode the own rows of tiles, with the row above, which blends into them; and gather those of all."""
    step = int(vae.tile_latent_min_size * (1 - vae.tile_overlap_factor))
    kept = vae.tile_sample_min_size - int(vae.tile_sample_min_size * vae.tile_overlap_factor)
    tiles, per_latent = range(0, z.shape[2], step), vae.tile_sample_min_size // vae.tile_latent_min_size
    cuts = cuts_of(len(tiles), cut.size)
    heights = [min(kept, (min(y + vae.tile_latent_min_size, z.shape[2]) - y) * per_latent) for y in tiles]
    counts = [sum(heights[a:b]) for a, b in pairwise(cuts)]
    first, stop = cuts[cut.rank : cut.rank + 2]
    above = max(first - 1, 0)
    slab = z[:, :, above * step : max(stop - 1, 0) * step + vae.tile_latent_min_size]
    rows = (
        whole(slab, return_dict=False)[0]
        if stop > first
        else z.new_empty((len(z), vae.config.out_channels, 0, z.shape[3] * per_latent))
    )
    rows = rows[:, :, sum(heights[above:first]) :][:, :, : counts[cut.rank]]
    picture = gather(rows.permute(2, 0, 1, 3), counts, cut, "rows of the picture").wait().permute(1, 2, 0, 3)
    if not return_dict:
        return (picture,)
    from diffusers.models.autoencoders.vae import DecoderOutput  # noqa: PLC0415

    return DecoderOutput(sample=picture)
