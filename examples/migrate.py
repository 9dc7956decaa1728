"""From DuoAttention or kvpress: read an attention pattern, and do what a press does, with a cache object.

No pattern of DuoAttention's is published for the demo model, so the folder is written here, with the retrieval scores of the
shipped profile; a published one is read in the same way. One context is compressed once and asked twice, as in kvpress'
pipeline, with the imported map and with what `StreamingLLMPress` keeps at the same bytes.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import torch

from redknot_hf import HeadProfile, RedKnotCache
from redknot_hf.demo_model import get_demo_model

TEXT = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
FACTS = ("The secret word is marmalade. ", "The secret town is Lisbon. ")
QUESTIONS = ("Remember: the secret word is", "Remember: the secret town is")
SINK, WINDOW, SPARSITY = 4, 128, 0.75


def write_pattern(folder: Path) -> None:
    """A folder as in DuoAttention's `attn_patterns`: gates per layer and KV head, sink and recent tokens."""
    gates = HeadProfile.load("SmolLM2-135M-Instruct").metadata["scores"]["gate"]
    lines = ["\t".join(f"{gate:.4f}" for gate in layer) for layer in gates]
    (folder / "full_attention_heads.tsv").write_text("\n".join(lines) + "\n")
    (folder / "config.json").write_text(json.dumps({"sink_size": SINK, "recent_size": WINDOW}))


def main(folder: str | None = None) -> dict[str, list[str]]:
    """Answers by policy. ``folder``: one of DuoAttention's patterns for the demo model, else a stand-in."""
    model, tokenizer = get_demo_model(attn_implementation="redknot")
    if folder is None:
        with tempfile.TemporaryDirectory() as made:
            write_pattern(Path(made))
            duo = HeadProfile.import_from(made, sparsity=SPARSITY)
    else:
        duo = HeadProfile.import_from(folder, sparsity=SPARSITY)
    context = tokenizer(TEXT * 8 + FACTS[0] + TEXT * 8 + FACTS[1] + TEXT * 20, return_tensors="pt")["input_ids"]
    length = context.shape[1]
    # What compression_ratio is in kvpress: here it follows from the map, and falls as the context grows.
    size = model.config.head_dim  # a pattern does not record it
    share = duo.kv_bytes(length, head_dim=size) / duo.dense_kv_bytes(length, head_dim=size)
    streaming = HeadProfile.uniform(model.config, sink=4, window=int(share * length) - 4)
    answers: dict[str, list[str]] = {}
    for name, profile in (("DuoAttention's map", duo), ("StreamingLLM", streaming)):
        cache = RedKnotCache(
            model.config, profile, prefill="full"
        )  # reads with full attention, then evicts, as a press
        with torch.no_grad():
            model(context, past_key_values=cache)
            kept = cache.memory_report().live
            answers[name] = []
            for question in QUESTIONS:
                asked = tokenizer(question, add_special_tokens=False, return_tensors="pt")["input_ids"]
                both = torch.cat([context, asked], 1)
                output = model.generate(both, past_key_values=cache.fork(), max_new_tokens=4, do_sample=False)
                answers[name].append(tokenizer.decode(output[0, both.shape[1] :]))
        print(f"{name:20} {kept:>12,} bytes of {length} tokens ({share:.0%} of the keys): {answers[name]}")
    return answers


if __name__ == "__main__":
    main(*sys.argv[1:2])
