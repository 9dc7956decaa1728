"""A GPU whose memory ends while a prompt is read or an answer is written: torch's own allocator refuses, for real.

The process is allowed a small share of the device, so nobody else is disturbed.
"""

from __future__ import annotations

import pytest
import torch

from redknot_hf import HeadProfile, RedKnotCache
from redknot_hf.errors import PoolExhausted

pytestmark = pytest.mark.gpu
CHUNK = 4096


@pytest.fixture(scope="module")
def model():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128, hidden_size=256, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=1 << 22, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device("cuda"):
        return LlamaForCausalLM._from_config(config, attn_implementation="redknot", dtype=torch.bfloat16).eval()


@torch.no_grad()
def feed(model, cache, ids):
    return model(ids, past_key_values=cache, logits_to_keep=1).logits[:, -1].float()


def tokens(count, seed=0):
    return torch.randint(1, 128, (1, count), generator=torch.Generator().manual_seed(seed)).cuda()


def leave_no_room():
    """Take what the allocator has in blocks from which larger pages could come; small tensors have blocks of their own."""
    taken = []
    for size in (8 << 20, 2 << 20):
        while True:
            try:
                taken.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
            except torch.OutOfMemoryError:
                break
    return taken


@pytest.mark.parametrize("length", [CHUNK, 1], ids=["chunks", "decode steps"])
def test_memory_ends_and_the_rest_goes_on(model, length):
    profile = HeadProfile.uniform(model.config, sink=4, window=64, global_heads=0.5)
    cache, other = RedKnotCache(model.config, profile), RedKnotCache(model.config, profile)
    want = feed(model, other, tokens(300, 1))
    feed(model, cache, tokens(8 * CHUNK))
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    spare = 96 << 20 if length == CHUNK else 2 << 20
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + spare) / total)
    ballast = [] if length == CHUNK else leave_no_room()
    try:
        with pytest.raises(PoolExhausted) as caught:
            for _ in range(500 if length == CHUNK else 3000):
                feed(model, cache, tokens(length))
        message = str(caught.value)
        assert "no memory on cuda" in message and "are free" in message and "bytes" in message
        held = torch.cuda.memory_allocated()
        cache.reset()
        assert torch.cuda.memory_allocated() < held, "reset() gives the memory back"
        torch.testing.assert_close(feed(model, cache, tokens(300, 1)), want, atol=0, rtol=0)
        following = feed(model, other, tokens(1, 2))
        torch.testing.assert_close(feed(model, cache, tokens(1, 2)), following, atol=0, rtol=0)
    finally:
        del ballast
        torch.cuda.set_per_process_memory_fraction(1.0)
