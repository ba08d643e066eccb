"""The table of hosts: every model family as a tiny random model, with its inputs, its sequence layout and its grids."""

from functools import partial
from typing import Any

import diffusers
import torch
from tiny_encoders import ENCODERS
from tiny_host_case import CHANNELS, POOLED_DIM, TEXT_DIM, HostCase, Layout, build, noise, randomise, sample
from tiny_id_dits import ID_DITS
from tiny_latent_dits import LATENT_DITS, latents
from tiny_packed_dits import PACKED_DITS
from tiny_unets import UNETS
from tiny_vits import VITS

__all__ = [
    "CHANNELS",
    "HOST",
    "HOSTS",
    "KIND",
    "POOLED_DIM",
    "TEXT_DIM",
    "VIDEO_HOSTS",
    "HostCase",
    "Layout",
    "noise",
    "randomise",
]


def _wan_inputs(height: int, width: int, batch: int, text: int) -> dict[str, Any]:
    video = noise(batch, CHANNELS, 2, 2 * height, 2 * width)
    return latents(height, width, batch, text, hidden_states=video, timestep=torch.full((batch,), 600))


HOSTS: list[HostCase] = [*UNETS, *LATENT_DITS, *PACKED_DITS, *ID_DITS, *VITS, *ENCODERS]
VIDEO_HOSTS: list[HostCase] = [
    HostCase(
        "wan",
        partial(
            build, diffusers.WanTransformer3DModel, num_attention_heads=2, attention_head_dim=16, num_layers=2,
            in_channels=CHANNELS, out_channels=CHANNELS, text_dim=TEXT_DIM, ffn_dim=32, rope_max_seq_len=32,
        ),
        _wan_inputs,
        sample,
        shape=lambda height, width, batch: (batch, CHANNELS, 2, 2 * height, 2 * width),
        layouts=lambda height, width, text: {Layout(0, (height, width), reference=((height, width),))},
        notes="two frames, the second stated as a reference; it is here to be refused",
    )
]  # fmt: skip
HOST: dict[str, HostCase] = {case.id: case for case in [*HOSTS, *VIDEO_HOSTS]}
KINDS = {"unet": UNETS, "latent-dit": LATENT_DITS, "packed-dit": [*PACKED_DITS, *ID_DITS], "vit": [*VITS, *ENCODERS]}
KIND: dict[str, str] = {case.id: kind for kind, cases in KINDS.items() for case in cases}
