"""One launch per layer that copies the stored rows of many segments to their places and rotates their keys.

The segments are separate tensors ``[layers, kv_heads, tokens, dim]``; their addresses go to the GPU once per prompt.
Every key is rotated in fp32 from the position that it was computed for to the one it goes to, and rounded once; values
are copied. Where nothing moves the angle is 0 and the key comes out bit by bit. Rows in int8 are multiplied with their
scales first, in fp32, too.

This module does not know where the rows come from or which are needed: it copies all of them. At several TB/s that
costs less than telling them apart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

__all__ = ["PlacedSegments", "available"]

BLOCK = 64  # rows of one program


def available(device: torch.device) -> bool:
    """Whether the kernel can run on ``device``."""
    if device.type != "cuda":
        return False
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True


@dataclass
class PlacedSegments:
    """What the kernel needs to know of the segments of one prompt, on the GPU.

    Args:
        keys, values: per segment ``[layers, kv_heads, tokens, dim]``, contiguous, all alike but for the tokens.
        starts: per segment the prompt position of its first token.
        scales: fp32 ``[layers, kv_heads, tokens, 2]`` of keys and values per segment, if those are int8.

    The tensors must live until the copies have run.
    """

    keys: Sequence[torch.Tensor]
    values: Sequence[torch.Tensor]
    starts: Sequence[int]
    scales: Sequence[torch.Tensor] = ()

    def __post_init__(self) -> None:
        self._quantised = bool(self.scales)
        scales = self.scales if self._quantised else self.keys  # which are not read as such
        rows = []
        for *tensors, start in zip(self.keys, self.values, scales, self.starts, strict=True):
            addresses, tokens = [tensor.data_ptr() for tensor in tensors], tensors[0].shape[2]
            rows += [(*addresses, tokens, start, first) for first in range(0, tokens, BLOCK)]
        self._aligned = math.gcd(16, *(row[i] for row in rows for i in (0, 1)))
        self._tiles = torch.tensor(rows, dtype=torch.int64).to(self.keys[0].device)

    def place(
        self,
        layer: int,
        cos: torch.Tensor | None,
        sin: torch.Tensor | None,
        interleaved: bool,
        k_out: torch.Tensor,
        v_out: torch.Tensor,
    ) -> None:
        """Copy one layer.

        Args:
            layer: index into the segments' first dimension.
            cos, sin: fp32 ``[positions, R / 2]`` by prompt position, or None to leave the keys as they are.
            interleaved: pairs are ``(2i, 2i + 1)`` instead of ``(i, i + R / 2)``.
            k_out, v_out: ``[kv_heads, slots, dim]``, the last dimension contiguous; slot = prompt position.
        """
        from ._place_triton import place_kernel

        heads, dim, v_dim = k_out.shape[0], k_out.shape[2], v_out.shape[2]
        rotary = 0 if cos is None else 2 * cos.shape[1]
        # bytes that every row of every tensor starts at a multiple of
        size = self.keys[0].element_size()
        aligned = math.gcd(16, *(n * size for n in (dim, v_dim, rotary // 2 or dim)), self._aligned)
        with torch.cuda.device_of(k_out):  # triton launches on the current device; a model may lie on another one
            place_kernel[(self._tiles.shape[0], heads)](
                self._tiles, cos, sin, k_out, v_out, layer, k_out.stride(0), k_out.stride(1), v_out.stride(0),
                v_out.stride(1), HEADS=heads, D=dim, DV=v_dim, BD=_power_of_two(dim), BDV=_power_of_two(v_dim),
                BR=_power_of_two(max(rotary // 2, 1)), ROTARY=rotary, INTERLEAVED=interleaved, BLOCK=BLOCK,
                ALIGN=aligned, QUANTISED=self._quantised, num_warps=4,
            )  # fmt: skip


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()
