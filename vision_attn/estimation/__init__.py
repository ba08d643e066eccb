"""What a conversion would cost and save: `estimate` and `advise`, the measured rates, and what `inspect` prints."""

from vision_attn.estimation.advising import advise
from vision_attn.estimation.model import estimate

__all__ = ["advise", "estimate"]
