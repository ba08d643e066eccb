"""timm's own tests pass for one small variant of each family.

`TIMM_TESTS` points to the tests of timm's source distribution, of the installed version:

    pip download timm==1.0.31 --no-binary timm --no-deps && tar xzf timm-1.0.31.tar.gz
    TIMM_TESTS=timm-1.0.31/tests python -m pytest tests/peer/test_timm_suite.py -s
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from backbone_families import FAMILIES

HERE = Path(__file__).parent
TESTS = os.environ.get("TIMM_TESTS")
PARTS = ("forward", "backward", "default_cfgs", "torchscript", "forward_features", "intermediates", "prune", "fx")
TOKEN_ARCH = "agent_deit_tiny"
ARCHS = [family.arch for family in FAMILIES.values()]


@pytest.mark.slow
@pytest.mark.parametrize(
    "arch",
    ARCHS
    if TESTS
    else [
        pytest.param(
            arch, marks=pytest.mark.skip(reason="TIMM_TESTS points to no tests"), id=f"{arch}-needs-TIMM_TESTS"
        )
        for arch in ARCHS
    ],
)
def test_timms_tests_pass(arch: str) -> None:
    command = [sys.executable, str(HERE / "run_timm_suite.py"), arch, "--", "-rA", "--tb=short"]
    environment = {**os.environ, "TIMM_TESTS": str(Path(TESTS or "").resolve()), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    passed = re.findall(r"^PASSED \S+::(\w+)", done.stdout, re.MULTILINE)
    print(arch, done.stdout.splitlines()[-1])
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    missing = [part for part in PARTS if not any(part in test for test in passed)]
    # timm has no such test of models whose features are tokens
    assert missing == (["forward_features"] if arch == TOKEN_ARCH else []), passed
