"""`redknot profile`: measure the heads of a model and write a head profile."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

NAME = "profile"
HELP = "measure which heads of a model need the whole context, and write a head profile"
DESCRIPTION = (
    "Scores every KV head on retrieval prompts and text, optimises gates, chooses classes and windows, and validates "
    "the choice: all heads together, against the full cache, on prompts that were not used before."
)
EPILOG = """examples:
  redknot profile HuggingFaceTB/SmolLM2-135M-Instruct -o smollm2.json
  redknot profile ./model -o model.json --budget 0.15 --texts book.txt --device cuda --dtype bfloat16
  redknot profile ./model -o model.json --tolerance 0.02 --checkpoint run.safetensors
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="folder or Hub id of a causal decoder")
    parser.add_argument("-o", "--output", metavar="FILE", required=True, help="head profile to write (JSON)")
    goal = parser.add_mutually_exclusive_group()
    goal.add_argument("--budget", type=float, help="fraction of heads that stay global (default 0.25)")
    goal.add_argument(
        "--tolerance",
        type=float,
        metavar="KL",
        help="take the smallest budget with at most this KL on text (nats per token)",
    )
    parser.add_argument(
        "--max-accuracy-drop", type=float, metavar="SHARE", help="with --tolerance: retrieval prompts that may be lost"
    )
    parser.add_argument("--method", default="joint", help="joint, gates+error, gates or error (default %(default)s)")
    parser.add_argument("--sink", type=int, default=4, help="first tokens that local heads keep (default %(default)s)")
    parser.add_argument(
        "--windows",
        type=int,
        nargs="+",
        default=[64, 128, 256, 512, 1024],
        metavar="W",
        help="window sizes to choose from, tokens (default: 64 128 256 512 1024)",
    )
    parser.add_argument(
        "--mean-window", type=int, default=256, help="average window of local heads, tokens (default %(default)s)"
    )
    parser.add_argument(
        "--needle-weight",
        type=float,
        default=1.0,
        metavar="W",
        help="what the search pays for answers against text: below 1 for maps that cost less on text and lose more "
        "answers (default %(default)s)",
    )
    parser.add_argument(
        "--prefill", default="windowed", help="mode to validate: windowed or full (default %(default)s)"
    )
    parser.add_argument(
        "--context", type=int, default=2048, help="tokens per calibration context (default %(default)s)"
    )
    parser.add_argument("--samples", type=int, help="retrieval prompts (default: 9 on a CPU, 40 on a GPU)")
    parser.add_argument(
        "--gate-steps", type=int, help="steps of the gate optimisation (default: what the device does in time)"
    )
    parser.add_argument(
        "--texts", nargs="+", metavar="FILE", help="UTF-8 text files to calibrate on (default: made-up prose)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of all prompts and draws (default %(default)s)")
    parser.add_argument("--device", help="torch device (default: cuda when there is one)")
    parser.add_argument(
        "--dtype",
        default="auto",
        help="float32, bfloat16, float16 or auto: float32 on a CPU, the model's own elsewhere",
    )
    parser.add_argument("--revision", help="branch, tag or commit of a Hub model")
    parser.add_argument("--checkpoint", metavar="FILE", help="continue from and save to this file (safetensors)")
    parser.add_argument("--no-validate", action="store_true", help="skip the validation")
    parser.add_argument("--no-progress", action="store_true", help="no progress bar")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")


