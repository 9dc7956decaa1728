"""Attention over a KV cache paged per head: some heads keep every token, others a few sinks and a recent window.

Four functions, each a torch operator: `append`, `decode`, `prefill`, `prefill_positions`. Triton kernels on NVIDIA GPUs
from Ampere on, plain torch (`reference`) anywhere else. Depends on torch, and on triton where a GPU is used; knows
nothing of models, tokenizers or page allocation.
"""

from . import reference
from .ops import append, decode, prefill, prefill_positions
from .support import is_available, supported

__all__ = ["append", "decode", "is_available", "prefill", "prefill_positions", "reference", "supported"]
