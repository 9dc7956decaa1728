"""No decoder family of transformers may be silently wrong: M0 and M4 hold, or an error names the cause.

The default run takes a family of every kind; the full sweep is marked slow and compares with the committed table.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import transformers
from family_check import check_family
from sweep import verdict
from tiny_families import families

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
SUPPORTED = [
    "bart",  # decoder of an encoder-decoder family
    "cohere2",  # parallel blocks, layers without RoPE
    "gemma2",  # softcap, sliding and full layers in turn
    "gemma3n_text",  # layers that share keys
    "gemma4_text",  # another head dimension in some layers
    "glm4",  # partial interleaved RoPE
    "gpt2",  # learned positions, fused projections
    "gpt_bigcode",  # one KV head
    "gpt_oss",  # attention sinks
    "jamba",  # state-space hybrid
    "lfm2",  # convolution hybrid
    "llama",
    "llama4_text",  # chunked layers, left to transformers
    "mistral",  # a sliding window in every layer
    "nemotron_h",  # one attention layer among others
    "olmo2",  # norms of queries and keys
    "phi3",
    "qwen2_moe",
    "qwen3",
    "qwen3_next",  # linear-attention hybrid
    "smollm3",  # layers without RoPE
]
EXACT_ONLY = {
    "falcon": "transformers cannot change this family's attention",
    "falcon_h1": "LinearAttentionAndFullAttentionLayer",
    "deepseek_v4": "a RedKnotCache does not serve",
}
REFUSED = {
    "deepseek_v3": "latent attention",
    "diffllama": "changes the values between the cache and the attention call",
    "git": "computes with the attention mask itself",
    "jetmoe": "were never attended to",
    "mamba": "a decoder with attention heads",
    "mimo_v2_flash": "another number of heads in some layers",
    "moshi": "caches a window of 8 tokens but masks with all",
    "mpt": "use_cache is False",
}


# What a family is depends on transformers: where nobody has looked at the table of a version, a family that cannot be
# built there, or that is served there, is no failure. A wrong result always is.
LOOKED_AT = (RESULTS / f"families-{transformers.__version__}.json").exists()


def check(family: str, expected: str) -> dict:
    result = check_family(family)
    found = verdict(result)
    if not LOOKED_AT and found in ("not built", "supported") and found != expected:
        pytest.skip(f"transformers {transformers.__version__}: {found}")
    assert found == expected, result
    return result


@pytest.mark.parametrize("family", SUPPORTED)
def test_m0_and_m4_hold(family):
    check(family, "supported")


@pytest.mark.parametrize("family", EXACT_ONLY)
def test_local_heads_are_refused_by_name(family):
    result = check(family, "exact only")
    assert EXACT_ONLY[family] in result["M4"]["message"]


@pytest.mark.parametrize("family", REFUSED)
def test_the_cache_is_refused_by_name(family):
    result = check(family, "refused")
    assert REFUSED[family] in result["M0"]["message"]


@pytest.mark.slow
@pytest.mark.parametrize("family", families())
def test_every_family_is_as_the_table_says(family):
    result = check_family(family)
    assert verdict(result) not in ("WRONG", "unknown"), result
    table = RESULTS / f"families-{transformers.__version__}.json"
    if table.exists():
        assert verdict(result) == verdict(json.loads(table.read_text())["families"][family]), result
