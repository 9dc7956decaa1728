"""What both processes share: prompts by token ids, and how an answer is judged. torch and transformers only.

A prompt is a context, which is read first, and a suffix with the question and the right answer, which is fed afterwards in
one forward. Right means: every token of the answer is the model's greedy choice (so greedy decoding would have written
it). KL is from the full cache of the same process, in nats per answer token.
"""

from __future__ import annotations

import hashlib
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def load_prompts(path: Path) -> tuple[dict[str, Any], str]:
    """The prompts file and its sha256: results of both processes carry it, so that they can be told to belong together."""
    data = path.read_bytes()
    return json.loads(data), hashlib.sha256(data).hexdigest()


def load_model(folder: str, implementation: str, device: str, dtype: str) -> Any:
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    options = {"dtype": getattr(torch, dtype), "attn_implementation": implementation}
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options).to(device).eval()


def device_name(model: Any) -> str:
    return torch.cuda.get_device_name() if model.device.type == "cuda" else f"{platform.machine()} CPU, 1 thread"


@torch.inference_mode()
def suffix_log_probs(model: Any, cache: Any, prompt: dict[str, Any], padding: int = 0, row: int = 0) -> torch.Tensor:
    """Log-probabilities that predict the answer's tokens, ``[answer tokens, vocabulary]``, with the context in ``cache``.

    Args:
        padding: columns of left padding of this row: positions count from its first real token.
        row: the row of a batch that holds this prompt; other rows get the same suffix.
    """
    suffix, begin, length = prompt["suffix"], prompt["answer_start"], len(prompt["context"])
    rows = prompt.get("rows", 1)
    ids = torch.tensor([suffix] * rows, device=model.device)
    position = (
        torch.arange(length - padding, length - padding + len(suffix))[None]
        .expand(rows, -1)
        .contiguous()
        .to(model.device)
    )
    extra = {}
    if prompt.get("mask") is not None:
        extra["attention_mask"] = prompt["mask"].to(model.device)
        position = prompt["positions"].to(model.device)
    logits = model(ids, position_ids=position, past_key_values=cache, use_cache=True, **extra).logits[row]
    return logits[begin - 1 : len(suffix) - 1].float().log_softmax(-1).cpu()


def judge(log_probs: torch.Tensor, reference: torch.Tensor, prompt: dict[str, Any]) -> dict[str, Any]:
    """Exact match, mean KL and top-1 agreement against the full cache's ``reference``."""
    target = torch.tensor(prompt["suffix"][prompt["answer_start"] :])
    kl = (reference.exp() * (reference - log_probs)).sum(-1).mean()
    return {
        "hit": bool((log_probs.argmax(-1) == target).all()),
        "kl": float(kl),
        "top1": float((log_probs.argmax(-1) == reference.argmax(-1)).float().mean()),
        "nll": float(-log_probs.gather(1, target[:, None]).mean()),
    }


class Rows:
    """Results, one line of JSON each, written as they come; a run started again makes what is missing."""

    def __init__(self, path: Path, head: dict[str, Any]):
        self.path, self.rows = path, []
        if path.exists():
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            if lines and lines[0]["prompts"] != head["prompts"]:
                raise SystemExit(f"{path} belongs to other prompts: remove it, or choose another --out")
            self.rows = lines[1:]
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(head) + "\n")
        self.have = {(r["task"], r["index"], r["method"], r["level"]) for r in self.rows}

    def add(self, **row: Any) -> None:
        self.rows.append(row)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def measure(
    rows: Rows,
    model: Any,
    prompts: list[dict[str, Any]],
    methods: list[tuple[str, float, Callable[[dict[str, Any]], tuple[Any, int, int]]]],
) -> None:
    """Every method on every prompt.

    Args:
        methods: (name, level, read): ``read`` puts a prompt's context into a cache and returns it with the bytes that it
            allocates and the bytes that later queries can see.
    """
    from transformers import DynamicCache

    for prompt in prompts:
        todo = [m for m in methods if (prompt["task"], prompt["index"], m[0], m[1]) not in rows.have]
        if not todo:
            continue
        with torch.inference_mode():
            cache = DynamicCache()
            model(
                torch.tensor([prompt["context"]], device=model.device),
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
        dense = tensor_bytes(cache)
        reference = suffix_log_probs(model, cache, prompt)
        for name, level, read in todo:
            began = time.perf_counter()
            try:
                if name == "full":
                    found, allocated, visible = reference, dense, dense
                else:
                    with torch.inference_mode():
                        cache, allocated, visible = read(prompt)
                    found = suffix_log_probs(model, cache, prompt)
            except Exception as error:  # whatever a press raises is a result, too
                message = f"{type(error).__name__}: {str(error)[:200]}"
                rows.add(task=prompt["task"], index=prompt["index"], method=name, level=level, error=message)
                continue
            rows.add(
                task=prompt["task"], index=prompt["index"], method=name, level=level, **judge(found, reference, prompt),
                allocated=allocated, visible=visible, dense=dense, seconds=round(time.perf_counter() - began, 3),
            )  # fmt: skip
        print(f"{prompt['task']} {prompt['index']}: {len(todo)} methods", flush=True)


def tensor_bytes(cache: Any) -> int:
    """Bytes of the storages behind a transformers cache's keys and values."""
    tensors = [t for layer in cache.layers for t in (layer.keys, layer.values)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def padded_pair(long: dict[str, Any], short: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Two contexts as one batch, the short one padded on the left: ids, mask ``[2, columns]``, and the padding."""
    length, pad = len(long["context"]), len(long["context"]) - len(short["context"])
    ids = torch.tensor([long["context"], [0] * pad + short["context"]])
    mask = torch.ones(2, length, dtype=torch.long)
    mask[1, :pad] = 0
    return ids, mask, pad


@torch.inference_mode()
def padded_case(
    model: Any,
    long: dict[str, Any],
    short: dict[str, Any],
    read: Callable[[torch.Tensor, torch.Tensor | None], Any],
) -> dict[str, Any]:
    """The short prompt alone and as the padded row of a batch: the same method should answer the same.

    Args:
        read: (ids, mask or None) -> a cache that holds them.
    """
    alone = suffix_log_probs(model, read(torch.tensor([short["context"]], device=model.device), None), short)
    ids, mask, pad = padded_pair(long, short)
    cache = read(ids.to(model.device), mask.to(model.device))
    # A cache that has pruned has fewer columns than tokens were fed; the mask must have as many as it holds.
    columns = cache.get_seq_length()
    wide = torch.cat([mask, torch.ones(2, len(short["suffix"]), dtype=torch.long)], 1)
    if columns != mask.shape[1]:
        wide = torch.ones(2, columns + len(short["suffix"]), dtype=torch.long)
    steps = torch.arange(len(short["suffix"]))
    position = torch.stack([steps + len(long["context"]), steps + len(short["context"])])
    both = {**short, "rows": 2, "mask": wide, "positions": position}
    together = suffix_log_probs(model, cache, both, row=1)
    return {
        "kl_from_alone": float((alone.exp() * (alone - together)).sum(-1).mean()),
        "max_difference": float((alone - together).abs().max()),
        "padding": pad,
        **{f"{k}_alone": v for k, v in judge(alone, alone, short).items() if k == "hit"},
        **{f"{k}_padded": v for k, v in judge(together, alone, short).items() if k in ("hit", "top1")},
    }
