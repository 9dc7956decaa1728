"""`decode`: a few query rows per sequence over its pages, split evenly over the device whatever the lengths are.

The work is a line of blocks of BLOCK_N slots, item after item, an item being one (sequence, KV head) (`decode_plan`).
Each program takes an equal stretch of it. A program that holds a whole item writes the output; an item that several
programs share leaves float32 partial results, which a second kernel combines ("flash decoding").

The group's query rows are few, so the product is turned around: S^T = K q^T and O^T = V^T P^T make the 64 keys the long
side of the matrix instruction and let Hopper read K and V straight from shared memory.

Attention does not depend on the order of keys, so a ring needs no unrolling: where the one query row sees every stored
token, the mask is ``slot < n``. Otherwise (EXACT) the position of a slot is computed and compared.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .decode_plan import blocks_of, item_facts, plan, program_of, programs_for, units_of
from .launching import cdiv, launch, power_of_2, scratch
from .tiles import (
    HIDDEN,
    LOG2E,
    Device,
    bad_as_nan,
    cap_scores,
    device_of,
    good_and_bad,
    has_nan,
    load_pages,
    load_tile,
    model_window_of,
    output_factor,
    page_descriptor,
    slot_to_position,
    strides,
)


@triton.jit
def _load_queries(
    p_q, q_stride_b, q_stride_h, q_stride_r, item, m_item,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, M: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    GUESS: tl.constexpr,
):  # fmt: skip
    """[BD, M]: an item's query rows, row m being query row m // GROUP of head m % GROUP; the others are zero."""
    i_b = (item // KV_HEADS).to(tl.int64)
    o_m = tl.arange(0, M)
    o_d = tl.arange(0, BD)
    p_q_row = p_q + i_b * q_stride_b + (item % KV_HEADS * GROUP + o_m % GROUP) * q_stride_h + o_m // GROUP * q_stride_r
    m_q = (o_m < tl.where(m_item, ROWS * GROUP, 0))[None, :] & (o_d < D)[:, None]
    return tl.load(p_q_row[None, :] + o_d[:, None], mask=m_q, other=0.0, volatile=GUESS)


@triton.jit
def _first_pages(
    p_table, table_stride_b, table_stride_h, item, m_item, block, max_pages,
    KV_HEADS: tl.constexpr, FOLD: tl.constexpr, PAGE: tl.constexpr, BLOCK_N: tl.constexpr, GUESS: tl.constexpr,
):  # fmt: skip
    """Page ids of a block, as `load_pages` gives them; whatever `block` is, nothing beyond the item's row is read."""
    p_row = p_table + (item // KV_HEADS).to(tl.int64) * table_stride_b + item % KV_HEADS // FOLD * table_stride_h
    if PAGE >= BLOCK_N:
        o_page = block * BLOCK_N // PAGE
    else:
        o_page = block * BLOCK_N // PAGE + tl.arange(0, BLOCK_N) // PAGE
    o_page = tl.maximum(tl.minimum(o_page, max_pages - 1), 0)
    return tl.load(p_row + o_page, mask=o_page < tl.where(m_item, max_pages, 0), other=0, volatile=GUESS)


@triton.jit
def _seen(
    o_slot, n, seq_len, sink, window, ring, newest, model_window, q_pos, EXACT: tl.constexpr
):  # fmt: skip
    """[BLOCK_N, M] or [BLOCK_N, 1]: which row sees which slot."""
    m_s = (o_slot < n)[:, None]
    if EXACT:
        pos = slot_to_position(o_slot, seq_len, sink, ring, newest)[:, None]
        m_s = m_s & (pos <= q_pos[None, :]) & (pos > q_pos[None, :] - model_window)
        m_s = m_s & ((pos < sink) | (pos > q_pos[None, :] - window))
    return m_s


@triton.jit
def _sum_again(
    p_k, p_v, p_row, b_q, b_m, scale, softcap, model_window, q_pos, token, token_end, n, seq_len, sink, window, ring, newest,
    M: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, PAGE: tl.constexpr,
    EXACT: tl.constexpr, CAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """[BDV, M]: the weighted sum of slots [token, token_end) in which hidden values count for nothing, whatever they are.

    ``b_m`` is the maximum of their scores. A value that is seen and is nan or infinite gives nan, as it should. Slow: few
    registers, so that a loop that hardly ever runs takes none from the one that always does.
    """
    STEP: tl.constexpr = 16  # divides every page
    o_n = tl.arange(0, STEP)
    o_d = tl.arange(0, BD)
    o_v = tl.arange(0, BDV)
    b_acc = tl.zeros([BDV, M], tl.float32)
    for t in tl.range(token, token_end, STEP, num_stages=1):
        page = tl.load(p_row + t // PAGE)
        # [STEP, BD], [STEP, BDV]
        b_k = load_tile(p_k, page, t, o_n, o_d, D, BD, PAGE, STEP, False)
        b_v = load_tile(p_v, page, t, o_n, o_v, DV, BDV, PAGE, STEP, False)
        # [STEP, M]
        b_s = cap_scores(tl.dot(b_k, b_q, input_precision=PRECISION), scale, softcap, CAP)
        m_s = _seen(t + o_n, n, seq_len, sink, window, ring, newest, model_window, q_pos, EXACT)
        b_p = tl.where(m_s, tl.exp2(b_s - b_m[None, :]), 0.0)
        b_good, b_bad = good_and_bad(b_v)
        b_acc = tl.dot(tl.trans(b_good), b_p.to(b_v.dtype), b_acc, input_precision=PRECISION)
        b_sees = tl.broadcast_to(m_s, [STEP, M]).to(tl.float32)
        b_acc = tl.dot(tl.trans(b_bad), b_sees, b_acc, input_precision=PRECISION)
    return bad_as_nan(b_acc)


@triton.jit
def _attend_part(
    p_k_pages, p_v_pages, p_k, p_v, p_table, p_window, p_aux, p_out, p_acc, p_max, p_sum,
    table_stride_b, table_stride_h, scale, softcap, model_window,
    b_q, page, item, seq_len, sink, ring, block, block_end, partial, alone,
    KV_HEADS: tl.constexpr, FOLD: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, M: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, PAGE: tl.constexpr, BLOCK_N: tl.constexpr,
    EXACT: tl.constexpr, CAP: tl.constexpr, AUX: tl.constexpr, TMA: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Blocks [block, block_end) of one item, the first of them on `page`; `alone`: they are all it has."""
    i_b = (item // KV_HEADS).to(tl.int64)
    i_h = item % KV_HEADS
    i_kv = i_h // FOLD
    n = tl.minimum(seq_len, sink + ring)
    o_m = tl.arange(0, M)
    o_d = tl.arange(0, BD)
    o_v = tl.arange(0, BDV)
    o_n = tl.arange(0, BLOCK_N)
    i_r = o_m // GROUP
    o_head = i_h * GROUP + o_m % GROUP
    m_m = o_m < ROWS * GROUP
    b_m = tl.full([M], HIDDEN, tl.float32)
    # Sums over warps wait for each other, so rows are summed up once at the end where registers are left for that.
    SUM_LATE: tl.constexpr = M * BDV <= 2048
    b_sums = tl.zeros([BLOCK_N, M] if SUM_LATE else [M], tl.float32)
    b_acc = tl.zeros([BDV, M], tl.float32)
    window = ring
    newest = 0
    q_pos = seq_len - ROWS + i_r
    if EXACT:
        window = tl.load(p_window + i_kv)
        newest = (seq_len - 1 - sink) % ring
    p_row = p_table + i_b * table_stride_b + i_kv * table_stride_h
    for i_n in tl.range(block, block_end, num_stages=STAGES):
        token = i_n * BLOCK_N
        # [BLOCK_N, BD], [BLOCK_N, BDV]
        b_k = load_tile(p_k_pages, page, token, o_n, o_d, D, BD, PAGE, BLOCK_N, TMA)
        b_v = load_tile(p_v_pages, page, token, o_n, o_v, DV, BDV, PAGE, BLOCK_N, TMA)
        page = load_pages(p_row, tl.minimum(i_n + 1, block_end - 1) * BLOCK_N, o_n, n, PAGE, BLOCK_N)
        # [BLOCK_N, M]
        b_s = cap_scores(tl.dot(b_k, b_q, input_precision=PRECISION), scale, softcap, CAP)
        m_s = _seen(token + o_n, n, seq_len, sink, window, ring, newest, model_window, q_pos, EXACT)
        b_s = tl.where(m_s, b_s, HIDDEN)
        # [M]
        b_top = tl.maximum(b_m, tl.max(b_s, 0))
        b_fade = tl.exp2(b_m - b_top)
        b_p = tl.exp2(b_s - b_top[None, :])
        if SUM_LATE:
            b_sums = b_sums * b_fade[None, :] + b_p
        else:
            b_sums = b_sums * b_fade + tl.sum(b_p, 0)
        b_m = b_top
        # [BDV, M]
        b_acc = tl.dot(tl.trans(b_v), b_p.to(b_v.dtype), b_acc * b_fade[None, :], input_precision=PRECISION)
    b_l = b_sums
    if SUM_LATE:
        b_l = tl.sum(b_sums, 0)
    hides = block_end * BLOCK_N > n
    if EXACT:
        hides = True
    if hides:  # noqa: SIM102
        if has_nan(b_acc):
            b_acc = _sum_again(
                p_k, p_v, p_row, b_q, b_m, scale, softcap, model_window, q_pos, block * BLOCK_N,
                tl.minimum(block_end * BLOCK_N, n), n, seq_len, sink, window, ring, newest,
                M, D, DV, BD, BDV, PAGE, EXACT, CAP, PRECISION,
            )  # fmt: skip
    if alone:
        b_f = output_factor(b_m, b_l, p_aux, o_head, m_m, AUX)
        o_out = ((i_b * ROWS + i_r) * (KV_HEADS * GROUP) + o_head) * DV
        p_o = p_out + o_out[None, :] + o_v[:, None]
        b_o = (b_acc * b_f[None, :]).to(p_out.dtype.element_ty)
        tl.store(p_o, b_o, mask=m_m[None, :] & (o_v < DV)[:, None])
    else:
        o_p = partial * (ROWS * GROUP) + o_m
        tl.store(p_acc + o_p[None, :] * DV + o_v[:, None], b_acc, mask=m_m[None, :] & (o_v < DV)[:, None])
        tl.store(p_max + o_p, b_m, mask=m_m)
        tl.store(p_sum + o_p, b_l, mask=m_m)


@triton.jit(do_not_specialize=["table_stride_b", "table_stride_h", "model_window", "num_items", "max_pages"])
def _decode_kernel(
    p_q, p_k_pages, p_v_pages, p_k, p_v, p_table, p_seq_lens, p_sink, p_window, p_ring, p_aux, p_out, p_acc, p_max, p_sum,
    q_stride_b, q_stride_h, q_stride_r, table_stride_b, table_stride_h, scale, softcap, model_window, num_items, max_pages,
    KV_HEADS: tl.constexpr, FOLD: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, M: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, PAGE: tl.constexpr, BLOCK_N: tl.constexpr,
    ITEMS: tl.constexpr, EXACT: tl.constexpr, CAP: tl.constexpr, AUX: tl.constexpr, TMA: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr, OVERHEAD: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    AHEAD: tl.constexpr = M * BD <= 4096  # registers are left for the next item's queries
    i_p = tl.program_id(0)
    if EARLY:
        # While the kernel before ends, plan by the lengths as they are. If they change until then, plan again.
        b_guess = units_of(
            p_seq_lens, p_sink, p_ring, model_window, num_items, KV_HEADS, FOLD, ROWS, BLOCK_N, ITEMS,
            EXACT, OVERHEAD, True,
        )  # fmt: skip
        total, programs, unit, stop, item, end = plan(b_guess, i_p, ITEMS)
        m_item = item < num_items
        seq_len, sink, ring = item_facts(p_seq_lens, p_sink, p_ring, item, m_item, KV_HEADS, FOLD, True)
        first, blocks = blocks_of(seq_len, sink, ring, model_window, ROWS, BLOCK_N, EXACT)
        block = first + tl.maximum(unit - end + blocks, 0)
        # queries and the page table's line come into L2; what they say is read again
        _first_pages(
            p_table, table_stride_b, table_stride_h, item, m_item, block, max_pages, KV_HEADS, FOLD, PAGE, BLOCK_N, True
        )
        _load_queries(p_q, q_stride_b, q_stride_h, q_stride_r, item, m_item, KV_HEADS, GROUP, ROWS, M, D, BD, True)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()  # not before: the combining kernel reads lengths before it waits
    # [ITEMS]
    b_units = units_of(
        p_seq_lens, p_sink, p_ring, model_window, num_items, KV_HEADS, FOLD, ROWS, BLOCK_N, ITEMS,
        EXACT, OVERHEAD, False,
    )  # fmt: skip
    planned = False
    if EARLY:
        # all at once, if the plan still holds
        guess = block
        seq_len, sink, ring = item_facts(p_seq_lens, p_sink, p_ring, item, m_item, KV_HEADS, FOLD, False)
        page = _first_pages(
            p_table, table_stride_b, table_stride_h, item, m_item, guess, max_pages, KV_HEADS, FOLD, PAGE, BLOCK_N,
            False,
        )  # fmt: skip
        b_q = _load_queries(
            p_q, q_stride_b, q_stride_h, q_stride_r, item, m_item, KV_HEADS, GROUP, ROWS, M, D, BD, False
        )
        first, blocks = blocks_of(seq_len, sink, ring, model_window, ROWS, BLOCK_N, EXACT)
        block = first + tl.maximum(unit - end + blocks, 0)
        planned = (tl.sum((b_units != b_guess).to(tl.int32), 0) == 0) & (block == guess)
        if not planned:
            total, programs, unit, stop, item, end = plan(b_units, i_p, ITEMS)
            m_item = item < num_items
            seq_len, sink, ring = item_facts(p_seq_lens, p_sink, p_ring, item, m_item, KV_HEADS, FOLD, False)
            first, blocks = blocks_of(seq_len, sink, ring, model_window, ROWS, BLOCK_N, EXACT)
            block = first + tl.maximum(unit - end + blocks, 0)
            page = _first_pages(
                p_table, table_stride_b, table_stride_h, item, m_item, block, max_pages, KV_HEADS, FOLD, PAGE, BLOCK_N,
                False,
            )  # fmt: skip
            b_q = _load_queries(
                p_q, q_stride_b, q_stride_h, q_stride_r, item, m_item, KV_HEADS, GROUP, ROWS, M, D, BD, False
            )
    else:
        total, programs, unit, stop, item, end = plan(b_units, i_p, ITEMS)
        m_item = item < num_items
        seq_len, sink, ring = item_facts(p_seq_lens, p_sink, p_ring, item, m_item, KV_HEADS, FOLD, False)
        first, blocks = blocks_of(seq_len, sink, ring, model_window, ROWS, BLOCK_N, EXACT)
        block = first + tl.maximum(unit - end + blocks, 0)
        page = _first_pages(
            p_table, table_stride_b, table_stride_h, item, m_item, block, max_pages, KV_HEADS, FOLD, PAGE, BLOCK_N,
            False,
        )  # fmt: skip
        b_q = _load_queries(
            p_q, q_stride_b, q_stride_h, q_stride_r, item, m_item, KV_HEADS, GROUP, ROWS, M, D, BD, False
        )
    while unit < stop:
        begin = end - blocks  # of the item's blocks, after its OVERHEAD units
        part_end = tl.minimum(end, stop)
        block = first + tl.maximum(unit - begin, 0)
        block_end = first + tl.maximum(part_end - begin, 0)
        # What the next item needs is on its way while this one is computed: memory that is busy answers late.
        m_next = item + 1 < tl.where(part_end < stop, num_items, 0)
        next_len, next_sink, next_ring = item_facts(p_seq_lens, p_sink, p_ring, item + 1, m_next, KV_HEADS, FOLD, False)
        next_first, next_blocks = blocks_of(next_len, next_sink, next_ring, model_window, ROWS, BLOCK_N, EXACT)
        next_page = _first_pages(
            p_table, table_stride_b, table_stride_h, item + 1, m_next, next_first, max_pages, KV_HEADS, FOLD, PAGE,
            BLOCK_N, False,
        )  # fmt: skip
        if AHEAD:
            b_next_q = _load_queries(
                p_q, q_stride_b, q_stride_h, q_stride_r, item + 1, m_next, KV_HEADS, GROUP, ROWS, M, D, BD, False
            )
        if block_end > block:
            alone = program_of(begin, total, programs) == program_of(end - 1, total, programs)
            _attend_part(
                p_k_pages, p_v_pages, p_k, p_v, p_table, p_window, p_aux, p_out, p_acc, p_max, p_sum, table_stride_b,
                table_stride_h, scale, softcap, model_window,
                b_q, page, item, seq_len, sink, ring, block, block_end, i_p + item, alone,
                KV_HEADS, FOLD, GROUP, ROWS, M, D, DV, BD, BDV, PAGE, BLOCK_N, EXACT, CAP, AUX, TMA, STAGES, PRECISION,
            )  # fmt: skip
        unit = part_end
        item += 1
        seq_len, sink, ring = next_len, next_sink, next_ring
        first, blocks, page = next_first, next_blocks, next_page
        end += blocks + OVERHEAD
        if AHEAD:
            b_q = b_next_q
        else:
            b_q = _load_queries(
                p_q, q_stride_b, q_stride_h, q_stride_r, item, item < num_items, KV_HEADS, GROUP, ROWS, M, D, BD, False
            )


@triton.jit(do_not_specialize=["model_window", "num_items", "num_programs"])
def _combine_kernel(
    p_seq_lens, p_sink, p_ring, p_aux, p_out, p_acc, p_max, p_sum, model_window, num_items, num_programs,
    KV_HEADS: tl.constexpr, FOLD: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, DV: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_N: tl.constexpr, ITEMS: tl.constexpr, PARTS: tl.constexpr, EXACT: tl.constexpr,
    AUX: tl.constexpr, PDL: tl.constexpr, OVERHEAD: tl.constexpr,
):  # fmt: skip
    """One item, one row, BLOCK_V output dimensions: adds up the partial results, PARTS at a time."""
    item, i_m = tl.program_id(0), tl.program_id(1)
    if PDL:
        gdc_launch_dependents()
    b_units = units_of(
        p_seq_lens, p_sink, p_ring, model_window, num_items, KV_HEADS, FOLD, ROWS, BLOCK_N, ITEMS,
        EXACT, OVERHEAD, False,
    )  # fmt: skip
    o_i = tl.arange(0, ITEMS)
    total = tl.sum(b_units, 0)
    programs = programs_for(total, num_programs)
    end = tl.sum(tl.where(o_i <= item, b_units, 0), 0)
    blocks = tl.sum(tl.where(o_i == item, b_units, 0), 0) - OVERHEAD
    program = program_of(end - blocks, total, programs)  # that holds the item's first block
    parts = tl.where(blocks > 0, program_of(end - 1, total, programs) - program + 1, 0)
    if PDL:
        gdc_wait()  # on every path: a kernel that ends without waiting lets the one after next start too early
    if parts != 1:
        o_v = tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
        o_s = tl.arange(0, PARTS)
        i_b = (item // KV_HEADS).to(tl.int64)
        i_head = item % KV_HEADS * GROUP + i_m % GROUP
        top = HIDDEN
        length = 0.0
        b_acc = tl.zeros([BLOCK_V], tl.float32)
        for i_s in range(0, parts, PARTS):
            # [PARTS]; programs and items both go up by one from part to part, so program + item names a part
            o_p = (program + item + i_s + o_s) * (ROWS * GROUP) + i_m
            m_p = i_s + o_s < parts
            b_m = tl.load(p_max + o_p, mask=m_p, other=HIDDEN)
            b_l = tl.load(p_sum + o_p, mask=m_p, other=0.0)
            # [PARTS, BLOCK_V]
            p_a = p_acc + o_p.to(tl.int64)[:, None] * DV + o_v[None, :]
            b_a = tl.load(p_a, mask=m_p[:, None] & (o_v < DV)[None, :], other=0.0)
            new_top = tl.maximum(top, tl.max(b_m, 0))
            b_c = tl.exp2(b_m - new_top)
            fade = tl.exp2(top - new_top)
            length = length * fade + tl.sum(b_l * b_c, 0)
            b_acc = b_acc * fade + tl.sum(b_a * b_c[:, None], 0)
            top = new_top
        factor = output_factor(top, length, p_aux, i_head, True, AUX)
        p_o = p_out + ((i_b * ROWS + i_m // GROUP) * (KV_HEADS * GROUP) + i_head) * DV
        tl.store(p_o + o_v, (b_acc * factor).to(p_out.dtype.element_ty), mask=o_v < DV)


@dataclass(frozen=True)
class DecodeConfig:
    """Launch parameters. Best on an H200, head_dim 128, bfloat16: 64 slots, 3 stages, 4 warps, 2 programs per SM.

    Tried there without gain: asking L2 for the next item's first blocks, or for the first blocks before the kernel ahead
    has ended (up to 10 % slower); three programs per SM with 2 stages, one with 6.
    """

    block_n: int
    stages: int
    warps: int
    programs: int
    tma: bool
    pdl: bool
    fold: int = 1  # parts of a group, each an item of its own, where one program cannot hold all rows of a group
    overhead: int = 2  # units that taking up an item costs; on an H200, 0 and 1 are 3 to 11 % slower
    early: bool = False  # plan before the kernel ahead has ended; needs pdl


def choose_config(
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    v_dim: int,
    page_size: int,
    rows: int,
    group: int,
    num_pages: int,
) -> DecodeConfig:
    """Launch parameters for `rows` query rows per sequence and `group` query heads per KV head."""
    in_int32 = num_pages * page_size < 1 << 31  # TMA counts rows so
    return _choose(device_of(device), dtype, head_dim, v_dim, page_size, rows, group, in_int32)


@functools.cache
def _choose(
    facts: Device, dtype: torch.dtype, head_dim: int, v_dim: int, page_size: int, rows: int, group: int, in_int32: bool
) -> DecodeConfig:
    plain = dtype == torch.float32  # multiplied without tensor cores: small tiles
    bd, bdv = power_of_2(head_dim), power_of_2(v_dim)
    wide = max(bd, bdv) > 128
    most = 16 if plain and wide else 32 if plain or wide else 64  # rows per program that registers can hold
    fold = next((f for f in range(1, group) if group % f == 0 and rows * group // f <= most), group)
    m = max(16, power_of_2(rows * group // fold))
    block_n = (16 if wide else 32) if plain else 64
    stage = block_n * (bd + bdv) * dtype.itemsize
    rest = m * (bd + block_n) * dtype.itemsize + (6 << 10)  # queries, probabilities, sums
    # two programs per SM hide each other's ends; wide heads do not fit twice
    per_sm = 2 if 2 * (2 * stage + rest) <= facts.shared_memory else 1
    buffers = max(1, min(2 if plain else 3, (facts.shared_memory // per_sm - rest) // stage))
    return DecodeConfig(
        block_n=block_n,
        # before Hopper a pipeline of n stages has n - 1 buffers
        stages=buffers if facts.hopper else buffers + 1,
        warps=8 if m > 32 or (m > 16 and (plain or wide or not facts.hopper)) else 4,
        programs=per_sm * facts.processors,
        tma=facts.hopper and not plain and page_size >= block_n and in_int32,
        pdl=facts.hopper,
        early=facts.hopper,
        fold=fold,
    )


def decode(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    sink: torch.Tensor,
    window: torch.Tensor,
    ring: torch.Tensor,
    scale: float,
    softcap: float = 0.0,
    s_aux: torch.Tensor | None = None,
    model_window: int = 0,
    exact_positions: bool = True,
    config: DecodeConfig | None = None,
) -> torch.Tensor:
    """Launch; arguments as in `segpaged_attention.decode`, already checked. `config` is for tuning and tests."""
    batch, q_heads, rows, head_dim = q.shape
    kv_heads, page_size, v_dim = block_table.shape[1], k_pages.shape[1], v_pages.shape[2]
    out = q.new_empty(batch, rows, q_heads, v_dim)
    if out.numel() == 0:
        return out
    if config is None:
        config = choose_config(
            q.device, q.dtype, head_dim, v_dim, page_size, rows, q_heads // kv_heads, k_pages.shape[0]
        )
    fold = config.fold
    group = q_heads // kv_heads // fold
    num_items = batch * kv_heads * fold
    # A multiple of 4, so that all three are aligned alike whatever the batch size: triton compiles a variant per
    # alignment.
    partials = cdiv((config.programs + num_items) * rows * group, 4) * 4
    memory = scratch(partials * (v_dim + 2), torch.float32, q.device)
    acc, maxima, sums = memory.split([partials * v_dim, partials, partials])
    # a handful of variants, not one per batch size
    items = next(bound for bound in (32, 256, 2048, 1 << 14, 1 << 17) if num_items <= bound)
    # few items have many parts each; many combining programs must fit beside those that decode, or they start late
    block_v, parts, warps = (32, 256, 4) if num_items <= 32 else (64, 32, 1)
    block_v = min(block_v, power_of_2(v_dim))
    pool = (page_descriptor(k_pages, config.block_n), page_descriptor(v_pages, config.block_n)) if config.tma else None
    exact = exact_positions or rows > 1 or model_window > 0
    limit = model_window_of(model_window)
    flags = {"EXACT": exact, "AUX": s_aux is not None, "PDL": config.pdl, "OVERHEAD": config.overhead}
    options = {"launch_pdl": True} if config.pdl else {}
    shape = {"KV_HEADS": kv_heads * fold, "FOLD": fold, "GROUP": group, "ROWS": rows}
    launch(
        _decode_kernel,
        (config.programs, 1, 1),
        (
            q, *(pool or (k_pages, v_pages)), k_pages, v_pages, block_table, seq_lens, sink, window,
            ring, s_aux, out, acc, maxima, sums,
            *strides(q), block_table.stride(0), block_table.stride(1), scale if softcap else scale * LOG2E,
            softcap, limit, num_items, block_table.shape[2],
        ),
        {
            **shape, "M": max(16, power_of_2(rows * group)), "D": head_dim, "DV": v_dim, "BD": power_of_2(head_dim),
            "BDV": power_of_2(v_dim), "PAGE": page_size, "BLOCK_N": config.block_n, "ITEMS": items, "CAP": softcap != 0,
            "TMA": config.tma, "STAGES": config.stages, "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",
            "EARLY": config.early, **flags,
        },
        {"num_warps": config.warps, **options},
    )  # fmt: skip
    launch(
        _combine_kernel,
        (num_items, rows * group, cdiv(v_dim, block_v)),
        (seq_lens, sink, ring, s_aux, out, acc, maxima, sums, limit, num_items, config.programs),
        {
            **shape, "DV": v_dim, "BLOCK_V": block_v, "BLOCK_N": config.block_n, "ITEMS": items, "PARTS": parts, **flags,
        },
        {"num_warps": warps, **options},
    )  # fmt: skip
    return out
