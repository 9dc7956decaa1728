"""`redknot demo`: a question about a long document, answered with DynamicCache and with RedKnotCache."""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib.resources
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import MissingExtraError, RedKnotError

if TYPE_CHECKING:
    from ..demo_compare import Contender, Question, Result
    from ..heads import HeadProfile

NAME = "demo"
HELP = "ask questions about a long document with DynamicCache and with RedKnotCache, side by side"
DESCRIPTION = """\
Reads a long document with DynamicCache (transformers' default) and with RedKnotCache, asks the same questions, and
shows both answers, KV memory and times, and which heads keep what. As a control it also runs RedKnotCache with every
head local: same sinks and windows, no head that keeps all tokens.

Without options: SmolLM2-135M-Instruct (93 MB, fetched once) and a Wikipedia article of 4,000 tokens that comes with the
package; about a minute on a CPU.
"""
EPILOG = """\
examples:
  redknot demo
  redknot demo --document report.txt --question "Who signed the contract?"
  redknot demo --model Qwen/Qwen3-0.6B --profile my_profile.json
"""

_DOCUMENT = "aardvark.txt"
# (question, how the answer begins, what a right answer contains). A model of 135 M parameters finds single facts when
# its answer is begun for it. Picked because DynamicCache answers them and a local head's window does not reach them.
_QUESTIONS = (
    ("What is the only fruit that aardvarks eat?", "The only fruit eaten by aardvarks is the", "cucumber"),
    ("How many years do aardvarks live in captivity?", "In captivity, aardvarks live for up to", "23 years"),
    ("What does the name aardvark mean?", "The name aardvark means", "earth pig"),
    ("Which zoo was the first to have an aardvark?", "The first zoo to have an aardvark was the", "London Zoo"),
)
# Heads that find facts far back in SmolLM2-135M-Instruct, for as long as no measured profile is shipped for it.
_RETRIEVAL_HEADS = {(6, 0), (7, 2), (17, 0), (17, 1), (18, 2), (20, 1), (20, 2), (21, 2), (22, 1), (23, 0)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", metavar="ID", help="Hub id or folder of a causal model (default: SmolLM2-135M-Instruct)"
    )
    parser.add_argument(
        "--profile", metavar="P", help="head profile: file, shipped name or Hub id (default: the model's)"
    )
    parser.add_argument("--document", metavar="FILE", help="text file, UTF-8 (default: the article that is shipped)")
    parser.add_argument("--question", metavar="TEXT", action="append", help="what to ask; may be repeated")
    parser.add_argument("--answer-prefix", metavar="TEXT", default="", help="words that every answer begins with")
    parser.add_argument(
        "--max-new-tokens", metavar="N", type=_positive, default=24, help="longest answer (default: 24)"
    )
    parser.add_argument(
        "--prefill",
        choices=("windowed", "full"),
        help="local heads forget the document while reading it, or after (default: as the profile was made, else full)",
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: a CUDA GPU if there is one)")
    parser.add_argument("--no-control", action="store_true", help="skip the run with every head local")
    parser.add_argument("--allow-hub", action="store_true", help="fetch the default model from the Hugging Face Hub")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.add_argument("--out", metavar="DIR", default="demo_out", help="folder for head_map.png (default: demo_out)")


def run(args: argparse.Namespace) -> int:
    document, name, questions = _what_to_ask(args)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    screen = _Screen(quiet=args.json)

    screen.note("loading torch, transformers and the model")
    threads = _set_threads()
    model, tokenizer, model_name = _load_model(args)
    from ..demo_compare import build_prompt, run_contender

    choice = _choose_profile(args, model.config)
    prompt = build_prompt(tokenizer, document, questions)
    _check_length(model.config, prompt.longest + args.max_new_tokens)
    head_map = _draw(choice.profile, out / "head_map.png", screen)

    facts = {
        "model": model_name,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "threads": threads,
        "document": name,
        "document_tokens": prompt.document.shape[1],
        "profile": choice.origin,
        "heads": {kind: choice.profile.count(kind) for kind in ("global", "retrieval", "dense", "local")},
        "prefill": choice.prefill,
    }
    screen.facts(facts, choice.profile, head_map)

    results = []
    for contender in _contenders(model, choice, control=not args.no_control):
        screen.contender(contender.name)
        with screen.bar(model) as on_layer:
            result = run_contender(
                model,
                tokenizer,
                prompt,
                questions,
                contender,
                max_new_tokens=args.max_new_tokens,
                on_layer=on_layer,
                on_question=screen.question,
                on_text=screen.text,
            )
        screen.answered()
        results.append(result)

    if args.json:
        report = {**facts, "head_map": head_map, "results": [_as_data(result) for result in results]}
        print(json.dumps(report, indent=2))
    else:
        _print_table(results)
    return 0


# ---------------------------------------------------------------- what to run


