"""Every way to generate gives the same tokens and logits with a RedKnotCache (global heads) as with `DynamicCache`."""

from __future__ import annotations

import pytest
import transformers
from generation_matrix import FAMILIES, MODES, ROWS_ALONE, cell
from packaging.version import Version

# The oldest versions cannot take tokens back from their own sliding windows; a RedKnotCache can, but has no peer there.
OLD = Version(transformers.__version__) < Version("5.17")
STATEFUL = {"qwen3_next"}  # transformers itself refuses to take tokens back there
SHARING = {"gemma3n_text"}  # layers that share keys have no static form
WINDOWED = {"mistral", "gemma2", "gemma3_text", "gemma3n_text", "gpt_oss", "cohere2"}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_generation_equals_dynamic_cache(family, mode):
    outcome = cell(family, mode)
    if family in STATEFUL and mode in ("assisted", "prompt lookup"):
        assert outcome.startswith("not applicable") and "stateful" in outcome
    elif OLD and family in WINDOWED and mode in ("assisted", "prompt lookup") and outcome != "passed":
        assert outcome.startswith("not applicable") and "states are lost" in outcome
    elif family in SHARING and mode == "static":
        assert outcome.startswith("not applicable") and "share keys" in outcome
    elif family in WINDOWED and mode == "right padding":
        assert outcome == ROWS_ALONE
    else:
        assert outcome == "passed"
