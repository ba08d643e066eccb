"""The example programs of the gallery, and arguments with which the offline ones take a second."""

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

from vision_attn.gallery.build import find_examples

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "gallery"
EXAMPLES = {example.name: example for example in find_examples(FOLDER)}
SMALL: dict[str, dict[str, Any]] = {
    "emoji_multipole": dict(sides=(64,), highres=160, steps=2),
    "emoji_highres": dict(side=256, steps=2, level_inference_steps=1),
    "own_processor": dict(prompts=("red apple",), steps=1),
    "vit_attention": dict(steps=1),
    "dinat_features": dict(steps=1),
}


def program(name: str) -> ModuleType:
    """Import an example."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES[name].path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
