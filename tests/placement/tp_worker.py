"""What `test_tensor_parallel.py` runs under torchrun: one function per check, all in one launch per world size.

Every rank runs every check in the same order and writes `{check: "" or what went wrong}` to its own file; the tests read
the files. A check compares the sharded model with the same weights in this process alone.

    torchrun --nproc-per-node 2 tp_worker.py FOLDER
"""

from __future__ import annotations

import copy
import json
import os
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed
from transformers import AutoModelForCausalLM, LlamaConfig, Phi3Config, Qwen2Config, Qwen3Config
from transformers.distributed import DistributedConfig
from transformers.models.gpt_oss import GptOssConfig
from transformers.utils import logging

from redknot_hf import HeadProfile, RedKnotCache
from redknot_hf.distributed import (
    CacheMissing,
    WorldPrompt,
    fetch,
    load_world,
    publish,
    save_world,
    unpublish,
    world_report,
)  # fmt: skip
from redknot_hf.errors import CacheError, RedKnotError
from redknot_hf.placement import place_heads, rank_profile, relabel_checkpoint
from redknot_hf.segments.stores import SegmentStore

SIZES = dict(
    vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=8,
    num_key_value_heads=4, max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=None,
)  # fmt: skip
CONFIGS = {
    "llama": LlamaConfig(**SIZES, attention_bias=True),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=16),
    "phi3": Phi3Config(**SIZES),
    "gpt_oss": GptOssConfig(**SIZES, head_dim=16, num_local_experts=2, num_experts_per_tok=1),
}
GLOBAL = {(0, 0), (0, 1), (1, 0), (2, 1)}  # all on the first of two ranks
GREEDY = dict(do_sample=False, max_new_tokens=12)


class Ranks:
    def __init__(self, folder: Path):
        self.folder = folder
        self.rank, self.size = distributed.get_rank(), distributed.get_world_size()
        self.whole: dict[str, torch.nn.Module] = {}
        self.split: dict[str, torch.nn.Module] = {}
        ids = torch.randint(2, 96, (2, 40), generator=torch.Generator().manual_seed(3))
        self.mask = torch.ones_like(ids)
        self.mask[0, :11] = 0
        self.ids = ids * self.mask

    def one(self, name: str) -> torch.nn.Module:
        """The whole model in this process."""
        if name not in self.whole:
            torch.manual_seed(0)
            config = copy.deepcopy(CONFIGS[name])
            model = AutoModelForCausalLM.from_config(config, attn_implementation="redknot").eval()
            with torch.no_grad():
                for parameter in model.parameters():  # biases, norms and sinks start at constants that hide mistakes
                    parameter.add_(0.05 * torch.randn_like(parameter))
            self.whole[name] = model
        return self.whole[name]

    def shards(self, name: str, state=None, config=None) -> torch.nn.Module:
        """The same weights, sharded by transformers."""
        if state is None and name in self.split:
            return self.split[name]
        model = self.one(name)
        given = {key: value.clone() for key, value in (state or model.state_dict()).items()}
        made = type(model).from_pretrained(
            None, config=config or copy.deepcopy(CONFIGS[name]), state_dict=given, tp_plan="auto",
            attn_implementation="redknot",
        ).eval()  # fmt: skip
        if state is None:
            self.split[name] = made
        return made

    def profile(self, name: str = "llama") -> HeadProfile:
        return HeadProfile.uniform(CONFIGS[name], sink=2, window=8, global_heads=GLOBAL)

    def text(self, model, cache, **options):
        options = {**GREEDY, **options}
        inputs = {"input_ids": self.ids, "attention_mask": self.mask, **options}
        return model.generate(past_key_values=cache, **inputs)

    def prefilled(self, model, **options):
        """A cache of the prompt and the ids with one more token."""
        cache = RedKnotCache(model.config, self.profile(), **options)
        return cache, self.text(model, cache, max_new_tokens=1)

    def more(self, model, cache, ids):
        mask = torch.cat([self.mask, torch.ones(2, ids.shape[1] - 40, dtype=torch.int64)], 1)
        return model.generate(ids, attention_mask=mask, past_key_values=cache, **GREEDY)


