"""Runs the kernel tests of this folder in triton's interpreter, on the CPU.

In a process of its own: triton decides when it is imported whether kernels are interpreted, and the tests beside this
one compile them.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def _too_old() -> bool:
    """Triton 3.6 makes Python numbers of one-element arrays, which numpy 2 refuses; 3.9 does not."""
    releases = [tuple(int(x) for x in version(name).split(".")[:2]) for name in ("triton", "numpy")]
    return releases[0] < (3, 9) and releases[1] >= (2, 0)


FILES = ["test_segpaged_append.py", "test_segpaged_decode.py", "test_segpaged_prefill.py"]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the tests already run in the interpreter")
@pytest.mark.parametrize("file", FILES)
def test_kernels_in_the_interpreter(file: str) -> None:
    if _too_old():
        pytest.skip("the interpreter of this triton does not work with numpy 2; triton 3.9's does")
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    env |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--override-ini",
        "addopts=",
        str(HERE / file),
    ]
    run = subprocess.run(command, env=env, cwd=HERE, capture_output=True, text=True, timeout=900, check=False)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert " passed" in run.stdout and "skipped" not in run.stdout