def _what_to_ask(args: argparse.Namespace) -> tuple[str, str, list[Question]]:
    from ..demo_compare import Question

    if args.document:
        try:
            document = Path(args.document).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise RedKnotError(
                f"--document {args.document} is not UTF-8 text ({error.reason} at byte {error.start})"
            ) from None
        if not document.strip():
            raise RedKnotError(f"--document {args.document} is empty; expected a text to ask about")
        if not args.question:
            raise RedKnotError("--document needs a --question about it")
        name = args.document
    else:
        document = (importlib.resources.files("redknot_hf") / "data" / _DOCUMENT).read_text(encoding="utf-8")
        name = "Wikipedia: Aardvark (CC BY-SA 3.0)"
    if args.question:
        return document, name, [Question(text, args.answer_prefix) for text in args.question]
    return document, name, [Question(*question) for question in _QUESTIONS]


def _set_threads() -> int:
    """Use the cores that are free: with more threads than those, every small forward waits for the scheduler."""
    import torch

    if "OMP_NUM_THREADS" not in os.environ and hasattr(os, "sched_getaffinity"):
        free = len(os.sched_getaffinity(0)) - round(os.getloadavg()[0])
        torch.set_num_threads(max(1, min(torch.get_num_threads(), free)))
    return torch.get_num_threads()


def _load_model(args: argparse.Namespace) -> tuple[Any, Any, str]:
    import torch

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise RedKnotError(f"--device {args.device}: {reason}; try --device cpu") from None
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16

    if args.model is None:
        from ..demo_model import MODEL_NAME, get_demo_model

        progress = not args.json
        return *get_demo_model(dtype, progress, args.allow_hub, device=device), MODEL_NAME
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    try:
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).eval().to(device)
    except ValueError as error:  # an architecture that is unknown or is not a causal language model
        raise RedKnotError(f"--model {args.model}: {error}") from error
    return model, tokenizer, args.model


class _Choice(NamedTuple):
    """The profile, where it came from, and when its local heads forget."""

    profile: HeadProfile
    origin: str
    prefill: str


def _choose_profile(args: argparse.Namespace, config: Any) -> _Choice:
    from ..demo_model import MODEL_NAME
    from ..heads import HeadProfile, shipped_names
    from ._models import find_profile

    if args.profile:
        profile, origin = HeadProfile.load(args.profile), args.profile
        profile.validate_for(config)
    elif args.model is None and MODEL_NAME in shipped_names():
        profile, origin = HeadProfile.load(MODEL_NAME), f"shipped for {MODEL_NAME}"
    elif args.model is None:
        profile = HeadProfile.uniform(config, sink=4, window=256, global_heads=_RETRIEVAL_HEADS)
        origin = "ten known retrieval heads"
    else:
        shipped, origin = find_profile(None, config, args.model)
        profile = shipped or HeadProfile.all_global(config)
        if shipped is None:
            origin = "none shipped for this model: all heads global (pass --profile)"
    return _Choice(profile, origin, args.prefill or _made_for(profile))


def _made_for(profile: HeadProfile) -> str:
    mode = profile.metadata.get("prefill")
    return mode if mode in ("windowed", "full") else "full"


def _check_length(config: Any, tokens: int) -> None:
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and tokens > limit:
        raise RedKnotError(
            f"document, question and answer are {tokens} tokens; the model was made for {limit}. Pass a shorter "
            "--document or a --model with a longer context"
        )


def _contenders(model: Any, choice: _Choice, control: bool) -> Iterator[Contender]:
    from transformers import DynamicCache

    from ..cache import RedKnotCache
    from ..demo_compare import Contender

    def redknot(profile: HeadProfile) -> Callable[[], Any]:
        return lambda: RedKnotCache.for_model(model, profile, prefill=choice.prefill)

    yield Contender("DynamicCache", lambda: DynamicCache(config=model.config), "sdpa")
    yield Contender("RedKnotCache", redknot(choice.profile), "redknot")
    if control and choice.profile.count("local") > 0:
        yield Contender("all local", redknot(_all_local(choice.profile)), "redknot")


def _all_local(profile: HeadProfile) -> HeadProfile:
    """The same profile with its commonest sink and window on every head."""
    cells = Counter(
        (sink, window)
        for classes, sinks, windows in zip(profile.head_class, profile.sink, profile.window, strict=True)
        for name, sink, window in zip(classes, sinks, windows, strict=True)
        if name == "local"
    )
    (sink, window), _ = cells.most_common(1)[0]
    changed = copy.deepcopy(profile)
    attention = set(profile.attention_layers)
    for layer in attention:
        changed.head_class[layer] = ["local"] * profile.num_kv_heads
        changed.sink[layer] = [sink] * profile.num_kv_heads
        changed.window[layer] = [window] * profile.num_kv_heads
    return changed


# ---------------------------------------------------------------- what to show


def _draw(profile: HeadProfile, path: Path, screen: _Screen) -> str | None:
    try:
        return str(profile.plot(path))
    except MissingExtraError as error:
        screen.note(str(error))
        return None