def same_text(name: str):
    def check(r: Ranks) -> None:
        want = r.text(r.one(name), RedKnotCache(r.one(name).config, r.profile(name)))
        model = r.shards(name)
        cache = RedKnotCache(model.config, r.profile(name))
        assert torch.equal(r.text(model, cache), want)
        gathered = name in ("phi3", "gpt_oss")  # their plans put all key heads on every rank again
        heads = 4 if gathered else 4 // r.size
        assert cache.layers[0].num_heads == heads, cache.layers[0].num_heads
        assert (cache.tp_rank, cache.tp_size) == ((0, 1) if gathered else (r.rank, r.size))
        again = RedKnotCache.for_model(model, r.profile(name))
        assert (again.tp_rank, again.tp_size) == (cache.tp_rank, cache.tp_size)

    return check


def the_rank_matters(r: Ranks) -> None:
    """The control: with rank 0's windows everywhere the logits differ."""
    model, one = r.shards("llama"), r.one("llama")
    inputs = dict(input_ids=r.ids, attention_mask=r.mask)
    want = one(**inputs, past_key_values=RedKnotCache(one.config, r.profile())).logits[:, 15:]
    good = model(**inputs, past_key_values=RedKnotCache(model.config, r.profile())).logits[:, 15:]
    bad = model(**inputs, past_key_values=RedKnotCache(model.config, r.profile(), tp_rank=0, tp_size=r.size)).logits
    assert (good - want).abs().max() < 1e-5
    assert (bad[:, 15:] - want).abs().max() > 1e-3


def modes(r: Ranks) -> None:
    """Beams, sampling with a seed, prompt lookup and a cache of fixed length, as one process does them."""
    model, one = r.shards("llama"), r.one("llama")
    single = dict(input_ids=r.ids[1:], attention_mask=r.mask[1:])
    for options in (dict(num_beams=3), dict(do_sample=True, top_k=8), dict(**single, prompt_lookup_num_tokens=4)):
        found = []
        for m in (one, model):
            torch.manual_seed(7)
            found.append(r.text(m, RedKnotCache(m.config, r.profile()), **options))
        assert torch.equal(*found), options
    # the static form, too
    static = [r.text(m, RedKnotCache(m.config, r.profile(), max_cache_len=80)) for m in (one, model)]
    assert torch.equal(*static)


