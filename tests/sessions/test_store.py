"""A SessionStore keeps every session, bit by bit, in the bytes it was given."""

from __future__ import annotations

import threading

import pytest
import torch
from session_helpers import feed, make, prompt, steps

from redknot_hf import HeadProfile, RedKnotCache, RedKnotError
from redknot_hf.errors import CacheError
from redknot_hf.sessions import SessionMissing, SessionStore, sleep
from redknot_hf.sessions.store import SUFFIX


def session_bytes(model, profile, tokens=24) -> int:
    cache = make(model, profile, 1, tokens)
    return sum(pool.allocated_bytes for pool in cache._pools.values())


def test_a_chat_of_100_sessions_on_a_budget_of_10(tiny, profile, tmp_path, monkeypatch):
    one = session_bytes(tiny, profile)
    store = SessionStore(tiny, device_bytes=12 * one, host_bytes=10 * one, folder=tmp_path)
    monkeypatch.setattr("os.fsync", lambda _: None)  # 200 of them take longer than all the rest
    fed = []
    forward = tiny.model.forward
    monkeypatch.setattr(tiny.model, "forward", lambda **kw: fed.append(kw["input_ids"].shape[1]) or forward(**kw))
    alone = {}
    for turn in range(2):
        for user in range(100):
            text = prompt(1, 24 if turn == 0 else 3, seed=100 * turn + user)
            fresh = RedKnotCache(tiny.config, profile, page_size=8)
            reference = alone.setdefault(user, fresh)
            expected = feed(tiny, reference, text)
            fed.clear()
            with store.use(f"user {user}", lambda: RedKnotCache(tiny.config, profile, page_size=8)) as cache:
                assert torch.equal(feed(tiny, cache, text), expected)
            assert fed == [text.shape[1]]  # nothing was computed again
            report = store.report()
            assert report.device_bytes <= 12 * one and report.host_bytes <= 10 * one
    report = store.report()
    assert len(store) == 100 and report.deletions == 0 and report.restores >= 90
    assert 8 <= len(report.device) <= 12 and report.host and len(report.disk) > 60


def test_least_recently_used_goes_first(tiny, profile):
    one = session_bytes(tiny, profile)
    store = SessionStore(tiny.config, device_bytes=3 * one)
    for name in "abc":
        store.put(name, make(tiny, profile, 1, 24))
    store.put("a", store.get("a"))
    store.put("d", make(tiny, profile, 1, 24))
    report = store.report()
    assert report.host == ("b",) and report.device == ("c", "a", "d")


def test_quantised_sessions_are_counted_and_moved(tiny, tmp_path):
    """Frozen pages lie in no pool: they count, move to the host and to files, and come back as they were."""
    profile = HeadProfile.all_global(tiny.config)

    def frozen(seed: int) -> RedKnotCache:
        cache = make(tiny, profile, 1, 300, seed=seed, kv_dtype="int8")
        cache.freeze()
        return cache

    one = frozen(0).memory_report()
    assert one.live < 0.3 * one.dense
    store = SessionStore(tiny, device_bytes=int(2.5 * one.live), host_bytes=int(1.5 * one.live), folder=tmp_path)
    twins = {}
    for user in range(5):
        cache = frozen(user)
        twins[user] = cache.fork()
        store.put(str(user), cache)
    report = store.report()
    assert (len(report.device), len(report.host), len(report.disk)) == (2, 1, 2)
    assert 1.9 * one.ideal < report.device_bytes < 2.5 * one.live and report.host_bytes > 0.95 * one.ideal
    for user, twin in twins.items():
        assert torch.equal(steps(tiny, store.get(str(user)), 5), steps(tiny, twin, 5))


def test_cold_tokens_on_the_host_count(tiny, profile, tmp_path):
    """Sessions with a cold tier fill the host from wherever they are; the longest idle become files, whole."""
    twins = {}
    caches = {name: make(tiny, profile, 1, 200, seed=ord(name), cold="cpu") for name in "abcd"}
    one = caches["a"].memory_report().cold
    store = SessionStore(tiny, host_bytes=int(2.5 * one), folder=tmp_path)
    for name, cache in caches.items():
        twins[name] = make(tiny, profile, 1, 200, seed=ord(name), cold="cpu")
        store.put(name, cache)
    report = store.report()
    assert report.disk == ("a", "b") and report.device == ("c", "d") and report.host_bytes == 2 * one
    for name, twin in twins.items():
        with store.use(name) as cache:
            assert torch.equal(steps(tiny, cache, 5), steps(tiny, twin, 5))
            cache.set_profile(HeadProfile.uniform(tiny.config, sink=2, window=150))  # what was cold is there
        assert store.report().host_bytes <= 2.5 * one


