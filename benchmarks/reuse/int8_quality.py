"""What int8 entries cost: prompts from segments kept in int8 beside the same prompts from segments in the model's dtype.

    python benchmarks/reuse/int8_quality.py --model PATH --data DIR --out DIR [--device cuda --n 100]

The prompts are those of `quality.py`: HotpotQA questions with their paragraphs, joined to four segments, shuffled.

  one segment  all paragraphs as one segment behind the header. In the model's dtype that is the full prefill; in int8 every
               difference comes from rounding.
  blend        the default selector at --ratio, in the model's dtype and in int8.

Per prompt: KL of the full prefill to each build and of each build to its twin in int8, over the tokens of the gold answer,
in nats; whether the greedy tokens along the full prefill's answer are all the same (`agree`). Means with 95 % bootstrap
intervals over prompts. Lines are appended to OUT/int8.jsonl prompt by prompt, and a second start continues there; several
--shard processes want folders of their own, whose lines --report-only puts into one table. Reads
DIR/multidoc/hotpotqa_distractor_sample100.jsonl.gz.
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

import numpy as np
import torch
import transformers
from quality import chat_frame, divergence, interval, load_prompts, reference
from transformers import AutoModelForCausalLM, AutoTokenizer

from redknot_hf import HeadProfile, __version__
from redknot_hf.segments.prompt import SegmentedPrompt
from redknot_hf.segments.stores import SegmentStore

MEASURES = ("kl_plain", "kl_int8", "more", "kl_plain_int8", "agree_plain", "agree_int8", "agree_each_other")


@torch.no_grad()
def along(model: Any, built: Any, *answers: list[int]) -> list[torch.Tensor]:
    """Log-probabilities fp32 ``[n, vocab]`` at the tokens of each answer."""
    last = int(built["input_ids"][0, -1])
    follow = [[last, *answer[:-1]] for answer in answers]
    width = max(map(len, follow))  # padding on the right changes nothing before it
    ids = torch.tensor([row + [0] * (width - len(row)) for row in follow], device=model.device)
    built["past_key_values"].batch_repeat_interleave(len(answers))
    rows = model(ids, past_key_values=built["past_key_values"]).logits.float().log_softmax(-1)
    return [row[: len(answer)] for row, answer in zip(rows, answers, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hub id")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--task", choices=["hotpot", "codes"], default="hotpot")
    parser.add_argument("--n", type=int, default=100)
    parser.add_argument("--ratio", type=float, default=0.15)
    parser.add_argument("--max-new-tokens", type=int, default=16)
    parser.add_argument("--shard", default="0/1", metavar="I/N", help="every N-th prompt from I on")
    parser.add_argument("--max-seconds", type=float, help="begin no further prompt after this time")
    parser.add_argument("--report-only", type=Path, nargs="*", metavar="JSONL", help="the table of these lines")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    log = args.out / "int8.jsonl"
    if args.report_only is not None:
        log.write_text("".join(path.read_text() for path in args.report_only))
    records = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    if args.report_only is None:
        measure(args, log, records)
    report(args, records)


def measure(args: argparse.Namespace, log: Path, records: list[dict[str, Any]]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    dtype = getattr(torch, args.dtype)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype, attn_implementation="redknot")
    model = model.eval().to(args.device)
    header, tail = chat_frame(tokenizer)
    ends = model.generation_config.eos_token_id
    stop = set(ends if isinstance(ends, list) else [ends])
    makers = [
        SegmentedPrompt(
            model,
            tokenizer,
            SegmentStore("memory://", device=args.device),
            HeadProfile.all_global(model.config),
            header=header,
            kv_dtype=kv_dtype,
        )
        for kv_dtype in (None, "int8")
    ]
    shard, shards = map(int, args.shard.split("/"))
    done = {record["i"] for record in records}
    begin = time.time()
    with log.open("a") as file:
        for prompt in load_prompts(args.data, args.n, 0, 4, args.task)[shard::shards]:
            if prompt["i"] in done:
                continue
            if args.max_seconds and time.time() - begin > args.max_seconds:
                break
            query = f"Question: {prompt['question']}{tail}{prompt['start']}"
            gold = tokenizer(prompt["answer"], add_special_tokens=False)["input_ids"]
            for kind in ("one segment", "blend"):
                documents = prompt["documents"] if kind == "blend" else ["".join(prompt["documents"])]
                found, builds = [], []
                for maker in makers:
                    maker.store.gc(max_bytes=1)
                    builds.append(maker.build(documents, query, args.ratio if kind == "blend" else 0.0))
                full = reference(model, builds[0]["input_ids"], gold, args.max_new_tokens, stop)
                found = [along(model, built, gold, full["own_ids"]) for built in builds]
                own = [row.argmax(-1).tolist() for _, row in found]
                record = {
                    "i": prompt["i"],
                    "kind": kind,
                    "tokens": builds[0].account.tokens,
                    "bytes": [sum(s.nbytes for s in built.account.segments[1:]) for built in builds],
                    "exact": [built.account.exact for built in builds],
                    "recomputed": [built.account.recomputed for built in builds],
                    "kl_plain": divergence(full["gold"], found[0][0]),
                    "kl_int8": divergence(full["gold"], found[1][0]),
                    "kl_plain_int8": divergence(found[0][0], found[1][0]),
                    "agree_plain": float(own[0] == full["own_ids"]),
                    "agree_int8": float(own[1] == full["own_ids"]),
                    "agree_each_other": float(own[0] == own[1]),
                }
                record["more"] = record["kl_int8"] - record["kl_plain"]
                records.append(record)
                file.write(json.dumps(record) + "\n")
                file.flush()


def report(args: argparse.Namespace, records: list[dict[str, Any]]) -> None:
    table = []
    for kind in dict.fromkeys(record["kind"] for record in records):
        rows = [record for record in records if record["kind"] == kind]
        line: dict[str, Any] = {"kind": kind, "n": len(rows)}
        line["bytes"] = round(sum(r["bytes"][1] for r in rows) / sum(r["bytes"][0] for r in rows), 4)
        for name in MEASURES:
            line[name] = [round(value, 6) for value in interval(np.array([row[name] for row in rows]))]
        table.append(line)
        print(kind, *(f"{name}={value}" for name, value in line.items() if name != "kind"))
    facts = {
        "date": str(date.today()),
        "command": " ".join(sys.argv),
        "model": Path(args.model).name,
        "dtype": args.dtype,
        "device": torch.cuda.get_device_name(0) if args.device.startswith("cuda") else platform.machine(),
        "task": args.task,
        "ratio": args.ratio,
        "versions": {
            "redknot_hf": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "measures": "mean and 95 % bootstrap interval; bytes: of int8 entries, as a share of the others",
        "table": table,
    }
    (args.out / "int8.json").write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
