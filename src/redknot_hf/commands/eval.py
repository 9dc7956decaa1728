"""`redknot eval`: what a head profile costs in quality, against the full cache and against others at the same bytes."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

NAME = "eval"
HELP = "measure quality: retrieval, tracking, counting, QA and perplexity against baselines at equal bytes"
DESCRIPTION = """\
Runs tasks whose answers are known, with the full cache, with a head profile, and with what else the same bytes buy: one
sliding window for all heads, StreamingLLM, the same profile dealt to random heads, and no context at all. Every cache
reads the context before it sees the question.

Rows are kept in DIR/rows.jsonl: the same command again makes what is missing. Results: table, DIR/results.csv,
DIR/results.json, DIR/results.png. docs/evaluation.md has the tasks, prompts and scores.

MODEL is a folder or a Hub id (default: SmolLM2-135M-Instruct).
"""
EPILOG = """\
tasks: passkey single multikey multivalue multiquery (needles), vt (variable tracking), cwe fwe (common and frequent
words), kv kv_short (key-value retrieval), qa (needs --data), ppl (perplexity)

examples:
  redknot eval --tasks single,kv_short,ppl --contexts 1024 --n 10
  redknot eval meta-llama/Llama-3.1-8B-Instruct --contexts 4k,16k --n 100 --device cuda --dtype bfloat16
  redknot eval ./model --profile mine.json --tasks qa --data hotpotqa.jsonl --contexts 2k
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", metavar="MODEL", help="folder or Hub id (default: SmolLM2-135M-Instruct)")
    parser.add_argument(
        "--profile", metavar="P", help="head profile: file, shipped name or Hub id (default: the one shipped)"
    )
    parser.add_argument("--tasks", metavar="A,B", help="tasks (default: all but passkey, multiquery and qa)")
    parser.add_argument(
        "--contexts", type=_lengths, default=(1024, 2048), metavar="N,M", help="context lengths (default 1k,2k)"
    )
    parser.add_argument("--n", type=int, default=20, help="prompts per task and length (default %(default)s)")
    parser.add_argument(
        "--methods", metavar="A,B", help="of full, ours, window, streaming, random, blind (default: all)"
    )
    parser.add_argument("--random-maps", type=int, default=3, metavar="N", help="draws of random (default %(default)s)")
    parser.add_argument(
        "--prefill",
        default="windowed",
        help="windowed: local heads forget while reading, as a RedKnotCache does by default; full: after reading",
    )
    parser.add_argument("--page-size", type=int, default=64, help="tokens per page (default %(default)s)")
    parser.add_argument(
        "--data", metavar="FILE", help="questions for qa: HotpotQA-like JSON or JSON lines, or a folder"
    )
    parser.add_argument("--texts", metavar="FILE", help="plain text, file or folder, for haystacks and perplexity")
    parser.add_argument("--no-chat", action="store_true", help="do not use the chat template")
    parser.add_argument("--seed", type=int, default=0, help="of prompts and random maps (default %(default)s)")
    parser.add_argument(
        "--batch-tokens", type=_count, metavar="N", help="context tokens per batch (default: 1 prompt; 128k on a GPU)"
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: a CUDA GPU if there is one)")
    parser.add_argument("--dtype", help="float32, bfloat16 or float16 (default: float32 on a CPU, bfloat16 on a GPU)")
    parser.add_argument("--revision", help="branch, tag or commit of a Hub model")
    parser.add_argument("--out", metavar="DIR", default="eval_out", help="folder of the results (default: eval_out)")
    parser.add_argument("--no-plot", action="store_true", help="no picture (needs matplotlib otherwise)")
    parser.add_argument("--no-progress", action="store_true", help="no progress bar")
    parser.add_argument("--json", action="store_true", help="print the results as one JSON object")


