"""What a conversion would cost and save: `estimate`, the measured rates behind it, and what `inspect` prints."""

from vision_attn.estimation.model import estimate

__all__ = ["estimate"]
