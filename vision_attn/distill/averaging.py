"""The parameters that are evaluated and saved: their exponential mean, or what a schedule-free optimiser averages."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from vision_attn.distill.config import OptimizerConfig
from vision_attn.distill.sharding import shard_like, whole


class Averaging:
    """Keeps the mean of parameters over the updates, if one is wanted.

    Args:
        config: `ema` is used.
        parameters: Trained, on their device.
        optimizer: Of these parameters.

    Attributes:
        ema: The mean, None if none is kept.
    """

    def __init__(self, config: OptimizerConfig, parameters: list[nn.Parameter], optimizer: Any) -> None:
        from diffusers.training_utils import EMAModel  # noqa: PLC0415, diffusers is optional

        self.parameters, self.optimizer = parameters, optimizer
        self.ema = EMAModel(parameters, decay=config.ema, use_ema_warmup=True, power=0.75) if config.ema else None
        if self.ema is not None:
            self.ema.to(parameters[0].device)

    def begin(self) -> None:
        """An update begins: a schedule-free optimiser wants the parameters that learn."""
        if hasattr(self.optimizer, "train"):
            self.optimizer.train()

    def update(self) -> None:
        """An update is done."""
        if self.ema is not None:
            self.ema.step(self.parameters)

    def state_dict(self) -> dict[str, Any]:
        """Return the mean for a checkpoint, whole if the model is sharded."""
        assert self.ema is not None, "registered only with a mean"
        state = self.ema.state_dict()
        return {**state, "shadow_params": [whole(p) for p in state["shadow_params"]]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the mean of a checkpoint."""
        assert self.ema is not None, "registered only with a mean"
        pairs = zip(state["shadow_params"], self.parameters, strict=True)
        self.ema.load_state_dict({**state, "shadow_params": [shard_like(p, like) for p, like in pairs]})

    @contextmanager
    def evaluated(self) -> Iterator[None]:
        """Have the mean in the model inside the `with` block."""
        if hasattr(self.optimizer, "eval"):
            self.optimizer.eval()
        if self.ema is not None:
            self.ema.store(self.parameters)
            self.ema.copy_to(self.parameters)
        try:
            yield
        finally:
            if self.ema is not None:
                self.ema.restore(self.parameters)
