"""PixelVAE: an autoencoder with nothing to learn, with which a latent diffusion pipeline works on pixels.

Encoding moves each block of pixels into the channels (`pixel_unshuffle`), and decoding moves it back. Both are exact.
FLUX packs 2 x 2 latents into a token, so blocks of 2 x 2 pixels make tokens of 4 x 4 pixels with 48 channels. The UNet
packs nothing, so its blocks have 4 x 4 pixels.
"""

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.models.modeling_utils import ModelMixin


class PixelVAE(ModelMixin, ConfigMixin):
    """An exact autoencoder without weights, for pipelines that expect an `AutoencoderKL`.

    Args:
        patch_size: Side in pixels of the block that becomes one latent.
        latent_channels: Channels of a latent, `3 * patch_size ** 2`.
        block_out_channels: Only the number of entries counts: pipelines read the scale from it, and
            `2 ** (len(block_out_channels) - 1)` must be `patch_size`.
        scaling_factor: Pipelines give the transformer `(latents - shift_factor) * scaling_factor`.
        shift_factor: About the mean of an emoji on white, in [-1, 1].
        center: `encode` subtracts it and `decode` adds it, for pipelines without a `shift_factor` such as Stable
            Diffusion's. Only 0 is exact to the bit.

    Raises:
        ValueError: If the three sizes contradict each other.
    """

    @register_to_config
    def __init__(
        self,
        patch_size: int = 2,
        latent_channels: int = 12,
        block_out_channels: tuple[int, ...] = (12, 12),
        scaling_factor: float = 1.6,
        shift_factor: float = 0.6,
        center: float = 0.0,
    ) -> None:
        super().__init__()
        scale = 2 ** (len(block_out_channels) - 1)
        if latent_channels != 3 * patch_size**2 or scale != patch_size:
            raise ValueError(
                f"patch_size {patch_size} needs latent_channels {3 * patch_size**2} and a scale of {patch_size}, got"
                f" latent_channels {latent_channels} and block_out_channels {tuple(block_out_channels)} (scale {scale})"
            )
        self.register_buffer("unit", torch.ones(1))  # gives the model a dtype and a device

    def encode(self, x: torch.Tensor, return_dict: bool = True) -> Any:
        """Move blocks of pixels into channels.

        Args:
            x: Images `[B, 3, height, width]` in [-1, 1], sides divisible by `patch_size`.
            return_dict: Return an output object rather than a tuple with one entry.

        Returns:
            An object whose `latent_dist` has the latents as its mode and as every sample:
            `[B, latent_channels, height / patch_size, width / patch_size]`.

        Raises:
            ValueError: If a side is not divisible by `patch_size`.
        """
        patch = self.config.patch_size
        if x.shape[-2] % patch or x.shape[-1] % patch:
            raise ValueError(f"image of {x.shape[-2]} x {x.shape[-1]} pixels does not divide into {patch} x {patch}")
        latents = F.pixel_unshuffle(x, patch) - self.config.center
        dist = DiagonalGaussianDistribution(torch.cat([latents, torch.zeros_like(latents)], 1), deterministic=True)
        return AutoencoderKLOutput(latent_dist=dist) if return_dict else (dist,)

    def decode(self, z: torch.Tensor, return_dict: bool = True, generator: torch.Generator | None = None) -> Any:
        """Move channels back into blocks of pixels: the inverse of `encode`.

        Args:
            z: Latents `[B, latent_channels, h, w]`, unscaled.
            return_dict: Return an output object rather than a tuple with one entry.
            generator: Unused; some pipelines pass it.

        Returns:
            An object whose `sample` is the images `[B, 3, h * patch_size, w * patch_size]`.
        """
        sample = F.pixel_shuffle(z, self.config.patch_size) + self.config.center
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def forward(self, sample: torch.Tensor, return_dict: bool = True) -> Any:
        """Return `sample` `[B, 3, height, width]`, encoded and decoded: unchanged."""
        return self.decode(self.encode(sample).latent_dist.mode(), return_dict=return_dict)

    def enable_tiling(self) -> None:
        """Do nothing: there is no memory to save. Pipelines may call it."""

    def disable_tiling(self) -> None:
        """Do nothing, like `enable_tiling`."""

    def enable_slicing(self) -> None:
        """Do nothing, like `enable_tiling`."""

    def disable_slicing(self) -> None:
        """Do nothing, like `enable_tiling`."""
