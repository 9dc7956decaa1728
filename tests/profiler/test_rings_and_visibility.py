"""The streamed attention of the profiler against dense brute force with the one visibility rule."""

from __future__ import annotations

import pytest
import torch

from redknot_hf.heads.profiler.intercept import AttentionCall
from redknot_hf.heads.profiler.scores import HeadScores, ring_attention
from redknot_hf.heads.profiler.visibility import KEEP_ALL, visible_attention

WINDOWS = (3, 8, 20)
SINK = 2


def make_call(rows=7, total=50, kv_heads=3, groups=2, dim=8, batch=2, seed=0, **options) -> AttentionCall:
    torch.manual_seed(seed)
    query = torch.randn(batch, kv_heads * groups, rows, dim)
    key, value = (torch.randn(batch, kv_heads, total, dim) for _ in range(2))
    # Scores of some spread, or every head looks alike.
    return AttentionCall(0, 2 * query, key, value, dim**-0.5, **options)


def dense_weights(call: AttentionCall, head_sink, head_window, sees=None) -> torch.Tensor:
    """`[batch, query_heads, rows, keys]`, the definition written out; `head_*` per KV head."""
    rows, total = call.query.shape[2], call.key.shape[2]
    p = torch.arange(total - rows, total)[:, None]
    j = torch.arange(total)[None]
    visible = torch.stack([(j <= p) & ((j < s) | (j > p - w)) for s, w in zip(head_sink, head_window, strict=True)])
    if call.model_window:
        visible = visible & (j > p - call.model_window)
    visible = visible.repeat_interleave(call.groups, 0)
    scores = call.query.double() @ call.key.double().repeat_interleave(call.groups, 1).transpose(2, 3) * call.scaling
    if call.softcap is not None:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    scores = scores.masked_fill(~visible, float("-inf"))
    if call.sink_logits is not None:
        extra = call.sink_logits.double()[None, :, None, None].expand(*scores.shape[:3], 1)
        return torch.cat([scores, extra], -1).softmax(-1)[..., :-1]
    return scores.softmax(-1)


def dense_output(call, weights) -> torch.Tensor:
    return weights @ call.value.double().repeat_interleave(call.groups, 1)


OPTIONS = [
    {},
    {"model_window": 12},
    {"softcap": 5.0},
    {"sink_logits": torch.linspace(-1, 2, 6)},
    {"rows": 50},  # the whole sequence: no context
    {"rows": 1},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(
    "sink,window", [((2, 2, 2), (5, 5, 5)), ((2, 0, 4), (5, KEEP_ALL, 17)), ((0, 40, 3), (1, 4, 49))]
)
def test_per_head_windows_equal_the_dense_mask(options, sink, window):
    call = make_call(**options)
    expected = dense_output(call, dense_weights(call, sink, window))
    assert torch.allclose(visible_attention(call, sink, window).double(), expected, atol=1e-5)


def test_long_prefill_in_query_blocks_equals_the_dense_mask():
    call = make_call(rows=1100, total=1100, kv_heads=2, batch=1)
    sink, window = (4, 0), (100, KEEP_ALL)
    expected = dense_output(call, dense_weights(call, sink, window))
    assert torch.allclose(visible_attention(call, sink, window).double(), expected, atol=1e-5)


@pytest.mark.parametrize("key_block", [7, 16, 64])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_rings_equal_brute_force(options, key_block):
    call = make_call(**options)
    rings = ring_attention(call, SINK, WINDOWS, key_block=key_block)
    keep = dense_weights(call, (0,) * 3, (KEEP_ALL,) * 3)
    assert torch.allclose(rings.full.double(), dense_output(call, keep), atol=1e-5)
    norms = call.value.double().norm(dim=-1).repeat_interleave(call.groups, 1)[:, :, None]
    rows, total = call.query.shape[2], call.key.shape[2]
    age = torch.arange(total - rows, total)[:, None] - torch.arange(total)[None]
    for i, window in enumerate(WINDOWS):
        windowed = dense_output(call, dense_weights(call, (SINK,) * 3, (window,) * 3))
        assert torch.allclose(rings.windowed[i].double(), windowed, atol=1e-5)
        far = ((age >= window) & (torch.arange(total)[None] >= SINK)).double()
        # Learned sink logits are not attention to any key: shares are of the attention that lands on keys.
        share = (keep * far).sum(-1) / keep.sum(-1)
        assert torch.allclose(rings.far_mass[i].double(), share, atol=1e-5)
        by_value = (keep * norms * far).sum(-1) / (keep * norms).sum(-1)
        assert torch.allclose(rings.far_value_mass[i].double(), by_value, atol=1e-5)


def test_head_scores_equal_brute_force_over_two_batches():
    scores = HeadScores(layers=1, heads=3, windows=WINDOWS, sink=SINK)
    needle = (10, 14)
    squares = {"error": torch.zeros(3), "norm": torch.zeros(3)}
    retrieval = torch.zeros(3)
    for seed in (1, 2):
        call = make_call(seed=seed)
        target = torch.zeros(2, 7, dtype=torch.bool)
        target[0, 4:], target[1, 2:5] = True, True
        rings = ring_attention(call, SINK, WINDOWS, key_block=16)
        scores.add("needle", call, rings, target, [needle, needle])
        keep = dense_weights(call, (0,) * 3, (KEEP_ALL,) * 3)
        full = dense_output(call, keep)
        cut = dense_output(call, dense_weights(call, (SINK,) * 3, (WINDOWS[1],) * 3))
        rows = target[:, None, :, None]
        squares["error"] += ((full - cut).square() * rows).sum((0, 2, 3)).reshape(3, 2).sum(1).float()
        squares["norm"] += (full.square() * rows).sum((0, 2, 3)).reshape(3, 2).sum(1).float()
        on_needle = keep[..., needle[0] : needle[1]].sum(-1)
        for b in range(2):
            per_head = on_needle[b][:, target[b]].mean(-1)
            retrieval += per_head.reshape(3, 2).amax(1).float() / 4
    means = scores.means()
    assert torch.allclose(
        means["needle_error"][0, :, 1].float(), (squares["error"] / squares["norm"]).sqrt(), atol=1e-5
    )
    assert torch.allclose(means["retrieval"][0].float(), retrieval, atol=1e-5)
    assert float(means["text_error"].abs().sum()) == 0.0  # nothing was counted as text
