"""The same four functions in plain torch: the specification of the kernels, and the path taken where they cannot run.

Everything follows from one rule. A key at position ``j`` is visible to a query at position ``p`` of a head with
``sink`` and ``window`` iff

    j <= p  and  (j < sink or j > p - window)  and  (model_window == 0 or j > p - model_window)

and from one arithmetic of storage. A head keeps position ``pos`` in

    slot(pos) = pos                              while pos < sink + ring
              = sink + (pos - sink) % ring       after that: the sinks stay, the rest is a ring

where slot ``s`` of head ``h`` of row ``b`` lies in page ``block_table[b, h, s // page_size]`` at row ``s % page_size``.
``ring`` is the window plus the slack kept for rolling back. Heads that keep everything have sink 0, window = ring =
2**30.

Scores, softmax and sums are float32. Nothing here is tuned; every function gathers all stored slots of all heads.
Arguments are described in `segpaged_attention.ops`.
"""

from __future__ import annotations

import torch
from torch import Tensor

_SCORE_ELEMENTS = 1 << 26  # query rows are taken some at a time, so that scores stay below 256 MB


def visible(q_pos: Tensor, key_pos: Tensor, sink: Tensor, window: Tensor, model_window: int = 0) -> Tensor:
    """The visibility rule as a dense mask.

    Args:
        q_pos: ``[B, T]`` positions of the queries; a negative one sees nothing.
        key_pos: ``[B, Hkv, N]`` positions of the keys; a negative one is seen by nobody.
        sink, window: ``[Hkv]``.
        model_window: 0 for none.

    Returns:
        ``[B, Hkv, T, N]`` bool.
    """
    p = q_pos[:, None, :, None].long()
    j = key_pos[:, :, None, :].long()
    s = sink.long()[None, :, None, None]
    w = window.long()[None, :, None, None]
    seen = (j >= 0) & (j <= p) & ((j < s) | (j > p - w))
    return seen & (j > p - model_window) if model_window else seen


def slot_of(pos: Tensor, sink: Tensor, ring: Tensor) -> Tensor:
    """Slot of each position: ``pos`` ``[..., Hkv, N]``, ``sink`` and ``ring`` ``[Hkv]``."""
    s, r = sink.long()[:, None], ring.long()[:, None]
    return torch.where(pos < s + r, pos, s + (pos - s) % r)


def slot_positions(seq_lens: Tensor, sink: Tensor, ring: Tensor, num_slots: int) -> Tensor:
    """Position held by each slot once ``seq_lens`` tokens were stored; -1 in empty slots.

    Args:
        seq_lens: ``[B]`` tokens stored.
        sink, ring: ``[Hkv]``.

    Returns:
        ``[B, Hkv, num_slots]`` int64.
    """
    slot = torch.arange(num_slots, device=seq_lens.device)[None, None, :]
    n = seq_lens.long()[:, None, None]
    s, r = sink.long()[None, :, None], ring.long()[None, :, None]
    age = (
        n - 1 - slot
    ) % r  # slot - sink and position - sink agree modulo ring: the newest such position is the one stored
    pos = torch.where((n <= s + r) | (slot < s), slot, n - 1 - age)
    return torch.where(slot < torch.minimum(n, s + r), pos, -1)