def test_pinned_and_used_sessions_stay(tiny, profile):
    one = session_bytes(tiny, profile)
    store = SessionStore(tiny.config, device_bytes=2 * one)
    store.put("pinned", make(tiny, profile, 1, 24), pin=True)
    store.put("used", make(tiny, profile, 1, 24))
    store.get("used")
    store.put("idle", make(tiny, profile, 1, 24))
    assert store.report().host == ("idle",)
    with pytest.raises(CacheError, match="in use"):
        store.get("used")
    with pytest.raises(CacheError, match="in use"):
        store.put("used", make(tiny, profile, 1, 24))
    store.pin("pinned", False)
    store.put("more", make(tiny, profile, 1, 24))
    assert "pinned" in store.report().host


def test_what_had_to_give_way_is_known(tiny, profile, tmp_path):
    one = session_bytes(tiny, profile)
    store = SessionStore(tiny.config, device_bytes=one, host_bytes=0)
    old = make(tiny, profile, 1, 24)
    store.put("a", old)
    store.put("b", make(tiny, profile, 1, 24))
    with pytest.raises(SessionMissing, match="'a': it had to give way: host_bytes=0"):
        store.get("a")
    with pytest.raises(CacheError, match="has left memory"):
        feed(tiny, old, prompt(1, 1))  # never an empty cache that looks like the session
    with pytest.raises(SessionMissing, match="never put"):
        store.get("z")
    small = SessionStore(tiny.config, device_bytes=0, host_bytes=0, disk_bytes=1, folder=tmp_path)
    small.put("a", make(tiny, profile, 1, 24))
    with pytest.raises(SessionMissing, match="disk_bytes=1"):
        small.get("a")
    assert not list(tmp_path.iterdir())


def test_delete_frees_every_tier(tiny, profile, tmp_path):
    one = session_bytes(tiny, profile)
    store = SessionStore(tiny.config, device_bytes=one, host_bytes=one, folder=tmp_path)
    for name in "abcd":
        store.put(name, make(tiny, profile, 1, 24))
    report = store.report()
    assert report.device and report.host and report.disk
    assert all(store.delete(name) for name in "abcd") and not store.delete("a")
    report = store.report()
    assert report.device_bytes == report.host_bytes == report.disk_bytes == 0 and not list(tmp_path.iterdir())


def test_a_folder_can_be_reopened(tiny, profile, tmp_path):
    store = SessionStore(tiny, folder=tmp_path)
    twins = {}
    for name in ("a", "../b", "c\n" * 100):
        store.put(name, make(tiny, profile, 1, 24, seed=len(name)))
        twins[name] = store._sessions[name].cache.fork()
    assert store.flush() == 3
    (tmp_path / f"x{SUFFIX}").write_bytes(b"rubbish")
    leftover = tmp_path / f".y{SUFFIX}.abc.tmp"
    leftover.write_bytes(b"killed while writing")
    again = SessionStore(tiny, folder=tmp_path)
    assert set(again.keys()) == set(twins) and not leftover.exists()
    for name, twin in twins.items():
        assert torch.equal(steps(tiny, again.get(name)), steps(tiny, twin))


@pytest.mark.parametrize("key", ["../x", "/etc/passwd", "a/b/c", "..", "a\0b", "~", "\ud800", "x" * 512, "CON", " "])
def test_keys_are_names_and_not_paths(tiny, profile, tmp_path, key):
    folder = tmp_path / "store"
    store = SessionStore(tiny.config, device_bytes=0, host_bytes=0, folder=folder)
    cache = make(tiny, profile, 1, 24)
    twin = cache.fork()
    store.put(key, cache)
    assert store.report().disk == (key,)
    files = list(folder.iterdir())
    assert len(files) == 1 and files[0].name.endswith(SUFFIX) and list(tmp_path.iterdir()) == [folder]
    again = SessionStore(tiny.config, folder=folder)
    assert again.keys() == [key]
    assert torch.equal(steps(tiny, again.get(key), 3), steps(tiny, twin, 3))
    again.delete(key)


def test_a_file_under_another_name_is_not_a_session(tiny, profile, tmp_path):
    """A label is what the file says of itself; it counts only where the name follows from it."""
    make(tiny, profile, 1, 24).save(tmp_path / ("f" * 40 + SUFFIX), label="victim")
    store = SessionStore(tiny.config, folder=tmp_path)
    assert store.keys() == []
    with pytest.raises(SessionMissing):
        store.get("victim")


