"""A pytest plugin that converts every model as soon as diffusers' own tests construct it.

    PYTHONPATH=tests/peer:DIFFUSERS pytest -p converted_diffusers DIFFUSERS/tests/models/transformers/...

`VISION_ATTN_SPEC` names the spec, 'softmax' unless given (fields after a colon, as JSON), or 'stock' for none. The
tests' dummies carry random position ids; they stand for a square.
"""

import functools
import json
import math
import os

from vision_attn._compat import ensure_torchvision

ensure_torchvision()

import diffusers  # noqa: E402

from vision_attn import convert  # noqa: E402
from vision_attn.conversion.state import LayerState  # noqa: E402
from vision_attn.grid import Grid  # noqa: E402
from vision_attn.hosts import image_ids  # noqa: E402
from vision_attn.processors import make_spec  # noqa: E402

MODELS = (
    "FluxTransformer2DModel",
    "SD3Transformer2DModel",
    "PixArtTransformer2DModel",
    "DiTTransformer2DModel",
    "UNet2DConditionModel",
    "UNet2DModel",
    "BriaFiboTransformer2DModel",
    "BriaTransformer2DModel",
    "ChromaTransformer2DModel",
    "CogView3PlusTransformer2DModel",
    "ErnieImageTransformer2DModel",
    "GlmImageTransformer2DModel",
    "HiDreamImageTransformer2DModel",
    "HunyuanDiT2DModel",
    "Krea2Transformer2DModel",
    "LongCatImageTransformer2DModel",
    "OvisImageTransformer2DModel",
    "PRXTransformer2DModel",
    "QwenImageTransformer2DModel",
    "ZImageTransformer2DModel",
)
COUNTS = {"converted": 0, "rerouted": 0}


def _convert_at_construction(cls, spec):
    construct = cls.__init__

    @functools.wraps(construct)
    def init(self, *args, **kwargs):
        construct(self, *args, **kwargs)
        convert(self, spec)
        COUNTS["converted"] += 1

    cls.__init__ = init


def _squares(read):
    def grid_of_ids(ids):
        found = read(ids)
        tokens = (ids[0] if ids.dim() == 3 else ids).shape[0]
        side = math.isqrt(tokens)
        return Grid(side, side) if isinstance(found, str) and side * side == tokens else found

    return grid_of_ids


def _counted(note):
    def counting(self, grid, status, **kwargs):
        COUNTS["rerouted"] += status == "rerouted"
        return note(self, grid, status, **kwargs)

    return counting


def pytest_configure(config):
    name, _, fields = os.environ.get("VISION_ATTN_SPEC", "softmax").partition(":")
    if name == "stock":
        return
    image_ids.grid_of_ids = _squares(image_ids.grid_of_ids)
    LayerState.note = _counted(LayerState.note)
    for model in MODELS:
        _convert_at_construction(getattr(diffusers, model), make_spec(name, **json.loads(fields or "{}")))


def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line(f"converted {COUNTS['converted']} models, rerouted {COUNTS['rerouted']} calls")
