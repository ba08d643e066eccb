"""diffusers' own test suites, with every model converted: the same tests pass as without vision_attn.

`DIFFUSERS_TESTS` points to a source tree of diffusers of the installed version:

    git clone --depth 1 --branch v0.42.1 https://github.com/huggingface/diffusers && \
        DIFFUSERS_TESTS=diffusers python -m pytest tests/peer/test_diffusers_suites.py -s

They import `parameterized` and `requests_mock`, which this package does not need: `pip install` both first.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TREE = os.environ.get("DIFFUSERS_TESTS")
SUITES = {
    "flux": "tests/models/transformers/test_models_transformer_flux.py",
    "sd3": "tests/models/transformers/test_models_transformer_sd3.py",
    "pixart": "tests/models/transformers/test_models_pixart_transformer2d.py",
    "dit": "tests/models/transformers/test_models_dit_transformer2d.py",
    "unet": "tests/models/unets/test_models_unet_2d_condition.py",
    "unet2d": "tests/models/unets/test_models_unet_2d.py",
}
TRANSFORMERS = (
    *("bria", "bria_fibo", "chroma", "cogview3plus", "ernie_image", "glm_image", "hidream", "hunyuan_dit"),
    *("krea2", "longcat_image", "ovis_image", "prx", "qwenimage", "z_image"),
)
SUITES |= {name: f"tests/models/transformers/test_models_transformer_{name}.py" for name in TRANSFORMERS}


def outcomes(suite: str, spec: str) -> set[tuple[str, str]]:
    """Run a suite in a process of its own; return (test, outcome)."""
    assert TREE is not None
    here = str(Path(__file__).parent)
    paths = os.pathsep.join([here, str(Path(TREE).resolve()), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "VISION_ATTN_SPEC": spec, "HF_HUB_OFFLINE": "1"}
    options = ["-p", "converted_diffusers", "-p", "no:cacheprovider", "-q", "-rA", "--tb=no"]
    command = [sys.executable, "-m", "pytest", *options, SUITES[suite]]
    done = subprocess.run(command, cwd=TREE, env=environment, capture_output=True, text=True, check=False)
    found = set(re.findall(r"^(PASSED|FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE))
    print(suite, spec, done.stdout[-300:])
    ran = any(outcome == "PASSED" for outcome, _ in found)  # one that cannot be imported is one ERROR in both runs
    assert ran, done.stdout[-3000:] + done.stderr[-3000:]
    return {(test, outcome) for outcome, test in found}


@pytest.mark.slow
@pytest.mark.parametrize(
    "suite",
    SUITES
    if TREE
    else [
        pytest.param(
            s, marks=pytest.mark.skip(reason="DIFFUSERS_TESTS points to no tree"), id=f"{s}-needs-DIFFUSERS_TESTS"
        )
        for s in SUITES
    ],
)
def test_the_same_tests_pass(suite: str) -> None:
    assert outcomes(suite, "softmax") == outcomes(suite, "stock")
