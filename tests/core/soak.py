"""A long life of many caches: random requests, forks, crops, cancelled forwards, threads of reuse; nothing may be left behind.

`Soak(seed).run(requests)` keeps one cache alive for its page pool, serves every request from a fork of it or from a cache that
was reset, and compares each text with a cache made for that request alone.
"""

from __future__ import annotations

import functools
import gc
import os
import random

import torch
from core_models import SIZES
from transformers import AutoModelForCausalLM, LlamaConfig

from redknot_hf import HeadProfile, RedKnotCache

ROLLBACK = 6
LOGITS = 1e-5


class Cancelled(Exception):
    pass


@functools.cache
def model():
    torch.manual_seed(0)
    config = LlamaConfig(**{**SIZES, "num_hidden_layers": 2, "hidden_size": 48, "intermediate_size": 48})
    return AutoModelForCausalLM.from_config(config, attn_implementation="redknot").eval()


def resident() -> int:
    """Bytes of this process in memory."""
    gc.collect()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Soak:
    """Args: seed: decides everything."""

    def __init__(self, seed: int = 0):
        self.random, self.generator = random.Random(seed), torch.Generator().manual_seed(seed)
        self.profile = HeadProfile.uniform(model().config, sink=2, window=7, global_heads={(0, 1), (1, 0), (1, 2)})
        self.root = self._new()
        self.prefix = self._ids(1, 9)
        self._feed(self.root, self.prefix, None)
        self.pools = list(self.root._pools.values())
        self.recycled = self._new()
        self.served = dict.fromkeys(("whole", "cancelled", "stopped"), 0)
        self.sizes: list[int] = []

    def _new(self) -> RedKnotCache:
        return RedKnotCache(model().config, self.profile, page_size=4, rollback=ROLLBACK)

    def _ids(self, batch: int, count: int) -> torch.Tensor:
        return torch.randint(2, 97, (batch, count), generator=self.generator)

    @staticmethod
    @torch.no_grad()
    def _feed(cache: RedKnotCache, ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        position = None if mask is None else (mask.cumsum(1) - 1).clamp(0)[:, -ids.shape[1] :]
        return model()(ids, attention_mask=mask, position_ids=position, past_key_values=cache).logits[:, -1]

    def run(self, requests: int, report=None) -> None:
        """Serve the requests, then check that only the root's pages are held and that memory has not grown."""
        for number in range(requests):
            kind = self.random.choices(("fork", "recycled", "generate"), (5, 4, 1))[0]
            getattr(self, f"_{kind}")()
            if number % max(1, requests // 10) == 0:
                self.sizes.append(resident())
                if report is not None:
                    report(number, self.sizes[-1], sum(pool.num_pages for pool in self.pools))
        self.recycled.reset()
        gc.collect()
        held = sum(int((layer.pages.table > 0).sum()) for layer in self.root.paged_layers)
        assert sum(pool.num_pages - 1 - pool.num_free for pool in self.pools) == held, "pages leaked"
        self.root.reset()
        assert all(pool.num_free == pool.num_pages - 1 for pool in self.pools) and not self.root._pools
        self.sizes.append(resident())

    # ------------------------------------------------------------------------------------------- kinds of request
    def _fork(self) -> None:
        """A request behind a shared prefix, on a fork."""
        cache, alone = self.root.fork(), self._new()
        self._feed(alone, self.prefix, None)
        rows = self.random.randint(1, 3)
        if rows > 1:
            cache.batch_repeat_interleave(rows)
            alone.batch_repeat_interleave(rows)
        self._converse(cache, alone, rows, torch.ones(rows, self.prefix.shape[1], dtype=torch.long))

    def _recycled(self) -> None:
        """A padded batch on a cache that served others before."""
        self.recycled.reset()
        rows, width = self.random.randint(1, 3), self.random.randint(1, 40)
        ids, mask = self._ids(rows, width), torch.ones(rows, width, dtype=torch.long)
        for row in range(1, rows):
            mask[row, : self.random.randint(0, width - 1)] = 0
        alone = self._new()
        if self._cancelled(self.recycled, ids, mask):
            self.recycled.reset()
        torch.testing.assert_close(
            self._feed(self.recycled, ids, mask), self._feed(alone, ids, mask), atol=LOGITS, rtol=0
        )
        self._converse(self.recycled, alone, rows, mask)

    def _converse(self, cache: RedKnotCache, alone: RedKnotCache, rows: int, mask: torch.Tensor) -> None:
        """Chunks, single tokens, crops and row selections on both caches; perhaps a cancelled forward at the end."""
        room = 0
        for _ in range(self.random.randint(1, 6)):
            act = self.random.choice(("token", "token", "chunk", "crop", "select"))
            if act == "crop" and room:
                count = self.random.randint(1, min(room, ROLLBACK))
                cache.crop(-count), alone.crop(-count)
                mask, room = mask[:, :-count], 0
            elif act == "select":
                chosen = torch.tensor([self.random.randrange(rows) for _ in range(self.random.randint(1, 3))])
                cache.batch_select_indices(chosen), alone.reorder_cache(chosen)
                mask, rows = mask[chosen], len(chosen)
            else:
                count = 1 if act == "token" else self.random.randint(2, 9)
                ids = self._ids(rows, count)
                mask = torch.cat([mask, torch.ones(rows, count, dtype=torch.long)], 1)
                torch.testing.assert_close(
                    self._feed(cache, ids, mask), self._feed(alone, ids, mask), atol=LOGITS, rtol=0
                )
                room = count
        ids = self._ids(rows, 3)
        mask = torch.cat([mask, torch.ones(rows, 3, dtype=torch.long)], 1)
        if not self._cancelled(cache, ids, mask):
            self.served["whole"] += 1
        if self.random.random() < 0.5:
            cache.reset()  # else its pages return when it is dropped, or at the next reset

    def _cancelled(self, cache: RedKnotCache, ids: torch.Tensor, mask: torch.Tensor) -> bool:
        """Perhaps a forward in which some layer raises."""
        if self.random.random() > 0.2:
            return False

        def fail(*_: object) -> None:
            raise Cancelled

        layer = self.random.choice(model().model.layers)
        hook = self.random.choice((layer, layer.self_attn.o_proj, layer.mlp)).register_forward_pre_hook(fail)
        try:
            self._feed(cache, ids, mask)
        except Cancelled:
            self.served["cancelled"] += 1
            return True
        finally:
            hook.remove()
        raise AssertionError("the forward was not cancelled")

    def _generate(self) -> None:
        """generate() in one of its modes, perhaps stopped by an exception in a stopping criterion."""
        ids = self._ids(1, self.random.randint(2, 30))
        options = self.random.choice(({}, {"num_beams": 2}, {"do_sample": True}, {"prompt_lookup_num_tokens": 3}))
        texts = []
        for cache in (self.recycled, self._new()):
            cache.reset()
            torch.manual_seed(1)
            out = model().generate(
                ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=4, **options
            )
            texts.append(out)
        assert torch.equal(*texts)
        self.served["whole"] += 1
        if self.random.random() < 0.3:

            def stop(*_: object, **__: object) -> torch.Tensor:
                raise Cancelled

            self.recycled.reset()
            try:
                model().generate(ids, past_key_values=self.recycled, max_new_tokens=4, stopping_criteria=[stop])
            except Cancelled:
                self.served["stopped"] += 1
