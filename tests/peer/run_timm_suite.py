"""Runs timm's own tests/test_models.py, from its source distribution, against the models of `vision_attn.backbones`.

    TIMM_TESTS=timm-1.0.31/tests python tests/peer/run_timm_suite.py nat_mini dinat_s_tiny -- --durations=5

timm's file is changed in three lists only: the models are those named, and our modules and our ViT-like models are
added to the filters that say which models return features. Tests that download weights or name timm's own models are
left out. Arguments after `--` go to pytest.
"""

import os
import re
import sys
import tempfile
from pathlib import Path

import vision_attn.backbones  # noqa: F401  it makes timm importable beside a CPU build of torch

import pytest  # isort: skip
import timm  # isort: skip

TESTS = (
    "test_model_forward or test_model_backward or test_model_default_cfgs or test_prune_intermediate_layers_contract"
)
MARKS = "base forward backward cfg cfg_nonstd torchscript features fxforward fxbackward timeout(n)"
VIT_LIKE = ["agent_deit*"]  # models whose features are token sequences


def restrict(names: list[str]) -> None:
    """Make timm list nothing but these models."""
    for listing in ("list_models", "list_pretrained"):
        everything = getattr(timm, listing)

        def ours(*args: object, everything=everything, **kwargs: object) -> list[str]:
            return [name for name in everything(*args, **kwargs) if name.split(".")[0] in names]

        setattr(timm, listing, ours)


def adapted(source: str, names: list[str]) -> str:
    """Add our modules and ViT-like models to the two filters of timm's file."""
    modules = sorted({timm.models._registry._model_to_module[name] for name in names})
    for filters, added in (("FEAT_INTER_FILTERS", modules), ("NON_STD_FILTERS", VIT_LIKE)):
        start = f"{filters} = ["
        source, found = re.subn(
            f"^{re.escape(start)}", start + "".join(f"{item!r}, " for item in added), source, flags=re.MULTILINE
        )
        assert found == 1, filters
    return source


def main(arguments: list[str]) -> int:
    """Run the tests of the models named; return pytest's exit code."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    names, options = arguments[:end], arguments[end + 1 :]
    unknown = sorted(set(names) - set(timm.list_models()))
    if not names or unknown:
        raise SystemExit(f"name models of vision_attn.backbones; unknown: {', '.join(unknown) or 'none given'}")
    source = (Path(os.environ["TIMM_TESTS"]) / "test_models.py").read_text()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "test_timm_models.py").write_text(adapted(source, names))
        marks = "".join(f"    {mark}: of timm\n" for mark in MARKS.split())
        (Path(folder) / "pytest.ini").write_text(f"[pytest]\nmarkers =\n{marks}")
        restrict(names)
        chosen = f"({TESTS}) and ({' or '.join(names)})"  # the second part leaves out tests of timm's own models
        quiet = ["-q", "-p", "no:cacheprovider", "-W", "ignore", "--rootdir", folder]
        return int(pytest.main([*quiet, folder, "-k", chosen, *options]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
