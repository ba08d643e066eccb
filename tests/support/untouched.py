"""Whether a refusal or `revert()` left a model as it was: its tensors, its classes and its hooks."""

import pytest
import torch
from torch import Tensor, nn

from vision_attn import Conversion
from vision_attn.conversion.state import is_rerouted


def state(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of the tensors of a model."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_untouched(model: nn.Module, before: dict[str, Tensor]) -> None:
    """Fail unless a model has the tensors that `state` copied, and no trace of a conversion."""
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)
    assert not any(is_rerouted(module) for module in model.modules())
    hooks = [h for m in model.modules() for h in (*m._forward_pre_hooks.values(), *m._forward_hooks.values())]
    assert not [h for h in hooks if not getattr(h, "__module__", "").startswith("transformers.")]  # it leaves some
    with pytest.raises(ValueError, match="not converted"):
        Conversion.of(model)
