"""Caches through stores in one process: what travels, what is refused, and every way in which a store can fail."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from transfer_worker import GREEDY, decode, make_model, make_profile, prefill, prompt

from redknot_hf import HeadProfile, RedKnotCache
from redknot_hf.distributed import CacheMissing, NotPublished, fetch, publish, unpublish
from redknot_hf.distributed.cells import visible_positions
from redknot_hf.distributed.root import Root, root_name
from redknot_hf.errors import CacheError, RedKnotError
from redknot_hf.placement import HeadPlacement
from redknot_hf.segments.codec import SegmentEntry
from redknot_hf.segments.stores import SegmentStore


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def profile(model):
    return make_profile(model)


@pytest.fixture(scope="module")
def expected(model, profile):
    return decode(model, *prefill(model, profile))


@pytest.fixture
def folder(tmp_path) -> SegmentStore:
    return SegmentStore(tmp_path / "store")


def cells(store: SegmentStore) -> list[Path]:
    """Files of single heads, in the order of layers and heads as far as their descriptions tell."""
    found = []
    for path in sorted(store.root.glob("*/*.safetensors")):
        said = store.get(path.stem).extra
        if "head" in said:
            found.append(((said["layer"], said["head"]), path))
    return [path for _, path in sorted(found)]


# ----------------------------------------------------------------------------------------------- what travels
@pytest.mark.parametrize("page_size", [None, 8, 256])
def test_a_fetched_cache_continues_like_the_one_it_was(model, profile, folder, expected, page_size):
    cache, ids = prefill(model, profile)
    sent = publish(cache, folder, "prompt", tokens=ids, model=model)
    found = fetch(folder, "prompt", model, page_size=page_size)
    assert torch.equal(found.tokens, ids) and found.cache.seen == 200
    assert found.attention_mask[:, :200].tolist() == prompt()[1].tolist()
    assert (found.nbytes, found.cells) == (sent.nbytes, 12)
    assert torch.equal(model.generate(**found.inputs, past_key_values=found.cache, **GREEDY), expected)
    # ... in pieces, too, and after many more tokens than a window has
    left, right = prefill(model, profile)[0], fetch(folder, "prompt", model).cache
    more = torch.randint(2, 96, (2, 50), generator=torch.Generator().manual_seed(9))
    mask = torch.cat([prompt()[1], torch.ones(2, 50, dtype=torch.int64)], 1)
    for begin, end in ((0, 1), (1, 20), (20, 21), (21, 50)):
        outs = [
            model(more[:, begin:end], attention_mask=mask[:, : 200 + end], past_key_values=cache).logits
            for cache in (left, right)
        ]
        torch.testing.assert_close(*outs, atol=2e-6, rtol=1e-6)


def test_only_visible_tokens_travel(model, profile, folder):
    """Exactly the keys and values that a next query sees: no page rounding, no padding, no slack for crops."""
    cache, _ = prefill(model, profile, rollback=32, page_size=64)
    sent = publish(cache, folder, "prompt")
    lens = [200, 200 - 61]
    tokens = sum(
        lens[row] if kind == "global" else 4 + 15 for row in range(2) for layer in profile.head_class for kind in layer
    )
    assert sent.nbytes == tokens * 2 * 8 * 4
    assert sent.dense_nbytes == 2 * 200 * 12 * 2 * 8 * 4
    files = sum(record.nbytes for record in folder.list())
    assert files < sent.nbytes + 13 * 1500  # what the store keeps beside them: names, shapes, checksums
    memory = cache.memory_report()
    assert sent.nbytes < memory.ideal < memory.live
    # nothing in the files is pickled
    assert all(path.read_bytes()[8:9] == b"{" for path in cells(folder))


def test_positions_that_stay_visible():
    for sink, window, length in [(4, 16, 3), (4, 16, 4), (4, 16, 19), (4, 16, 20), (4, 16, 500), (0, 1, 9), (9, 3, 7)]:
        query = length  # the next one
        rule = [j for j in range(length) if j < sink or j > query - window]
        assert visible_positions(sink, window, length).tolist() == rule, (sink, window, length)
    assert visible_positions(0, 1 << 30, 7).tolist() == list(range(7))


@pytest.mark.parametrize("length", [62, 70, 77, 78, 79, 80, 96, 97])
def test_lengths_around_sinks_and_windows(model, profile, length):
    """Rows with 1 to 36 tokens beside rows of 62 to 97: rings that are empty, filling, just full and turning."""
    store = SegmentStore("memory://")
    cache, ids = prefill(model, profile, length)
    publish(cache, store, "x", tokens=ids)
    found = fetch(store, "x", model)
    want = decode(model, cache, ids)
    assert torch.equal(model.generate(**found.inputs, past_key_values=found.cache, **GREEDY), want)


def test_beams_travel_once(model, profile):
    store = SegmentStore("memory://")
    cache, ids = prefill(model, profile)
    once = publish(cache, store, "x", tokens=ids).nbytes
    cache.batch_repeat_interleave(3)
    ids = ids.repeat_interleave(3, 0)
    assert publish(cache, store, "x", tokens=ids).nbytes == once
    found = fetch(store, "x", model)
    assert found.cache.memory_report().live < cache.memory_report().live * 1.01
    text = model.generate(**found.inputs, past_key_values=found.cache, **GREEDY)
    assert torch.equal(text, decode(model, *prefill(model, profile)).repeat_interleave(3, 0))


def test_relabelled_models_on_either_side(model, profile, expected, folder):
    order = [[2, 0, 3, 1], [1, 2, 3, 0], [3, 1, 2, 0]]
    placed = make_model()
    HeadPlacement(profile, 2, order).apply_to_model(placed)
    for key, writer, reader in (("a", model, placed), ("b", placed, model), ("c", placed, placed)):
        cache, ids = prefill(writer, profile)
        publish(cache, folder, key, tokens=ids, model=writer)
        found = fetch(folder, key, reader)
        text = reader.generate(**found.inputs, past_key_values=found.cache, **GREEDY)
        assert torch.equal(text, expected), key
    # a share of the relabelled reader's heads is read by their original numbers
    part = fetch(folder, "a", placed.config, rank=1, world_size=2).cache
    whole, _ = prefill(model, profile)
    for layer, (mine, full) in enumerate(zip(part.layers, whole.layers, strict=True)):
        shown = (mine.dense()[0] != 0).any(-1, keepdim=True)
        torch.testing.assert_close(mine.dense()[0], full.dense()[0][:, order[layer][2:]] * shown)


def test_other_forms_of_a_cache_are_published_too(model, profile, expected):
    """Retrieval heads with cold pages, a static cache, an offloaded one: the reader gets the growing form."""
    store = SegmentStore("memory://")
    classes = [["retrieval" if kind == "global" else kind for kind in row] for row in profile.head_class]
    retrieval = HeadProfile(3, 4, classes, profile.sink, profile.window)
    for key, given, options in (
        ("cold", retrieval, dict(cold="cpu", near_tokens=64, page_size=16)),
        ("static", profile, dict(max_cache_len=256)),
        ("asleep", profile, {}),
    ):
        cache, ids = prefill(model, given, **options)
        if key == "asleep":
            cache.offload()
        publish(cache, store, key, tokens=ids)
        found = fetch(store, key, model)
        text = model.generate(**found.inputs, past_key_values=found.cache, **GREEDY)
        assert torch.equal(text, expected), key


def test_a_reader_may_quantise(model, profile):
    """One byte per channel on the reader's side: close to what came, and the writer's cache is as it was."""
    store = SegmentStore("memory://")
    cache, ids = prefill(model, profile, 300)
    publish(cache, store, "x", tokens=ids)
    found = fetch(store, "x", model, kv_dtype="int8")
    more = torch.randint(2, 96, (2, 80), generator=torch.Generator().manual_seed(9))
    mask = torch.cat([prompt(300)[1], torch.ones(2, 80, dtype=torch.int64)], 1)
    exact, close = (model(more, attention_mask=mask, past_key_values=each).logits for each in (cache, found.cache))
    assert 1e-5 < (exact - close).abs().max() < 0.05 * exact.abs().max()


def test_without_profile_and_without_tokens(model):
    store = SegmentStore("memory://")
    cache, ids = prefill(model, HeadProfile.all_global(model.config))
    want = decode(model, cache.fork(), ids)
    publish(cache, store, "x")
    found = fetch(store, "x", model.config)
    with pytest.raises(RedKnotError, match="without tokens"):
        _ = found.inputs
    assert torch.equal(decode(model, found.cache, ids), want)


# ------------------------------------------------------------------------------------------------- what is refused
def test_another_model_is_refused(model, profile, folder):
    cache, ids = prefill(model, profile)
    publish(cache, folder, "x", tokens=ids, model=model)
    with pytest.raises(CacheError, match="another model"):
        fetch(folder, "x", make_model(intermediate_size=128))
    with pytest.raises(CacheError, match="other weights"):
        fetch(folder, "x", make_model(seed=1))
    with pytest.raises(CacheError, match=r"holds torch.float32, the model runs in torch.bfloat16"):
        publish(cache, folder, "y", tokens=ids)
        fetch(folder, "y", make_model().to(torch.bfloat16))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (dict(rank=0), "give both or neither"),
        (dict(rank=2, world_size=2), "tp_rank=2"),
        (dict(rank=0, world_size=3), "4 KV heads per layer, which do not divide"),
        (dict(cold="cpu"), "fetch\\(\\) got cold="),
        (dict(page_size=48), "power of two"),
    ],
)
def test_bad_arguments_are_named(model, profile, arguments, words):
    store = SegmentStore("memory://")
    publish(prefill(model, profile)[0], store, "x")
    with pytest.raises(RedKnotError, match=words):
        fetch(store, "x", model.config, **arguments)


def test_bad_tokens_and_keys_are_named(model, profile):
    cache, ids = prefill(model, profile)
    store = SegmentStore("memory://")
    for tokens, words in (
        (ids[:1], "2 rows of 200 tokens"),
        (ids[:, :100], "2 rows of 200"),
        (ids.float(), "integer ids"),
    ):
        with pytest.raises(RedKnotError, match=words):
            publish(cache, store, "x", tokens=tokens)
    for key in ("", "k" * 513, 7):
        with pytest.raises(RedKnotError, match="1 to 512 characters"):
            publish(cache, store, key)
    half = prefill(model, profile)[0]
    half.layers[2].seen -= 1
    with pytest.raises(CacheError, match="layer 2 holds 199 of 200 tokens"):
        publish(half, store, "x")
    assert store.stat().entries == 0


# ------------------------------------------------------------------------------------------- stores that fail
def test_nothing_published_is_a_clear_error(model, folder):
    with pytest.raises(CacheMissing, match=r"no cache is published under 'x'.*Feed the prompt"):
        fetch(folder, "x", model)
    assert not unpublish(folder, "x")


def damage(path: Path, how: str) -> None:
    raw = bytearray(path.read_bytes())
    if how == "truncated":
        raw = raw[: len(raw) // 2]
    elif how == "a bit":
        raw[-3] ^= 4
    elif how == "empty":
        raw = bytearray()
    elif how == "gone":
        path.unlink()
        return
    path.write_bytes(bytes(raw))


@pytest.mark.parametrize("how", ["truncated", "a bit", "empty", "gone", "swapped"])
def test_any_damaged_cell_is_a_miss(model, profile, folder, how, caplog):
    caplog.set_level(logging.ERROR)
    for which in (0, 5, 11):
        publish(prefill(model, profile)[0], folder, "x")
        path = cells(folder)[which]
        if how == "swapped":  # whole, sealed, and of another head
            path.write_bytes(cells(folder)[which - 1].read_bytes())
        else:
            damage(path, how)
        with pytest.raises(CacheMissing, match=f"layer {which // 4}, head {which % 4}"):
            fetch(folder, "x", model)
        # ranks that do not need that head are served
        other = 1 - which % 4 // 2
        assert fetch(folder, "x", model.config, rank=other, world_size=2).cells == 6


@pytest.mark.parametrize("how", ["truncated", "a bit", "empty", "gone"])
def test_a_damaged_description_is_a_miss(model, profile, folder, how, caplog):
    caplog.set_level(logging.ERROR)
    publish(prefill(model, profile)[0], folder, "x", tokens=prefill(model, profile)[1])
    damage(folder._path(root_name("x")), how)
    with pytest.raises(CacheMissing):
        fetch(folder, "x", model)


def test_a_description_that_lies_is_refused(model, profile, folder):
    """Sealed by somebody who can write to the store, and contradicting itself or the model."""
    cache, ids = prefill(model, profile)
    publish(cache, folder, "x", tokens=ids)
    good = folder.get(root_name("x"))
    lies = [
        ("lens", [200, 140]), ("lens", [200]), ("lens", [200, -1]), ("row_of", [1, 1]), ("row_of", [0, 7]), ("seen", 201),
        ("heads", 8), ("heads", 1 << 40), ("layers", good.extra["layers"][:2]), ("layers", 3), ("edition", "../../x"),
        ("options", {"prefill": "windowed"}), ("version", 99), ("format", "other"), ("profile", {"format": "x"}),
        ("layers", [{**good.extra["layers"][0], "dtype": "int64"}] * 3),
        ("layers", [{**good.extra["layers"][0], "key_dim": 16}] * 3),
        ("row_of", [0, 0]),
    ]  # fmt: skip
    for name, value in lies:
        folder.put(root_name("x"), SegmentEntry(dict(good.tensors), 200, extra={**good.extra, name: value}))
        with pytest.raises(RedKnotError):
            fetch(folder, "x", model)
    folder.put(
        root_name("x"),
        SegmentEntry({**good.tensors, "padding": torch.zeros(2, 1, dtype=torch.uint8)}, 200, extra=good.extra),
    )
    with pytest.raises(RedKnotError):
        fetch(folder, "x", model)
    huge = {**good.extra, "seen": 1 << 39, "lens": [1 << 39] * 2}  # nothing of that size is made
    folder.put(root_name("x"), SegmentEntry({}, 200, extra=huge))
    with pytest.raises(CacheMissing, match="layer 0, head 0 holds"):
        fetch(folder, "x", model)
    folder.put(root_name("x"), good)
    assert fetch(folder, "x", model).cells == 12


def test_two_editions_are_never_mixed(model, profile, expected):
    """Publishing again while a reader is between two layers: it gets the new one whole; the old cells are gone."""
    store = SegmentStore("memory://")
    publish(prefill(model, profile, 150)[0], store, "x", tokens=prefill(model, profile, 150)[1])
    load, calls = store._load_many, []

    def load_many(names):
        calls.append(names)
        if len(calls) == 3:  # the root, the first layer, and now
            cache, ids = prefill(model, profile)
            publish(cache, store, "x", tokens=ids)
        return load(names)

    store._load_many = load_many
    found = fetch(store, "x", model)
    assert found.cache.seen == 200
    assert torch.equal(model.generate(**found.inputs, past_key_values=found.cache, **GREEDY), expected)
    assert store.stat().entries == 13  # the first edition left nothing behind
    assert unpublish(store, "x") and store.stat().entries == 0


def test_a_store_without_room_publishes_nothing(model, profile, tmp_path, caplog):
    """What was there before stays whole, and what was begun is removed."""
    caplog.set_level(logging.ERROR)
    store = SegmentStore(tmp_path / "store")
    cache, ids = prefill(model, profile, 100)
    publish(cache, store, "x", tokens=ids)
    before = {record.key for record in store.list()}
    save, calls = store._save_many, []
    store._save_many = lambda items: save(items) if not calls.append(1) and len(calls) < 3 else [False] * len(items)
    with pytest.raises(NotPublished, match="rank 0: the store did not take a cell"):
        publish(prefill(model, profile)[0], store, "x")
    assert {record.key for record in store.list()} == before
    assert fetch(store, "x", model).cache.seen == 100


def test_evicted_cells_are_misses(model, profile, caplog):
    caplog.set_level(logging.ERROR)
    store = SegmentStore("memory://", max_bytes=20_000)
    with pytest.raises((CacheMissing, NotPublished)):
        publish(prefill(model, profile)[0], store, "x")
        fetch(store, "x", model)


def test_a_reader_with_another_secret_misses(model, profile, tmp_path, caplog):
    caplog.set_level(logging.ERROR)
    publish(prefill(model, profile)[0], SegmentStore(tmp_path, secret="one"), "x")
    assert fetch(SegmentStore(tmp_path, secret="one"), "x", model).cells == 12
    for secret in ("two", None):
        with pytest.raises(CacheMissing):
            fetch(SegmentStore(tmp_path, secret=secret), "x", model)


def test_fetched_pages_have_no_old_content(model, profile):
    """Slots that hold nothing are finite after other tokens lived in them: NaN times a weight of zero would be NaN."""
    store = SegmentStore("memory://")
    cache, ids = prefill(model, profile, 70)
    publish(cache, store, "x", tokens=ids)
    found = fetch(store, "x", model)
    for layer in found.cache.paged_layers:
        assert torch.isfinite(layer.pages.pool.k).all()
        assert np.array_equal(layer.pages.lens, [70, 9])
    assert isinstance(Root.read(store, root_name("x")), Root)
    assert isinstance(found.cache, RedKnotCache)
