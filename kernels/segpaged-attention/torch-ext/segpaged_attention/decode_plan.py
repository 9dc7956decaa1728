"""How `decode` shares its work: items on a line of units, an equal stretch of the line for every program ("stream-K").

An *item* is one (sequence, KV head), or a part of its query heads, with its own number of stored slots. It takes one unit
per block of BLOCK_N slots, and OVERHEAD units before those for the fixed cost of taking it up: without them many short
local items land on few programs. Everything follows from the lengths on the device, so nothing is planned on the host,
and a captured graph follows them (arXiv 2301.03598).
"""

import triton
import triton.language as tl

MIN_UNITS = tl.constexpr(2)  # a program takes no less


@triton.jit
def item_facts(
    p_seq_lens, p_sink, p_ring, item, m_item, KV_HEADS: tl.constexpr, FOLD: tl.constexpr, GUESS: tl.constexpr
):
    """Tokens stored, sink and ring of one item or of many.

    GUESS: the kernel before may still be writing them, so nothing of what is read may stay in L1 (volatile).
    """
    i_kv = item % KV_HEADS // FOLD
    seq_len = tl.load(p_seq_lens + item // KV_HEADS, mask=m_item, other=0, volatile=GUESS)
    sink = tl.load(p_sink + i_kv, mask=m_item, other=0, volatile=GUESS)
    return seq_len, sink, tl.load(p_ring + i_kv, mask=m_item, other=1, volatile=GUESS)


@triton.jit
def blocks_of(
    seq_len, sink, ring, model_window, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, EXACT: tl.constexpr
):  # fmt: skip
    """The first block that any row sees, and how many blocks follow; for one item or many."""
    kept = sink + ring
    blocks = (tl.minimum(seq_len, kept) + BLOCK_N - 1) // BLOCK_N
    first = blocks * 0
    if EXACT:
        # where slot and position are the same, what lies before the model's window of the first row need not be read
        oldest = tl.maximum(seq_len - ROWS - model_window + 1, 0)
        first = tl.where(seq_len <= kept, oldest // BLOCK_N, 0)
        blocks -= first
    return first, blocks


@triton.jit
def units_of(
    p_seq_lens, p_sink, p_ring, model_window, num_items,
    KV_HEADS: tl.constexpr, FOLD: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, ITEMS: tl.constexpr,
    EXACT: tl.constexpr, OVERHEAD: tl.constexpr, GUESS: tl.constexpr,
):  # fmt: skip
    """[ITEMS]: the units that each item takes on the line."""
    o_i = tl.arange(0, ITEMS)
    m_i = o_i < num_items
    seq_len, sink, ring = item_facts(p_seq_lens, p_sink, p_ring, o_i, m_i, KV_HEADS, FOLD, GUESS)
    _first, b_blocks = blocks_of(seq_len, sink, ring, model_window, ROWS, BLOCK_N, EXACT)
    return tl.where(m_i, b_blocks + OVERHEAD, 0)


@triton.jit
def programs_for(total, num_programs):
    """How many of the programs get any of `total` units."""
    return tl.maximum(tl.minimum(num_programs, (total + MIN_UNITS - 1) // MIN_UNITS), 1)


@triton.jit
def stretch_start(program, total, programs):
    """First unit of a program: all take as many, the first ``total % programs`` one more."""
    each = total // programs
    return program * each + tl.minimum(program, total - each * programs)


@triton.jit
def program_of(unit, total, programs):
    """The program that takes a unit: the inverse of `stretch_start`."""
    each = total // programs
    more = total - each * programs
    wide = more * (each + 1)
    return tl.where(unit < wide, unit // (each + 1), more + (unit - wide) // tl.maximum(each, 1))


@triton.jit
def plan(b_units, i_p, ITEMS: tl.constexpr):
    """Units in all, programs that get any, this program's stretch [unit, stop), its first item and where that ends."""
    b_end = tl.cumsum(b_units, 0)
    total = tl.sum(b_units, 0)
    programs = programs_for(total, tl.num_programs(0))
    unit = stretch_start(i_p, total, programs)
    stop = tl.where(i_p < programs, stretch_start(i_p + 1, total, programs), unit)
    item = tl.sum((b_end <= unit).to(tl.int32), 0)
    end = tl.sum(tl.where(tl.arange(0, ITEMS) == item, b_end, 0), 0)
    return total, programs, unit, stop, item, end
