"""`redknot env`: what a bug report needs to know about this installation."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import sys
from collections.abc import Mapping
from typing import Any

NAME = "env"
HELP = "versions, devices, kernels and caches of this installation (for bug reports)"

_PACKAGES = (
    "redknot-hf", "transformers", "torch", "triton", "accelerate", "safetensors", "huggingface_hub", "tokenizers",
    "numpy", "matplotlib", "gguf", "fsspec", "valkey", "mooncake-transfer-engine", "mooncake-transfer-engine-non-cuda",
    "lm-eval",
)  # fmt: skip
_VARIABLES = (
    "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "TRITON_INTERPRET", "HF_HOME", "HF_HUB_OFFLINE", "XDG_CACHE_HOME",
    "REDKNOT_TEST_MODEL", "REDKNOT_DATA",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def run(args: argparse.Namespace) -> int:
    report = collect()
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        for title, value in report.items():
            _print(title, value, "")
    return 0


def collect() -> dict[str, Any]:
    """The report as plain data: versions, devices, kernels, names registered with transformers, profiles, caches."""
    return {
        "python": f"{platform.python_version()} ({platform.python_implementation()}, {sys.executable})",
        "platform": platform.platform(),
        "packages": _versions(),
        "devices": _devices(),
        "kernels": _kernels(),
        "attention": _attention(),
        "profiles": _profiles(),
        "cache": _cache(),
        "environment": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
    }


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return versions


def _devices() -> dict[str, Any]:
    import torch

    cpu = platform.processor() or platform.machine()
    devices: dict[str, Any] = {"cpu": f"{cpu}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"}
    if torch.version.cuda:
        devices["cuda build"] = torch.version.cuda
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        card = torch.cuda.get_device_properties(index)
        devices[f"cuda:{index}"] = (
            f"{card.name}, compute capability {card.major}.{card.minor}, {card.total_memory / 2**30:.1f} GiB"
        )
    if torch.backends.mps.is_available():
        devices["mps"] = "available"
    return devices


def _kernels() -> dict[str, Any]:
    """Which of the two paths attention takes here: the Triton kernels or plain torch."""
    import torch

    missing = [name for name in ("segpaged_attention", "triton") if importlib.util.find_spec(name) is None]
    if missing:
        return {"path": "torch", "reason": f"{' and '.join(missing)} not installed"}
    if not torch.cuda.is_available():
        return {"path": "torch", "reason": "torch sees no CUDA device; the Triton kernels need one"}
    return {"path": "triton", "reason": "CUDA device and Triton found"}


def _attention() -> dict[str, Any]:
    """Whether `attn_implementation="redknot"` is known to transformers, for attention and for masks."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    import redknot_hf  # noqa: F401  # registers the name

    known = {"attention function": AttentionInterface, "mask function": AttentionMaskInterface}
    return {what: "redknot" in interface().valid_keys() for what, interface in known.items()}


def _profiles() -> list[str]:
    from ..heads.sources import shipped_names

    return list(shipped_names())


def _cache() -> dict[str, Any]:
    from ..demo_model import cache_root, find_demo_model
    from ..errors import RedKnotError

    root = cache_root()
    size = 0
    for folder, _, names in os.walk(root):
        for name in names:
            with contextlib.suppress(OSError):
                size += os.stat(os.path.join(folder, name)).st_size
    try:
        model = find_demo_model()
    except RedKnotError as error:
        demo_model = str(error)
    else:
        demo_model = str(model) if model else "not fetched yet"
    return {"folder": str(root), "bytes": size, "demo model": demo_model}


def _print(title: str, value: Any, indent: str) -> None:
    if isinstance(value, Mapping):
        print(f"{indent}{title}:{'' if value else ' none'}")
        for key, item in value.items():
            _print(str(key), item, indent + "  ")
    elif isinstance(value, list):
        print(f"{indent}{title}: {', '.join(map(str, value)) or 'none'}")
    else:
        words = {True: "yes", False: "no", None: "not installed"}
        print(f"{indent}{title}: {words[value] if value is None or isinstance(value, bool) else value}")
