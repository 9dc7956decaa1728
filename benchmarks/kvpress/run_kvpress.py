"""kvpress' side of the comparison: its presses on the prompts that run_ours.py wrote, at the same byte levels.

    /path/to/kvpress-venv/bin/python benchmarks/kvpress/run_kvpress.py --model DIR --prompts /tmp/prompts.json \\
        --out benchmarks/results/kvpress

Runs in an environment of its own (kvpress needs transformers < 5.4) and imports nothing of redknot-hf. What a press
allocates is read off the cache's tensors. StreamingLLM, SnapKV and ExpectedAttention cut the tensors; AdaKV and
DuoAttention leave them whole and mask keys by replacing them when they are read, so they allocate 100 % at any level:
for these the level is the share of keys that stay *visible*.

DuoAttention has no published pattern for this model (`DuoAttentionPress()` refuses it), so it runs in two ways: with its
on-the-fly scores, computed on the calibration text of the prompts file where the press would download BookSum; and with
the gates of the head profile shipped with redknot-hf, which is its mechanism with our map.
"""

from __future__ import annotations

import argparse
import importlib.util
import platform
import sys
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

for _name, _attribute in (("datasets", "load_dataset"), ("fire", "Fire")):
    # kvpress imports both for a download and a command line that are not used here.
    if importlib.util.find_spec(_name) is None:
        sys.modules[_name] = types.ModuleType(_name)
        setattr(sys.modules[_name], _attribute, None)

import kvpress  # noqa: E402
import kvpress.presses.duo_attention_press as duo  # noqa: E402
from kvpress import AdaKVPress, DuoAttentionPress, ExpectedAttentionPress, SnapKVPress, StreamingLLMPress  # noqa: E402
from transformers import DynamicCache  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parent))
from common import (  # noqa: E402
    Rows,
    batches,
    chosen,
    contexts,
    device_name,
    load_model,
    load_prompts,
    measure,
    padded_case,
    tensor_bytes,
)

LEVELS = (0.35, 0.5)


@dataclass
class GatedDuoAttentionPress(DuoAttentionPress):
    """DuoAttentionPress with a given number of whole heads by given scores, and the window that meets a level."""

    scores: Any = None
    whole: int = 0
    window: int = 0

    def post_init_from_model(self, model: Any) -> None:
        self.sink_size, self.recent_size = 4, self.window
        order = np.argsort(self.scores, axis=None)[: self.scores.size - self.whole]
        self.streaming_mask = torch.zeros(self.scores.shape, dtype=bool, device=model.device)
        self.streaming_mask[np.unravel_index(order, self.scores.shape)] = True
        self.head_compression_ratio = 1 - self.whole / self.scores.size


def presses(level: float, tokens: int, gates: np.ndarray, whole: int, notes: dict[str, str]) -> dict[str, Any]:
    """The presses that leave ``level`` of the keys after ``tokens`` tokens, by name."""
    ratio = 1 - level
    found: dict[str, Any] = {
        "StreamingLLM": StreamingLLMPress(ratio),
        "SnapKV": SnapKVPress(ratio),
        "ExpectedAttention": ExpectedAttentionPress(ratio),
        "AdaKV (SnapKV)": AdaKVPress(SnapKVPress(ratio)),
        "AdaKV (ExpectedAttention)": AdaKVPress(ExpectedAttentionPress(ratio)),
    }
    heads = ratio / (1 - (128 + 256) / tokens)  # its on-the-fly windows are 128 + 256, whatever the context
    if 0 <= heads <= 1:
        found["DuoAttention (on the fly)"] = DuoAttentionPress(heads, on_the_fly_scoring=True)
    else:
        notes[f"DuoAttention (on the fly) at {level} of {tokens}"] = (
            f"not reachable: even with every head streaming, 384 of {tokens} keys stay"
        )
    window = int((level * gates.size - whole) * tokens / (gates.size - whole)) - 4
    if window > 0:
        found["DuoAttention (our gates)"] = GatedDuoAttentionPress(scores=gates, whole=whole, window=window)
    return found


