"""Prompts put together from documents that were computed once.

    prompt = SegmentedPrompt(model, tokenizer, "file:///var/cache/segments", header="You answer questions.")
    a, b = prompt.add(text_a), prompt.add(text_b)
    built = prompt.build([b, a], "Who wrote the second document?")
    out = model.generate(**built, max_new_tokens=64)
    print(built.account)

A build lays out header, segments and query, fetches the segments (computing and storing those that are missing),
rotates their keys to their places, lets a selector choose rows to recompute, runs the model once over these rows and
the query, and hands the result over to a `RedKnotCache` that lacks the prompt's last token, which `generate`
computes.

Reuse is approximate unless everything before a segment is what it was computed behind, or every row is recomputed. The
account says which.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch

from ..cache import RedKnotCache
from ..errors import RedKnotError, shorten
from ..heads import HeadProfile
from ..paging.frozen import kv_dtype_of
from .account import BuildAccount, Clock, SegmentAccount
from .batch import hand_over_batch, pad_left
from .capture import capture
from .checks import Checks
from .codec import CorruptEntry, SegmentEntry
from .contexts import capture_mean
from .entry import SegmentRows, in_int8, inspect, unpack
from .keys import SegmentKey, hash_fields, model_fingerprint
from .placing import Loader, Place
from .rope import Relocator
from .rows import RowSet
from .select import Choice, PromptView, Selector, choose, selector_of
from .splice import Layout, SpliceCache, forward_rows, narrow_rows
from .stores import SegmentStore
from .transfer import Upload

__all__ = ["DEFAULT_RATIO", "DEFAULT_SELECTOR", "SegmentedPrompt", "SplicedBatch", "SplicedPrompt"]

DEFAULT_RATIO = 0.15
DEFAULT_SELECTOR = "blend"
Tokens = str | Sequence[int] | torch.Tensor


class SplicedPrompt(dict[str, Any]):
    """What `model.generate(**prompt)` takes: input_ids, attention_mask, past_key_values.

    Attributes:
        account: what building it took; not passed to `generate`.
    """

    account: BuildAccount

    def __init__(self, items: dict[str, Any], account: BuildAccount):
        super().__init__(items)
        self.account = account


class SplicedBatch(dict[str, Any]):
    """What `model.generate(**batch)` takes: several prompts, padded on the left.

    Attributes:
        accounts: of each prompt what building it took; not passed to `generate`. Their seconds leave out what was done
            for all prompts together.
    """

    accounts: list[BuildAccount]

    def __init__(self, items: dict[str, Any], accounts: list[BuildAccount]):
        super().__init__(items)
        self.accounts = accounts


_Built = TypeVar("_Built", SplicedPrompt, SplicedBatch)


class _Options(NamedTuple):
    recompute: float | Sequence[float]
    selector: str | Selector
    relocate: bool


class _Spliced(NamedTuple):
    """A prompt whose last forward is done: ids ``[1, N]``, and its account once its times are complete."""

    cache: SpliceCache
    row: torch.Tensor
    account: Callable[[], BuildAccount]


class SegmentedPrompt:
    """Builds prompts from stored segments, for one model, header and profile.

    Args:
        model: a causal LM with ``attn_implementation="redknot"``.
        tokenizer: turns texts into ids; None if only ids are given. Segments and queries get no special tokens.
        store: a `SegmentStore` or the URL of one.
        profile: as for `RedKnotCache`. Its windows hold while documents are computed, too (see ``prefill``).
        header: what every prompt begins with, and what documents are computed behind: the system prompt, or at least
            the BOS token. A text gets the tokenizer's special tokens. None: the special tokens that the tokenizer
            puts in front of a text, if any; without any header reuse is visibly worse.
        contexts: a few texts like those that will stand between header and segment: samples of your documents, of a
            few hundred tokens each. Segments that do not come first are then kept as the mean of what they are behind
            each of these, which is nearer to what they are behind other documents. Costs a capture for each context
            and a second entry for each segment, and nothing in a build.
        prefill: ``"windowed"`` or ``"full"``, as for `RedKnotCache`. With "full" stored segments serve every profile.
        page_size, rollback: of the caches that are built.
        batch_tokens: tokens of one forward when documents are computed.
        kv_dtype: ``"int8"`` keeps the segments' entries in one byte per channel, with a scale for each row of each head:
            half of bfloat16's bytes to store, to read and to bring to a GPU, and reuse is never exact. The header stays as
            it is. Entries in int8 and others are never taken for each other.

    Raises:
        UnsupportedModel: the model's keys cannot be relocated, or its layers cannot be spliced; the message says why.
        RedKnotError: the model runs another attention implementation.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        store: SegmentStore | str,
        profile: HeadProfile | str | None = None,
        *,
        header: Tokens | None = None,
        contexts: Sequence[Tokens] = (),
        prefill: str = "windowed",
        page_size: int = 64,
        rollback: int = 0,
        batch_tokens: int = 16384,
        kv_dtype: torch.dtype | str | None = None,
    ):
        self.kv_dtype = kv_dtype_of(kv_dtype)
        if self.kv_dtype not in (None, torch.int8):
            raise RedKnotError(
                f"kv_dtype={shorten(kv_dtype)}: segments are kept in 'int8', or None for the model's dtype"
            )
        self.model, self.tokenizer = model, tokenizer
        self.store = store if isinstance(store, SegmentStore) else SegmentStore(store)
        self._options = dict(prefill=prefill, page_size=page_size, rollback=rollback)
        self.batch_tokens = batch_tokens
        first = RedKnotCache.for_model(model, profile, **self._options)
        self.profile = first.profile
        SpliceCache(first, 1)  # refuses models that cannot be spliced
        self.relocator = Relocator.from_model(model)
        self.header = self._header_ids(header)
        self.behind = (
            self.header
        )  # what documents are computed behind; something else makes reuse worse, as baselines do
        if isinstance(contexts, (str, torch.Tensor)):
            raise RedKnotError(f"contexts={shorten(contexts)}: expected a list of texts or of lists of token ids")
        self.contexts = [self._ids(context, "contexts") for context in contexts]
        if not all(self.contexts):
            raise RedKnotError("contexts: an empty text stands for nothing; leave it out")
        self.device = next(model.parameters()).device
        self._segments: dict[str, SegmentKey] = {}
        self._means: dict[str, SegmentKey] = {}  # by the id of a segment, what it is where it does not come first
        self._context_rows: list[SegmentRows] = []
        self._identity = dict(
            model=model_fingerprint(model),
            rope=self.relocator.signature,
            dtype=model.dtype,
            profile="" if prefill == "full" else _profile_id(self.profile),
        )
        # one token tells the shapes that every entry must have
        _, probe = next(capture(model, self.new_cache, None, [[0]]))
        inspect(probe, len(first.layers), 1, 0, model.dtype)
        (rows,) = unpack([probe], Upload([probe], self.device).finish())
        self._shapes = rows.shapes()

    def new_cache(self) -> RedKnotCache:
        """An empty cache as the builds hand out."""
        profile = self.profile if self.profile is not None else HeadProfile.all_global(self.model.config)
        return RedKnotCache.for_model(self.model, profile, **self._options)

    # ------------------------------------------------------------------------------------------------- segments
    def add(self, segment: Tokens) -> str:
        """Make sure that a segment is in the store; computes it if it is not.

        Args:
            segment: text, or token ids.

        Returns:
            Its id for `build`: 64 hex digits, the same in every process with the same model, header and profile.

        Raises:
            RedKnotError: no tokens.
        """
        return self.add_many([segment])[0]

    def add_many(self, segments: Sequence[Tokens]) -> list[str]:
        """`add` for many segments; those that are missing are computed in batches."""
        keys = [self._register(segment) for segment in segments]
        wanted = keys + [self._elsewhere(key) for key in keys]
        missing = {key.hex: key for key in wanted if not self.store.contains(key)}
        self._compute(list(missing.values()))
        return [key.hex for key in keys]

    def _elsewhere(self, key: SegmentKey) -> SegmentKey:
        """The entry of a segment that other segments stand before."""
        if not self.contexts:
            return key
        if key.hex not in self._means:
            packed = [np.asarray(ids, np.int64).tobytes() for ids in self.contexts]
            digest = hash_fields("redknot-hf/contexts/1", packed)
            self._means[key.hex] = dataclasses.replace(key, contexts=digest)
        return self._means[key.hex]

    def _register(self, segment: Tokens) -> SegmentKey:
        key = self._key(self._ids(segment, "segment"), self.behind, self.kv_dtype)
        self._segments[key.hex] = key
        return key

    def _key(self, ids: Sequence[int], header: Sequence[int], kv_dtype: torch.dtype | None = None) -> SegmentKey:
        return SegmentKey.of(token_ids=ids, header_ids=header, kv_dtype=kv_dtype, **self._identity)

    def _keep(self, key: SegmentKey, entry: SegmentEntry, entries: dict[str, SegmentEntry]) -> None:
        """Store what was computed, and use what is stored: a miss gives the bits of a hit."""
        entries[key.hex] = in_int8(entry) if key.quantised else entry
        self.store.put(key, entries[key.hex])

    def _ids(self, value: Tokens, name: str) -> list[int]:
        if isinstance(value, str):
            if self.tokenizer is None:
                raise RedKnotError(f"{name} is a text but tokenizer is None: pass token ids, or a tokenizer")
            return list(self.tokenizer(value, add_special_tokens=False)["input_ids"])
        if isinstance(value, torch.Tensor):
            if value.dim() == 2 and value.shape[0] == 1:
                value = value[0]
            if value.dim() != 1 or value.dtype.is_floating_point:
                raise RedKnotError(f"{name}: expected one row of ids, got {value.dtype} {list(value.shape)}")
            return value.tolist()
        if not isinstance(value, Sequence) or not all(isinstance(i, (int, np.integer)) for i in value):
            raise RedKnotError(
                f"{name}={shorten(value)}: expected a text, a list of token ids or a 1D tensor; several prompts at "
                "once: build_many"
            )
        return [int(i) for i in value]

    def _header_ids(self, header: Tokens | None) -> list[int]:
        if header is None:
            return [] if self.tokenizer is None else list(self.tokenizer("")["input_ids"])
        if isinstance(header, str) and self.tokenizer is not None:
            return list(self.tokenizer(header)["input_ids"])
        return self._ids(header, "header")

    # ------------------------------------------------------------------------------------------ computing, fetching
    def _compute(self, keys: list[SegmentKey]) -> dict[str, SegmentEntry]:
        """Compute and store segments; the header comes first, as the others need it."""
        entries: dict[str, SegmentEntry] = {}
        if not keys:
            return entries
        header = self._rows_of(self.behind, entries) if any(key.header_ids for key in keys) else None
        for behind in (False, True):
            batch = [key for key in keys if bool(key.header_ids) == behind and not key.contexts]
            batch = [key for key in batch if key.hex not in entries]
            documents = [key.token_ids for key in batch]
            rows = header if behind else None
            for i, entry in capture(self.model, self.new_cache, rows, documents, self.batch_tokens):
                self._keep(batch[i], entry, entries)
        batch = [key for key in keys if key.contexts]
        if batch:
            if not self._context_rows:
                self._context_rows = [self._rows_of([*self.behind, *context], entries) for context in self.contexts]
            documents = [key.token_ids for key in batch]
            means = capture_mean(
                self.model, self.new_cache, self.relocator, len(self.behind), self._context_rows, documents,
                self.batch_tokens,
            )  # fmt: skip
            for i, entry in means:
                self._keep(batch[i], entry, entries)
        return entries

    def _rows_of(self, ids: Sequence[int], entries: dict[str, SegmentEntry]) -> SegmentRows:
        """What documents are computed behind: from the store, or computed."""
        key = self._key(ids, ())
        found = self._fetch([key])[key.hex]
        if found is None:
            ((_, entry),) = capture(self.model, self.new_cache, None, [ids], self.batch_tokens)
            self.store.put(key, entry)
            entries[key.hex] = entry
            (found,) = unpack([entry], Upload([entry], self.device).finish())
        return found

    def _fetch(self, keys: Sequence[SegmentKey], checks: Checks | None = None) -> dict[str, SegmentRows | None]:
        """Rows of stored segments; None for what is missing, damaged or not ours.

        With ``checks`` the bytes of entries may not have been hashed yet, and ``checks`` knows what is left to do.
        """
        unique = {key.hex: key for key in keys}
        wanted = [key for name, key in unique.items() if checks is None or name not in checks.distrusted]
        usable = []
        for key, entry in zip(wanted, self.store.get_many(wanted, defer=checks is not None), strict=True):
            if entry is None:
                continue
            try:
                inspect(entry, self._shapes, len(key.token_ids), len(key.header_ids), self.model.dtype, key.quantised)
                usable.append((key, entry))
            except CorruptEntry as error:
                self.store.discard(
                    key, error, entry.tier
                )  # a store that nobody may write to keeps it, and stays in use
        entries = [entry for _, entry in usable]
        upload = Upload(entries, self.device)
        if checks is None:
            upload.finish()
        else:
            checks.start(usable, upload)
        found: dict[str, SegmentRows | None] = dict.fromkeys(unique)
        found.update(zip((key.hex for key, _ in usable), unpack(entries, upload), strict=True))
        return found

    # -------------------------------------------------------------------------------------------------------- build
    @torch.no_grad()
    def build(
        self,
        segments: Sequence[Tokens],
        query: Tokens = "",
        recompute: float | Sequence[float] = DEFAULT_RATIO,
        selector: str | Selector = DEFAULT_SELECTOR,
        *,
        relocate: bool = True,
    ) -> SplicedPrompt:
        """Put a prompt together.

        Args:
            segments: ids from `add`, or texts or token ids, in any order; the same one may appear twice.
            query: what follows the segments; always computed. May be empty.
            recompute: share of the segments' rows that is computed anew, 0 to 1, or one share per layer, never growing.
                At 1 the result equals a full prefill.
            selector: "boundary", "kv_deviation", "query_attention", "blend", an object from `select`, or a callable
                that takes a `PromptView`.
            relocate: False keeps the keys rotated for where they were computed. Wrong; measured as a baseline.

        Returns:
            A dict for ``model.generate(**built)`` with the attribute ``account``.

        Raises:
            RedKnotError: an unknown segment id, a ratio out of range, an empty prompt.
        """
        options = _Options(recompute, selector, relocate)
        clock = Clock(self.device)

        def once(checks: Checks, missed: set[str]) -> SplicedPrompt:
            spliced = self._splice(segments, query, options, checks, missed, clock, True)
            spliced.cache.hand_over(spliced.row.shape[1] - 1)
            clock.mark("hand_over")
            checks.wait()
            clock.mark("verify")
            return SplicedPrompt(_for_generate(spliced.row, None, spliced.cache.target), spliced.account())

        return self._until_sound(once)

    @torch.no_grad()
    def build_many(
        self,
        segments: Sequence[Sequence[Tokens]],
        queries: Sequence[Tokens],
        recompute: float | Sequence[float] = DEFAULT_RATIO,
        selector: str | Selector = DEFAULT_SELECTOR,
        *,
        relocate: bool = True,
    ) -> SplicedBatch:
        """Put several prompts together, for one call of ``generate``.

        Every prompt is computed as `build` does, one after the other; then they become the rows of one cache, padded
        on the left. Until then each holds its keys and values, so this takes twice the memory of the result.

        Args:
            segments: the segments of each prompt.
            queries: the query of each prompt.

        Returns:
            A dict for ``model.generate(**built)`` with the attribute ``accounts``.

        Raises:
            RedKnotError: as `build`; no prompts, or another number of queries than prompts.
        """
        if isinstance(queries, str) or not len(segments) or len(segments) != len(queries):
            raise RedKnotError(
                f"build_many: {len(segments)} lists of segments and queries={shorten(queries)}: expected at least one "
                "prompt and a query for each"
            )
        if any(isinstance(mine, (str, torch.Tensor)) for mine in segments):
            raise RedKnotError("build_many: segments: expected a list of segments for each prompt")
        options = _Options(recompute, selector, relocate)
        clocks = [Clock(self.device) for _ in segments]

        def once(checks: Checks, missed: set[str]) -> SplicedBatch:
            parts = []
            for mine, query, clock in zip(segments, queries, clocks, strict=True):
                clock.begin()
                parts.append(self._splice(mine, query, options, checks, missed, clock, False))
            target = self.new_cache()
            counts = hand_over_batch([part.cache for part in parts], target)
            checks.wait()
            rows = [part.row for part in parts]
            items = _for_generate(pad_left(rows, self._padding_id()), counts + 1, target)
            return SplicedBatch(items, [part.account() for part in parts])

        return self._until_sound(once)

    def _padding_id(self) -> int:
        found = getattr(self.tokenizer, "pad_token_id", None)
        return self.header[0] if found is None and self.header else found or 0

    def _until_sound(self, once: Callable[[Checks, set[str]], _Built]) -> _Built:
        """What ``once`` builds; a second time only if an entry turns out damaged after it has been used."""
        missed: set[str] = set()
        with Checks() as checks:
            while True:
                built = once(checks, missed)
                damaged = checks.failures()
                if not damaged:
                    return built
                for key, tier, error in damaged:
                    self.store.discard(key, error, tier)

    def _splice(
        self,
        segments: Sequence[Tokens],
        query: Tokens,
        options: _Options,
        checks: Checks,
        missed: set[str],
        clock: Clock,
        in_place: bool,
    ) -> _Spliced:
        """Everything of a build up to the last forward. ``in_place``: the result is in the target's pages already."""
        recompute, selector, relocate = options
        head = [self._key(self.header, ())] if self.header else []
        resolved = [self._resolve(segment) for segment in segments]
        keys = [*head, *resolved[:1], *map(self._elsewhere, resolved[1:])]
        names = [key.hex for key in (*head, *resolved)]
        query_ids = self._ids(query, "query")
        ids = torch.from_numpy(np.concatenate([*(key.ids for key in keys), np.array(query_ids, np.int64)]))
        length = len(ids)
        if not length:
            raise RedKnotError("the prompt is empty: give segments, a query or a header")
        ratios = self._ratios(recompute)

        row = ids[None].to(self.device)  # a small copy that would wait behind the gigabytes of an upload
        found = self._fetch(keys, checks)
        clock.mark("store")
        missing = [key for key in {key.hex: key for key in keys}.values() if found[key.hex] is None]
        missed.update(key.hex for key in missing)
        hits = found.keys() - missed
        for name, entry in self._compute(missing).items():
            (found[name],) = unpack([entry], Upload([entry], self.device).finish())
        for name in missed & found.keys():  # by an earlier attempt, too, which has stored it
            found[name].tier = "computed"  # type: ignore[union-attr]
        clock.mark("capture")

        places, at = [], 0
        for key in keys:
            places.append(Place(at, found[key.hex]))  # type: ignore[arg-type]
            at += len(key.token_ids)
        settled = [self._is_exact(index, keys, places) and relocate for index in range(len(keys))]
        exact = [right and not key.quantised for right, key in zip(settled, keys, strict=True)]
        target = self.new_cache()
        cache = SpliceCache(target, length, in_place=in_place)
        loader = Loader(cache, places, self.relocator, relocate, self.model.dtype)
        # rows that are rounded and nothing else are recomputed where everything is: others gain more
        view = self._view(cache, ids, row, places, exact if ratios[-1] == 1 else settled, at, ratios)

        self._run_dense_heads(view)
        chosen = Choice(np.zeros(0, np.int64), np.zeros(length, bool))
        if view.budget == len(view.eligible) and ratios[-1] == ratios[0] and not callable(selector):
            chosen = Choice(view.eligible, chosen.partial)
            selector_of(selector)
        elif view.budget:
            chosen = choose(view, selector_of(selector)(view))
        if chosen.heads is not None:
            cache.partial_heads = list(chosen.heads)
        clock.mark("select")

        self._recompute(view, chosen, ratios)
        loader.finish()
        clock.mark("recompute")

        was_hit = [key.hex in hits for key in keys]
        account = functools.partial(
            self._account, view, chosen, names, places, exact, was_hit, ratios, selector, relocate, loader, clock
        )
        return _Spliced(cache, row, account)

    def _resolve(self, segment: Tokens) -> SegmentKey:
        if isinstance(segment, str):
            if segment in self._segments:
                return self._segments[segment]
            if len(segment) == 64 and all(c in "0123456789abcdef" for c in segment):
                raise RedKnotError(
                    f"segments: {segment[:12]}... was not added to this SegmentedPrompt; ids hold no tokens, so call "
                    "add(text) first (it costs nothing if the store has the segment)"
                )
        return self._register(segment)

    def _ratios(self, recompute: float | Sequence[float]) -> list[float]:
        layers = len(self._shapes)
        ratios = [recompute] * layers if isinstance(recompute, (int, float)) else list(recompute)
        falling = all(a >= b for a, b in itertools.pairwise(ratios))
        if len(ratios) != layers or not falling or not all(0 <= r <= 1 for r in ratios):
            raise RedKnotError(
                f"recompute={shorten(recompute)}: expected a share from 0 to 1, or {layers} of them, one per layer, "
                "that never grow"
            )
        return [float(r) for r in ratios]

    @staticmethod
    def _is_exact(index: int, keys: list[SegmentKey], places: list[Place]) -> bool:
        """Whether a segment stands where and behind what it was computed."""
        if places[index].start != places[index].rows.start or keys[index].contexts:
            return False
        return keys[index].header_ids == tuple(i for key in keys[:index] for i in key.token_ids)

    def _view(
        self,
        cache: SpliceCache,
        ids: torch.Tensor,
        row: torch.Tensor,
        places: list[Place],
        exact: list[bool],
        at: int,
        ratios: list[float],
    ) -> PromptView:
        end = len(ids) - 1
        spans = [(place.start, place.stop) for place in places]
        reused = [np.arange(a, min(b, end)) for (a, b), right in zip(spans, exact, strict=True) if not right]
        eligible = np.concatenate(reused) if reused else np.zeros(0, np.int64)
        documents = spans[1:] if self.header else spans
        rows = sum(b - a for a, b in documents)
        budget = min(len(eligible), int(np.ceil(ratios[0] * rows)))
        if ratios[0] == 1:
            budget = len(eligible)
        return PromptView(self.model, cache, ids, row, documents, eligible, np.arange(at, len(ids)), budget)

    def _run_dense_heads(self, view: PromptView) -> None:
        """Heads of class "dense" are never reused: their layers, and all before them, run over every row."""
        if self.profile is None or not len(view.eligible):
            return
        dense = [i for i, row in enumerate(self.profile.head_class) if "dense" in row]
        if dense:
            view.run_early_layers(dense[-1])

    def _recompute(self, view: PromptView, chosen: Choice, ratios: list[float]) -> None:
        """The one forward: chosen rows and query."""
        end = view.length - 1
        query = view.query[view.query < end]
        positions = np.union1d(chosen.ranked, query)
        partial = chosen.partial[positions] & np.isin(positions, chosen.ranked)
        rows = RowSet(positions, self.device, partial)
        ids = view.row[:, rows.positions]
        asks = int(view.query[0]) if len(view.query) else end
        view.cache.layout = Layout(tuple(start for start, _ in view.spans), asks)
        at: dict[int, Callable[[RowSet], np.ndarray]] = {}
        for layer in range(1, len(ratios)):
            if ratios[layer] < ratios[layer - 1]:
                count = round(len(chosen.ranked) * ratios[layer] / ratios[0])
                stay = np.union1d(chosen.ranked[:count], query)
                at[layer] = functools.partial(_staying, stay)
                if not len(stay):
                    raise RedKnotError("recompute: a schedule that falls to 0 needs a query of at least two tokens")
        if at:
            with narrow_rows(self.model, view.cache, at):
                forward_rows(self.model, view.cache, ids, rows)
        else:
            forward_rows(self.model, view.cache, ids, rows)

    def _account(
        self,
        view: PromptView,
        chosen: Choice,
        names: list[str],
        places: list[Place],
        exact: list[bool],
        hits: list[bool],
        ratios: list[float],
        selector: str | Selector,
        relocate: bool,
        loader: Loader,
        clock: Clock,
    ) -> BuildAccount:
        segments = [
            SegmentAccount(
                id=name,
                start=place.start,
                tokens=len(place.rows),
                hit=hit,
                tier=place.rows.tier,
                recomputed=int(((chosen.ranked >= place.start) & (chosen.ranked < place.stop)).sum()),
                exact=right,
                nbytes=place.rows.nbytes,
            )
            for name, hit, place, right in zip(names, hits, places, exact, strict=True)
        ]
        layers = len(ratios)
        flat = len(set(ratios)) == 1
        everything = len(chosen.ranked) == len(view.eligible) and not chosen.partial[chosen.ranked].any()
        rounded = sum(
            len(place.rows) - segment.recomputed
            for place, segment in zip(places, segments, strict=True)
            if place.rows.quantised
        )
        if not len(view.eligible):
            right, reason = True, "every reused row stands behind exactly what it was computed behind"
        elif everything and flat:
            right, reason = True, "every row that was reused inexactly has been recomputed"
        elif view.exact_through == layers - 1:
            right, reason = True, "dense heads made every layer run over every row"
        else:
            right = False
            stale = len(view.eligible) - len(chosen.ranked)
            reason = f"{stale} of {view.length} rows were computed without the segments before them"
            if chosen.partial[chosen.ranked].any():
                reason += "; of recomputed rows some heads keep what was stored"
            if not flat:
                reason += "; later layers recomputed fewer rows than earlier ones"
            if not relocate:
                reason += "; keys were not relocated"
        if rounded and view.exact_through < layers - 1:
            kept = f"{rounded} reused rows are kept in int8"
            right, reason = False, kept if right else f"{reason}; {kept}"
        if view.cache.skipped:
            right, reason = False, f"{reason}; a sparse FFN left out {view.cache.skipped} rows of FFNs"
        total = sum(len(place.rows) for place in places)
        name = selector if isinstance(selector, str) else getattr(selector, "__name__", repr(selector))
        return BuildAccount(
            segments=segments,
            tokens=view.length,
            query=len(view.query),
            reused=total - len(chosen.ranked),
            recomputed=len(chosen.ranked),
            early_layers=view.exact_through + 1,
            ratio=ratios[0] if flat else ratios,
            selector=name,
            exact=right,
            reason=reason,
            bytes_moved=loader.bytes_moved,
            timing=clock.reading(load=loader.seconds),
        )


def _for_generate(ids: torch.Tensor, counts: np.ndarray | None, cache: RedKnotCache) -> dict[str, Any]:
    """``counts`` int ``[batch]``: real tokens of each row, at its end; None: all."""
    mask = torch.ones_like(ids)
    if counts is not None:
        real = torch.from_numpy(counts).to(ids.device)
        mask = (torch.arange(ids.shape[1], device=ids.device) >= ids.shape[1] - real[:, None]).to(ids.dtype)
    return dict(input_ids=ids, attention_mask=mask, past_key_values=cache)


def _staying(stay: np.ndarray, rows: RowSet) -> np.ndarray:
    return np.flatnonzero(np.isin(rows.host, stay))


def _profile_id(profile: HeadProfile | None) -> str:
    """What of a profile decides the values of keys: the windows of its local heads. Empty when it has none."""
    if profile is None or not any("local" in row for row in profile.head_class):
        return ""
    cells = [
        [[s, w] if c == "local" else None for c, s, w in zip(*rows, strict=True)]
        for rows in zip(profile.head_class, profile.sink, profile.window, strict=True)
    ]
    return hashlib.blake2b(json.dumps(cells).encode(), digest_size=16, person=b"redknot-profile").hexdigest()
