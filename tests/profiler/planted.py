"""A tiny decoder with a planted retrieval head, and a byte tokenizer; nothing is downloaded."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

PLANTED = (0, 1)
LAYERS, HEADS, DIM = 2, 3, 32


def make_byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte."""
    vocabulary = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def make_planted_model() -> LlamaForCausalLM:
    """Random weights, but one head attends to earlier occurrences of the current token at any distance.

    Its queries and keys are the same projection of the input, restricted to the slowest rotary pairs; all other heads
    get queries near zero: they spread their attention evenly, so their far mass is large and means nothing.
    """
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=96, intermediate_size=128, num_hidden_layers=LAYERS, num_attention_heads=HEADS * 2,
        num_key_value_heads=HEADS, head_dim=DIM, max_position_embeddings=4096, rope_theta=1e9,
        tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval().float()
    with torch.no_grad():
        model.model.embed_tokens.weight.normal_(0, 1)
        model.lm_head.weight.normal_(0, 0.3)
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.mul_(0.01)
        layer, head = PLANTED
        attention = model.model.layers[layer].self_attn
        slow = [i for i in range(DIM) if i % (DIM // 2) >= 6]  # rotary pairs that hardly turn in 1000 tokens
        projection = torch.zeros(DIM, 96)
        projection[slow] = torch.randn(len(slow), 96) / 96**0.5 * 2.0
        attention.k_proj.weight[head * DIM : (head + 1) * DIM] = projection
        for query in (2 * head, 2 * head + 1):
            attention.q_proj.weight[query * DIM : (query + 1) * DIM] = projection
        # What it finds must matter to the logits.
        attention.o_proj.weight[:, 2 * head * DIM : (2 * head + 2) * DIM].mul_(20)
    return model