class _Calibration:
    """Stands in for the data set that the press would download: 50 sampled "chapters" are our 50 pieces of text."""

    def __init__(self, texts: list[str]):
        self.texts = texts

    def to_pandas(self) -> Any:
        return self

    def sample(self, count: int, random_state: int) -> Any:
        return {"chapter": np.array(self.texts[:count])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/kvpress"))
    parser.add_argument("--only-padded", action="store_true", help="the padded batch alone")
    parser.add_argument("--tasks", help="some of single,kv_short,ppl (default: all), without the padded batch")
    parser.add_argument("--batch", type=int, default=1, help="prompts at a time (25 on a GPU)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    data, digest = load_prompts(args.prompts)
    duo.load_dataset = lambda *_, **__: _Calibration(data["calibration"])
    gates, whole = np.array(data["gates"]["scores"]), data["gates"]["whole"]
    model = load_model(args.model, "sdpa", args.device, args.dtype)
    notes: dict[str, str] = {}
    try:
        DuoAttentionPress(0.5).post_init_from_model(model)
    except Exception as error:
        notes["DuoAttention with a published pattern"] = f"{type(error).__name__}: {str(error)[:160]}"
    head = {
        "prompts": digest,
        "command": "python benchmarks/kvpress/run_kvpress.py " + " ".join(sys.argv[1:]),
        "device": device_name(model),
        "dtype": args.dtype,
        "versions": {
            "kvpress": kvpress.__version__ if hasattr(kvpress, "__version__") else _version("kvpress"),
            "torch": torch.__version__, "transformers": transformers.__version__, "python": platform.python_version(),
        },
    }  # fmt: skip
    built: dict[tuple[float, int], dict[str, Any]] = {}

    def of(level: float, tokens: int) -> dict[str, Any]:
        if (level, tokens) not in built:
            built[level, tokens] = presses(level, tokens, gates, whole, notes)
        return built[level, tokens]

    lengths = {len(p["context"]) for p in data["prompts"]}
    names = {level: list(dict.fromkeys(n for t in lengths for n in of(level, t))) for level in LEVELS}
    head["notes"] = notes
    rows = Rows(args.out / "kvpress.jsonl", head)

    def reader(name: str, level: float) -> Any:
        def read(group: list[dict[str, Any]]) -> tuple[Any, int, int]:
            cache = DynamicCache()
            with of(level, len(group[0]["context"]))[name](model):
                model(contexts(model, group), past_key_values=cache, use_cache=True, logits_to_keep=1)
            allocated = tensor_bytes(cache)
            masked = sum(
                len(layer.self_attn.masked_key_indices[0])
                for layer in model.model.layers
                if getattr(layer.self_attn, "masked_key_indices", None) is not None
            )
            return cache, allocated, allocated - masked * 2 * model.config.head_dim * model.dtype.itemsize

        return read

    methods: list[Any] = [("full", 1.0, None)]
    methods += [(name, level, reader(name, level)) for level in LEVELS for name in names[level]]

    def reachable(tokens: int) -> list[Any]:
        return [m for m in methods if m[0] == "full" or m[0] in of(m[1], tokens)]

    long = next(p for p in data["prompts"] if p["task"] == "single")
    short = next(p for p in data["prompts"] if p["task"] == "kv_short")
    for name in names[0.5]:
        if args.tasks or ("padded", 0, name, 0.5) in rows.have:
            continue

        def read(ids: torch.Tensor, mask: torch.Tensor | None, name: str = name) -> Any:
            cache = DynamicCache()
            position = None if mask is None else (mask.cumsum(1) - 1).clamp(min=0)
            with of(0.5, len(long["context"]))[name](model):
                model(ids, attention_mask=mask, position_ids=position, past_key_values=cache, logits_to_keep=1)
            return cache

        try:
            found = padded_case(model, long, short, read)
        except Exception as error:  # whatever a press raises is the result
            found = {"error": f"{type(error).__name__}: {str(error)[:200]}"}
        rows.add(task="padded", index=0, method=name, level=0.5, **found)
    for group in [] if args.only_padded else batches(chosen(data["prompts"], args.tasks), args.batch):
        measure(rows, model, group, reachable(len(group[0]["context"])))


def _version(package: str) -> str:
    import importlib.metadata

    return importlib.metadata.version(package)


if __name__ == "__main__":
    main()