class _Screen:
    """The run as a person watches it: stdout gets the record, stderr the progress. Quiet: nothing."""

    def __init__(self, quiet: bool):
        self.quiet = quiet
        self._line_open = False

    def note(self, text: str) -> None:
        if not self.quiet:
            print(f"redknot: {text}", file=sys.stderr, flush=True)

    def facts(self, facts: dict[str, Any], profile: HeadProfile, head_map: str | None) -> None:
        if self.quiet:
            return
        from ..heads.plots import terminal_heatmap

        count = facts["threads"]
        threads = f", {count} thread{'s' if count > 1 else ''}" if facts["device"] == "cpu" else ""
        print(f"model     {facts['model']}, {facts['dtype']} on {facts['device']}{threads}")
        print(f"document  {facts['document']}, {facts['document_tokens']:,} tokens")
        print(f"profile   {facts['profile']}")
        local = profile.count("local")
        total = sum(facts["heads"].values())
        print(f"heads     {total - local} of {total} KV heads keep every token, {local} keep their first and last ones")
        print(f"          local heads forget {_WHEN[facts['prefill']]}\n")
        print(terminal_heatmap(profile, seq_len=facts["document_tokens"]))
        print(f"          as a picture: {head_map}" if head_map else "", flush=True)

    def contender(self, name: str) -> None:
        if not self.quiet:
            print(f"\n{name}", flush=True)

    @contextlib.contextmanager
    def bar(self, model: Any) -> Iterator[Callable[[], None]]:
        """A progress bar over the layers while the document is read; it vanishes with the last one."""
        from tqdm import tqdm

        layers = len(getattr(model.get_decoder(), "layers", ()))
        bar = tqdm(
            total=layers,
            desc="  reading the document",
            unit="layer",
            leave=False,
            file=sys.stderr,
            disable=True if self.quiet else None,
        )

        def on_layer() -> None:
            bar.update()
            if bar.n >= layers:
                bar.close()

        try:
            yield on_layer
        finally:
            bar.close()

    def question(self, question: Question) -> None:
        if self.quiet:
            return
        self.answered()
        print(f"  {question.text}\n    {question.answer_prefix}", end="", flush=True)
        self._line_open = True

    def text(self, piece: str) -> None:
        if not self.quiet:
            print(piece.replace("\n", " "), end="", flush=True)

    def answered(self) -> None:
        if self._line_open:
            print(flush=True)
            self._line_open = False


_WHEN = {"windowed": "while the document is read", "full": "after the document is read, before the question"}


def _print_table(results: list[Result]) -> None:
    dense = results[0].kv_bytes
    rows: list[tuple[str, list[str]]] = [("", [result.name for result in results])]
    if any(answer.correct is not None for answer in results[0].answers):
        counts = [sum(answer.correct is True for answer in result.answers) for result in results]
        rows.append(("right answers", [f"{count} of {len(results[0].answers)}" for count in counts]))
    rows += [
        ("KV memory after the document", [f"{result.kv_bytes / 1e6:.1f} MB" for result in results]),
        ("  of DynamicCache's", [f"{result.kv_bytes / dense:.1%}" for result in results]),
        ("time to first token", [f"{result.first_token_s:.2f} s" for result in results]),
        ("  of it, question to first token", [f"{result.answers[0].first_token_s:.2f} s" for result in results]),
        ("tokens/s after the first", [_rate(result) for result in results]),
    ]
    label = max(len(row[0]) for row in rows)
    column = max(14, max(len(result.name) for result in results) + 2)
    print()
    for title, cells in rows:
        print(title.ljust(label) + "".join(cell.rjust(column) for cell in cells))
    counted = ", ".join(str(sum(answer.tokens - 1 for answer in result.answers)) for result in results)
    live = results[1].kv_live_bytes / 1e6
    print(
        "\nMeasured in this run, once each, on a machine that may have been busy: a demonstration, not a benchmark.\n"
        "KV memory            DynamicCache: its key and value tensors. RedKnotCache: all that its allocator holds,\n"
        f"                     page tables and free pages included; pages in use {live:.1f} MB.\n"
        "Time to first token  from an empty cache to the first token of the first answer.\n"
        f"Tokens/s             over {counted} tokens.\n"
        "Right answers        the shipped questions were picked so that DynamicCache answers them."
    )
    if len(results) > 2:
        print("All local            the control: the same sinks and windows, but no head keeps every token.")


def _rate(result: Result) -> str:
    rate = result.decode_tokens_per_s
    return "-" if rate is None else f"{rate:.1f}"


def _as_data(result: Result) -> dict[str, Any]:
    return {
        "name": result.name,
        "kv_bytes": result.kv_bytes,
        "kv_live_bytes": result.kv_live_bytes,
        "read_s": result.read_s,
        "first_token_s": result.first_token_s,
        "decode_tokens_per_s": result.decode_tokens_per_s,
        "answers": [{**vars(answer), "correct": answer.correct} for answer in result.answers],
    }


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return value