def profiles_that_do_not_divide(r: Ranks) -> None:
    sizes = {**SIZES, "hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 3}
    config = LlamaConfig(**sizes)
    state = AutoModelForCausalLM.from_config(copy.deepcopy(config)).state_dict()
    model = r.shards("llama", state, config)
    try:
        RedKnotCache(model.config, HeadProfile.uniform(config))
    except RedKnotError as error:
        assert f"tp_size={r.size}: the model has 3 KV heads" in str(error), error
    else:
        raise AssertionError("3 KV heads were spread over the ranks")


def relabelled_while_loading(r: Ranks) -> None:
    """place_heads over the ranks: the same text from the relabelled weights, and even memory."""
    one = r.one("llama")
    profile = r.profile()
    want = r.text(one, RedKnotCache(one.config, profile))
    placement = place_heads(profile, r.size)
    config = copy.deepcopy(CONFIGS["llama"])
    model = r.shards("llama", placement.apply_to_state_dict(one.state_dict(), config), config)
    caches = {}
    for given, name in ((profile, "original profile"), (placement.profile, "placed profile")):
        caches[name] = cache = RedKnotCache(model.config, given, page_size=16)
        assert torch.equal(r.text(model, cache), want), name
    after = world_report(cache)
    plain = r.shards("llama")
    cache = RedKnotCache(plain.config, profile, page_size=16)
    r.text(plain, cache)
    before = world_report(cache)
    assert before.total.ideal == after.total.ideal
    assert after.imbalance < before.imbalance - 0.1, (before.imbalance, after.imbalance)


def relabelled_on_disk(r: Ranks) -> None:
    """A checkpoint relabelled before loading, with transformers' newer spelling of `tp_plan="auto"`."""
    placed = r.folder / "placed"
    if r.rank == 0:
        r.one("llama").save_pretrained(r.folder / "plain")
        relabel_checkpoint(r.folder / "plain", placed, place_heads(r.profile(), r.size))
    distributed.barrier()
    model = AutoModelForCausalLM.from_pretrained(
        placed, distributed_config=DistributedConfig(tp_size=r.size), attn_implementation="redknot"
    ).eval()
    one = r.one("llama")
    want = r.text(one, RedKnotCache(one.config, r.profile()))
    assert torch.equal(r.text(model, RedKnotCache(model.config, r.profile())), want)


def memory_adds_up(r: Ranks) -> None:
    model, one = r.shards("llama"), r.one("llama")
    alone, _ = r.prefilled(one)
    cache, _ = r.prefilled(model)
    want, here, world = alone.memory_report(), cache.memory_report(), world_report(cache)
    assert world.ranks[r.rank] == here and len(world.ranks) == r.size
    assert world.total.ideal_per_head == want.ideal_per_head
    assert world.total.live_per_head == want.live_per_head
    assert (world.total.ideal, world.total.dense) == (want.ideal, want.dense)
    assert here.ideal < want.ideal and here.dense * r.size == want.dense
    mine = rank_profile(r.profile(), r.rank, r.size)
    assert cache.layers[1].num_heads == mine.num_kv_heads


def files_of_one_rank(r: Ranks) -> None:
    model = r.shards("llama")
    cache, ids = r.prefilled(model)
    path = r.folder / f"rank-{r.rank}.session.safetensors"
    cache.save(path, model=model)
    distributed.barrier()
    for config in (model, model.config):
        again = RedKnotCache.load(path, config)
        assert (again.tp_rank, again.tp_size) == (r.rank, r.size)
    want = r.more(model, cache, ids)
    assert torch.equal(r.more(model, again, ids), want)
    other = r.folder / f"rank-{(r.rank + 1) % r.size}.session.safetensors"
    for config in (model, model.config):
        try:
            RedKnotCache.load(other, config)
        except RedKnotError as error:
            assert "same tensor-parallel layout" in str(error) or "other weights" in str(error), error
        else:
            raise AssertionError("another rank's file was loaded")


def files_of_the_world(r: Ranks) -> None:
    """Written by all ranks; read by one process, by these ranks, and head by head by any number of ranks."""
    model, one = r.shards("llama"), r.one("llama")
    cache, ids = r.prefilled(model)
    saved = save_world(cache, r.folder / "world", tokens=ids, model=model)
    assert len(saved.nbytes_per_rank) == r.size and sum(saved.nbytes_per_rank) == saved.nbytes
    assert saved.nbytes < saved.dense_nbytes and saved.cells == 12
    alone, _ = r.prefilled(one)
    want = r.more(one, alone, ids)
    loaded = load_world(r.folder / "world", model)
    assert loaded.cells == 12 // r.size and loaded.nbytes == saved.nbytes_per_rank[r.rank]
    assert torch.equal(model.generate(**loaded.inputs, past_key_values=loaded.cache, **GREEDY), want)
    alone_again = load_world(r.folder / "world", one)  # its config knows of no ranks: no talking to others
    assert torch.equal(one.generate(**alone_again.inputs, past_key_values=alone_again.cache, **GREEDY), want)
    fresh, _ = r.prefilled(one)
    for size in (1, 2, 4):
        for rank in range(size):
            part = load_world(r.folder / "world", one, rank=rank, world_size=size).cache
            mine = slice(rank * 4 // size, (rank + 1) * 4 // size)
            for layer, whole in zip(part.layers, fresh.layers, strict=True):
                for half, all_heads in zip(layer.dense(), whole.dense(), strict=True):
                    shown = (half != 0).any(-1, keepdim=True)  # the token that leaves the window next is not carried
                    torch.testing.assert_close(half, all_heads[:, mine] * shown, atol=1e-5, rtol=1e-5)


def one_process_to_ranks(r: Ranks) -> None:
    """Written by one process, read by these ranks, in the order of heads that each of them has."""
    one = r.one("llama")
    alone, ids = r.prefilled(one)
    store = f"file://{r.folder / 'from_one'}"
    if r.rank == 0:
        publish(alone, store, "prompt", tokens=ids, model=one)
    distributed.barrier()
    want = r.more(one, alone, ids)
    placement = place_heads(r.profile(), r.size)
    config = copy.deepcopy(CONFIGS["llama"])
    placed = r.shards("llama", placement.apply_to_state_dict(one.state_dict(), config), config)
    for model in (r.shards("llama"), placed):
        found = fetch(store, "prompt", model)
        assert torch.equal(model.generate(**found.inputs, past_key_values=found.cache, **GREEDY), want)
    # and back: published by the relabelled ranks, read by one process and by ranks in the original order
    cache, ids = r.prefilled(placed)
    publish(cache, store, "placed", tokens=ids, model=placed)
    for model in (one, r.shards("llama")):
        found = fetch(store, "placed", model)
        assert torch.equal(model.generate(**found.inputs, past_key_values=found.cache, **GREEDY), want)


def stores_of_servers(r: Ranks) -> None:
    """Valkey and Mooncake, where they run (REDKNOT_TEST_STORES): ranks publish, ranks and one process fetch."""
    model, one = r.shards("llama"), r.one("llama")
    for i, (url, options) in enumerate(json.loads(os.environ.get("REDKNOT_TEST_STORES", "[]"))):
        with SegmentStore(url, **options) as store:
            cache, ids = r.prefilled(model)
            publish(cache, store, f"world-{r.size}-{i}", tokens=ids, model=model)
            want = r.more(model, cache, ids)
            for reader in (model, one):
                found = fetch(store, f"world-{r.size}-{i}", reader)
                text = reader.generate(**found.inputs, past_key_values=found.cache, **GREEDY)
                assert torch.equal(text, want), url
            distributed.barrier()
            if r.rank == 0:
                assert unpublish(store, f"world-{r.size}-{i}")


def segments(r: Ranks) -> None:
    """Documents computed by one process are found by these ranks and the other way round; the same prompts come out."""
    model, one = r.shards("qwen3"), r.one("qwen3")
    profile = r.profile("qwen3")
    folder = r.folder / f"segments-{r.size}"
    generator = torch.Generator().manual_seed(11)
    first, second, third = (torch.randint(2, 96, (n,), generator=generator).tolist() for n in (50, 40, 30))
    header, query = [1, 5, 9], [7, 8, 9, 10]
    options = dict(header=header, prefill="full")
    alone = WorldPrompt(one, None, f"file://{folder}", profile, **options)
    if r.rank == 0:
        alone.add_many([first, second])
    distributed.barrier()
    together = WorldPrompt(model, None, f"file://{folder}", profile, **options)

    def text(prompt, recompute, selector, documents):
        built = prompt.build(documents, query, recompute, selector)
        return prompt.model.generate(**built, **GREEDY), built.account

    want, account = text(alone, 0.2, "boundary", [second, first])
    got, mine = text(together, 0.2, "boundary", [second, first])
    assert torch.equal(got, want)
    assert all(segment.hit for segment in mine.segments), mine
    assert mine.recomputed == account.recomputed > 0 and not mine.exact
    # the same rows on all ranks, whatever a rank's heads say
    for selector in ("blend", "kv_deviation", "query_attention"):
        got, mine = text(together, 0.2, selector, [second, first])
        everyone = [torch.empty_like(got) for _ in range(r.size)]
        distributed.all_gather(everyone, got)
        assert all(torch.equal(each, got) for each in everyone), selector
    assert torch.equal(
        text(together, 1.0, "boundary", [second, first])[0], text(alone, 1.0, "boundary", [second, first])[0]
    )
    # several prompts at once: one selector for all ranks there, too
    for selector in ("boundary", "kv_deviation"):
        built = together.build_many([[second, first], [first]], [query, query], 0.2, selector)
        got = model.generate(**built, **GREEDY)
        everyone = [torch.empty_like(got) for _ in range(r.size)]
        distributed.all_gather(everyone, got)
        assert all(torch.equal(each, got) for each in everyone), selector
    # computed by the ranks, found by one process; and without one rank's heads all of them compute it anew
    got, mine = text(together, 0.2, "boundary", [third])
    assert not mine.segments[-1].hit
    distributed.barrier()
    again, account = text(alone, 0.2, "boundary", [third])
    assert account.segments[-1].hit and torch.equal(again, got)
    distributed.barrier()
    if r.rank == r.size - 1:
        names = together.store._names(together._key(third, header))
        assert together.store.inner.delete(names[-1])
    distributed.barrier()
    got, mine = text(together, 0.2, "boundary", [third])
    assert not mine.segments[-1].hit and torch.equal(again, got)


def segments_in_int8_behind_contexts(r: Ranks) -> None:
    """Scales go with their heads: rows kept in int8 and means over contexts are the same for ranks and for one process."""
    model, one = r.shards("qwen3"), r.one("qwen3")
    folder = r.folder / f"int8-{r.size}"
    generator = torch.Generator().manual_seed(12)
    first, second, sample = (torch.randint(2, 96, (n,), generator=generator).tolist() for n in (50, 40, 20))
    options = dict(header=[1, 5, 9], prefill="full", kv_dtype="int8", contexts=[sample])
    makers = [WorldPrompt(m, None, f"file://{folder}", r.profile("qwen3"), **options) for m in (one, model)]
    if r.rank == 0:
        makers[0].add_many([first, second])
    distributed.barrier()
    found = []
    for maker in makers:
        built = maker.build([second, first], [7, 8, 9, 10], 0.2, "boundary")
        assert all(segment.hit for segment in built.account.segments) and "int8" in built.account.reason
        found.append(maker.model.generate(**built, **GREEDY))
    assert torch.equal(*found)
    # a file holds one head: nobody may take it for the entry
    names = makers[1].store._names(makers[1]._register(first))
    parts = makers[1].store.inner.get_many(names)
    (joined,) = makers[1].store.get_many([makers[1]._register(first)])
    assert all(part.source is not None for part in parts) and joined.source is None
    assert joined.tensors["s.0"].shape[1] == len(names) == 4 // r.size


def a_rank_without_its_heads(r: Ranks) -> None:
    """One rank cannot have its heads: all of them say so, none goes on."""
    model = r.shards("llama")
    cache, ids = r.prefilled(model)
    publish(cache, f"file://{r.folder / 'torn'}", "prompt", tokens=ids)
    last = r.size - 1
    with SegmentStore(f"file://{r.folder / 'torn'}") as store:
        if r.rank == last:
            load, calls = store._load_many, []
            store._load_many = lambda names: (
                load(names) if not calls.append(1) and len(calls) < 3 else [None] * len(names)
            )
        try:
            fetch(store, "prompt", model)
        except CacheMissing as error:
            assert f"rank {last}" in str(error), error
        else:
            raise AssertionError("went on without the others")
    # a writer that does not hold what the others hold is noticed, too
    odd, ids = r.prefilled(model)
    if r.rank == last:
        odd.seen -= 1
        for layer in odd.paged_layers:
            layer.seen -= 1
    try:
        publish(odd, f"file://{r.folder / 'torn'}", "odd")
    except (CacheError, RedKnotError) as error:
        assert "rank" in str(error), error
    else:
        raise AssertionError("ranks with different tokens published together")


CHECKS = {
    **{f"same text {name}": same_text(name) for name in CONFIGS},
    "the rank matters": the_rank_matters,
    "modes": modes,
    "does not divide": profiles_that_do_not_divide,
    "relabelled while loading": relabelled_while_loading,
    "relabelled on disk": relabelled_on_disk,
    "memory adds up": memory_adds_up,
    "files of one rank": files_of_one_rank,
    "files of the world": files_of_the_world,
    "one process to ranks": one_process_to_ranks,
    "stores of servers": stores_of_servers,
    "segments": segments,
    "segments in int8 behind contexts": segments_in_int8_behind_contexts,
    "a rank without its heads": a_rank_without_its_heads,
}


def main() -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    wanted = sys.argv[2:] or list(CHECKS)
    distributed.init_process_group("gloo", timeout=timedelta(seconds=60))
    ranks = Ranks(folder)
    found = {}
    for name in wanted:
        try:
            CHECKS[name](ranks)
            found[name] = ""
        except Exception:
            found[name] = traceback.format_exc()
        (folder / f"results-{ranks.rank}.json").write_text(json.dumps(found))
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