def run(args: argparse.Namespace) -> int:
    from ..errors import RedKnotError
    from ..eval import Evaluation, evaluate, read_questions, read_texts
    from ..eval.methods import DEFAULT_METHODS
    from ..eval.report import plot, summarise, table, write_csv, write_json
    from ..eval.run import read_rows
    from ..eval.tasks import DEFAULT_TASKS
    from ._models import choose_device, find_profile, load_model

    device, _ = choose_device(args.device, args.dtype)
    default = 131072 if device.startswith("cuda") else 0
    evaluation = Evaluation(
        tasks=_names(args.tasks) or DEFAULT_TASKS,
        contexts=args.contexts,
        n=args.n,
        methods=_names(args.methods) or DEFAULT_METHODS,
        random_maps=args.random_maps,
        prefill=args.prefill,
        page_size=args.page_size,
        seed=args.seed,
        chat=not args.no_chat,
        batch_tokens=default if args.batch_tokens is None else args.batch_tokens,
        texts=None if args.texts is None else read_texts(args.texts),
        questions=[] if args.data is None else read_questions(args.data),
    )
    evaluation.check()  # before a model is loaded
    if not args.no_plot:
        _need_matplotlib()
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load_model(
        args.model, args.device, args.dtype, revision=args.revision, progress=not args.no_progress
    )
    profile, source = find_profile(args.profile, model.config, args.model)
    if profile is None:
        raise RedKnotError("no profile is shipped for this model: pass --profile, made by `redknot profile`")
    with _Progress(disable=args.no_progress) as progress:
        rows = evaluate(model, tokenizer, profile, evaluation, out / "rows.jsonl", progress)
    head, _ = read_rows(out / "rows.jsonl")
    entries = summarise(rows)
    head = {**head, "profile_source": source, "command": "redknot " + " ".join(sys.argv[1:])}
    write_csv(entries, out / "results.csv")
    write_json(head, entries, out / "results.json")
    if not args.no_plot:
        name = f"{head['model']}, {head['dtype']}, prefill={args.prefill}, mean and 95 % interval"
        plot(entries, out / "results.png", name)
    if args.json:
        print(json.dumps({**head, "results": entries}, indent=1))
    else:
        print(table(entries))
        print(f"{head['model']} in {head['dtype']} on {head['device']}; profile: {source}; prefill={args.prefill}.")
        print(f"KV: pages in use after the context, per prompt. Rows and tables are in {out}/")
    return 0


class _Progress:
    """A bar on stderr that knows the task at hand; nothing where stderr is no terminal but a line per task."""

    def __init__(self, disable: bool) -> None:
        from tqdm import tqdm

        self.bar = tqdm(
            total=0, disable=True if disable else None, file=sys.stderr, leave=False, unit="prompt", dynamic_ncols=True
        )
        self.quiet, self.last = disable, ""

    def __call__(self, text: str, done: int, total: int) -> None:
        if self.bar.disable:
            if text != self.last and not self.quiet:
                print(f"redknot: {text} ({done} of {total})", file=sys.stderr, flush=True)
        else:
            self.bar.total = total
            self.bar.set_description(text, refresh=False)
            self.bar.update(done - self.bar.n)
        self.last = text

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: Any) -> None:
        self.bar.close()


def _need_matplotlib() -> None:
    """Hours of measuring should not end in a missing package."""
    import importlib.util

    from ..errors import MissingExtraError

    if importlib.util.find_spec("matplotlib") is None:
        raise MissingExtraError("the plot of an evaluation (or pass --no-plot)", "matplotlib", "eval")


def _names(text: str | None) -> list[str]:
    return [] if text is None else [name.strip() for name in text.split(",") if name.strip()]


def _lengths(text: str) -> tuple[int, ...]:
    return tuple(_count(part.strip()) for part in text.split(","))


def _count(text: str) -> int:
    number, scale = (text[:-1], 1024) if text[-1:] in "kK" and text else (text, 1)
    if not number.isdigit() or not 0 < int(number) <= 10**8:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a positive number such as 4096 or 4k")
    return int(number) * scale