def run(args: argparse.Namespace) -> int:
    from ..errors import RedKnotError

    if args.max_accuracy_drop is not None and args.tolerance is None:
        raise RedKnotError("--max-accuracy-drop is a second bound beside --tolerance; pass --tolerance as well")
    texts = [_read(Path(name)) for name in args.texts] if args.texts else None
    output = Path(args.output)
    if output.is_dir() or not output.absolute().parent.is_dir():
        raise RedKnotError(f"--output is {args.output!r}; expected a file name in an existing folder")

    from ..heads.profiler import profile_heads

    model, tokenizer = _load(args)
    tolerance: Any = args.tolerance
    if args.max_accuracy_drop is not None:
        tolerance = {"text_kl": args.tolerance, "accuracy_drop": args.max_accuracy_drop}
    profile = profile_heads(
        model, tokenizer, texts, budget=args.budget, tolerance=tolerance, method=args.method, sink=args.sink,
        windows=tuple(args.windows), mean_window=args.mean_window, needle_weight=args.needle_weight,
        prefill=args.prefill, context=args.context,
        seed=args.seed, gate_steps=args.gate_steps, samples=args.samples, validate=not args.no_validate,
        progress=not args.no_progress, checkpoint=args.checkpoint,
    )  # fmt: skip
    profile.save(output)
    if args.json:
        keys = ("model", "method", "budget", "predicted_kl", "validation", "tolerance")
        print(json.dumps({"file": str(output), **{k: profile.metadata[k] for k in keys if k in profile.metadata}}))
    else:
        print(report(profile))
        print(f"written to {output}")
    return 0


def report(profile: Any) -> str:
    """The result in a few lines."""
    budget = profile.metadata["budget"]
    sizes: dict[int, int] = {}
    for classes, windows in zip(profile.head_class, profile.window, strict=True):
        for name, window in zip(classes, windows, strict=True):
            if name == "local":
                sizes[window] = sizes.get(window, 0) + 1
    lines = [
        f"{budget['global_heads']} of {budget['heads']} heads global; local heads per window: "
        + (", ".join(f"{w}: {n}" for w, n in sorted(sizes.items())) or "none")
    ]
    checked = profile.metadata.get("validation")
    if checked:
        text, needle = checked.get("text"), checked.get("needle")
        lines.append(
            f"validation (prefill={checked['prefill']}, {checked['context']} tokens, KV "
            f"{checked['kv_bytes_fraction']:.0%} of the full cache)"
        )
        if text:
            low, high = text["kl_95"]
            lines.append(
                f"  text:      KL {text['kl']:.4f} [{low:.4f}, {high:.4f}], delta NLL {text['delta_nll']:+.4f}, "
                f"top-1 agreement {text['top1']:.1%} (n={text['n']})"
            )
        if needle:
            low, high = needle["accuracy_95"]
            lines.append(
                f"  retrieval: accuracy {needle['accuracy']:.2f} [{low:.2f}, {high:.2f}], "
                f"full cache {needle['full_accuracy']:.2f}, "
                f"KL at the answer {needle['kl']:.4f} (n={needle['n']})"
            )
    tolerance = profile.metadata.get("tolerance")
    if tolerance and not tolerance["met"]:
        lines.append(f"  no budget met the tolerance {tolerance['bounds']}: all heads stay global")
    return "\n".join(lines)


def _read(path: Path) -> str:
    from ..errors import RedKnotError

    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RedKnotError(f"--texts: cannot read {str(path)!r} as UTF-8 text: {error}") from error


def _load(args: argparse.Namespace) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ..errors import RedKnotError

    try:
        device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise RedKnotError(f"--device is {args.device!r}: {error}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise RedKnotError(f"--device is {args.device!r}, but this torch sees no CUDA device; pass --device cpu")
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if args.dtype not in (*known, "auto"):
        raise RedKnotError(f"--dtype is {args.dtype!r}; expected auto, {', '.join(known)}")
    dtype = known.get(args.dtype, torch.float32 if device.type == "cpu" else "auto")
    print(f"loading {args.model}", file=sys.stderr)
    try:
        tokenizer = AutoTokenizer.from_pretrained(args.model, revision=args.revision)
        model = AutoModelForCausalLM.from_pretrained(args.model, revision=args.revision, dtype=dtype)
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise RedKnotError(f"cannot load {args.model!r}: {first}") from error
    return model.to(device), tokenizer