def test_a_full_disk_loses_nothing(tiny, profile, tmp_path, monkeypatch):
    from redknot_hf.sessions import store as module

    one = session_bytes(tiny, profile)
    store = SessionStore(tiny.config, device_bytes=one, host_bytes=0, folder=tmp_path)
    first = make(tiny, profile, 1, 24)
    twin = first.fork()
    store.put("a", first)
    with monkeypatch.context() as patch:
        patch.setattr(module, "save_session", lambda *a, **k: (_ for _ in ()).throw(RedKnotError("the disk is full")))
        with pytest.raises(RedKnotError, match="disk is full"):
            store.put("b", make(tiny, profile, 1, 24))
    assert torch.equal(steps(tiny, store.get("a")), steps(tiny, twin))
    assert "b" in store


def test_no_host_memory_goes_to_the_disk(tiny, profile, tmp_path, monkeypatch):
    def none(*_):
        raise MemoryError

    monkeypatch.setattr(sleep, "host_empty", none)
    store = SessionStore(tiny.config, device_bytes=0, folder=tmp_path)
    cache = make(tiny, profile, 1, 24)
    twin = cache.fork()
    store.put("a", cache)
    assert store.report().disk == ("a",)
    assert torch.equal(steps(tiny, store.get("a")), steps(tiny, twin))


def test_a_damaged_file_is_named_and_the_others_live(tiny, profile, tmp_path):
    store = SessionStore(tiny.config, device_bytes=0, host_bytes=0, folder=tmp_path)
    store.put("a", make(tiny, profile, 1, 24))
    store.put("b", make(tiny, profile, 1, 24))
    path = store._path("a")
    raw = bytearray(path.read_bytes())
    raw[-5] ^= 1
    path.write_bytes(raw)
    with pytest.raises(RedKnotError, match="damaged"):
        store.get("a")
    store.get("b")
    assert store.delete("a")


def test_an_interrupted_session_is_not_kept(tiny, profile):
    store = SessionStore(tiny.config)
    store.put("a", make(tiny, profile, 1, 24))
    hook = tiny.model.layers[1].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt), store.use("a") as cache:
        feed(tiny, cache, prompt(1, 3))
    hook.remove()
    with pytest.raises(SessionMissing, match="interrupted"):
        store.get("a")


def test_bad_arguments(tiny, tmp_path):
    for bad in (-1, True, 1.5):
        with pytest.raises(RedKnotError, match="device_bytes"):
            SessionStore(tiny.config, device_bytes=bad)
    with pytest.raises(RedKnotError, match="key must"):
        SessionStore(tiny.config).put("", None)
    (tmp_path / "file").write_text("")
    with pytest.raises(RedKnotError, match="folder="):
        SessionStore(tiny.config, folder=tmp_path / "file" / "x")


def test_threads(tiny, profile, tmp_path):
    one = session_bytes(tiny, profile)
    store = SessionStore(tiny, device_bytes=2 * one, host_bytes=2 * one, folder=tmp_path)
    expected, failures = {}, []
    for user in range(8):
        store.put(str(user), make(tiny, profile, 1, 24, seed=user))
        expected[user] = steps(tiny, make(tiny, profile, 1, 24, seed=user), 6)

    def chat(user: int) -> None:
        try:
            found = []
            for _ in range(3):
                with store.use(str(user)) as cache:
                    ids = torch.full((1, 1), 5) if not found else found[-1][:, -1:].argmax(-1)
                    for _ in range(2):
                        found.append(feed(tiny, cache, ids))
                        ids = found[-1][:, -1:].argmax(-1)
            assert torch.equal(torch.cat(found, 1), expected[user])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=chat, args=(user,)) for user in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_the_real_model(smollm2, tmp_path):
    model, tokenizer = smollm2
    profile = HeadProfile.uniform(model.config, sink=4, window=32, global_heads=0.25)
    texts = [f"Once upon a time {name} went to the market" for name in ("Ann", "Bob")]
    store = SessionStore(model, device_bytes=1, host_bytes=1, folder=tmp_path)  # one at a time
    twins = []
    for text in texts:
        ids = tokenizer(text, return_tensors="pt").input_ids
        with store.use(text, lambda: RedKnotCache(model.config, profile)) as cache:
            out = model.generate(ids, past_key_values=cache, max_new_tokens=2, do_sample=False)
            twins.append((out, cache.fork()))
    for text, (out, twin) in zip(texts, twins, strict=True):
        with store.use(text) as cache:
            found = model.generate(out, past_key_values=cache, max_new_tokens=2, do_sample=False)
        assert torch.equal(found, model.generate(out, past_key_values=twin, max_new_tokens=2, do_sample=False))
