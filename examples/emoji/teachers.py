"""The teachers before training: each is one module with all learned parts, its training examples and its stages.

Each gives the loop of train.py `stages` (pixels per side, batch, part of the time), a `learning_rate`, `examples` that
turn clean images into inputs, targets and weights, `forward`, and the `pipeline` around the result.
"""

import math

import torch
from torch import nn

from vision_attn.demo import EmojiPipeline, EmojiUNetPipeline, PixelVAE, WordEncoder

# isort: split
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel, UNet2DConditionModel

NATIVE = 32  # tokens per side at 128 px, the size that the teachers are trained for


class FluxTeacher(nn.Module):
    """A FLUX transformer, trained by flow matching: first at 64 px with spread positions, then at 128 px."""

    stages = ((64, 512, 0.3), (128, 192, 0.7))

    def __init__(self, vocabulary: list[str], heads: int, single: int, learning_rate: float) -> None:
        super().__init__()
        self.learning_rate = learning_rate
        self.vae = PixelVAE()
        self.text_encoder = WordEncoder(vocabulary)
        self.transformer = FluxTransformer2DModel(
            in_channels=48,
            num_layers=1,
            num_single_layers=single,
            num_attention_heads=heads,
            attention_head_dim=64,
            joint_attention_dim=64,
            pooled_projection_dim=64,
            axes_dims_rope=(16, 24, 24),
            guidance_embeds=False,
        )

    def examples(self, images):
        """Return the inputs (noisy tokens `[B, N, 48]`, noise levels `[B]`, FLUX's ids), the velocities and weights.

        Noise levels are logit-normal and shifted up with the number of tokens.
        """
        x = (self.vae.encode(images).latent_dist.mode() - self.vae.config.shift_factor) * self.vae.config.scaling_factor
        x = EmojiPipeline._pack_latents(x, *x.shape)
        noise, side = torch.randn_like(x), images.shape[-1] // 4
        u = torch.sigmoid(torch.randn(len(x), device=x.device))
        sigma = shift(side) * u / (1 + (shift(side) - 1) * u)
        img_ids, txt_ids = positions(side, x.device), torch.zeros(8, 3, device=x.device)
        return (torch.lerp(x, noise, sigma[:, None, None]), sigma, img_ids, txt_ids), noise - x, torch.ones_like(sigma)

    def forward(self, ids, tokens, sigma, img_ids, txt_ids):
        """Predict the velocity of noisy tokens for word ids `[B, 8]`."""
        sequence, pooled = self.text_encoder(ids)
        return self.transformer(
            hidden_states=tokens,
            timestep=sigma,
            encoder_hidden_states=sequence,
            pooled_projections=pooled,
            img_ids=img_ids,
            txt_ids=txt_ids,
            return_dict=False,
        )[0]

    def pipeline(self) -> EmojiPipeline:
        """Return the diffusers pipeline around these modules."""
        flow = FlowMatchEulerDiscreteScheduler(shift=shift(NATIVE))
        return EmojiPipeline(flow, self.vae, self.text_encoder, self.transformer)


class UNetTeacher(nn.Module):
    """A UNet of Stable Diffusion's type, trained to predict the noise, at 128 px from the start.

    It finds its position only by the zeros around the picture, so at a smaller size it would learn larger objects.
    """

    stages = ((128, 192, 1.0),)

    def __init__(self, vocabulary: list[str], learning_rate: float, channels: tuple[int, ...] = (96, 96, 96)) -> None:
        super().__init__()
        self.learning_rate = learning_rate
        # Half the deviation of Stable Diffusion's latents: the 48 channels of a token are so alike that it takes more
        # noise to hide a picture, and little of the picture may be left at the last noise level.
        self.vae = PixelVAE(4, 48, (48, 48, 48), scaling_factor=0.8, shift_factor=0.0, center=0.6)
        self.text_encoder = WordEncoder(vocabulary, dim=96)
        self.unet = UNet2DConditionModel(
            sample_size=NATIVE,
            in_channels=48,
            out_channels=48,
            block_out_channels=channels,
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=96,
            attention_head_dim=tuple(width // 32 for width in channels),  # diffusers' name for the number of heads
        )
        self.ddim = DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            steps_offset=1,
            timestep_spacing="trailing",
        )

    def examples(self, images):
        """Return the inputs (noisy latents `[B, 48, 32, 32]` and timesteps `[B]`), the noise, and weights.

        The weight `1 / alphas_cumprod` turns the error into that of the velocity: without it, hardly anything asks for
        the right picture where there is much noise. Above 20 it would ask for more digits than bf16 has.
        """
        x = self.vae.encode(images).latent_dist.mode() * self.vae.config.scaling_factor
        # Without a shift for each channel, the UNet would read the picture's mean from the noise it starts with.
        noise = torch.randn_like(x) + 0.1 * torch.randn(*x.shape[:2], 1, 1, device=x.device)
        timesteps = torch.randint(self.ddim.config.num_train_timesteps, (len(x),), device=x.device)
        weight = 1 / self.ddim.alphas_cumprod.to(x.device)[timesteps]
        return (self.ddim.add_noise(x, noise, timesteps), timesteps), noise, weight.clamp(max=20)

    def forward(self, ids, latents, timesteps):
        """Predict the noise in latents for word ids `[B, 8]`."""
        sequence, pooled = self.text_encoder(ids)
        return self.unet(latents, timesteps, torch.cat([sequence, pooled[:, None]], 1), return_dict=False)[0]

    def pipeline(self) -> EmojiUNetPipeline:
        """Return the diffusers pipeline around these modules."""
        return EmojiUNetPipeline(self.ddim, self.vae, self.text_encoder, self.unet)


def shift(side: int) -> float:
    """Return the shift of the noise levels, which grows with the square root of the tokens: 3 at 32 x 32."""
    return 1.5 * math.sqrt(side * side / 256)


def positions(side: int, device: str | torch.device) -> torch.Tensor:
    """Return FLUX's image ids for `side` x `side` tokens, spread over the native coordinates.

    With the coordinates of a large image's corner, a model would learn to draw crops.
    """
    axis = (torch.arange(side, device=device) + 0.5) * NATIVE / side - 0.5
    rows, columns = torch.meshgrid(axis, axis, indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], -1).flatten(0, 1)


def make_teacher(name: str, vocabulary: list[str]) -> FluxTeacher | UNetTeacher:
    """Return an untrained teacher: 'base', 'nano' or 'unet'."""
    if name == "unet":
        return UNetTeacher(vocabulary, 1e-3)
    return FluxTeacher(vocabulary, 4, 5, 1e-3) if name == "base" else FluxTeacher(vocabulary, 2, 4, 2e-3)
