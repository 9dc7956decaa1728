"""`redknot bench [WHAT] MODEL`: measurements on this machine. One entry of `BENCHES` per measurement.

`redknot bench MODEL` is short for `redknot bench caches MODEL`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import RedKnotError, shorten

if TYPE_CHECKING:
    from ..eval.speed import CacheTable
    from ..heads import HeadProfile
    from ..ledger import Ledger
    from ..sparse_ffn import SparseFFNSchedule

NAME = "bench"
HELP = "measure on this machine: caches side by side, or where prefill time goes"
DESCRIPTION = """\
Measurements on this machine. `redknot bench WHAT --help` explains one; without WHAT it is "caches".
"""
EPILOG = """\
examples:
  redknot bench
  redknot bench meta-llama/Llama-3.1-8B-Instruct --tokens 32k --device cuda --compile
  redknot bench prefill
  redknot bench prefill meta-llama/Llama-3.1-8B-Instruct --tokens 16k --device cuda --dtype bfloat16
"""

_PREFILL = """\
The ledger of a prefill: FLOPs (counted), bytes and seconds (measured) of the dense model, of head classes, of a sparse
FFN, and of both. "realised" is the time saved over what the FLOPs saved promise: 0 % is a saving on paper only.

Quality is not measured here: a sparse FFN is approximate. MODEL is a folder or a Hub id (default:
SmolLM2-135M-Instruct).
"""
_PREFILL_EPILOG = """\
examples:
  redknot bench prefill --tokens 2k --repeats 3
  redknot bench prefill --keep 0.3 --first-layer 20
  redknot bench prefill ./config_of_a_large_model --random-weights --device cuda --dtype bfloat16 --tokens 8k
"""


_CACHES = """\
Time to first token, milliseconds per token, memory, and how many sequences fit: DynamicCache, StaticCache,
QuantizedCache (where its backend is installed), an offloaded cache (on a GPU) and RedKnotCache, on the same random
tokens in one process. "agrees" is the share of greedy tokens that are DynamicCache's: a head profile is approximate,
and quality is measured by `redknot eval`. MODEL is a folder or a Hub id (default: SmolLM2-135M-Instruct).
"""
_CACHES_EPILOG = """\
examples:
  redknot bench --tokens 2k
  redknot bench ./model --profile mine.json --tokens 8k --plot caches.png
  redknot bench ./config_of_a_large_model --random-weights --device cuda --tokens 32k --compile --largest-batch 60
"""


class Bench(NamedTuple):
    """One measurement: a line for the list, its texts, its options, and the function that does it."""

    help: str
    description: str
    epilog: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    subparsers = parser.add_subparsers(title="measurements", dest="bench", metavar="WHAT", required=True)
    for name, bench in BENCHES.items():
        subparser = subparsers.add_parser(
            name,
            help=bench.help,
            description=bench.description,
            epilog=bench.epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        bench.add_arguments(subparser)


def complete(arguments: Sequence[str]) -> list[str]:
    """The arguments after `redknot bench`, with the measurement's name put in front where it was left out."""
    named = arguments and (arguments[0] in BENCHES or arguments[0] in ("-h", "--help"))
    return list(arguments) if named else ["caches", *arguments]


def run(args: argparse.Namespace) -> int:
    return BENCHES[args.bench].run(args)


# -------------------------------------------------------------------------------------------------------------- caches


