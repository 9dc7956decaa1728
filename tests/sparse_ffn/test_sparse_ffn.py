"""SparseFFN against its definition on tiny models: exactness, rows, importance, caches, padding, context rules."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from sparse_models import CONFIGS, SEQUENTIAL, SIZES, tiny, tokens, with_rows
from torch.nn.functional import softmax
from transformers import AutoModelForCausalLM, BertConfig, DynamicCache, MambaConfig, OPTConfig, StaticCache

from redknot_hf import HeadProfile, RedKnotCache, attention
from redknot_hf.errors import RedKnotError, UnsupportedModel
from redknot_hf.sparse_ffn import Band, SparseFFN, SparseFFNSchedule
from redknot_hf.sparse_ffn.structure import find_blocks

CLOSE = 2e-5  # fp32 logits of magnitude 10: other row counts take other GEMM tiles
SCHEDULE = SparseFFNSchedule(keep=0.5, first_layer=1, sink=2, recent=6, boundary=3, query_block=5, bucket=4, min_rows=0)


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool((a - b).abs().max() <= CLOSE * b.abs().max())


class Spy:
    """A callable importance that scores rows by a fixed table and remembers what it was shown."""

    def __init__(self, scores: torch.Tensor):
        self.scores, self.views = scores, []

    def __call__(self, view):
        self.views.append(view)
        return self.scores


# ------------------------------------------------------------------------------------------------------------- exactness


@pytest.mark.parametrize("name", list(CONFIGS))
@pytest.mark.parametrize("rule", [dict(mass=1.0), dict(keep=1.0), dict(above_mean=0.0)])
def test_dense_rules_are_dense_bit_for_bit(name, rule):
    model, ids = tiny(name), tokens(2, 40)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    with torch.no_grad():
        for given in (None, mask):
            dense = model(ids, attention_mask=given).logits
            with SparseFFN(model, SCHEDULE.replace(**{"keep": None, **rule})):
                assert torch.equal(model(ids, attention_mask=given).logits, dense)


@pytest.mark.parametrize("name", list(CONFIGS))
def test_rows_that_do_not_pass_keep_their_residual(name):
    """The output is the definition's: run every row, then zero what the FFN gave for the others."""
    model, ids = tiny(name), tokens(2, 40)
    scores = torch.rand(2, 40, generator=torch.Generator().manual_seed(3))
    always = torch.zeros(2, 40, dtype=torch.bool)
    always[:, :2] = always[:, -6:] = True
    kept = torch.zeros_like(always)
    for row in range(2):
        order = scores[row].masked_fill(always[row], 9.0).argsort(descending=True)
        kept[row, order[:20]] = True
    with torch.no_grad(), SparseFFN(model, SCHEDULE.replace(importance=Spy(scores))) as context:
        found = model(ids).logits
    expected = with_rows(model, ids, {layer: kept for layer in (1, 2, 3)})
    assert close(found, expected)
    assert not close(found, model(ids).logits.detach())
    assert context.stats.seen == [80] * 4 and context.stats.run == [80, 40, 40, 40]


def test_a_broken_selection_would_be_noticed(monkeypatch):
    """The comparison above tells wrong rows: one row exchanged for another is not close."""
    model, ids = tiny("llama"), tokens(1, 40)
    kept = torch.ones(1, 40, dtype=torch.bool)
    kept[0, 10] = False
    other = torch.ones(1, 40, dtype=torch.bool)
    other[0, 11] = False
    assert not close(with_rows(model, ids, {2: kept}), with_rows(model, ids, {2: other}))


def test_gradients_flow_in_eval_mode_and_skipped_rows_have_none_from_the_ffn():
    model, ids = tiny("llama"), tokens(1, 40)
    scores = torch.arange(40.0)[None]
    embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
    with SparseFFN(model, SCHEDULE.replace(importance=Spy(scores))):
        model(inputs_embeds=embeds).logits[0, -1].sum().backward()
    assert embeds.grad is not None and bool(embeds.grad.isfinite().all()) and bool(embeds.grad.any())


