"""Reads the golden cases: inputs, weights and outputs recorded from the authors' own code.

Some are too large for this repository. Where they lie in a folder beside it, they run too.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

GOLDEN = Path(__file__).parents[1] / "golden"
BESIDE = Path(__file__).parents[3] / "shared" / "golden"
TOLERANCE = dict(atol=1e-5, rtol=1e-4)


def case_names(family: str) -> list[str]:
    """Return the cases of a family, here or beside the repository."""
    stems = {path.stem for folder in (GOLDEN, BESIDE) for path in (folder / family).glob("*.json")}
    return [f"{family}/{stem}" for stem in sorted(stems)]


def located(path: str) -> Path:
    """Return where a file of a case lies."""
    return GOLDEN / path if (GOLDEN / path).exists() else BESIDE / path


def tensors(path: str) -> dict[str, Tensor]:
    """Return a safetensors file with float16, which is for storage only, widened to float32."""
    return {name: t.float() if t.dtype == torch.float16 else t for name, t in load_file(located(path)).items()}


def mechanism(path: str) -> dict[str, Any]:
    """Return one attention case: `cfg`, `state_dict`, `inputs`, `output`, `grad_input`, `cotangent`."""
    t = tensors(f"{path}.safetensors")

    def pick(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): value for name, value in t.items() if name.startswith(prefix)}

    cotangent = torch.cos(0.7 * torch.arange(t["output"].numel(), dtype=torch.float64)).float()
    return dict(
        cfg=json.loads(located(f"{path}.json").read_text()),
        state_dict=pick("state_dict."),
        inputs=pick("input."),
        output=t["output"],
        grad_input=pick("grad_input."),
        cotangent=cotangent.view_as(t["output"]),
    )
