# python -m pytest tests/localflash/test_interpreted.py -q
"""Our kernels' numbers without a GPU: these suites again, with Triton's interpreter.

It is chosen when Triton is imported, and knows no threads, hence processes of their own.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="there is no Triton for this system")

ROOT = Path(__file__).parents[2]
HERE = "tests/localflash"
# every suite with the cases in it that our kernels must pass
SUITES = {
    "conformance": [f"{HERE}/test_attend.py", "-k", "triton-cpu or cpu-triton"],
    "views": [f"{HERE}/test_views.py", "-k", "triton"],
    "own": [f"{HERE}/test_triton.py"],
    "runtime": ["tests/ringstar/test_triton_runtime.py"],
}


@pytest.mark.slow
@pytest.mark.parametrize("suite", SUITES)
def test_interpreted(suite):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *SUITES[suite]]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert " passed" in done.stdout or "[100%]" in done.stdout
