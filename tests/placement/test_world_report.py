"""The sum of the ranks' memory reports, with parts that only some ranks have."""

from __future__ import annotations

from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest

from redknot_hf import HeadProfile, RedKnotCache
from redknot_hf.distributed import reports
from redknot_hf.paging.resident import FetchCounts


@pytest.mark.parametrize("counts", [(None, None), (FetchCounts(3, 2, 1, 4, 5), None), (FetchCounts(1), FetchCounts(2))])
def test_counts_of_fetches_are_added_where_there_are_any(monkeypatch, counts):
    from transformers import LlamaConfig

    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8
    )  # fmt: skip
    one = RedKnotCache(config, HeadProfile.all_global(config)).memory_report()
    said = [asdict(replace(one, far=far)) for far in counts]
    monkeypatch.setattr(reports.Ranks, "of", lambda *_: SimpleNamespace(exchange=lambda mine: said))
    cache = SimpleNamespace(tp_rank=0, tp_size=2, memory_report=lambda: one)
    found = reports.world_report(cache)
    assert [report.far for report in found.ranks] == list(counts)
    known = [far for far in counts if far is not None]
    assert found.total.far == (sum(known[1:], known[0]) if known else None)
    assert found.total.allocated == 2 * one.allocated