def _caches_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", metavar="MODEL", help="folder or Hub id (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--tokens", type=_tokens, default=2048, metavar="N", help="length of the prompt (default 2k)")
    parser.add_argument("--new-tokens", type=_tokens, default=16, metavar="N", help="tokens decoded (default 16)")
    parser.add_argument("--batch", type=_tokens, default=1, metavar="N", help="sequences (default 1)")
    parser.add_argument(
        "--profile",
        metavar="P",
        help="head profile: file, shipped name or Hub id (default: the one shipped for the model, else a quarter of the "
        "heads global, which measures time and says nothing of quality)",
    )
    parser.add_argument(
        "--caches",
        metavar="A,B",
        help="of dynamic, static, quantized, offloaded, ours, ours-static, ours-global (default: all)",
    )
    parser.add_argument("--compile", action="store_true", help="time the static forms under torch.compile, too")
    parser.add_argument("--repeats", type=_tokens, default=3, metavar="N", help="runs of each (default 3)")
    parser.add_argument(
        "--memory", type=_size, metavar="SIZE", help="for counting what fits, e.g. 80G (default: the device's)"
    )
    parser.add_argument(
        "--largest-batch",
        type=float,
        default=0.0,
        metavar="S",
        help="on a GPU: try how many sequences fit, for up to S seconds per cache (default: by bytes)",
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: a CUDA GPU if there is one)")
    parser.add_argument("--dtype", help="float32, bfloat16 or float16 (default: float32 on a CPU, bfloat16 on a GPU)")
    parser.add_argument(
        "--random-weights", action="store_true", help="MODEL needs a config only: time does not depend on weights"
    )
    parser.add_argument("--plot", metavar="FILE", help="draw a picture: .png, .svg or .pdf")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def _caches(args: argparse.Namespace) -> int:
    from ..eval.speed import CACHES, contenders, measure_caches
    from ._models import load_model

    wanted = CACHES if args.caches is None else [name.strip() for name in args.caches.split(",") if name.strip()]
    unknown = [name for name in wanted if name not in CACHES]
    if unknown or not wanted:
        raise RedKnotError(f"--caches {shorten(args.caches)}: expected some of {', '.join(CACHES)}")
    model, _ = load_model(
        args.model, args.device, args.dtype, random_weights=args.random_weights, tokenizer=False, progress=not args.json
    )
    profile, source = _profile(args, model)
    assert profile is not None
    say = (lambda line: None) if args.json else (lambda line: print(f"redknot: {line}", file=sys.stderr, flush=True))
    table = measure_caches(
        model,
        args.tokens,
        args.new_tokens,
        contenders(model, profile, wanted, compile_decode=args.compile),
        batch=args.batch,
        repeats=args.repeats,
        memory=args.memory,
        measure_fits_s=args.largest_batch,
        profile_name=source,
        progress=say,
    )
    if args.random_weights:
        table.model += ", random weights"
    if args.plot:
        from ..eval.speed_plot import plot

        plot(table, args.plot)
    print(json.dumps(table.as_dict(), indent=2) if args.json else _caches_table(table))
    return 0


def _caches_table(table: CacheTable) -> str:
    wide = max(len(row.name) for row in table.rows) + 2
    lines = [
        f"{table.batch} x {table.tokens} tokens and {table.new_tokens} new ones, {table.model}, {table.dtype} on "
        f"{table.device} ({table.threads} threads), median of {table.repeats}; profile: {table.profile}",
        "",
        f"{'':{wide}}{'first token s':>14}{'ms per token':>13}{'KV per seq.':>13}{'peak':>11}{'fit':>7}{'tried':>7}"
        f"{'agrees':>8}",
    ]
    for row in table.rows:
        if row.first_token_s is None:
            lines.append(f"{row.name:{wide}}  not measured: {row.note}")
            continue
        peak = "-" if row.peak_bytes is None else _bytes(row.peak_bytes)
        tried = "-" if row.fits_measured is None else str(row.fits_measured)
        agrees = "-" if row.agrees is None else f"{row.agrees:.0%}"
        size = "-" if row.kv_bytes is None else _bytes(row.kv_bytes)
        fits = "-" if row.fits is None else str(row.fits)
        lines.append(
            f"{row.name:{wide}}{row.first_token_s:>14.4f}{row.decode_ms:>13.3f}{size:>13}{peak:>11}{fits:>7}{tried:>7}"
            f"{agrees:>8}{'  ' + row.note if row.note else ''}"
        )
    lines += [
        "",
        f"fit: sequences by bytes, in {_bytes(table.memory)} of memory of which a tenth is left and "
        f"{_bytes(table.weights)} are weights; activations are not counted. agrees: greedy tokens that are DynamicCache's.",
    ]
    return "\n".join(lines)


def _size(text: str) -> int:
    number, unit = (text[:-1], text[-1].upper()) if text[-1:].isalpha() else (text, "")
    scale = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}.get(unit)
    try:
        value = float(number) * scale  # type: ignore[operator]
    except (TypeError, ValueError):
        value = 0.0
    if not 0 < value < 2**60:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a size such as 80G")
    return int(value)


