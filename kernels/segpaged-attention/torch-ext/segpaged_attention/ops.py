"""The four functions as torch operators ``segpaged_attention::*``, so that torch.compile and CUDA graphs see one node.

On CUDA an operator launches the Triton kernels; elsewhere, and for shapes the kernels do not take, it is the torch
reference (with one warning on CUDA). The functions below check their arguments and call the operators.

Storage, shared by all of them:

    k_pages, v_pages   [num_pages, page_size, D] and [num_pages, page_size, Dv], contiguous. They must hold finite
                       numbers from the start (allocate with zeros): a masked score multiplies a stale value by 0.
    block_table        int32 [B, Hkv, max_pages], last dimension contiguous; unused entries 0; page 0 holds nothing
    seq_lens           int32 [B], tokens stored
    sink, window, ring int32 [Hkv]; the rule and the slot arithmetic are in `segpaged_attention.reference`

No function synchronises with the host. Lengths are read on the device, so a captured CUDA graph follows them.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import reference, support

# ---------------------------------------------------------------------------------------------------------------------
# public functions


def append(
    k: Tensor,
    v: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    sink: Tensor,
    ring: Tensor,
    q_start: Tensor | None = None,
    q_len: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    interleaved: bool = False,
) -> None:
    """Store a chunk of new keys and values in the pages of every head of a layer.

    Only tokens that are still kept when the chunk ends are written (``pos < sink`` or ``pos >= total - ring``), so no
    slot is written twice. Pages must not be shared with another sequence at the slots written: copy shared pages first.

    Args:
        k: ``[B, Hkv, T, D]``, any strides, last dimension contiguous. v: ``[B, Hkv, T, Dv]``.
        k_pages, v_pages, block_table: see the module; the pages are changed.
        seq_lens: int32 ``[B]``, tokens stored before this call.
        sink, ring: int32 ``[Hkv]``.
        q_start, q_len: int32 ``[B]`` or None: the columns ``[q_start, q_start + q_len)`` are tokens, the others are
            padding. Column ``c`` is position ``seq_lens[b] + c - q_start[b]``. None: all T columns are tokens.
        cos, sin: float32 ``[B, R / 2]`` or None: rotate the first R dimensions of every key by these angles (relocation
            by one offset per row), in float32 with one rounding, before it is stored.
        interleaved: pairs are ``(2i, 2i + 1)`` instead of ``(i, i + R / 2)``.

    Raises:
        ValueError: a shape, dtype or stride that does not fit; the message names the argument.
    """
    _check_pages(k_pages, v_pages, block_table, seq_lens)
    _check_heads(block_table.shape[1], sink=sink, ring=ring)
    _check_chunk(k, v, k_pages, v_pages, block_table)
    _check_columns(q_start, q_len, k.shape[0])
    if (cos is None) != (sin is None):
        raise ValueError(f"cos and sin must be given together; got {'sin' if cos is None else 'cos'} alone")
    if cos is not None and sin is not None:
        for name, angle in (("cos", cos), ("sin", sin)):
            if (
                angle.dtype != torch.float32
                or angle.dim() != 2
                or angle.shape[0] != k.shape[0]
                or 2 * angle.shape[1] > k.shape[3]
            ):
                raise ValueError(
                    f"{name} is {_describe(angle)}; expected float32 [{k.shape[0]}, R / 2] with R <= {k.shape[3]}"
                )
    torch.ops.segpaged_attention.append(
        k, v, k_pages, v_pages, block_table, seq_lens, sink, ring, q_start, q_len, cos, sin, interleaved
    )


def decode(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    sink: Tensor,
    window: Tensor,
    ring: Tensor,
    scale: float,
    softcap: float = 0.0,
    s_aux: Tensor | None = None,
    model_window: int = 0,
    exact_positions: bool = True,
) -> Tensor:
    """Attention of the last R tokens of every sequence, which are already appended.

    Args:
        q: ``[B, Hq, R, D]``, R = 1 ... 8, any strides, last dimension contiguous. Row ``r`` is at position
            ``seq_lens[b] - R + r``.
        k_pages, v_pages, block_table: see the module.
        seq_lens: int32 ``[B]``, tokens stored, these R included. Rows before position 0 are zero.
        sink, window, ring: int32 ``[Hkv]``.
        scale: factor of the scores.
        softcap: 0 for none, else scores become ``softcap * tanh(score / softcap)``.
        s_aux: float32 ``[Hq]`` or None: attention sinks, one more score per query head in the softmax denominator.
        model_window: the model's own sliding window, intersected with the head's; 0 for none.
        exact_positions: False promises that the one query row sees every stored token (``ring == window`` on all
            heads); the kernel then compares no positions. Ignored where R > 1 or a model_window is given.

    Returns:
        ``[B, R, Hq, Dv]`` of q's dtype.

    Raises:
        ValueError: a shape or dtype that does not fit; the message names the argument.
    """
    _check_pages(k_pages, v_pages, block_table, seq_lens)
    _check_heads(block_table.shape[1], sink=sink, window=window, ring=ring)
    _check_queries(q, k_pages, block_table, s_aux)
    if not 1 <= q.shape[2] <= support.MAX_DECODE_ROWS:
        raise ValueError(
            f"q has {q.shape[2]} rows per sequence; decode takes 1 to {support.MAX_DECODE_ROWS}: use prefill for more"
        )
    return torch.ops.segpaged_attention.decode(
        q,
        k_pages,
        v_pages,
        block_table,
        seq_lens,
        sink,
        window,
        ring,
        scale,
        softcap,
        s_aux,
        model_window,
        exact_positions,
    )


def prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    sink: Tensor,
    window: Tensor,
    ring: Tensor,
    scale: float,
    softcap: float = 0.0,
    s_aux: Tensor | None = None,
    model_window: int = 0,
    q_start: Tensor | None = None,
    q_len: Tensor | None = None,
    head_order: Tensor | None = None,
    num_global: int = -1,
    past_len_hint: int = -1,
) -> Tensor:
    """Attention of a chunk of new tokens over what is stored and over itself. Call it before `append`.

    A query early in the chunk may see older keys than those that are kept when the chunk ends, hence the order.

    Args:
        q: ``[B, Hq, T, D]``. k: ``[B, Hkv, T, D]``. v: ``[B, Hkv, T, Dv]``. Any strides, last dimension contiguous.
        k_pages, v_pages, block_table: see the module.
        seq_lens: int32 ``[B]``, tokens stored before the chunk.
        sink, window, ring: int32 ``[Hkv]``.
        scale, softcap, s_aux, model_window: as in `decode`.
        q_start, q_len: as in `append`; padding columns are attended to by nobody and come back as zeros.
        head_order: int32 ``[Hkv]`` or None: KV heads, those that keep everything first. None: 0 ... Hkv - 1.
        num_global: how many of them keep everything; those get tiles and a split of their own. -1: unknown, one launch.
        past_len_hint: about how many tokens are stored, which steers the split of small chunks over the past; -1:
            unknown.
            0 promises that nothing is stored: the pages are then not read.

    Returns:
        ``[B, T, Hq, Dv]`` of q's dtype.

    Raises:
        ValueError: a shape or dtype that does not fit; the message names the argument.
    """
    kv_heads = block_table.shape[1]
    _check_pages(k_pages, v_pages, block_table, seq_lens)
    _check_heads(kv_heads, sink=sink, window=window, ring=ring)
    _check_queries(q, k_pages, block_table, s_aux)
    _check_chunk(k, v, k_pages, v_pages, block_table)
    _check_columns(q_start, q_len, q.shape[0])
    if q.shape[2] != k.shape[2]:
        raise ValueError(f"q has {q.shape[2]} columns and k has {k.shape[2]}; a chunk's queries and keys go together")
    if head_order is not None:
        _check_heads(kv_heads, head_order=head_order)
    if not -1 <= num_global <= kv_heads:
        raise ValueError(f"num_global is {num_global}; expected -1 (unknown) or 0 ... {kv_heads} (KV heads)")
    return torch.ops.segpaged_attention.prefill(
        q, k, v, k_pages, v_pages, block_table, seq_lens, sink, window, ring, scale, softcap, s_aux, model_window,
        q_start, q_len, head_order, num_global, past_len_hint,
    )  # fmt: skip


def prefill_positions(
    q: Tensor,
    q_pos: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    kv_lens: Tensor,
    sink: Tensor,
    window: Tensor,
    scale: float,
    softcap: float = 0.0,
    s_aux: Tensor | None = None,
    model_window: int = 0,
) -> Tensor:
    """Attention of rows at given positions, when everything, their own keys included, is already in the pages.

    Slot and position are the same here (no ring): this is how a splice recomputes some of a prompt's rows.

    Args:
        q: ``[B, Hq, T, D]``, any strides, last dimension contiguous.
        q_pos: int32 ``[B, T]``, increasing along T apart from padding, which is -1 and gives zeros.
        k_pages, v_pages, block_table: see the module.
        kv_lens: int32 ``[B]``, tokens stored; keys at or beyond it are seen by nobody.
        sink, window: int32 ``[Hkv]``.
        scale, softcap, s_aux, model_window: as in `decode`.

    Returns:
        ``[B, T, Hq, Dv]`` of q's dtype.

    Raises:
        ValueError: a shape or dtype that does not fit; the message names the argument.
    """
    _check_pages(k_pages, v_pages, block_table, kv_lens)
    _check_heads(block_table.shape[1], sink=sink, window=window)
    _check_queries(q, k_pages, block_table, s_aux)
    if q_pos.dtype != torch.int32 or q_pos.shape != (q.shape[0], q.shape[2]):
        raise ValueError(f"q_pos is {_describe(q_pos)}; expected int32 [{q.shape[0]}, {q.shape[2]}]")
    return torch.ops.segpaged_attention.prefill_positions(
        q, q_pos, k_pages, v_pages, block_table, kv_lens, sink, window, scale, softcap, s_aux, model_window
    )


# ---------------------------------------------------------------------------------------------------------------------
# argument checks: shapes and dtypes only, nothing that reads a tensor


def _describe(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}"


def _check_pages(k_pages: Tensor, v_pages: Tensor, block_table: Tensor, seq_lens: Tensor) -> None:
    for name, pages in (("k_pages", k_pages), ("v_pages", v_pages)):
        if pages.dim() != 3 or not pages.is_contiguous():
            raise ValueError(
                f"{name} is {_describe(pages)}, strides {pages.stride()}; expected contiguous [num_pages, page_size, D]"
            )
    if k_pages.shape[:2] != v_pages.shape[:2] or k_pages.dtype != v_pages.dtype:
        raise ValueError(
            f"k_pages is {_describe(k_pages)} and v_pages {_describe(v_pages)}; only the last size may differ"
        )
    if (
        block_table.dim() != 3
        or block_table.dtype != torch.int32
        or (block_table.shape[2] > 1 and block_table.stride(2) != 1)
    ):
        raise ValueError(
            f"block_table is {_describe(block_table)}; expected int32 [B, Hkv, max_pages], last dimension contiguous"
        )
    if seq_lens.dtype != torch.int32 or seq_lens.shape != block_table.shape[:1]:
        raise ValueError(
            f"the lengths are {_describe(seq_lens)}; expected int32 [{block_table.shape[0]}] as in block_table"
        )


def _check_heads(kv_heads: int, **per_head: Tensor) -> None:
    for name, x in per_head.items():
        if x.dtype != torch.int32 or x.shape != (kv_heads,):
            raise ValueError(f"{name} is {_describe(x)}; expected int32 [{kv_heads}], one per KV head of block_table")


def _check_chunk(k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, block_table: Tensor) -> None:
    for name, x, pages in (("k", k, k_pages), ("v", v, v_pages)):
        if x.dim() != 4 or x.shape[:2] != block_table.shape[:2] or x.shape[3] != pages.shape[2] or x.stride(3) != 1:
            raise ValueError(
                f"{name} is {_describe(x)}, strides {x.stride()}; block_table and {name}_pages say "
                f"[{block_table.shape[0]}, {block_table.shape[1]}, T, {pages.shape[2]}], last dimension contiguous"
            )
    if k.shape[2] != v.shape[2]:
        raise ValueError(f"k has {k.shape[2]} columns and v has {v.shape[2]}; expected as many")


def _check_columns(q_start: Tensor | None, q_len: Tensor | None, batch: int) -> None:
    if (q_start is None) != (q_len is None):
        raise ValueError(
            f"q_start and q_len must be given together; got {'q_len' if q_start is None else 'q_start'} alone"
        )
    for name, x in (("q_start", q_start), ("q_len", q_len)):
        if x is not None and (x.dtype != torch.int32 or x.shape != (batch,)):
            raise ValueError(f"{name} is {_describe(x)}; expected int32 [{batch}]")


def _check_queries(q: Tensor, k_pages: Tensor, block_table: Tensor, s_aux: Tensor | None) -> None:
    batch, kv_heads = block_table.shape[:2]
    if (
        q.dim() != 4
        or q.shape[0] != batch
        or q.shape[1] % kv_heads
        or q.shape[3] != k_pages.shape[2]
        or q.stride(3) != 1
    ):
        raise ValueError(
            f"q is {_describe(q)}, strides {q.stride()}; block_table and k_pages say "
            f"[{batch}, multiple of {kv_heads}, T, {k_pages.shape[2]}], last dimension contiguous"
        )
    if s_aux is not None and (s_aux.dtype != torch.float32 or s_aux.shape != (q.shape[1],)):
        raise ValueError(f"s_aux is {_describe(s_aux)}; expected float32 [{q.shape[1]}], one per query head")


# ---------------------------------------------------------------------------------------------------------------------
# operators


def why_not(q: Tensor, k_pages: Tensor, v_pages: Tensor, group: int) -> str | None:
    """Why the kernels cannot serve these arguments, or None."""
    _, page_size, head_dim = k_pages.shape
    return _reason(q.device, q.dtype, k_pages.dtype, page_size, head_dim, v_pages.shape[2], group)


@functools.lru_cache(maxsize=256)
def _reason(
    device: torch.device, q: torch.dtype, pages: torch.dtype, page_size: int, head_dim: int, v_dim: int, group: int
) -> str | None:
    if not support.is_available(device):
        return f"{torch.cuda.get_device_name(device)}: the kernels need an NVIDIA GPU from Ampere on, and triton"
    if q != pages:
        return f"queries are {q} but pages are {pages}"
    for dim in (head_dim, v_dim):
        reason = support.supported(dim, pages, page_size, group)
        if reason is not None:
            return reason
    return None


@functools.cache
def _launcher(kernel: str) -> Callable[..., Any]:
    """The function ``module:function`` of this package, imported when it is first launched."""
    module, _, function = kernel.partition(":")
    return getattr(importlib.import_module(f".{module}", __package__), function)


def does_not_fit(error: Exception) -> bool:
    """Whether a launch failed because the device is smaller than any that the launchers know of."""
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources

    return isinstance(error, (CompilationError, OutOfResources))


# Reference and kernels have the public functions' signatures. The dispatcher leaves out trailing arguments that equal
# their defaults, so what is not looked at is passed on as it came.


def _run(reason: str | None, kernel: str, fallback: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """Launch `kernel` (module:function), or take the torch path and say why."""
    if reason is None:
        try:
            return _launcher(kernel)(*args)
        except Exception as error:
            if not does_not_fit(error):
                raise
            reason = f"{kernel.partition(':')[2]} does not fit this GPU: {error}"  # one smaller than any we know of
    support.warn_once(reason)
    return fallback(*args)


def _append_cuda(k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, *rest: Any) -> None:
    reason = why_not(k_pages, k_pages, v_pages, 1)  # new keys of another dtype are converted, so they need no check
    _run(reason, "append_kernel:append", reference.append, (k, v, k_pages, v_pages, *rest))


def _decode_cuda(q: Tensor, k_pages: Tensor, v_pages: Tensor, block_table: Tensor, *rest: Any) -> Tensor:
    reason = why_not(q, k_pages, v_pages, q.shape[1] // block_table.shape[1])
    return _run(reason, "decode_kernel:decode", reference.decode, (q, k_pages, v_pages, block_table, *rest))


def _prefill_cuda(q: Tensor, k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, *rest: Any) -> Tensor:
    reason = why_not(q, k_pages, v_pages, q.shape[1] // k.shape[1])
    if reason is None and not (q.dtype == k.dtype == v.dtype):
        reason = f"the chunk's queries, keys and values are {q.dtype}, {k.dtype} and {v.dtype}"
    return _run(reason, "prefill_kernel:prefill", reference.prefill, (q, k, v, k_pages, v_pages, *rest))


def _prefill_positions_cuda(
    q: Tensor, q_pos: Tensor, k_pages: Tensor, v_pages: Tensor, block_table: Tensor, *rest: Any
) -> Tensor:
    reason = why_not(q, k_pages, v_pages, q.shape[1] // block_table.shape[1])
    args = (q, q_pos, k_pages, v_pages, block_table, *rest)
    return _run(reason, "positions_kernel:prefill_positions", reference.prefill_positions, args)


def _append_fake(*_: Any) -> None:
    return None


def _decode_fake(q: Tensor, k_pages: Tensor, v_pages: Tensor, *_: Any) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v_pages.shape[2])


def _prefill_fake(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3])


def _prefill_positions_fake(q: Tensor, q_pos: Tensor, k_pages: Tensor, v_pages: Tensor, *_: Any) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v_pages.shape[2])


_PAGES = "Tensor k_pages, Tensor v_pages, Tensor block_table"
_HEADS = "Tensor sink, Tensor window"
_SCORES = "float scale, float softcap=0.0, Tensor? s_aux=None, SymInt model_window=0"
_COLUMNS = "Tensor? q_start=None, Tensor? q_len=None"
_OPERATORS = (
    (
        "append(Tensor k, Tensor v, Tensor(a!) k_pages, Tensor(b!) v_pages, Tensor block_table, Tensor seq_lens, "
        f"Tensor sink, Tensor ring, {_COLUMNS}, Tensor? cos=None, Tensor? sin=None, bool interleaved=False) -> ()",
        _append_cuda,
        reference.append,
        _append_fake,
    ),
    (
        f"decode(Tensor q, {_PAGES}, Tensor seq_lens, {_HEADS}, Tensor ring, {_SCORES}, "
        "bool exact_positions=True) -> Tensor",
        _decode_cuda,
        reference.decode,
        _decode_fake,
    ),
    (
        f"prefill(Tensor q, Tensor k, Tensor v, {_PAGES}, Tensor seq_lens, {_HEADS}, Tensor ring, {_SCORES}, "
        f"{_COLUMNS}, Tensor? head_order=None, SymInt num_global=-1, SymInt past_len_hint=-1) -> Tensor",
        _prefill_cuda,
        reference.prefill,
        _prefill_fake,
    ),
    (
        f"prefill_positions(Tensor q, Tensor q_pos, {_PAGES}, Tensor kv_lens, {_HEADS}, {_SCORES}) -> Tensor",
        _prefill_positions_cuda,
        reference.prefill_positions,
        _prefill_positions_fake,
    ),
)

_LIBRARY = torch.library.Library("segpaged_attention", "DEF")  # the operators live as long as this object
for _schema, _cuda, _elsewhere, _fake in _OPERATORS:
    _name = _schema.partition("(")[0]
    # inductor must hand over tensors as they were traced: the last dimension contiguous
    _LIBRARY.define(_schema, tags=(torch.Tag.needs_fixed_stride_order,))
    _LIBRARY.impl(_name, _elsewhere, "CompositeExplicitAutograd")  # every device that has no kernel of its own
    _LIBRARY.impl(_name, _cuda, "CUDA")
    torch.library.register_fake(f"segpaged_attention::{_name}", _fake, lib=_LIBRARY)
