"""A config with fewer layers than it lists types of, as one gets by cutting a loaded model to its first layers."""

import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from redknot_hf import HeadProfile, RedKnotCache


def test_layers_beyond_the_model_are_not_made() -> None:
    config = Qwen3Config(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    config.num_hidden_layers = 2  # layer_types still has four entries
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="redknot").eval()
    profile = HeadProfile.uniform(config, sink=2, window=8, global_heads={(0, 0), (1, 1)})
    cache = RedKnotCache(model.config, profile)
    assert len(cache.layers) == 2
    ids = torch.randint(1, 64, (1, 40))
    text = model.generate(ids, past_key_values=cache, max_new_tokens=8, do_sample=False)
    assert text.shape[1] == 48 and cache.get_seq_length() == 47
