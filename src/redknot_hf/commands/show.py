"""`redknot show PROFILE`: what a head profile keeps, what it costs, where it comes from.

Reads files of this project and foreign head maps alike. It never loads weights; `--model` reads a config.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import RedKnotError, shorten
from ._show_text import render, size_text

if TYPE_CHECKING:
    from ..heads import HeadProfile

NAME = "show"
HELP = "a head profile as table and heat map: memory, capacity, provenance"
DESCRIPTION = """\
Show a head profile: which KV heads keep every token, what the others keep, and what that costs at a context length.

PROFILE is a file, the name of a shipped profile, a Hub id, or a head map of another project (RedKnot, DuoAttention,
HeadKV, MInference; recognised by content). Without PROFILE the shipped profiles are listed.
"""
EPILOG = """\
examples:
  redknot show Meta-Llama-3.1-8B-Instruct --seq-len 128k
  redknot show Meta-Llama-3.1-8B-Instruct --gpu-memory 80GiB --weights-bytes 16GB --context 128k
  redknot show Mistral-7B-Instruct-v0.3 --world-size 8 --json
  redknot show scores.json.gz --num-kv-heads 8 --fraction 0.3 --save profile.json --plot heads.png
"""

_IMPORT_OPTIONS = ("num_kv_heads", "fraction", "reduce", "threshold", "sparsity", "sink", "window", "num_layers")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("profile", nargs="?", metavar="PROFILE", help="path, shipped name or Hub id")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.add_argument("--plot", metavar="FILE", help="also draw the head map into a .png, .svg or .pdf file")
    parser.add_argument("--save", metavar="FILE", help="also write the profile in this project's format")

    cost = parser.add_argument_group("memory")
    cost.add_argument("--seq-len", type=_tokens, default=32768, metavar="N", help="context in tokens (32k = 32768)")
    cost.add_argument("--batch", type=_tokens, default=1, metavar="N", help="sequences (default 1)")
    cost.add_argument("--dtype", default="bfloat16", help="of K and V (default bfloat16)")
    cost.add_argument("--page-size", type=_tokens, default=64, metavar="N", help="tokens per page (default 64)")
    cost.add_argument("--head-dim", type=_tokens, metavar="N", help="elements per head, when the profile does not say")
    cost.add_argument(
        "--world-size", type=_tokens, metavar="N", help="balance of KV bytes over N tensor-parallel ranks"
    )

    fit = parser.add_argument_group("capacity: sessions per GPU")
    fit.add_argument("--gpu-memory", type=_bytes, metavar="SIZE", help="e.g. 80GiB")
    fit.add_argument("--context", type=_tokens, metavar="N", help="tokens per session (default: --seq-len)")
    fit.add_argument("--model", metavar="ID", help="path or Hub id of the model: checks the profile, counts parameters")
    fit.add_argument("--weights-bytes", type=_bytes, metavar="SIZE", help="size of the weights, instead of --model")
    fit.add_argument("--utilization", type=float, default=1.0, metavar="X", help="share this process may take (1.0)")
    fit.add_argument(
        "--reserve", type=_bytes, metavar="SIZE", help="CUDA context, kernels and libraries (default 1GiB)"
    )
    fit.add_argument(
        "--chunk", type=_tokens, default=2048, metavar="N", help="prompt tokens fed at a time, for activations (2048)"
    )

    foreign = parser.add_argument_group("head maps of other projects")
    foreign.add_argument("--format", default="auto", help="auto, redknot, duo_attention, headkv or minference")
    foreign.add_argument("--num-kv-heads", type=int, metavar="N", help="for maps of query heads")
    foreign.add_argument("--num-layers", type=int, metavar="N", help="for hybrids that list attention layers only")
    foreign.add_argument("--attention-layers", metavar="A:B:C", help="layers with KV, as start:stop:step or a,b,c")
    foreign.add_argument("--fraction", type=float, metavar="X", help="share of global heads (headkv)")
    foreign.add_argument("--reduce", choices=["max", "mean"], help="query heads to KV head (headkv)")
    foreign.add_argument("--threshold", type=float, metavar="X", help="gates at or above are global (duo_attention)")
    foreign.add_argument("--sparsity", type=float, metavar="X", help="share of local heads (duo_attention)")
    foreign.add_argument("--sink", type=int, metavar="N", help="sink of local heads")
    foreign.add_argument("--window", type=int, metavar="N", help="window of local heads")


def run(args: argparse.Namespace) -> int:
    if args.profile is None:
        return _list(args)
    profile = _load(args)
    config = _config(args.model) if args.model else None
    if config is not None:
        profile.validate_for(config)
    report = collect(profile, args, config)
    if args.save:
        report["saved"] = str(profile.save(args.save))
    if args.plot:
        report["plot"] = str(profile.plot(args.plot))
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        print(render(profile, report))
    return 0


def collect(profile: HeadProfile, args: argparse.Namespace, config: Any = None) -> dict[str, Any]:
    """Everything `show` knows, as plain data.

    Args:
        profile: what to describe.
        args: parsed arguments of this command.
        config: the model's config, or None.
    """
    from ..heads import HEAD_CLASSES, model_shape

    head_dim = args.head_dim or profile.metadata.get("head_dim") or (config and model_shape(config).head_dim)
    sizes = {"dtype": args.dtype, "head_dim": head_dim}
    tokens = profile.stored_tokens(args.seq_len)
    kept = sum(map(sum, tokens))
    cells = len(profile.attention_layers) * profile.num_kv_heads
    report: dict[str, Any] = {
        "num_layers": profile.num_layers,
        "num_kv_heads": profile.num_kv_heads,
        "attention_layers": profile.attention_layers,
        "classes": {name: profile.count(name) for name in HEAD_CLASSES},
        "layers": _layers(profile, tokens, args.seq_len),
        "seq_len": args.seq_len,
        "batch": args.batch,
        "kept_share": kept / (cells * args.seq_len) if args.seq_len else 1.0,
        "memory": None,
        "metadata": {key: value for key, value in profile.metadata.items() if key != "scores"},
        "scores": sorted(profile.metadata.get("scores", {})),
    }
    if head_dim:
        live = profile.kv_bytes(args.seq_len, args.batch, page_size=args.page_size, **sizes)
        dense = profile.dense_kv_bytes(args.seq_len, args.batch, **sizes)
        report["memory"] = {
            "pages": live,
            "tables": profile.table_bytes(args.seq_len, args.batch, args.page_size),
            "dense": dense,
            "share": live / dense if dense else 1.0,
            "page_size": args.page_size,
            **sizes,
        }
    if args.world_size:
        report["placement"] = _placement(profile, args, head_dim)
    if args.gpu_memory:
        report["capacity"] = _capacity(profile, args, config, head_dim)
    return report


def _layers(profile: HeadProfile, tokens: list[list[int]], seq_len: int) -> list[dict[str, Any]]:
    """One entry per run of layers that hold the same."""
    from ..heads import HEAD_CLASSES

    runs: list[dict[str, Any]] = []
    for layer in profile.attention_layers:
        row = profile.head_class[layer]
        local = [h for h, name in enumerate(row) if name == "local"]
        entry = {
            **{name: row.count(name) for name in HEAD_CLASSES},
            "sink": sorted({profile.sink[layer][h] for h in local}),
            "window": sorted({profile.window[layer][h] for h in local}),
            "kept_share": sum(tokens[layer]) / (seq_len * len(row)) if seq_len else 1.0,
        }
        previous = runs[-1] if runs else None
        if previous and previous["last"] == layer - 1 and all(previous[key] == entry[key] for key in entry):
            previous["last"] = layer
        else:
            runs.append({"first": layer, "last": layer, **entry})
    return runs


def _placement(profile: HeadProfile, args: argparse.Namespace, head_dim: int | None) -> dict[str, Any]:
    from ..placement import HeadPlacement, place_heads

    after = place_heads(profile, args.world_size, page_size=args.page_size)
    found: dict[str, Any] = {
        "world_size": args.world_size,
        "replicas": after.replicas,
        "lower_bound": after.lower_bound(args.seq_len, args.page_size),
    }
    for name, placement in (("before", HeadPlacement.contiguous(profile, args.world_size)), ("after", after)):
        found[name] = {
            "imbalance": placement.imbalance(args.seq_len, args.page_size),
            "decode_tokens": placement.decode_tokens(args.seq_len),
        }
        if head_dim:
            found[name]["bytes_per_rank"] = placement.kv_bytes_per_rank(
                args.seq_len, args.batch, args.dtype, args.page_size, head_dim=head_dim
            )
    return found


def _capacity(profile: HeadProfile, args: argparse.Namespace, config: Any, head_dim: int | None) -> dict[str, Any]:
    from ..heads.capacity import RUNTIME_BYTES, Activations, capacity

    if args.weights_bytes is not None:
        weights, source = args.weights_bytes, "given by --weights-bytes"
    elif config is not None:
        weights, source = _weights_of(config)
    else:
        raise RedKnotError("--gpu-memory needs the size of the weights: pass --model ID or --weights-bytes SIZE")
    found = capacity(
        profile,
        args.context or args.seq_len,
        args.gpu_memory,
        weights,
        dtype=args.dtype,
        page_size=args.page_size,
        head_dim=head_dim,
        utilization=args.utilization,
        world_size=args.world_size or 1,
        runtime=RUNTIME_BYTES if args.reserve is None else args.reserve,
        activations=None if config is None else Activations.of(config, args.chunk),
        chunk=args.chunk,
    ).as_dict()
    found["assumptions"].insert(0, f"weights {size_text(weights)}: {source}")
    return {"gpu_memory": args.gpu_memory, **found}


def _weights_of(config: Any) -> tuple[int, str]:
    """Bytes of the weights, counted on a model without memory."""
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # whatever a model's constructor raises for its own config
        raise RedKnotError(f"cannot count the parameters of this model ({error}); pass --weights-bytes") from None
    count = sum(parameter.numel() for parameter in model.parameters())
    dtype = getattr(config, "dtype", None) or torch.bfloat16
    return count * dtype.itemsize, f"{count / 1e9:.2f} billion parameters in {str(dtype).removeprefix('torch.')}"


def _list(args: argparse.Namespace) -> int:
    from ..heads import HeadProfile, shipped_names

    rows = []
    for name in shipped_names():
        profile = HeadProfile.load(name)
        rows.append({"name": name, "model": profile.metadata.get("model"), "layers": profile.num_layers,
                     "kv_heads": profile.num_kv_heads, "global": profile.count("global"),
                     "local": profile.count("local")})  # fmt: skip
    if args.json:
        print(json.dumps(rows, indent=2))
    else:
        print("shipped profiles (redknot show NAME):")
        for row in rows:
            shape = f"{row['layers']} layers x {row['kv_heads']} KV heads"
            print(f"  {row['name']:32} {shape:26} {row['global']} global, {row['local']} local   {row['model']}")
    return 0


# ---------------------------------------------------------------- input


def _load(args: argparse.Namespace) -> HeadProfile:
    from ..heads import HeadProfile
    from ..heads.sources import FILE_NAME

    options = {key: getattr(args, key) for key in _IMPORT_OPTIONS if getattr(args, key) is not None}
    if args.attention_layers:
        options["attention_layers"] = _layer_list(args.attention_layers)
    path = Path(args.profile)
    is_foreign = path.exists() and not (path.is_dir() and (path / FILE_NAME).exists())
    if is_foreign or args.format != "auto":
        return HeadProfile.import_from(path, args.format, **options)
    if options:
        raise RedKnotError(f"--{next(iter(options)).replace('_', '-')} is for head maps of other projects")
    return HeadProfile.load(args.profile)


def _config(model: str) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(model)
    except Exception as error:  # OSError, ValueError and the Hub's own, all meaning "no such config"
        raise RedKnotError(
            f"no config for the model {shorten(model, 200)}: {str(error).strip().splitlines()[0]}"
        ) from None


def _layer_list(text: str) -> list[int]:
    if re.fullmatch(r"\d{1,5}:\d{1,5}(:[1-9]\d{0,4})?", text):
        return list(range(*map(int, text.split(":"))))
    if re.fullmatch(r"\d{1,5}(,\d{1,5})*", text):
        return [int(part) for part in text.split(",")]
    raise RedKnotError(f"--attention-layers is {shorten(text)}; expected start:stop:step or a,b,c")


def _tokens(text: str) -> int:
    match = re.fullmatch(r"(\d{1,12})([kKmM]?)", text)
    if not match or int(match[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a positive number such as 32768 or 32k")
    return int(match[1]) * {"": 1, "k": 1024, "m": 1024**2}[match[2].lower()]


def _bytes(text: str) -> int:
    units = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
             "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}  # fmt: skip
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,9})?)\s*([a-zA-Z]{0,3})", text)
    if not match or match[2].lower() not in units or float(match[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a size such as 80GiB, 16GB or a number of bytes")
    return round(float(match[1]) * units[match[2].lower()])
