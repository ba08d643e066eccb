"""`generate_highres`: pictures far above the training size, from coarse to fine."""

from vision_attn.highres.levels import Options, generate_highres

__all__ = ["Options", "generate_highres"]
