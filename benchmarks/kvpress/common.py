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
    """The prompts file and a sha256 of its prompts: results of both processes carry it, to be told to belong together."""
    data = json.loads(path.read_bytes())
    return data, hashlib.sha256(json.dumps([data["prompts"], data["calibration"]]).encode()).hexdigest()


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
def suffix_log_probs(model: Any, cache: Any, prompts: list[dict[str, Any]], **extra: Any) -> list[torch.Tensor]:
    """Log-probabilities that predict each answer's tokens, ``[answer tokens, vocabulary]``, with the contexts in ``cache``.

    Suffixes are padded on the right to one length: no real token sees what comes after it.

    Args:
        extra: position_ids and attention_mask where a row of the batch was padded; otherwise positions go on from the
            context's length.
    """
    longest, length = max(len(p["suffix"]) for p in prompts), len(prompts[0]["context"])
    ids = torch.tensor([p["suffix"] + [0] * (longest - len(p["suffix"])) for p in prompts], device=model.device)
    position = torch.arange(length, length + longest, device=model.device).expand(len(prompts), -1)
    extra.setdefault("position_ids", position)
    logits = model(ids, past_key_values=cache, use_cache=True, **extra).logits
    return [
        logits[row, p["answer_start"] - 1 : len(p["suffix"]) - 1].float().log_softmax(-1).cpu()
        for row, p in enumerate(prompts)
    ]


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


def chosen(prompts: list[dict[str, Any]], tasks: str | None) -> list[dict[str, Any]]:
    """The prompts of the tasks named, separated by commas; None: all. One process per task keeps a GPU busy."""
    wanted = None if tasks is None else tasks.split(",")
    return [p for p in prompts if wanted is None or p["task"] in wanted]


def contexts(model: Any, prompts: list[dict[str, Any]]) -> torch.Tensor:
    """The contexts of a batch, int64 ``[prompts, tokens]``; all of one length."""
    return torch.tensor([p["context"] for p in prompts], device=model.device)


def batches(prompts: list[dict[str, Any]], size: int) -> list[list[dict[str, Any]]]:
    """Prompts of one task together, up to ``size``; tasks in turn."""
    tasks = list(dict.fromkeys(p["task"] for p in prompts))
    of = {task: [p for p in prompts if p["task"] == task] for task in tasks}
    found = [of[task][i : i + size] for task in tasks for i in range(0, len(of[task]), size)]
    return sorted(found, key=lambda group: group[0]["index"])


def measure(
    rows: Rows,
    model: Any,
    group: list[dict[str, Any]],
    methods: list[tuple[str, float, Callable[[list[dict[str, Any]]], tuple[Any, int, int]]]],
) -> None:
    """Every method on a batch of prompts of one task.

    Args:
        methods: (name, level, read): ``read`` puts the prompts' contexts into a cache and returns it with the bytes that
            it allocates and the bytes that later queries can see, for the whole batch.
    """
    from transformers import DynamicCache

    task = group[0]["task"]
    todo = [m for m in methods if any((task, p["index"], m[0], m[1]) not in rows.have for p in group)]
    if not todo:
        return
    with torch.inference_mode():
        cache = DynamicCache()
        model(contexts(model, group), past_key_values=cache, use_cache=True, logits_to_keep=1)
    dense = tensor_bytes(cache)
    references = suffix_log_probs(model, cache, group)
    for name, level, read in todo:
        began = time.perf_counter()
        try:
            if name == "full":
                found, allocated, visible = references, dense, dense
            else:
                with torch.inference_mode():
                    cache, allocated, visible = read(group)
                found = suffix_log_probs(model, cache, group)
        except Exception as error:  # whatever a press raises is a result, too
            message = f"{type(error).__name__}: {str(error)[:200]}"
            for prompt in group:
                rows.add(task=task, index=prompt["index"], method=name, level=level, error=message)
            continue
        seconds = round((time.perf_counter() - began) / len(group), 4)
        for prompt, log_probs, reference in zip(group, found, references, strict=True):
            rows.add(
                task=task, index=prompt["index"], method=name, level=level, **judge(log_probs, reference, prompt),
                allocated=allocated // len(group), visible=visible // len(group), dense=dense // len(group),
                seconds=seconds,
            )  # fmt: skip
    print(f"{task} {group[0]['index']} to {group[-1]['index']}: {len(todo)} methods", flush=True)


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
    (alone,) = suffix_log_probs(model, read(contexts(model, [short]), None), [short])
    ids, mask, pad = padded_pair(long, short)
    cache = read(ids.to(model.device), mask.to(model.device))
    # A cache that has pruned has fewer columns than tokens were fed; the mask must have as many as it holds.
    columns = cache.get_seq_length()
    past = mask if columns == mask.shape[1] else torch.ones(2, columns, dtype=torch.long)
    steps = torch.arange(len(short["suffix"]))
    position = torch.stack([steps + len(long["context"]), steps + len(short["context"])])
    wide = torch.cat([past, torch.ones(2, len(steps), dtype=torch.long)], 1)
    both = suffix_log_probs(
        model, cache, [{**long, "suffix": short["suffix"], "answer_start": short["answer_start"]}, short],
        attention_mask=wide.to(model.device), position_ids=position.to(model.device),
    )  # fmt: skip
    together = both[1]
    return {
        "kl_from_alone": float((alone.exp() * (alone - together)).sum(-1).mean()),
        "max_difference": float((alone - together).abs().max()),
        "padding": pad,
        **{f"{k}_alone": v for k, v in judge(alone, alone, short).items() if k == "hit"},
        **{f"{k}_padded": v for k, v in judge(together, alone, short).items() if k in ("hit", "top1")},
    }
