"""Where the Triton kernels can run, and which shapes they take. Imports neither triton nor a kernel."""

from __future__ import annotations

import functools
import importlib.util
import warnings

import torch

MAX_HEAD_DIM = 256
MAX_GROUP = 16  # query heads per KV head
MAX_DECODE_ROWS = 8  # query rows per sequence in decode
KEEP_ALL = 1 << 30  # the window and the ring of a head that keeps everything
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def is_available(device: torch.device | str | int) -> bool:
    """Whether the Triton kernels can run on `device`: NVIDIA, compute capability 8.0 or later, triton installed."""
    device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    if device.type != "cuda" or torch.version.hip is not None or not torch.cuda.is_available():
        return False
    return (
        _cuda_capability(torch.cuda.current_device() if device.index is None else device.index) >= (8, 0) and _triton()
    )


def supported(head_dim: int, dtype: torch.dtype, page_size: int, gqa: int) -> str | None:
    """None if the kernels take this shape, else one line that says why not.

    Args:
        head_dim: of the keys or of the values; 64, 128 and 256 fill their tiles, others are padded inside.
        dtype: of queries and pages.
        page_size: tokens per page.
        gqa: query heads per KV head.
    """
    if dtype not in DTYPES:
        return f"dtype {dtype} is none of {', '.join(str(known) for known in DTYPES)}"
    if head_dim % 8 or not 16 <= head_dim <= MAX_HEAD_DIM:
        return f"head_dim {head_dim} is not a multiple of 8 between 16 and {MAX_HEAD_DIM}"
    if page_size & (page_size - 1) or not 16 <= page_size <= 256:
        return f"page_size {page_size} is not a power of two between 16 and 256"
    if not 1 <= gqa <= MAX_GROUP:
        return f"{gqa} query heads per KV head is not between 1 and {MAX_GROUP}"
    return None


def warn_once(reason: str) -> None:
    """Say once per process and reason that the torch path is taken."""
    if reason not in _warned:
        _warned.add(reason)
        warnings.warn(f"segpaged_attention uses its slow torch path: {reason}", RuntimeWarning, stacklevel=3)


_warned: set[str] = set()


@functools.cache
def _triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _cuda_capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)
