"""Random lives of paged layers against attention by definition (M4, M5, M6, M7, M9 of the storage alone).

Sinks, windows, page sizes, model windows, softcap, attention sinks, chunk sizes, ragged rows, forks, crops, row
selections and changed rollbacks are drawn; `paging_model` compares every output and every page count.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from paging_model import PagedLayer, check_references, make_pool

from redknot_hf.paging import torch_attention

FIXED = dict(derandomize=True, deadline=None, suppress_health_check=list(HealthCheck), print_blob=False)
OPERATIONS = ["chunk", "chunk", "token", "token", "tokens", "fork", "crop", "select", "rollback", "free"]


@st.composite
def geometries(draw):
    heads = draw(st.integers(1, 3))
    return dict(
        sink=[draw(st.integers(0, 6)) for _ in range(heads)],
        window=[draw(st.one_of(st.none(), st.integers(1, 12))) for _ in range(heads)],
        batch=draw(st.integers(1, 3)),
        rollback=draw(st.sampled_from([0, 0, 1, 5])),
        contiguous=draw(st.booleans()),
        model_window=draw(st.sampled_from([None, None, 1, 4, 9])),
        softcap=draw(st.sampled_from([0.0, 0.0, 3.0])),
        sinks=draw(st.sampled_from([False, False, True])),
    )


def live(data, operations: int) -> None:
    """One random life."""
    pool = make_pool(data.draw(st.sampled_from([1, 2, 4, 16]), label="page size"))
    layers = [PagedLayer(pool, **data.draw(geometries(), label="geometry"))]
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**20), label="seed"))
    for _ in range(operations):
        layer = data.draw(st.sampled_from(layers), label="layer")
        batch = len(layer.lens)
        operation = data.draw(st.sampled_from(OPERATIONS))
        if operation == "chunk":
            new = data.draw(st.lists(st.integers(0, 14), min_size=batch, max_size=batch))
            if max(new):
                layer.feed(new, generator, commit=data.draw(st.booleans()))
        elif operation == "token":
            layer.feed([1] * batch, generator)
        elif operation == "tokens":
            for _ in range(data.draw(st.integers(2, 12))):
                layer.feed([1] * batch, generator)
        elif operation == "fork" and len(layers) < 3:
            layers.append(layer.fork())
        elif operation == "crop":
            layer.crop([data.draw(st.integers(0, min(length, 7))) for length in layer.lens])
        elif operation == "select":
            layer.select(data.draw(st.lists(st.integers(0, batch - 1), min_size=1, max_size=3)))
        elif operation == "rollback":
            layer.set_rollback(data.draw(st.integers(0, 6)))
        elif operation == "free" and len(layers) > 1:
            layers.remove(layer)
            layer.pages.free()
        check_references(pool, layers)
    for layer in layers:
        layer.feed([2] * len(layer.lens), generator)
        layer.pages.free()
    assert pool.num_free == pool.num_pages - 1


@settings(max_examples=120, **FIXED)
@given(st.data())
def test_random_lives_equal_the_definition(data):
    live(data, operations=12)


@pytest.mark.slow
@settings(max_examples=4000, **FIXED)
@given(st.data())
def test_many_random_lives_equal_the_definition(data):
    live(data, operations=25)


@settings(max_examples=25, **FIXED)
@given(st.data())
def test_small_blocks_equal_the_definition(data):
    """Query blocks and bands of a few rows: every border of the blocked code is crossed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_attention, "BLOCK_ROWS", data.draw(st.sampled_from([3, 8])))
        patch.setattr(torch_attention, "BAND_TOKENS", 64)
        patch.setattr(torch_attention, "SCORE_ELEMENTS", 97)
        live(data, operations=6)


@pytest.mark.parametrize("past", [0, 1, 30])
@pytest.mark.parametrize("sink,window", [(0, 1), (4, 20), (3, 70), (0, 64)])
def test_banded_prefill_equals_the_definition(past, sink, window):
    """A chunk longer than two blocks goes through the banded path; ragged rows, a model window and a global head."""
    pool = make_pool(16)
    generator = torch.Generator().manual_seed(past + window)
    for model_window in (None, 10, 90):
        layer = PagedLayer(pool, [sink, 0, 2], [window, None, 7], batch=2, model_window=model_window)
        if past:
            layer.feed([past, past // 2], generator)
        layer.feed([150, 141], generator)
        layer.feed([1, 1], generator)
        layer.pages.free()
