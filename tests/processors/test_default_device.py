"""Processors compute where their tensors are, whatever the default device is: many programs set it to their GPU."""

import pytest
import torch
from processor_table import PROCESSORS

from vision_attn.grid import Grid
from vision_attn.processors.base import Layer, Moment

QUICK = "clear", "multipole", "paro"
GRID = Grid(12, 16, prefix=3)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in PROCESSORS]
)
def test_tables_are_made_where_the_tensors_are(name):
    """Whatever is made without a device would be on 'meta', which holds no numbers."""
    spec = PROCESSORS[name]
    torch.manual_seed(0)
    processor = spec.build(Layer("layer", 2, 8, dim=16))
    q, k, v = (t.requires_grad_() for t in torch.randn(3, 2, GRID.tokens, 2, 8))
    angles = torch.rand(GRID.tokens, 8)
    moment = Moment(rotary=(angles.cos(), angles.sin()))
    processor = processor.at(moment) if processor.wants else processor
    more = (moment,) if processor.wants else ()
    mask = torch.rand(2, 3) < 0.7
    torch.set_default_device("meta")
    try:
        o = processor(q, k, v, GRID, mask, None, *more)
    finally:
        torch.set_default_device(None)
    o.sum().backward()
    assert o.isfinite().all() and q.grad.isfinite().all()
