"""`redknot bench WHAT`: measurements on this machine. One entry of `BENCHES` per measurement."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import RedKnotError, shorten

if TYPE_CHECKING:
    from ..heads import HeadProfile
    from ..ledger import Ledger
    from ..sparse_ffn import SparseFFNSchedule

NAME = "bench"
HELP = "measure on this machine: where prefill time goes"
DESCRIPTION = """\
Measurements on this machine. `redknot bench WHAT --help` explains one.
"""
EPILOG = """\
examples:
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


def run(args: argparse.Namespace) -> int:
    return BENCHES[args.bench].run(args)


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
    import torch

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    name = args.dtype or ("bfloat16" if device.startswith("cuda") else "float32")
    if name not in ("float32", "bfloat16", "float16"):
        raise RedKnotError(f"--dtype {shorten(name)}: expected float32, bfloat16 or float16")
    dtype: torch.dtype = getattr(torch, name)
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise RedKnotError(f"--device {shorten(device)}: {str(error).splitlines()[0]}") from None
    from transformers import AutoConfig, AutoModelForCausalLM

    import redknot_hf  # noqa: F401  # registers "redknot"

    if args.model is None:
        if args.random_weights:
            raise RedKnotError("--random-weights needs a MODEL to take the config from")
        from ..demo_model import get_demo_model

        model, _ = get_demo_model(dtype, progress=not args.json, attn_implementation="redknot", device=device)
        return model
    try:
        if args.random_weights:
            config = AutoConfig.from_pretrained(args.model)
            with torch.device(device):
                model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="redknot")
        else:
            model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype, attn_implementation="redknot")
    except RedKnotError:
        raise
    except (OSError, ValueError, KeyError) as error:  # whatever transformers raises for "no such model"
        raise RedKnotError(f"no model {shorten(args.model, 200)}: {str(error).strip().splitlines()[0]}") from None
    return model.to(device).eval()


def _profile(args: argparse.Namespace, model: Any) -> tuple[HeadProfile | None, str]:
    from ..heads import HeadProfile, find_shipped

    if args.profile == "none":
        return None, "none"
    if args.profile:
        given = HeadProfile.load(args.profile)
        given.validate_for(model.config)
        return given, args.profile
    shipped = find_shipped(model.config) if args.model is not None else HeadProfile.load("SmolLM2-135M-Instruct")
    if shipped is not None:
        return shipped, "shipped for this model"
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
    "prefill": Bench(
        "FLOPs, bytes and seconds of a prefill, per mechanism", _PREFILL, _PREFILL_EPILOG, _prefill_arguments, _prefill
    ),
}
"""Measurements by name."""
