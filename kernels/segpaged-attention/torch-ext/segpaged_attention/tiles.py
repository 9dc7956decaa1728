"""What the kernels share: score arithmetic on tiles, slot arithmetic, and what the launchers ask of a device.

Alphabet of the kernels: ``i_`` index of this program, ``p_`` pointer or tensor descriptor, ``b_`` block in registers,
``o_`` offsets, ``m_`` mask. Upper case is known at compile time. Scores are kept in base 2: exp(x) = exp2(x * LOG2E).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .support import KEEP_ALL

LOG2E = 1.4426950408889634
_LOG2E = tl.constexpr(LOG2E)
# The score of an invisible key: finite, so that differences of two of them are 0 and not nan. A row whose maximum is
# still HIDDEN has seen nothing; what it summed up (exp2(0) per key) is wiped by the first real score, or dropped at the
# end.
HIDDEN = tl.constexpr(-1.0e30)
_SEEN = tl.constexpr(-1.0e29)


@triton.jit
def cap_scores(b_s, scale, softcap, CAP: tl.constexpr):
    """Raw products to base-2 scores. ``scale`` comes with LOG2E unless CAP."""
    if CAP:
        # tanh(x) = 1 - 2 / (1 + exp(2x)); the interpreter knows no tanh, and exp may overflow to inf without harm
        b_s = softcap * (1.0 - 2.0 / (1.0 + tl.exp2(b_s * (2.0 * _LOG2E * scale / softcap)))) * _LOG2E
    else:
        b_s = b_s * scale
    return b_s


@triton.jit
def output_factor(b_m, b_l, p_aux, o_head, m_head, AUX: tl.constexpr):
    """Per row 1 / softmax denominator, or 0 where nothing was seen; ``b_m`` maximum, ``b_l`` sum of the scores."""
    m_seen = b_m > _SEEN
    b_l = tl.where(m_seen, b_l, 1.0)
    if AUX:
        b_aux = tl.load(p_aux + o_head, mask=m_head, other=0.0) * _LOG2E
        b_top = tl.maximum(b_m, b_aux)
        b_f = tl.exp2(b_m - b_top) / (b_l * tl.exp2(b_m - b_top) + tl.exp2(b_aux - b_top))
    else:
        b_f = 1.0 / b_l
    return tl.where(m_seen, b_f, 0.0)


# A hidden slot has weight 0, and 0 times the nan or the infinity that it may hold is nan. So where a sum comes out as nan
# the kernels make it again from `good_and_bad` values; nan that is seen by a row stays nan.
_BAD = tl.constexpr(1.0e30)


@triton.jit
def has_nan(b_acc):
    """Whether any sum is nan."""
    b_rows = tl.sum(b_acc, 1)
    return tl.max((b_rows != b_rows).to(tl.int32), 0) > 0


@triton.jit
def good_and_bad(b_v):
    """Finite values, the others 0; and in float32 a large number for each of the others, to be seen or not seen."""
    m_v = b_v - b_v == 0.0
    return tl.where(m_v, b_v, 0.0), tl.where(m_v, 0.0, _BAD)


@triton.jit
def bad_as_nan(b_acc):
    """Sums in which a bad value was seen become nan."""
    return tl.where(tl.abs(b_acc) < 0.1 * _BAD, b_acc, float("nan"))


@triton.jit
def slot_to_position(o_slot, seq_len, sink, ring, newest):
    """Position stored in each slot. ``newest``: the ring place of position seq_len - 1, (seq_len - 1 - sink) % ring."""
    age = newest - (o_slot - sink)
    age = tl.where(age < 0, age + ring, age)
    return tl.where((o_slot < sink) | (seq_len <= sink + ring), o_slot, seq_len - 1 - age)


@triton.jit
def load_pages(p_row, token, o_n, n, PAGE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Page ids of the block of slots at ``token``: one id, or one per slot where pages are shorter than blocks.

    Loaded one block ahead and carried: a load that feeds the address of another load inside a pipelined loop would be
    pipelined as a level of its own and take the buffers of K and V.
    """
    if PAGE >= BLOCK_N:
        page = tl.load(p_row + token // PAGE)
    else:
        page = tl.load(p_row + (token + o_n) // PAGE, mask=token + o_n < n, other=0)
    return page


@triton.jit
def load_tile(
    p_pages, page, token, o_n, o_d,
    D: tl.constexpr, BD: tl.constexpr, PAGE: tl.constexpr, BLOCK_N: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """[BLOCK_N, BD] of K or V; columns from D on are zero."""
    if TMA:
        b = p_pages.load([page * PAGE + token % PAGE, 0])
    else:
        # int64: a pool may hold more than 2**31 elements
        if PAGE >= BLOCK_N:
            o_row = page.to(tl.int64) * PAGE + token % PAGE + o_n
        else:
            o_row = page.to(tl.int64) * PAGE + o_n % PAGE
        if BD == D:
            b = tl.load(p_pages + o_row[:, None] * D + o_d[None, :])
        else:
            b = tl.load(p_pages + o_row[:, None] * D + o_d[None, :], mask=(o_d < D)[None, :], other=0.0)
    return b


@dataclass(frozen=True)
class Device:
    """What a launcher asks of a device: streaming multiprocessors, shared memory per block, Hopper's features."""

    processors: int
    shared_memory: int  # bytes
    hopper: bool  # TMA and programmatic dependent launch


@functools.cache
def device_of(device: torch.device) -> Device:
    """Facts about a CUDA device; small made-up ones for the CPU, where triton's interpreter runs."""
    if device.type != "cuda":
        return Device(processors=3, shared_memory=1 << 20, hopper=False)
    facts = torch.cuda.get_device_properties(device)
    shared = getattr(facts, "shared_memory_per_block_optin", 0) or (227 << 10 if facts.major == 9 else 99 << 10)
    return Device(facts.multi_processor_count, shared, facts.major == 9)


class _Address:
    """What triton reads of a descriptor's tensor. Holding the tensor itself would keep a dropped pool in memory."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._address = tensor.data_ptr()
        self.dtype, self.device, self.shape = tensor.dtype, tensor.device, tensor.shape

    def data_ptr(self) -> int:
        return self._address


_DESCRIPTORS: dict[tuple, TensorDescriptor] = {}  # a description of an address never goes stale


def page_descriptor(pages: torch.Tensor, block_n: int) -> TensorDescriptor:
    """TMA descriptor of a pool as ``[num_pages * page_size, D]``, box ``[block_n, D]`` padded to a power of two."""
    key = (pages.data_ptr(), pages.shape, pages.dtype, pages.device, block_n)
    found = _DESCRIPTORS.get(key)
    if found is None:
        if len(_DESCRIPTORS) > 1024:  # pools of many caches came and went
            _DESCRIPTORS.clear()
        head_dim = pages.shape[2]
        base = _Address(pages) if pages.is_cuda else pages  # the interpreter copies the tensor
        shape, box = [pages.shape[0] * pages.shape[1], head_dim], [block_n, triton.next_power_of_2(head_dim)]
        found = TensorDescriptor(base, shape, [head_dim, 1], box)
        if pages.is_cuda:
            _DESCRIPTORS[key] = found
    return found


def strides(x: torch.Tensor) -> tuple[int, int, int]:
    """Strides of the first three of four dimensions, 0 where the size is 1.

    Triton compiles one variant per divisibility of each stride; torch leaves the stride of a dimension of size 1
    undefined.
    """
    first, second, third = (0 if x.shape[i] == 1 else x.stride(i) for i in range(3))
    return first, second, third


def model_window_of(model_window: int) -> int:
    """0 means none: a window as long as anything."""
    return model_window if model_window > 0 else KEEP_ALL
