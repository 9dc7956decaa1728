"""Fixtures of the evaluation's tests: a tiny decoder and a byte tokenizer with a chat template."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import redknot_hf  # noqa: F401  # registers "redknot"


def make_tokenizer(chat: bool = True) -> PreTrainedTokenizerFast:
    vocabulary = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    if chat:
        fast.chat_template = (
            "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"
            "{% if add_generation_prompt %}<assistant>{% endif %}"
        )
    return fast


@pytest.fixture(scope="session")
def byte_tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture
def own_tokenizer() -> PreTrainedTokenizerFast:
    """For tests that change it."""
    return make_tokenizer()


@pytest.fixture(scope="session")
def plain_tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer(chat=False)


@pytest.fixture(scope="session")
def tiny_model() -> LlamaForCausalLM:
    """Two layers of two KV heads, random weights large enough that logits are not all alike."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=4096, initializer_range=0.4, eos_token_id=None,
        pad_token_id=None, bos_token_id=None, attn_implementation="redknot",
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def tiny_folder(tiny_model, byte_tokenizer, tmp_path) -> str:
    folder = tmp_path / "tiny"
    tiny_model.save_pretrained(folder)
    byte_tokenizer.save_pretrained(folder)
    return str(folder)