# ------------------------------------------------------------------------------------------------------------- prefill


def _prefill_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", metavar="MODEL", help="folder or Hub id (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--tokens", type=_tokens, default=4096, metavar="N", help="length of the prompt (default 4k)")
    parser.add_argument("--batch", type=_tokens, default=1, metavar="N", help="sequences (default 1)")
    parser.add_argument(
        "--profile",
        metavar="P",
        help="head profile: file, shipped name or Hub id; 'none' to leave head classes out (default: the one shipped "
        "for the model, else a quarter of the heads global, which measures time and says nothing of quality)",
    )
    sparse = parser.add_argument_group("sparse FFN")
    sparse.add_argument("--preset", metavar="NAME", help="a measured schedule of this model")
    sparse.add_argument("--params", metavar="FILE", help="a parameter file of the RedKnot authors")
    sparse.add_argument(
        "--keep", type=float, metavar="X", help="share of the rows that sparse layers run (default 0.3)"
    )
    sparse.add_argument("--mass", type=float, metavar="X", help="or: share of the importance that they cover")
    sparse.add_argument("--first-layer", type=int, metavar="N", help="first sparse layer (default: the last third)")
    sparse.add_argument("--importance", metavar="NAME", help="received_attention, attention_norm or hidden_change")
    parser.add_argument("--repeats", type=_tokens, default=5, metavar="N", help="runs of each (default 5)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: a CUDA GPU if there is one)")
    parser.add_argument("--dtype", help="float32, bfloat16 or float16 (default: float32 on a CPU, bfloat16 on a GPU)")
    parser.add_argument(
        "--random-weights", action="store_true", help="MODEL needs a config only: time does not depend on weights"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def _prefill(args: argparse.Namespace) -> int:
    schedule, name = _schedule(args)
    model = _model(args)
    from ..ledger import measure_prefill

    profile, profile_name = _profile(args, model)
    say = (lambda line: None) if args.json else (lambda line: print(f"redknot: {line}", file=sys.stderr, flush=True))
    ledger = measure_prefill(
        model, args.tokens, {name: schedule}, profile, args.repeats, batch=args.batch, progress=say
    )
    if args.json:
        print(json.dumps({**ledger.as_dict(), "profile": profile_name, "schedule": repr(schedule)}, indent=2))
    else:
        print(_table(ledger, profile_name))
    return 0


def _schedule(args: argparse.Namespace) -> tuple[SparseFFNSchedule, str]:
    from ..sparse_ffn import SparseFFNSchedule

    own = {word: getattr(args, word) for word in ("keep", "mass", "first_layer", "importance")}
    own = {word: value for word, value in own.items() if value is not None}
    given = [word for word in ("preset", "params") if getattr(args, word)]
    if len(given) > 1 or (given and own):
        rest = [*given, *own][1]
        raise RedKnotError(f"--{given[0]} and --{rest.replace('_', '-')}: a schedule comes from one place")
    if args.preset:
        return SparseFFNSchedule.preset(args.preset), f"sparse FFN {args.preset}"
    if args.params:
        schedule = SparseFFNSchedule.import_from(args.params)
        return schedule, f"sparse FFN {schedule.name}"
    if "mass" not in own:
        own.setdefault("keep", 0.3)
    return SparseFFNSchedule(**own), "sparse FFN"


def _model(args: argparse.Namespace) -> Any:
    from ._models import load_model

    return load_model(
        args.model, args.device, args.dtype, random_weights=args.random_weights, tokenizer=False, progress=not args.json
    )[0]


def _profile(args: argparse.Namespace, model: Any) -> tuple[HeadProfile | None, str]:
    from ..heads import HeadProfile
    from ._models import find_profile

    if args.profile == "none" and args.bench == "prefill":
        return None, "none"
    found, source = find_profile(args.profile, model.config, args.model)
    if found is not None:
        return found, source
    made = HeadProfile.uniform(model.config, sink=4, window=256, global_heads=0.25)
    return made, "a quarter of the heads global, picked blindly: for time only"


def _table(ledger: Ledger, profile_name: str) -> str:
    wide = max(len(entry.name) for entry in ledger.entries) + 2
    lines = [
        f"prefill of {ledger.batch} x {ledger.tokens} tokens, {ledger.model}, {ledger.dtype} on {ledger.device} "
        f"({ledger.threads} threads), median of {ledger.repeats}; head classes: {profile_name}",
        "",
        f"{'':{wide}}{'FLOPs':>9}{'saved':>8}{'seconds':>10}{'saved':>8}{'realised':>10}{'KV bytes':>11}{'peak':>10}",
    ]
    for entry in ledger.entries:
        realised = ledger.realised(entry)
        peak = "-" if entry.peak_bytes is None else _bytes(entry.peak_bytes)
        lines.append(
            f"{entry.name:{wide}}{_flops(entry.flops['total']):>9}{ledger.saved_flops(entry):>8.1%}"
            f"{entry.seconds:>10.4f}{ledger.saved_seconds(entry):>8.1%}"
            f"{'-' if realised is None else f'{realised:.0%}':>10}{_bytes(entry.kv_bytes):>11}{peak:>10}"
        )
    lines += ["", "FLOPs by part, and seconds of the modules (timed apart, one run):"]
    lines.append(
        f"{'':{wide}}{'project.':>9}{'attention':>10}{'FFN':>8}{'choice':>8}{'head':>8}  |"
        f"{'attention':>10}{'FFN':>9}{'rest':>9}{'FFN rows':>10}{'moved':>10}"
    )
    for entry in ledger.entries:
        f, s = entry.flops, entry.part_seconds
        lines.append(
            f"{entry.name:{wide}}{_flops(f['projections']):>9}{_flops(f['attention']):>10}{_flops(f['ffn']):>8}"
            f"{_flops(f['selection']):>8}{_flops(f['head']):>8}  |{s['attention']:>10.4f}{s['ffn']:>9.4f}"
            f"{s['rest']:>9.4f}{entry.ffn_rows:>10.1%}{_bytes(entry.moved_bytes):>10}"
        )
    for entry in ledger.entries:
        lines += [f"note on {entry.name}: {note}" for note in entry.notes]
    return "\n".join(lines)


def _flops(count: float) -> str:
    for unit, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return f"{count:.0f}"


def _bytes(count: int) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.4g} {unit}"
    return f"{count} B"


def _tokens(text: str) -> int:
    number, scale = (text[:-1], 1024) if text[-1:] in "kK" and text else (text, 1)
    if not number.isdigit() or not 0 < int(number) <= 10**8:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a positive number such as 4096 or 4k")
    return int(number) * scale


BENCHES = {
    "caches": Bench(
        "first token, decoding, memory and capacity of the caches a user can choose from",
        _CACHES,
        _CACHES_EPILOG,
        _caches_arguments,
        _caches,
    ),
    "prefill": Bench(
        "FLOPs, bytes and seconds of a prefill, per mechanism", _PREFILL, _PREFILL_EPILOG, _prefill_arguments, _prefill
    ),
}
"""Measurements by name."""
