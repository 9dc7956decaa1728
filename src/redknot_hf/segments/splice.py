"""One forward of the unchanged model over some rows of a prompt, the other rows taken from storage.

`SpliceCache` looks like any cache to the model. Its layers are linear: slot and position are the same. A layer's
``update`` stages the rows' new keys and values; the attention function comes back through `SpliceLayer.attend`, which
overwrites the rows' slots and then lets every row attend by position. Rows that are not computed cost nothing in any
layer.

`narrow_rows` drops rows on the way: some layers run over more rows than the later ones. It hooks the decoder's layers
for the time of one forward and knows them only as modules that take hidden states first.

What this module does not know: where stored keys come from, which rows are worth computing (`select`), prompts
(`prompt`).
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from ..attention import HANDLE, NAME
from ..cache import RedKnotCache
from ..errors import CacheError, RedKnotError, UnsupportedModel
from ..layer import Handle, RedKnotLayer, Step, effective_window
from ..masks import CacheLength, RedKnotMask
from ..paging.pages import KEEP_ALL
from ..paging.torch_attention import AttentionSpec
from .rows import PAGE, RowSet, attend_rows, kinds

__all__ = [
    "KeysComplete",
    "Layout",
    "Observer",
    "SpliceCache",
    "SpliceLayer",
    "decoder_layers",
    "forward_rows",
    "narrow_rows",
]


class Layout(NamedTuple):
    """Where a prompt's parts are: the first position of each segment, and that of the query."""

    starts: tuple[int, ...]
    query: int


class Observer:
    """Looks on while rows are computed; both methods do nothing unless overridden.

    Attributes:
        compares: `rows` reads what is stored at the rows that are about to be replaced.
    """

    compares = False

    def rows(self, layer: SpliceLayer, rows: RowSet, k: torch.Tensor, v: torch.Tensor) -> None:
        """Called before the new keys and values ``[batch, kv_heads, n, dim]`` of the rows replace what is stored."""

    def queries(self, layer: SpliceLayer, rows: RowSet, q: torch.Tensor, spec: AttentionSpec) -> torch.Tensor | None:
        """Called with the queries ``[batch, q_heads, n, dim]`` when the storage is ready to be attended over.

        Returns:
            The result of attention ``[batch, n, q_heads, dim]`` if the observer has computed it anyway, else None.
        """
        return None


class Brings(Protocol):
    """What fills layers from storage."""

    def __call__(self, layer: SpliceLayer, rows: RowSet) -> None:
        """Called before a layer's rows overwrite and attend: brings what they will read."""

    def forget(self, index: int) -> None:
        """The layer ``index`` has lost what was brought."""


class KeysComplete(Exception):
    """Ends a forward that has stored the keys and values that it was run for: nobody reads what would follow."""


