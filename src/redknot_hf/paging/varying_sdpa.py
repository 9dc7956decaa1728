"""`scaled_dot_product_attention` for calls whose number of keys changes from step to step.

On recent GPUs torch prefers cuDNN's attention, which compiles a plan for every new shape: 5 ms and more of host time. In
decode every layer has a new shape in every step, so these calls go to torch's other backends. The switch that torch has
for this is global: it is thrown for the time of the call, counted over threads, and put back by the last that leaves.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch.nn.functional import scaled_dot_product_attention

__all__ = ["varying_sdpa", "without_cudnn"]

_lock = threading.Lock()
_inside = 0
_before = True


@contextmanager
def without_cudnn() -> Iterator[None]:
    """cuDNN's attention is off inside; as it was when the last thread has left."""
    global _inside, _before
    with _lock:
        if not _inside:
            _before = torch.backends.cuda.cudnn_sdp_enabled()
            torch.backends.cuda.enable_cudnn_sdp(False)
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if not _inside:
                torch.backends.cuda.enable_cudnn_sdp(_before)


def varying_sdpa(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """Attention of ``q [batch, heads, rows, dim]`` over ``k, v [batch, heads, keys, dim]``; ``mask`` is True where seen."""
    with without_cudnn() if q.is_cuda else nullcontext():
        return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
