"""One picture over several processes: what each processor sends between them, exactly.

`pipe.transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))` of diffusers cuts the tokens of a
model, and a converted layer then sends halos, means or states where diffusers would exchange all heads. `enable` does
the same for models that diffusers has no plan for. `ranks.py` says who holds what, `transfers.py` how it travels, and
`processors.py` how each processor attends.
"""

from vision_attn.parallel.models import enable
from vision_attn.parallel.vae import shared_decoding

__all__ = ["enable", "shared_decoding"]
