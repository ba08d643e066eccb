"""`assert_untouched` sees what a refused conversion could leave behind."""

import pytest
import torch
from tiny_hosts import HOST
from torch import nn
from untouched import assert_untouched, state

from vision_attn import Clear, convert

TRACES = {
    "weight": lambda model: nn.init.zeros_(model.norm.bias),
    "buffer": lambda model: model.register_buffer("extra", torch.zeros(1)),
    "conversion": lambda model: convert(model, Clear(radius=2)),
    "hook": lambda model: model.register_forward_hook(print),
    "hook-before": lambda model: model.blocks[0].register_forward_pre_hook(print),
}


@pytest.mark.parametrize("leave", TRACES.values(), ids=TRACES)
def test_a_trace_is_seen(leave):
    model = HOST["vit"].build()
    before = state(model)
    assert_untouched(model, before)
    leave(model)
    with pytest.raises(AssertionError):
        assert_untouched(model, before)