def gather_slots(pages: Tensor, block_table: Tensor, num_slots: int) -> Tensor:
    """``[B, Hkv, num_slots, D]``: the first slots of every head, out of ``pages`` ``[num_pages, page_size, D]``."""
    page_size = pages.shape[1]
    num_pages = (num_slots + page_size - 1) // page_size
    got = pages[block_table[:, :, :num_pages].long()]  # [B, Hkv, num_pages, page_size, D]
    return got.flatten(2, 3)[:, :, :num_slots]


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, softcap: float, s_aux: Tensor | None) -> Tensor:
    """Masked attention in float32; rows that see no key are zero.

    Args:
        q: ``[B, Hq, T, D]``. k: ``[B, Hkv, N, D]``. v: ``[B, Hkv, N, Dv]``. mask: ``[B, Hkv, T, N]``.
        softcap: 0 for none, else scores become ``softcap * tanh(score / softcap)``.
        s_aux: ``[Hq]`` or None: one more score per query head, which only enters the softmax denominator.

    Returns:
        ``[B, T, Hq, Dv]`` of q's dtype.
    """
    batch, q_heads, rows, _ = q.shape
    kv_heads, keys = k.shape[1:3]
    group = q_heads // kv_heads
    out = q.new_empty(batch, rows, q_heads, v.shape[-1])
    k, v = k.float()[:, :, None], v.float()[:, :, None]
    # an unseen value has weight 0, but 0 times nan is nan: what is not finite counts only where it is seen
    bad = ~torch.isfinite(v)
    spoilt = bool(bad.any())
    if spoilt:
        v = v.masked_fill(bad, 0.0)
    step = max(1, _SCORE_ELEMENTS // max(1, batch * q_heads * keys))
    for t in range(0, rows, step):  # rows do not depend on each other
        some = q[:, :, t : t + step].float().unflatten(1, (kv_heads, group))
        seen = mask[:, :, None, t : t + step]
        score = some @ k.transpose(-1, -2) * scale  # [B, Hkv, group, T, N]
        if softcap:
            score = softcap * torch.tanh(score / softcap)
        score = score.masked_fill(~seen, float("-inf"))
        if s_aux is not None:
            extra = s_aux.float().view(1, kv_heads, group, 1, 1).expand(*score.shape[:-1], 1)
            weight = torch.cat([score, extra], -1).softmax(-1)[..., :-1]
        else:
            weight = score.softmax(-1).masked_fill(~seen.any(-1, keepdim=True), 0.0)  # a row of -inf becomes nan
        values = weight @ v
        if spoilt:
            values = values.masked_fill(seen.float() @ bad.float() > 0, float("nan"))
        out[:, t : t + step] = values.permute(0, 3, 1, 2, 4).flatten(2, 3).to(q.dtype)
    return out


def rotate(k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotate the first ``2 * cos.shape[-1]`` dimensions of ``k`` ``[B, Hkv, T, D]`` by one angle per row; float32."""
    half = cos.shape[-1]
    x = k.float()
    turned, rest = x[..., : 2 * half], x[..., 2 * half :]
    cos, sin = cos[:, None, None, :], sin[:, None, None, :]
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        turned = torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
    else:
        a, b = turned[..., :half], turned[..., half:]
        turned = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
    return torch.cat([turned, rest], -1)


def _column_positions(seq_lens: Tensor, columns: int, q_start: Tensor | None, q_len: Tensor | None) -> Tensor:
    """``[B, T]`` position of every chunk column, -1 in padding."""
    column = torch.arange(columns, device=seq_lens.device)[None, :]
    start = torch.zeros_like(seq_lens)[:, None] if q_start is None else q_start[:, None]
    length = torch.full_like(seq_lens, columns)[:, None] if q_len is None else q_len[:, None]
    real = (column >= start) & (column < start + length)
    return torch.where(real, seq_lens[:, None] + column - start, -1).long()


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
    """Store the chunk's tokens that are still kept when the chunk ends."""
    kv_heads, columns = k.shape[1:3]
    page_size = k_pages.shape[1]
    pos = _column_positions(seq_lens, columns, q_start, q_len)[:, None, :].expand(-1, kv_heads, -1)  # [B, Hkv, T]
    total = seq_lens.long() + (columns if q_len is None else q_len.long())
    oldest = total[:, None, None] - ring.long()[None, :, None]
    keep = (pos >= 0) & ((pos < sink.long()[None, :, None]) | (pos >= oldest))
    if cos is not None and sin is not None:
        k = rotate(k, cos, sin, interleaved)
    slot = slot_of(pos.clamp_min(0), sink, ring)
    column = (slot // page_size).clamp_max(
        block_table.shape[2] - 1
    )  # columns that are not kept may lie beyond the table
    row = block_table.long().gather(2, column) * page_size + slot % page_size
    k_pages.flatten(0, 1)[row[keep]] = k[keep].to(k_pages.dtype)
    v_pages.flatten(0, 1)[row[keep]] = v[keep].to(v_pages.dtype)


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
    """Attention of the last R tokens, already stored, over what is stored. Always exact by position."""
    del exact_positions  # a promise that lets the kernel skip work; the result is the same
    rows = q.shape[2]
    num_slots = _most_slots(seq_lens, sink, ring, block_table, k_pages)
    key_pos = slot_positions(seq_lens, sink, ring, num_slots)
    q_pos = seq_lens.long()[:, None] - rows + torch.arange(rows, device=q.device)[None, :]
    mask = visible(q_pos, key_pos, sink, window, model_window)
    k = gather_slots(k_pages, block_table, num_slots)
    v = gather_slots(v_pages, block_table, num_slots)
    return attend(q, k, v, mask, scale, softcap, s_aux)


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
    """Attention of a chunk over what is stored before it and over itself."""
    del head_order, num_global, past_len_hint  # they only steer the kernels
    kv_heads, columns = k.shape[1:3]
    num_slots = _most_slots(seq_lens, sink, ring, block_table, k_pages)
    past_pos = slot_positions(seq_lens, sink, ring, num_slots)
    q_pos = _column_positions(seq_lens, columns, q_start, q_len)
    key_pos = torch.cat([past_pos, q_pos[:, None, :].expand(-1, kv_heads, -1)], -1)
    mask = visible(q_pos, key_pos, sink, window, model_window)
    all_k = torch.cat([gather_slots(k_pages, block_table, num_slots).to(k.dtype), k], 2)
    all_v = torch.cat([gather_slots(v_pages, block_table, num_slots).to(v.dtype), v], 2)
    all_v = all_v.masked_fill((key_pos < 0)[..., None], 0)  # padding columns may hold anything, even nan
    return attend(q, all_k, all_v, mask, scale, softcap, s_aux)


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
    """Attention of rows at given positions over pages in which slot and position are the same."""
    kv_heads = block_table.shape[1]
    num_slots = min(int(kv_lens.max()), block_table.shape[2] * k_pages.shape[1])
    slot = torch.arange(num_slots, device=q.device)[None, :]
    key_pos = torch.where(slot < kv_lens[:, None], slot, -1)[:, None, :].expand(-1, kv_heads, -1)
    mask = visible(q_pos, key_pos, sink, window, model_window)
    k = gather_slots(k_pages, block_table, num_slots)
    v = gather_slots(v_pages, block_table, num_slots)
    return attend(q, k, v, mask, scale, softcap, s_aux)


def _most_slots(seq_lens: Tensor, sink: Tensor, ring: Tensor, block_table: Tensor, pages: Tensor) -> int:
    """Slots that the fullest head uses."""
    if seq_lens.numel() == 0:
        return 0
    used = min(int(seq_lens.max()), int((sink.long() + ring.long()).max()))
    return min(used, block_table.shape[2] * pages.shape[1])