# ------------------------------------------------------------------------------------------------------------ importance


def received(model, ids, layer, queries, seen, past=0):
    """Attention that each row's key receives from the last ``queries`` rows in a layer, from the weights, head by head.

    Args:
        seen: bool ``[heads, rows, rows]``.
    """
    states = {}
    block = model.get_decoder().layers[layer]
    hook = block.self_attn.register_forward_pre_hook(
        lambda module, args, kwargs: states.update(kwargs, x=args[0] if args else kwargs["hidden_states"]),
        with_kwargs=True,
    )
    try:
        with torch.no_grad():
            model(ids, use_cache=False)
    finally:
        hook.remove()
    import sys

    attn, x = block.self_attn, states["x"]
    rotate = sys.modules[type(attn).__module__].apply_rotary_pos_emb
    shape = (*x.shape[:2], -1, attn.head_dim)
    q, k = (proj(x).view(shape).transpose(1, 2) for proj in (attn.q_proj, attn.k_proj))
    if hasattr(attn, "q_norm"):
        q, k = attn.q_norm(q), attn.k_norm(k)
    q, k = rotate(q, k, *states["position_embeddings"])
    total = torch.zeros(x.shape[:2])
    group = q.shape[1] // k.shape[1]
    for batch in range(x.shape[0]):
        for head in range(q.shape[1]):
            scores = q[batch, head] @ k[batch, head // group].T * attn.scaling
            cap = getattr(model.config, "attn_logit_softcapping", None)
            if cap:
                scores = torch.tanh(scores / cap) * cap
            weights = softmax(scores.masked_fill(~seen[head // group], float("-inf")), -1)
            total[batch] += weights[-queries:].sum(0)
    return total.detach()


def published(model, call, layer, schedule=SCHEDULE, **options):
    """What reached layer ``layer``'s choice as received attention in a forward, dense so far."""
    found = {}
    from redknot_hf.sparse_ffn.run import Run

    original = Run._importance

    def spy(self, index, *rest):
        found[index] = original(self, index, *rest)
        return found[index]

    Run._importance = spy
    try:
        rules = SparseFFNSchedule(
            bands=(Band(layer, keep=0.99), Band(layer + 1, keep=1.0)),
            **{name: getattr(schedule, name) for name in ("sink", "recent", "query_block", "bucket", "min_rows")},
        )
        with torch.no_grad(), SparseFFN(model, rules, **options):
            call()
    finally:
        Run._importance = original
    return found[layer]


def rule_mask(rows, sink, window):
    p, j = torch.arange(rows)[:, None], torch.arange(rows)
    return (j <= p) & ((j < sink) | (j > p - window))


@pytest.mark.parametrize("name", SEQUENTIAL)
def test_received_attention_is_what_the_heads_give(name):
    """GQA, query and key norms, softcap and sliding windows, over no cache, an ordinary one, a static and a paged one."""
    model, ids = tiny(name), tokens(2, 40)
    window = 12 if name == "gemma2" else 10**6
    for layer in (2, 3):
        own = window if name != "gemma2" or model.config.layer_types[layer] == "sliding_attention" else 10**6
        expected = received(model, ids, layer, 5, rule_mask(40, 0, own)[None].expand(2, -1, -1))
        caches = [
            lambda: None,
            lambda: DynamicCache(config=model.config),
            lambda: RedKnotCache(model.config),
            lambda: RedKnotCache(model.config, page_size=4, max_cache_len=64),
        ]
        if name != "gemma2":  # softcap over a static cache goes to the family's own function, which is not the subject
            caches.append(lambda: StaticCache(config=model.config, max_cache_len=64))
        for cache in caches:
            got = published(model, lambda make=cache: model(ids, past_key_values=make()), layer)
            assert torch.allclose(got, expected, atol=1e-5), (name, layer)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
@pytest.mark.parametrize("prefill", ["windowed", "full"])
def test_received_attention_of_local_heads(name, prefill):
    model, ids = tiny(name), tokens(1, 40)
    profile = HeadProfile.uniform(model.config, sink=3, window=8, global_heads={(l, 0) for l in range(4)})
    layer = 0  # what deeper layers see depends on the windows of those before
    seen = torch.stack(
        [rule_mask(40, 0, 10**6), rule_mask(40, 3, 8) if prefill == "windowed" else rule_mask(40, 0, 999)]
    )
    if name == "gemma2" and model.config.layer_types[0] == "sliding_attention":
        seen &= rule_mask(40, 0, 12)
    expected = received(model, ids, layer, 5, seen)
    got = published(
        model, lambda: model(ids, past_key_values=RedKnotCache(model.config, profile, prefill=prefill)), layer
    )
    assert torch.allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize("local", [False, True])
def test_received_attention_in_a_later_chunk_and_behind_padding(local):
    """Chunks and left padding: a row of a batch gives what it gives alone; normalised over the past too."""
    model, ids = tiny("llama"), tokens(2, 40)
    profile = HeadProfile.uniform(model.config, sink=3, window=8, global_heads=0.5 if local else 1.0)
    seen = torch.stack(
        [rule_mask(40, 3, 8) if kind == "local" else rule_mask(40, 0, 999) for kind in profile.head_class[0]]
    )
    expected = received(model, ids, 0, 5, seen)

    def chunked():
        cache = RedKnotCache(model.config, profile, page_size=4)
        model(ids[:, :24], past_key_values=cache)
        model(ids[:, 24:], past_key_values=cache)

    assert torch.allclose(published(model, chunked, 0), expected[:, 24:], atol=1e-5)
    padded = torch.cat([torch.zeros(2, 9, dtype=torch.long), ids], 1)
    padded[1] = torch.cat([torch.zeros(4, dtype=torch.long), ids[1], torch.zeros(5, dtype=torch.long)])
    mask = torch.zeros_like(padded)
    mask[0, 9:] = mask[1, 4:44] = 1
    caches = [lambda: RedKnotCache(model.config, profile)] + ([] if local else [lambda: None, DynamicCache])
    for make in caches:
        got = published(model, lambda make=make: model(padded, attention_mask=mask, past_key_values=make()), 0)
        assert torch.allclose(got[0, 9:], expected[0], atol=1e-5)
        assert torch.allclose(got[1, 4:44], expected[1], atol=1e-5)
        assert not got[mask == 0].any()


def test_padding_does_not_ask():
    """A row with fewer real tokens than query rows: columns behind its end see its keys, but have no say."""
    model, ids = tiny("llama"), tokens(2, 40)
    mask = torch.ones_like(ids)
    mask[0, 3:] = 0
    expected = received(model, ids[:1, :3], 0, 5, rule_mask(3, 0, 999)[None].expand(2, -1, -1))
    for make in (lambda: None, DynamicCache, lambda: RedKnotCache(model.config)):
        got = published(model, lambda make=make: model(ids, attention_mask=mask, past_key_values=make()), 0)
        assert torch.allclose(got[0, :3], expected[0], atol=1e-5)
        assert not got[0, 3:].any()


def test_attention_norm_and_hidden_change_are_what_they_say():
    model, ids = tiny("qwen3"), tokens(1, 40)
    added, entered = {}, {}
    layers = model.get_decoder().layers
    hooks = [
        layer.self_attn.register_forward_hook(lambda m, a, out, i=i: added.update({i: out[0]}))
        for i, layer in enumerate(layers)
    ]
    hooks += [
        layer.register_forward_pre_hook(lambda m, a, i=i: entered.update({i: a[0]})) for i, layer in enumerate(layers)
    ]
    for importance in ("attention_norm", "hidden_change"):
        got = published_other(model, ids, importance)
        for layer in (1, 3):
            change = (entered[layer] - entered[layer - 1]).norm(dim=-1) / entered[layer - 1].norm(dim=-1)
            expected = added[layer].norm(dim=-1) if importance == "attention_norm" else change
            assert torch.allclose(got[layer], expected, rtol=1e-4)
    for hook in hooks:
        hook.remove()


def published_other(model, ids, importance):
    from redknot_hf.sparse_ffn.run import Run

    found, original = {}, Run._importance

    def spy(self, index, *rest):
        found[index] = original(self, index, *rest)
        return found[index]

    Run._importance = spy
    try:
        with torch.no_grad(), SparseFFN(model, SCHEDULE.replace(importance=importance)):
            model(ids)
    finally:
        Run._importance = original
    return found


def test_a_callable_sees_the_layer():
    model, ids = tiny("llama"), tokens(1, 40)
    spy = Spy(torch.rand(1, 40))
    with torch.no_grad(), SparseFFN(model, SCHEDULE.replace(importance=spy)):
        model(ids)
    assert [view.layer for view in spy.views] == [1, 2, 3]
    view = spy.views[0]
    assert view.ffn_input.shape == view.attention_output.shape == view.previous_input.shape == (1, 40, 48)
    expected = view.ffn_input + 0  # the FFN that is shown is the whole one
    assert view.ffn(expected).shape == (1, 40, 48)


# ------------------------------------------------------------------------------------------------- rows that always pass


def chosen(model, call, schedule=SCHEDULE, **options):
    """bool ``[batch, rows]`` of the rows that passed in layer 1 when all importance is zero."""
    seen = []
    from redknot_hf.sparse_ffn import run as module

    original = module.select_rows

    def spy(importance, *rest):
        index = original(importance, *rest)
        rows = torch.zeros(importance.numel(), dtype=torch.bool)
        rows[index] = True
        seen.append(rows.view(importance.shape))
        return index

    module.select_rows = spy
    try:
        nothing = schedule.replace(keep=0.0, bucket=1, importance=lambda view: torch.zeros(view.ffn_input.shape[:2]))
        with torch.no_grad(), SparseFFN(model, nothing, **options):
            call()
    finally:
        module.select_rows = original
    return seen


def positions(rows: torch.Tensor) -> list[int]:
    return rows.nonzero().flatten().tolist()


def test_sinks_boundaries_recent_and_query_rows_always_pass():
    model, ids = tiny("llama"), tokens(1, 60)
    rows = chosen(model, lambda: model(ids), boundaries=[20, 40], query_tokens=9)[0][0]
    assert positions(rows) == [0, 1, 20, 21, 22, 40, 41, 42, *range(51, 60)]
    rows = chosen(model, lambda: model(ids))[0][0]
    assert positions(rows) == [0, 1, *range(54, 60)]


def test_positions_count_from_the_first_real_token_and_over_chunks():
    model, ids = tiny("llama"), tokens(2, 60)
    mask = torch.ones_like(ids)
    mask[0, :10] = 0
    mask[1, 50:] = 0
    rows = chosen(model, lambda: model(ids, attention_mask=mask), boundaries=[20])[0]
    assert positions(rows[0]) == [10, 11, 30, 31, 32, *range(54, 60)]
    assert positions(rows[1]) == [0, 1, 20, 21, 22, *range(44, 50)]

    def chunked():
        cache = DynamicCache()
        model(ids[:, :30], attention_mask=mask[:, :30], past_key_values=cache)
        model(ids[:, 30:], attention_mask=mask, past_key_values=cache)

    layers = chosen(model, chunked, boundaries=[28])
    first, second = layers[0], layers[1]
    assert positions(first[0]) == [10, 11, *range(24, 30)]
    assert positions(second[0]) == [8, 9, 10, *range(24, 30)]  # positions 28..30 are columns 38..40
    assert positions(second[1]) == [0, *range(14, 20)]


def test_decode_rows_and_short_forwards_are_dense():
    model, ids = tiny("llama"), tokens(1, 40)
    with torch.no_grad():
        cache = DynamicCache()
        with SparseFFN(model, SCHEDULE) as context:
            model(ids, past_key_values=cache)
            seen = list(context.stats.seen)
            twin = DynamicCache()
            for layer, stored in enumerate(cache.layers):
                twin.update(stored.keys.clone(), stored.values.clone(), layer)
            inside = [model(ids[:, :n], past_key_values=cache).logits for n in (1, 5)]
            assert context.stats.run[0] == context.stats.seen[0]
        outside = [model(ids[:, :n], past_key_values=twin).logits for n in (1, 5)]
    assert all(torch.equal(a, b) for a, b in zip(inside, outside, strict=True))
    assert seen == [40] * 4
    with torch.no_grad(), SparseFFN(model, SCHEDULE.replace(min_rows=41)) as context:
        model(ids)
    assert context.stats.seen == [0] * 4


def test_counts_are_rounded_up_to_the_bucket():
    model, ids = tiny("llama"), tokens(2, 61)
    for bucket, count in ((1, 19), (8, 24), (16, 32), (64, 61)):
        schedule = SCHEDULE.replace(keep=0.3, bucket=bucket)
        with torch.no_grad(), SparseFFN(model, schedule) as context:
            model(ids)
        assert context.stats.run[1:] == [2 * count] * 3


# ---------------------------------------------------------------------------------------------- caches, batches, generate


@pytest.mark.parametrize("importance", ["received_attention", "attention_norm", "hidden_change"])
def test_every_cache_gives_the_same(importance):
    model, ids = tiny("qwen3"), tokens(2, 40)
    schedule = SCHEDULE.replace(importance=importance)
    with torch.no_grad(), SparseFFN(model, schedule):
        plain = model(ids).logits
        for cache in (DynamicCache(), RedKnotCache(model.config), RedKnotCache(model.config, max_cache_len=64)):
            assert close(model(ids, past_key_values=cache).logits, plain)
    assert not close(plain, model(ids).logits.detach())


@pytest.mark.parametrize("importance", ["received_attention", "attention_norm"])
@pytest.mark.parametrize("rule", [dict(keep=0.4), dict(keep=None, mass=0.6), dict(keep=0.4, fill="mean")])
def test_a_padded_row_is_that_row_alone(importance, rule):
    model, ids = tiny("llama"), tokens(2, 50)
    profile = HeadProfile.uniform(model.config, sink=3, window=12, global_heads=0.5)
    schedule = SCHEDULE.replace(importance=importance, **rule)
    mask = torch.ones_like(ids)
    mask[0, :11] = 0
    with torch.no_grad(), SparseFFN(model, schedule) as context:
        both = model(ids, attention_mask=mask, past_key_values=RedKnotCache(model.config, profile)).logits
        run = context.stats.run[2]
        alone = model(ids[:1, 11:], past_key_values=RedKnotCache(model.config, profile)).logits
        other = model(ids[1:], past_key_values=RedKnotCache(model.config, profile)).logits
        assert context.stats.run[2] == 2 * run  # padding rows run no FFN
    assert close(both[0, 11:], alone[0]) and close(both[1], other[0])


def test_generate_with_local_heads():
    model, ids = tiny("llama"), tokens(1, 40)
    profile = HeadProfile.uniform(model.config, sink=3, window=12, global_heads=0.5)
    options = dict(max_new_tokens=6, do_sample=False)
    with SparseFFN(model, SCHEDULE):
        found = model.generate(ids, past_key_values=RedKnotCache(model.config, profile), **options)
        cache = RedKnotCache(model.config, profile)
        with torch.no_grad():
            text = ids
            logits = model(ids, past_key_values=cache).logits
            for _ in range(6):
                text = torch.cat([text, logits[:, -1:].argmax(-1)], 1)
                logits = model(text[:, -1:], past_key_values=cache).logits
    assert torch.equal(found, text)


# ----------------------------------------------------------------------------------------------------------- the context


def traces(model) -> list:
    """Everything a context could leave behind on a model's modules."""
    found = []
    for module in model.modules():
        hooks = list(module._forward_hooks.values()), list(module._forward_pre_hooks.values())
        found.append((sorted(module.__dict__), hooks, module.__dict__.get("forward")))
    return found


def test_nothing_is_left_behind():
    model, ids = tiny("mixtral"), tokens(1, 40)
    before, dense = traces(model), model(ids).logits.detach()
    with SparseFFN(model, SCHEDULE):
        assert traces(model) != before
        model(ids)
    assert traces(model) == before and attention.observers == ()
    assert torch.equal(model(ids).logits.detach(), dense)


def test_exceptions_inside_leave_nothing_behind():
    model, ids = tiny("llama"), tokens(1, 40)
    before = traces(model)

    def fails(view):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"), SparseFFN(model, SCHEDULE.replace(importance=fails)):
        model(ids)
    assert traces(model) == before and attention.observers == ()
    with torch.no_grad(), SparseFFN(model, SCHEDULE) as context:  # and a failed forward does not disturb the next
        with pytest.raises(Exception, match=r"\w"):
            model(ids, attention_mask=torch.ones(1, 3, 5))
        found = model(ids).logits
        assert context.stats.run[2] == 20
        assert torch.equal(found, model(ids).logits)


def test_the_innermost_context_of_a_model_holds():
    model, other, ids = tiny("llama"), tiny("qwen3"), tokens(1, 40)
    with torch.no_grad():
        dense, foreign = model(ids).logits, other(ids).logits
        with SparseFFN(model, SCHEDULE):
            outer = model(ids).logits
            assert torch.equal(other(ids).logits, foreign)
            with SparseFFN(model, SCHEDULE.replace(keep=1.0)), SparseFFN(other, SCHEDULE):
                assert torch.equal(model(ids).logits, dense)
                assert not torch.equal(other(ids).logits, foreign)
            assert torch.equal(model(ids).logits, outer) and torch.equal(other(ids).logits, foreign)
            context = SparseFFN(model, SCHEDULE)
            with context, context:
                assert torch.equal(model(ids).logits, outer)
        assert torch.equal(model(ids).logits, dense)
    assert not torch.equal(outer, dense)


def test_a_context_belongs_to_its_thread():
    model, ids = tiny("llama"), tokens(1, 40)
    with torch.no_grad():
        dense = model(ids).logits
        with SparseFFN(model, SCHEDULE):
            sparse = model(ids).logits
    start, failures = threading.Barrier(4), []

    def work(number):
        try:
            with torch.no_grad():
                start.wait()
                for _ in range(6):
                    if number % 2:
                        with SparseFFN(model, SCHEDULE):
                            assert torch.equal(model(ids).logits, sparse)
                    assert torch.equal(model(ids).logits, dense)
        except BaseException as error:
            failures.append(error)

    before = traces(model)
    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert traces(model) == before and attention.observers == ()


def test_a_forward_that_somebody_else_put_in_survives():
    model, ids = tiny("llama"), tokens(1, 40)
    mlp = model.get_decoder().layers[2].mlp
    original, calls = mlp.forward, []

    def theirs(x):
        calls.append(x.shape[1])
        return original(x)

    mlp.forward = theirs
    try:
        with torch.no_grad(), SparseFFN(model, SCHEDULE):
            calls.clear()
            model(ids)
        assert calls == [20] and mlp.__dict__["forward"] is theirs
    finally:
        del mlp.forward


def test_training_is_refused():
    model = AutoModelForCausalLM.from_config(CONFIGS["llama"](), attn_implementation="redknot")
    with pytest.raises(RedKnotError, match=r"training mode with gradients: .*model\.eval\(\)"):
        SparseFFN(model.train(), SCHEDULE)
    context = SparseFFN(model.eval(), SCHEDULE)
    with context:
        model.train()
        with pytest.raises(RedKnotError, match="training mode"):
            model(tokens(1, 40))
    with pytest.raises(RedKnotError, match="training mode"), context:
        pass


@pytest.mark.parametrize("part", ["mlp", "post_attention_layernorm", "layer", "model"])
def test_what_torch_compile_runs_is_dense(part):
    """Compiled in place, before the context or inside it; what is not compiled stays sparse."""
    model = AutoModelForCausalLM.from_config(CONFIGS["llama"](), attn_implementation="redknot").eval()
    ids, layer = tokens(2, 40), model.model.layers[2]
    compiled = {"layer": layer, "model": model}.get(part) or getattr(layer, part)
    with torch.no_grad():
        dense = model(ids).logits
        runs = [40, 20, 20 if part == "post_attention_layernorm" else 0, 20] if part != "model" else [0] * 4
        bands = tuple(Band(layer, keep=1.0 if layer == 2 else 0.5) for layer in (1, 2, 3))
        with SparseFFN(model, SCHEDULE.replace(keep=None, first_layer=None, bands=bands)):
            without = model(ids).logits  # layer 2 dense
        with SparseFFN(model, SCHEDULE) as context:
            sparse = model(ids).logits
            context.stats.reset()
            compiled.compile(backend="eager")
            inside = model(ids).logits
            assert [run // 2 for run in context.stats.run] == runs
        with SparseFFN(model, SCHEDULE) as context:
            again = model(ids).logits
            assert [run // 2 for run in context.stats.run] == runs
        assert torch.equal(inside, again) and torch.allclose(model(ids).logits, dense, atol=1e-5)
    expected = {"model": dense, "post_attention_layernorm": sparse}.get(part, without)
    assert torch.allclose(inside, expected, atol=1e-5)


def test_received_attention_needs_our_attention():
    model = AutoModelForCausalLM.from_config(CONFIGS["llama"](), attn_implementation="sdpa").eval()
    with pytest.raises(RedKnotError, match=r"'sdpa': call model\.set_attn_implementation\('redknot'\)"):
        SparseFFN(model, SCHEDULE)
    with torch.no_grad(), SparseFFN(model, SCHEDULE.replace(importance="attention_norm")) as context:
        model(tokens(1, 40))
    assert context.stats.run[2] == 20


@pytest.mark.parametrize(
    "arguments, words",
    [
        (dict(schedule=0.5), "schedule=0.5"),
        (dict(schedule=SCHEDULE, query_tokens=-1), "query_tokens=-1"),
        (dict(schedule=SCHEDULE, boundaries=[-1]), "boundaries="),
        (dict(schedule=SCHEDULE.replace(first_layer=9)), "layer 9"),
    ],
)
def test_bad_arguments_are_named(arguments, words):
    with pytest.raises(RedKnotError, match=words):
        SparseFFN(tiny("llama"), **arguments)


# -------------------------------------------------------------------------------------------------------------- structure


@pytest.mark.parametrize("name", list(CONFIGS))
def test_ffns_are_found_by_what_they_do(name):
    blocks = find_blocks(tiny(name))
    parallel = name in ("cohere", "gpt_neox")
    mixer = "attention" if name == "gpt_neox" else "self_attn"
    assert [(b.ffn, b.mixers, b.parallel, b.ffn_first) for b in blocks] == [(("mlp",), (mixer,), parallel, False)] * 4


def test_blocks_of_another_form_are_refused_by_name():
    bert = AutoModelForCausalLM.from_config(
        BertConfig(is_decoder=True, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    ).eval()
    with pytest.raises(UnsupportedModel, match="BertLayer"):
        find_blocks(bert)
    mamba = AutoModelForCausalLM.from_config(MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=97)).eval()
    with pytest.raises(UnsupportedModel, match="MambaBlock has no FFN module"):
        find_blocks(mamba)
    opt = AutoModelForCausalLM.from_config(
        OPTConfig(hidden_size=32, word_embed_proj_dim=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=2)
    ).eval()
    with pytest.raises(UnsupportedModel, match="OPTDecoderLayer"):
        find_blocks(opt)


def test_a_layer_that_was_replaced_is_looked_at_again():
    model = AutoModelForCausalLM.from_config(CONFIGS["llama"](), attn_implementation="redknot").eval()
    assert find_blocks(model)[0].ffn == ("mlp",)
    layer = model.get_decoder().layers[0]
    layer.mlp = torch.nn.Sequential(layer.mlp, torch.nn.Conv1d(40, 40, 1))  # no rows by themselves any more
    layer.mlp.forward = lambda x: x.mean(1, keepdim=True).expand_as(x)
    assert find_blocks(model)[0].ffn == ()


def test_sizes_of_the_test_models_are_what_the_tests_assume():
    assert SIZES["num_hidden_layers"] == 4 and np.prod(tokens(2, 40).shape) == 80