class SpliceLayer(CacheLayerMixin):
    """Linear storage of one attention layer: the key of position p is in slot p.

    Attributes:
        k, v: ``[batch, kv_heads, slots, dim]``, zero where nothing is stored; None before the first use.
        in_place: they are views of the target's pages, which therefore need no copy in the end.
        borrowed: they are memory that other layers use, too (`SpliceCache.borrowing`).
        sink, window: int ``[kv_heads]``, the rule of each head in this forward.
    """

    is_compileable = False
    supports_early_init = False

    def __init__(self, cache: SpliceCache, index: int, model_window: int | None):
        super().__init__()
        # A circle would keep the target's pages and the stored rows on the GPU until the garbage collector comes by.
        self._cache = weakref.ref(cache)
        self.index, self.model_window = index, model_window
        self.is_sliding = model_window is not None
        self.in_place = self.borrowed = False
        self._kinds: list[tuple[int, int, np.ndarray]] | None = None
        self.k: torch.Tensor | None = None
        self.v: torch.Tensor | None = None

    @property
    def cache(self) -> SpliceCache:
        cache = self._cache()
        assert cache is not None
        return cache

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Take heads, dims, dtype and device from keys and values ``[batch, kv_heads, n, dim]``."""
        batch, heads = self.cache.batch, key_states.shape[1]
        self._geometry(heads)
        lent = self.cache.lend(self, key_states, value_states)
        self.borrowed = lent is not None
        views = lent or self._pages_of_target(key_states, value_states)
        self.in_place = views is not None and not self.borrowed
        if views is None:
            views = (
                key_states.new_zeros(batch, heads, self.cache.slots, key_states.shape[3]),
                value_states.new_zeros(batch, heads, self.cache.slots, value_states.shape[3]),
            )
        self.k, self.v = views
        self.is_initialized = True

    @property
    def keeps_everything(self) -> bool:
        """Whether no head of the layer evicts."""
        return self.model_window is None and bool((self.window >= KEEP_ALL).all())

    def _pages_of_target(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        step = self.cache.room(k.device)
        if step is None or not self.keeps_everything:
            return None
        layer = self.cache.target.paged_layers[self.index]
        views = layer.lay_out(k, v, step)
        if views is None:
            return None
        slots = views[0].shape[2]
        readable = k.device.type == "cpu" or (slots % PAGE == 0 and all(x.is_contiguous() for x in views))
        if slots < self.cache.length or not readable:
            assert layer.pages is not None  # lay_out made them
            layer.pages.free()
            return None
        return views

    def give_back(self) -> None:
        """Be empty again, if the memory is borrowed."""
        if self.borrowed:
            self.reset()
            if self.cache.loader is not None:
                self.cache.loader.forget(self.index)

    def _leave_pages(self) -> None:
        """The layer turns out to have a window: its storage becomes its own."""
        if self.borrowed:
            assert self.k is not None and self.v is not None
            self.k, self.v, self.borrowed = self.k.clone(), self.v.clone(), False
        if self.in_place:
            assert self.k is not None and self.v is not None
            self.k, self.v, self.in_place = self.k.clone(), self.v.clone(), False
            target = self.cache.target.paged_layers[self.index]
            assert target.pages is not None
            target.pages.free()
            target.pages, target.kernel = None, None

    def _geometry(self, heads: int) -> None:
        self._kinds = None
        target = self.cache.target
        if target.prefill == "full":
            sink, window = np.zeros(heads, np.int64), np.full(heads, KEEP_ALL, np.int64)
            self.sink, self.window, self.extra_window = effective_window(sink, window, self.model_window)
        else:
            self.sink, self.window, self.extra_window = target.geometry(self.index, heads, self.model_window)

    @property
    def kinds(self) -> list[tuple[int, int, np.ndarray]]:
        """(sink, window, heads) of heads under one rule."""
        if self._kinds is None:
            self._kinds = kinds(self.sink, self.window)
        return self._kinds

    def fill(self, k: torch.Tensor, v: torch.Tensor, positions: torch.Tensor | slice) -> None:
        """Store keys (rotated for their positions) and values ``[batch, kv_heads, n, dim]`` computed elsewhere."""
        if not self.is_initialized:
            self.lazy_initialization(k, v)
        assert self.k is not None and self.v is not None
        self.k[:, :, positions] = k
        self.v[:, :, positions] = v

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stage the rows' keys (after RoPE) and values; the attention function stores them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        rows = self.cache.rows
        if rows is None or key_states.shape[2] != len(rows) or key_states.shape[0] != self.cache.batch:
            raise CacheError(
                f"layer {self.index} is fed {key_states.shape[2]} tokens of {key_states.shape[0]} rows, announced were "
                f"{0 if rows is None else len(rows)} of {self.cache.batch}: only forward_rows() drives a SpliceCache"
            )
        keys, values = key_states.detach(), value_states.detach()
        setattr(keys, HANDLE, Handle(self, None, keys, values))  # type: ignore[arg-type]
        self.cache.staged += 1
        return keys, values

    def attend(
        self,
        handle: Handle,
        query: torch.Tensor,
        mask: Any,
        scale: float,
        sliding_window: int | None,
        softcap: float | None,
        s_aux: torch.Tensor | None,
    ) -> torch.Tensor:
        """Overwrite the rows' slots, then attend: ``[batch, q_heads, n, dim]`` -> ``[batch, n, q_heads, dim]``."""
        if handle.stored:
            raise UnsupportedModel(f"layer {self.index}: several attention calls share one chunk of keys: no splicing")
        if mask is not None and not (isinstance(mask, RedKnotMask) and mask.is_causal):
            raise UnsupportedModel(
                f"layer {self.index} attends with a mask that is not causal (chunks, images, a prefix): its rows "
                "cannot be computed apart"
            )
        if sliding_window is not None and sliding_window != self.model_window:
            self.model_window = sliding_window
            self._leave_pages()
            self._geometry(query.shape[1] if self.k is None else self.k.shape[1])
        rows = self.cache.rows
        assert rows is not None and self.k is not None and self.v is not None
        query, k, v = query.detach(), handle.k, handle.v
        assert k is not None and v is not None
        spec = AttentionSpec(scale, softcap or 0.0, s_aux, self.extra_window)
        if self.cache.loader is not None:
            self.cache.loader(self, rows)
        if self.cache.observer is not None:
            self.cache.observer.rows(self, rows, k, v)
        self._overwrite(rows, k, v)
        handle.release()
        self.cache.consumed += 1
        out = None
        if self.cache.observer is not None:
            out = self.cache.observer.queries(self, rows, query, spec)
        if self.index == len(self.cache.layers) - 1:
            raise KeysComplete
        if out is not None:
            return out
        return attend_rows(query, rows, self.k, self.v, self.sink, self.window, spec)

    def _overwrite(self, rows: RowSet, k: torch.Tensor, v: torch.Tensor) -> None:
        for store, new in ((self.k, k), (self.v, v)):
            assert store is not None
            if rows.contiguous and rows.partial is None:
                first = int(rows.host[0])
                store[:, :, first : first + len(rows)] = new
            elif rows.partial is None:
                store.index_copy_(2, rows.positions, new.to(store.dtype))
            else:
                some = new.index_select(2, rows.whole).to(store.dtype)
                store.index_copy_(2, rows.positions[rows.whole], some)
                for head in np.flatnonzero(self.cache.partial_heads[self.index]):
                    store[:, head].index_copy_(1, rows.positions, new[:, head].to(store.dtype))

    def release(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Keys and values, given away: the layer holds nothing afterwards. None if they are in the target's pages."""
        assert self.k is not None and self.v is not None
        k, v, self.k, self.v = self.k, self.v, None, None
        self.is_initialized = False
        return None if self.in_place else (k, v)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return CacheLength.of(self.cache.length, False), 0

    def get_seq_length(self) -> int:
        rows = self.cache.rows
        return 0 if rows is None or not len(rows) else int(rows.host[0])

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length

    def reset(self) -> None:
        self.k, self.v, self.is_initialized, self.borrowed = None, None, False, False

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        raise CacheError("a SpliceCache builds one prompt; reorder the RedKnotCache it was handed over to")


class SpliceCache(Cache):
    """What the model sees as its cache while a prompt is put together.

    Args:
        target: the (empty) cache that the result goes to: it decides layers, head rules and the prefill mode.
        length: tokens of the prompt.
        batch: prompts of equal layout.
        in_place: fill the target's pages directly where its heads keep everything; `hand_over` must follow.

    Attributes:
        rows: the rows of the running forward.
        observer: who looks on, or None.
        partial_heads: bool ``[layers][kv_heads]``, the heads that take the new keys of partial rows: at first those
            that the profile does not call local.
        loader: brings what rows will read.
        layout: the prompt's parts, known while its last forward runs: only that one may leave out FFN rows.
        skipped: FFN rows that `SparseFFN` left out.

    Raises:
        UnsupportedModel: the model has layers that are not plain attention, or layers sharing keys.
    """

    def __init__(self, target: RedKnotCache, length: int, batch: int = 1, in_place: bool = False):
        if target.defers:
            raise UnsupportedModel(f"{type(target.config).__name__}: layers that share keys cannot be spliced")
        odd = [i for i, layer in enumerate(target.layers) if not isinstance(layer, RedKnotLayer)]
        if odd:
            raise UnsupportedModel(
                f"{type(target.config).__name__}: layer {odd[0]} is a {type(target.layers[odd[0]]).__name__}; only "
                "layers of plain attention can be spliced, because the state of others depends on everything before"
            )
        self.target, self.length, self.batch = target, length, batch
        self.slots = -(-max(length, 1) // PAGE) * PAGE
        self._in_place = in_place and length > 1
        self._room: dict[bool, Step] = {}
        self.rows: RowSet | None = None
        self.observer: Observer | None = None
        self.loader: Brings | None = None
        self._lent: dict[Any, tuple[torch.Tensor, torch.Tensor]] | None = None
        self.layout: Layout | None = None
        self.staged = self.consumed = self.skipped = 0
        classes = target.profile.head_class if target.profile is not None else [["global"] * 4096] * len(target.layers)
        self.partial_heads = [np.array([kind != "local" for kind in _share(row, target)]) for row in classes]
        super().__init__(layers=[SpliceLayer(self, layer.index, layer.model_window) for layer in target.paged_layers])

    def room(self, device: torch.device) -> Step | None:
        """What the target's pages are laid out for on ``device``; None if they are not to be filled directly.

        Kernels read whole pages of `PAGE` slots; what the prompt does not need of them is given back in the end.
        """
        if not self._in_place:
            return None
        whole = device.type != "cpu"
        if whole not in self._room:
            self._room[whole] = Step(0, self.slots if whole else self.length, self.batch)
            self._room[whole].resolve(None, np.zeros(self.batch, np.int64))
        return self._room[whole]

    @contextlib.contextmanager
    def borrowing(self) -> Iterator[None]:
        """While inside, layers that hold nothing share one layer's memory, and they hold nothing again afterwards.

        For a forward whose keys nobody reads later. A GPU copies stored rows twice in less time than the host takes to lay
        out the pages of every layer, which it can do while the GPU is busy with what follows. Elsewhere, and for layers
        that do not keep everything, nothing changes.
        """
        self._lent = {}
        try:
            yield
        finally:
            self._lent = None
            for layer in self.layers:
                layer.give_back()

    def lend(self, layer: SpliceLayer, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Memory for keys and values like ``k`` and ``v``, or None: the layer takes its own."""
        if self._lent is None or not _copies_cheaply(k.device) or self.loader is None or not layer.keeps_everything:
            return None
        like = (k.device, k.dtype, k.shape[1], k.shape[3], v.shape[3])
        if like not in self._lent:
            shape = (self.batch, k.shape[1], self.slots)
            self._lent[like] = (k.new_zeros(*shape, k.shape[3]), v.new_zeros(*shape, v.shape[3]))
        return self._lent[like]

    def hand_over(self, tokens: int) -> None:
        """Move the first ``tokens`` positions into the target; this cache is empty afterwards."""
        self.target.adopt(_given_away(self, tokens), tokens)


def _copies_cheaply(device: torch.device) -> bool:
    return device.type == "cuda"


def _share(row: list[str], target: RedKnotCache) -> list[str]:
    """Of a value per KV head those of this process's heads."""
    count = len(row) // target.tp_size
    return row[target.tp_rank * count : (target.tp_rank + 1) * count]


def _given_away(cache: SpliceCache, tokens: int) -> Iterator[tuple[torch.Tensor, torch.Tensor] | None]:
    for layer, target in zip(cache.layers, cache.target.paged_layers, strict=True):
        target.model_window = layer.model_window  # a family may show its window to attention only
        given = layer.release()
        yield None if given is None else (given[0][:, :, :tokens], given[1][:, :, :tokens])


@torch.no_grad()
def forward_rows(
    model: torch.nn.Module, cache: SpliceCache, ids: torch.Tensor, rows: RowSet, observer: Observer | None = None
) -> None:
    """Run the model's decoder over ``rows``: ``ids`` ``[batch, n]`` int64 are their tokens.

    No logits are computed, and in the last layer nothing behind the keys: no attention and no FFN.

    Raises:
        UnsupportedModel: the model does not attend through the registered attention function.
    """
    if not len(rows):
        return
    if cache.target.attention_implementation != NAME:
        raise RedKnotError(
            f"the model runs attn_implementation={cache.target.attention_implementation!r}; reuse needs '{NAME}': call "
            f"model.set_attn_implementation('{NAME}') or load the model with attn_implementation='{NAME}'"
        )
    cache.rows, cache.observer, cache.staged, cache.consumed = rows, observer, 0, 0
    try:
        with contextlib.suppress(KeysComplete):
            decoder_of(model)(
                input_ids=ids,
                position_ids=rows.positions.expand(ids.shape[0], -1),
                past_key_values=cache,
                use_cache=True,
            )
    finally:
        cache.rows, cache.observer = None, None
    if cache.consumed != cache.staged:
        raise UnsupportedModel(
            f"{type(model).__name__} does not pass its keys on to the registered attention function, so its prompts "
            "cannot be spliced"
        )


def decoder_of(model: torch.nn.Module) -> torch.nn.Module:
    """The model without its head on top."""
    getter: Any = getattr(model, "get_decoder", None)
    found = getter() if getter is not None else None
    return found if found is not None else model.base_model  # type: ignore[return-value]


def decoder_layers(model: torch.nn.Module, count: int) -> torch.nn.ModuleList:
    """The decoder's list of layers.

    Raises:
        UnsupportedModel: there is no list of ``count`` modules directly in the decoder.
    """
    for child in decoder_of(model).children():
        if isinstance(child, torch.nn.ModuleList) and len(child) >= count:
            return child
    raise UnsupportedModel(
        f"{type(model).__name__} has no list of {count} decoder layers, so the rows cannot change between layers: use "
        "a selector that needs no early layers, such as 'boundary' or 'query_attention', with one ratio for all layers"
    )


@contextlib.contextmanager
def narrow_rows(
    model: torch.nn.Module, cache: SpliceCache, at: dict[int, Callable[[RowSet], np.ndarray]]
) -> Iterator[None]:
    """While inside, a forward drops rows on entry to some layers.

    Args:
        at: layer index -> function that is given the rows so far and returns the (ascending) indices of those to keep.

    Everything that the decoder hands to its layers with one entry per row (hidden states, rotary tables, position ids)
    is reduced alike.
    """
    layers = decoder_layers(model, len(cache.layers))
    first: RowSet | None = None
    kept: np.ndarray | None = None

    def enter(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        nonlocal first, kept
        rows = cache.rows
        if rows is None or not any(x is cache for x in (*args, *kwargs.values())):
            return None  # another forward of the same model
        if first is None:
            first = rows
        mine = None
        if index in at:
            mine = at[index](rows)
            if len(mine) < len(rows):
                kept = mine if kept is None else kept[mine]
                cache.rows = rows.take(mine)
            else:
                mine = None
        if kept is None:
            return None
        everything = torch.from_numpy(kept).to(rows.device)
        some = torch.from_numpy(mine).to(rows.device) if mine is not None else None

        def of_state(x: torch.Tensor) -> torch.Tensor:  # comes from the layer before: has the rows that it ran on
            return x if some is None else x.index_select(1, some)

        length = len(first)
        if args:
            return (of_state(args[0]), *_gathered(args[1:], everything, length)), _gathered(kwargs, everything, length)
        state = kwargs["hidden_states"]
        kwargs = _gathered({k: v for k, v in kwargs.items() if k != "hidden_states"}, everything, length)
        return args, {"hidden_states": of_state(state), **kwargs}

    start = min(at, default=len(layers))
    hooks = [
        layer.register_forward_pre_hook(
            lambda module, args, kwargs, index=index: enter(index, args, kwargs), with_kwargs=True
        )
        for index, layer in enumerate(layers)
        if index >= start
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _gathered(value: Any, index: torch.Tensor, length: int) -> Any:
    """``value`` with every tensor that has one entry per row of the forward reduced to ``index``."""
    if type(value) is torch.Tensor:
        if value.dim() >= 2 and value.shape[1] == length:
            return value.index_select(1, index)
        return value.index_select(0, index) if value.dim() == 1 and value.shape[0] == length else value
    if isinstance(value, (tuple, list)):
        return type(value)(_gathered(item, index, length) for item in value)
    if type(value) is dict:
        return {key: _gathered(item, index, length) for key, item in value.items()}
    return value
