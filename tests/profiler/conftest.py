"""Fixtures of the profiler's tests."""

from __future__ import annotations

import pytest
from planted import make_byte_tokenizer, make_planted_model
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast


@pytest.fixture(scope="session")
def byte_tokenizer() -> PreTrainedTokenizerFast:
    return make_byte_tokenizer()


@pytest.fixture
def planted_model() -> LlamaForCausalLM:
    return make_planted_model()
