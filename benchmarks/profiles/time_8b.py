"""How long profiling an 8B model takes, end to end: random weights in the shape of Llama-3.1-8B, nothing downloaded.

    python benchmarks/profiles/time_8b.py --out benchmarks/results/h200

Calls `profile_heads` with its defaults (method, budget, samples; 2K contexts) and checks that the result is a whole
profile: every head has a class, the budget is met, scores and validation are there. The tokenizer is
trained on the spot, so prompts have the usual number of tokens, but the model knows none of them: seconds are what is
measured, nothing else. A search over random weights finds nothing and stops after the first of its two rounds. The time
of the first call counts, kernels' compilation and warm-up included; building the model does not.

`--context N --samples M` times another length beside it; these runs are written to the list "also".
Written: OUT/profile_8b.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from redknot_hf import __version__
from redknot_hf.heads.profiler import profile_heads
from redknot_hf.heads.profiler.texts import make_prose, python_topics

SHAPES = {
    "llama-8b": dict(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, max_position_embeddings=131072,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    ),
    "tiny": dict(
        vocab_size=8192, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=131072,
    ),
}  # fmt: skip


def small_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of 8192 tokens, trained on the profiler's own text in a second."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=8192, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([make_prose(i) for i in range(40)] + python_topics(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def timed(model: Any, tokenizer: Any, device: torch.device, **arguments: Any) -> dict[str, Any]:
    """One profile; its seconds, peak memory and the check that it is whole."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    parts = Parts()
    sys.stderr = parts
    start = time.perf_counter()
    try:
        profile = profile_heads(model, tokenizer, **arguments)
    finally:
        sys.stderr = sys.__stderr__
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    config = model.config
    heads = config.num_hidden_layers * config.num_key_value_heads
    names = [name for row in profile.head_class for name in row]
    data = profile.metadata["data"]
    assert len(names) == heads and names.count("global") == profile.metadata["budget"]["global_heads"]
    assert names.count("global") == round(profile.metadata["budget"]["global_fraction"] * heads)
    assert all(w > 0 for row, of in zip(profile.window, profile.head_class, strict=True)
               for w, name in zip(row, of, strict=True) if name == "local")  # fmt: skip
    assert {"retrieval", "gate", "text_error", "needle_error"} <= set(profile.metadata["scores"])
    assert profile.metadata["validation"]["text"]["n"] > 0 and profile.metadata["validation"]["needle"]["n"] > 0
    return {
        "seconds": round(seconds, 2),
        "context": data["context"],
        "method": profile.metadata["method"],
        "data": data,
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 1) if device.type == "cuda" else None,
        "phases": parts.seconds(seconds),
        "search": profile.metadata["selection"].get("search"),
    }


class Parts:
    """Stands in for stderr while the progress bar runs and notes when each phase began."""

    def __init__(self) -> None:
        self.began: dict[str, float] = {}
        self.start = time.perf_counter()

    def write(self, text: str) -> int:
        name = text.strip("\r\n ").split(":")[0]
        if name and name[0].isalpha() and "|" not in name and name not in self.began:
            self.began[name] = time.perf_counter() - self.start
            print(f"[{self.began[name]:6.1f} s] {name}", flush=True)
        return len(text)

    def flush(self) -> None: ...

    def seconds(self, total: float) -> dict[str, float]:
        """Seconds of every phase, in order."""
        ends = [*list(self.began.values())[1:], total]
        return {name: round(end - at, 2) for (name, at), end in zip(self.began.items(), ends, strict=True)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--shape", default="llama-8b", choices=sorted(SHAPES))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--context", type=int, help="also time contexts of this length")
    parser.add_argument("--samples", type=int, default=2, help="retrieval prompts of the extra run")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    device = torch.device(args.device)
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with device:
        config = LlamaConfig(**SHAPES[args.shape], eos_token_id=None, pad_token_id=0)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "shape": args.shape, "dtype": str(dtype).removeprefix("torch."), "date": date.today().isoformat(),
        "python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__,
        "redknot_hf": __version__, "command": "python benchmarks/profiles/time_8b.py --out benchmarks/results/h200",
    }  # fmt: skip
    tokenizer = small_tokenizer()
    result.update(timed(model, tokenizer, device))
    target = args.out / "profile_8b.json"
    target.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: result[key] for key in ("seconds", "context", "method", "peak_gib", "phases")}))
    if args.context:
        result["also"] = [timed(model, tokenizer, device, context=args.context, samples=args.samples)]
        target.write_text(json.dumps(result, indent=1) + "\n")
        print(json.dumps({key: result["also"][0][key] for key in ("seconds", "context", "peak_gib", "phases")}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
