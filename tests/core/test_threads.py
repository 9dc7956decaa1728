"""Several threads: different caches and forks are independent, one cache in two threads is a clear error."""

from __future__ import annotations

import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from core_models import assert_same, forward, generate, global_cache, mixed_cache, tiny, tokens

from redknot_hf.errors import CacheError
from redknot_hf.paging.pool import PagePool

WORKERS = 4


@pytest.fixture
def llama():
    return tiny("llama")


def together(jobs):
    """Run the jobs on as many threads at once; their results in order."""
    start = threading.Barrier(len(jobs))

    def run(job):
        start.wait()
        return job()

    with ThreadPoolExecutor(len(jobs)) as pool:
        return [future.result() for future in [pool.submit(run, job) for job in jobs]]


def greedy(model, cache, ids):
    """generate() without touching the global random state, which threads share."""
    return model.generate(
        ids,
        past_key_values=cache,
        do_sample=False,
        max_new_tokens=10,
        return_dict_in_generate=True,
        output_logits=True,
        attention_mask=torch.ones_like(ids),
    )


def test_threads_with_caches_of_their_own(llama):
    prompts = [tokens(20 + 5 * i, 1 + i % 2, seed=i) for i in range(WORKERS)]
    make = [mixed_cache if i % 2 else global_cache for i in range(WORKERS)]
    want = [greedy(llama, make[i](llama), prompts[i]) for i in range(WORKERS)]
    for _ in range(2):
        got = together([lambda i=i: greedy(llama, make[i](llama), prompts[i]) for i in range(WORKERS)])
        for one, other in zip(got, want, strict=True):
            assert_same(one, other, 0)


def test_threads_with_forks_of_one_cache_share_a_pool(llama):
    """Each fork copies the shared pages that it writes to and makes the common pools grow, all at once."""
    root = mixed_cache(llama, page_size=2)
    prefix = tokens(30)
    forward(llama, prefix, root)
    texts = [torch.cat([prefix, tokens(40, seed=50 + i)], 1) for i in range(WORKERS)]
    want = []
    for text in texts:
        alone = mixed_cache(llama, page_size=2)
        forward(llama, prefix, alone)
        want.append(greedy(llama, alone, text))
    for _ in range(2):
        forks = [root.fork() for _ in texts]
        got = together([lambda f=fork, t=text: greedy(llama, f, t) for fork, text in zip(forks, texts, strict=True)])
        for one, other in zip(got, want, strict=True):
            assert_same(one, other, 1e-6)
        for fork in forks:
            fork.reset()
        for layer in root.paged_layers:
            refs = layer.pages.pool.refs
            held = np.zeros_like(refs)
            np.add.at(held, layer.pages.table[layer.pages.table > 0], 1)
            held[0] = 1
            assert (held == refs).all()


def test_a_pool_grown_by_many_threads_hands_out_every_page_once():
    pool = PagePool(2, 4, 4, torch.float32, torch.device("cpu"))

    def take():
        taken = []
        for count in [1, 3, 7] * 30:
            pool.reserve(count)
            pages = pool.alloc(count)
            pool.k[pages] = float(pages[0])
            taken.append(pages)
        return np.concatenate(taken)

    taken = np.concatenate(together([take] * WORKERS))
    assert len(np.unique(taken)) == len(taken) == 4 * 330
    assert pool.k.shape[0] == pool.v.shape[0] == len(pool.refs)
    assert (pool.refs[taken] == 1).all()


def meeting_in(module, parties=2):
    """A hook that lets ``parties`` threads meet inside ``module`` (or passes after a second)."""
    barrier = threading.Barrier(parties)

    def wait(*_):
        with contextlib.suppress(threading.BrokenBarrierError):
            barrier.wait(timeout=0.3)

    return module.register_forward_pre_hook(wait)


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("filled", [False, True])
def test_two_threads_on_one_cache_are_told(llama, place, filled):
    """At least one of them gets the error, whatever the order, and none a wrong text."""
    cache = mixed_cache(llama)
    if filled:
        forward(llama, tokens(20), cache)
    want = forward(llama, tokens(4, seed=3), mixed_cache(llama)) if not filled else None
    if filled:
        fresh = mixed_cache(llama)
        forward(llama, tokens(20), fresh)
        want = forward(llama, tokens(4, seed=3), fresh)

    def run():
        try:
            return forward(llama, tokens(4, seed=3), cache)
        except CacheError as error:
            return str(error)

    hook = meeting_in(llama.model.layers[place].mlp)
    try:
        results = together([run, run])
    finally:
        hook.remove()
    errors = [result for result in results if isinstance(result, str)]
    assert errors and all("thread" in text and "reset()" in text for text in errors)
    for result in results:
        if not isinstance(result, str):
            torch.testing.assert_close(result, want, atol=1e-6, rtol=0)
    cache.reset()
    torch.testing.assert_close(
        forward(llama, tokens(20), cache), forward(llama, tokens(20), mixed_cache(llama)), atol=0, rtol=0
    )


def test_a_cache_may_move_from_one_thread_to_another(llama):
    cache, ids = mixed_cache(llama), tokens(20)
    want = generate(llama, mixed_cache(llama), ids)
    together([lambda: forward(llama, ids[:, :9], cache)])
    assert_same(generate(llama, cache, ids), want)
