"""RedKnotCache: per-head paged storage behind transformers' Cache interface.

The cache owns the page pools, counts the tokens of the whole model and does for all layers at once what concerns rows
(beams, selection, forks, crops). What one layer stores and how it attends is in `layer` and `paging`.
"""

from __future__ import annotations

import copy
import os
import threading
from typing import Any

import numpy as np
import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer, StaticCache

from . import compat
from .errors import CacheError, RedKnotError, UnsupportedModel
from .forwards import Forwards
from .heads import HeadProfile
from .heads.model_shape import text_config
from .layer import RedKnotLayer
from .memory import MemoryReport, report_on
from .paging.frozen import kv_dtype_of
from .paging.pool import PagePool, PoolCeiling
from .paging.tiers import NEAR_TOKENS, ColdTier, lost_tokens
from .pools import check_max_bytes
from .served import check_options, check_served, is_chunked, resolve_profile
from .static import StaticRedKnotLayer

FREEZE_TOKENS = 128  # a cache with kv_dtype quantises after this many tokens, or after an eighth more
RECORDING_ROLLBACK = 64  # ring slots that assisted decoding gets: more than any default number of drafted tokens


class RedKnotCache(Forwards, Cache):
    """A cache that keeps, for each KV head, the tokens that head needs.

    Args:
        config: the model's config; its text decoder decides the layers. Pass ``model.config`` itself, so that the cache
            sees which attention implementation runs.
        profile: a `HeadProfile`, or the path, Hub id or name of one. None: the profile shipped for this model if there
            is one, else all heads global (exact).
        prefill: ``"windowed"``: local heads see sink and window at once. ``"full"``: in the first forward every head
            sees the whole prompt and eviction follows; needs a prompt in one piece.
        page_size: tokens per page, a power of two from 1 to 1024. 16 to 256 differ by 2 % in speed; small ones round up
            less.
        max_cache_len: build the static form that holds up to this many tokens, for compiled decoding. None: grow.
        rollback: tokens that `crop` can take back from local heads after eviction.
        tp_rank, tp_size: which share of the KV heads this process holds. None: as the config of a model says that
            transformers has sharded (`tp_plan="auto"`); the profile is that of the whole model in every case.
        cold: what becomes of tokens that leave a local head's window: ``"drop"``, or kept in host memory (``"cpu"``)
            or in a mapped file (``"disk"``), so that `set_profile` can give heads longer windows and `crop` needs no
            rollback. Far pages of retrieval heads then are there, too, instead of on the device.
        retrieve: which far pages retrieval heads read in a decode step: None: all (exact); an int: that many, those
            whose keys could score highest; a float in (0, 1]: enough for this share of the attention, by the same
            bounds. Approximate unless None or 1.0.
        near_tokens: recent tokens that retrieval heads keep on the device.
        resident_pages: far pages that each retrieval head keeps on the device beside them, when it reads some and not
            all: those it read last, and those that came close and are fetched ahead of the step that may ask for them.
            None: twice as many as it picks. 0: those of its latest step, nothing is fetched ahead. Changes the speed of
            a step, never its result.
        kv_dtype: keep what is stored in one byte per channel: ``"fp8"`` (``torch.float8_e4m3fn``) or ``"int8"``, with
            one scale per page for keys and one for values. Approximate. Tokens are quantised when another eighth of the
            context has come, or at once by `freeze`; until then they are in the model's dtype. None: never.
        max_bytes: the most that the page pools of this cache and its forks may take; a forward that needs more is refused
            before it stores anything (`PoolExhausted`). Can be set later: ``cache.max_bytes = n``. Frozen pages, cold
            ones and resident copies of cold ones do not count, nor does the second copy of a slab while it grows.
            None: what the device has.

    Raises:
        RedKnotError: an argument is out of range, or the profile is of another shape than the model.

    Example:
        >>> model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="redknot")
        >>> cache = RedKnotCache(model.config, profile="profile.json")
        >>> model.generate(**inputs, past_key_values=cache)
    """

    def __init__(
        self,
        config: Any,
        profile: HeadProfile | str | None = None,
        *,
        prefill: str = "windowed",
        page_size: int = 64,
        max_cache_len: int | None = None,
        rollback: int = 0,
        tp_rank: int | None = None,
        tp_size: int | None = None,
        cold: str = "drop",
        retrieve: int | float | None = None,
        near_tokens: int = NEAR_TOKENS,
        resident_pages: int | None = None,
        kv_dtype: torch.dtype | str | None = None,
        max_bytes: int | None = None,
    ):
        check_options(prefill, page_size, rollback, max_cache_len)
        if not hasattr(config, "get_text_config"):
            raise RedKnotError(f"config={type(config).__name__}: expected the model's config, e.g. model.config")
        if tp_rank is None and tp_size is None:
            tp_rank, tp_size = compat.config_tensor_parallel(config)
        if tp_rank is None or tp_size is None or not 0 <= tp_rank < tp_size:
            raise RedKnotError(f"tp_rank={tp_rank}, tp_size={tp_size}: expected 0 <= tp_rank < tp_size, or neither")
        self.config = text_config(config)
        self.profile = resolve_profile(config, profile)
        if self.profile is not None and self.profile.num_kv_heads % tp_size:
            raise RedKnotError(
                f"tp_size={tp_size}: the model has {self.profile.num_kv_heads} KV heads per layer, which do not divide "
                "by that. Start as many processes as divide it (torchrun --nproc-per-node)"
            )
        self.prefill, self.page_size, self.rollback = prefill, page_size, rollback
        self.limit = max_cache_len
        self.tp_rank, self.tp_size = tp_rank, tp_size
        self.cold = cold
        for name, value in (("retrieve", retrieve), ("resident_pages", resident_pages)):
            if cold == "drop" and value is not None:
                raise RedKnotError(
                    f"{name}={value!r} with cold='drop': only far pages that are cold are chosen from; pass cold='cpu' or 'disk'"
                )
        self.tier = None if cold == "drop" else ColdTier(cold, retrieve, near_tokens, resident_pages)
        if self.tier is not None and max_cache_len is not None:
            raise RedKnotError(f"cold={cold!r} with max_cache_len: the static form has no cold tier; use one of them")
        self.kv_dtype = kv_dtype_of(kv_dtype)
        other = "max_cache_len" if max_cache_len is not None else f"cold={cold!r}" if self.tier is not None else None
        if self.kv_dtype is not None and other is not None:
            raise RedKnotError(f"kv_dtype={kv_dtype!r} with {other}: there, tokens stay in the model's dtype; use one")
        self.frozen_until = 0  # tokens that the latest `freeze` has seen
        self.recording = False
        self._start()
        check_max_bytes(max_bytes)
        self.ceiling = PoolCeiling(max_bytes)
        self._pools: dict[tuple[int, torch.device, torch.dtype, int, int], PagePool] = {}

        template = DynamicCache(config=self.config).layers
        if self.profile is not None:  # a config cut to fewer layers still lists the types of all
            template = template[: self.profile.num_layers]
        if not template:
            raise UnsupportedModel(f"{type(self.config).__name__} has no layers that keep keys and values")
        self.defers = compat.shares_kv(self.config, template)
        if self.defers and self.tier is not None:
            raise UnsupportedModel(f"cold={cold!r} with {type(self.config).__name__}: its layers share keys")
        fixed = template
        if max_cache_len is not None:
            if self.defers:
                raise UnsupportedModel(
                    f"max_cache_len with {type(self.config).__name__}: layers that share keys have no static form; build "
                    "the cache without max_cache_len"
                )
            fixed = StaticCache(config=self.config, max_cache_len=max_cache_len).layers
        # not super(): a subclass may also be a DynamicCache, whose own __init__ makes other layers
        Cache.__init__(self, layers=[self._layer(i, plain, fixed[i]) for i, plain in enumerate(template)])
        check_served(self)

    @classmethod
    def for_model(cls, model: Any, profile: HeadProfile | str | None = None, **options: Any) -> RedKnotCache:
        """A cache for ``model`` as it is loaded: knows its tensor-parallel rank. Options as in the constructor."""
        rank, size = compat.tensor_parallel(model)
        return cls(model.config, profile, tp_rank=rank, tp_size=size, **options)

    def _layer(self, index: int, plain: Any, fixed: Any) -> Any:
        """Pages instead of an ordinary attention layer; linear, chunked, indexed and others stay what they are."""
        sliding = type(plain) is DynamicSlidingWindowLayer and not is_chunked(self.config, index)
        if type(plain) is not DynamicLayer and not sliding:
            return fixed
        window = plain.sliding_window if sliding else None
        if self.limit is not None:
            return StaticRedKnotLayer(self, index, window, self.limit)
        return RedKnotLayer(self, index, window)

    @property
    def paged_layers(self) -> list[RedKnotLayer]:
        return [layer for layer in self.layers if getattr(layer, "is_paged", False)]

    @property
    def attention_implementation(self) -> str | None:
        """What the model runs now: the config is the model's own object."""
        return getattr(self.config, "_attn_implementation", None)

    # ------------------------------------------------------------------------------------------- for the layers
    def set_profile(self, profile: HeadProfile | str) -> None:
        """Change head classes, sinks and windows of a cache in use; heads get back from the cold tier what they lack.

        What the new profile shows is what comes next: keys and values that are stored were computed under the old one.

        Raises:
            CacheError: a head would have to show tokens that were dropped; says which and what to do. Nothing has
                changed then.
        """
        from .sessions.profile_change import change_profile

        change_profile(self, resolve_profile(self.config, profile))

    def dropped_tokens(self) -> list[list[int]]:
        """Tokens that are kept nowhere any more, ``[layers][kv_heads]``, summed over the rows."""
        self._settle()
        return [
            [] if getattr(layer, "pages", None) is None else lost_tokens(layer.pages).sum(0).tolist()
            for layer in self.layers
        ]

    # ------------------------------------------------------------------------------- transformers' Cache contract
    @property
    def is_initialized(self) -> bool:
        """Whether every layer has seen keys. (The base class looks only at layers that can be set up ahead of them.)"""
        return all(layer.is_initialized for layer in self.layers)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Logical tokens fed so far, padding and evicted ones included."""
        if layer_idx >= len(self.layers):
            return 0
        layer = self.layers[layer_idx]
        return layer.get_seq_length() if isinstance(layer, RedKnotLayer) else super().get_seq_length(layer_idx)

    def reset(self) -> None:
        """Forget every token; the pages are free again, and their memory is given back unless a fork uses it."""
        for layer in self.layers:
            layer.reset()
        self.seen, self.padding, self.step, self.last_handle, self._device_lens = 0, [], None, None, {}
        self._budget = self.frozen_until = 0
        self._drop_pools()

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last ``abs(tokens_to_remove)`` tokens of every row (0 or negative, as transformers passes it).

        Raises:
            RollbackExceeded: a local head has evicted what would become visible again. Nothing is changed then.
        """
        removed = compat.tokens_to_remove(int(tokens_to_remove), self.seen)
        self._settle()
        if removed > self.seen:
            raise CacheError(f"crop({tokens_to_remove}): the cache holds only {self.seen} tokens")
        if removed:
            layers = [layer for layer in self.paged_layers if layer.pages is not None]
            if layers:
                real = (
                    self.real_columns(layers[0].batch_size, self.seen)[:, self.seen - removed :].sum(1).astype(np.int64)
                )
                for layer in layers:
                    layer.pages.check_crop(real)  # type: ignore[union-attr]
                for layer in layers:
                    layer.pages.crop(real)  # type: ignore[union-attr]
                    layer.seen -= removed
                for state in self._states.values():
                    state.push(self.seen - removed, layers[0].pages.lens, layers[0].pages.lens)  # type: ignore[union-attr]
                self.settle_states()
            self.seen -= removed
            self.padding = [
                (start, fresh[:, : self.seen - start]) for start, fresh in self.padding if start < self.seen
            ]
        for other in self.layers:
            if not isinstance(other, RedKnotLayer):
                other.crop(-removed)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Rows become ``beam_idx [rows]``; pages are shared, not copied."""
        self._select(beam_idx, "reorder_cache")

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows ``indices`` (int64 numbers, or a bool mask)."""
        self._select(indices, "batch_select_indices")

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row ``repeats`` times, side by side; pages are shared, not copied."""
        if repeats < 1:
            raise CacheError(f"batch_repeat_interleave({repeats}): expected 1 or more; cache.reset() forgets every row")
        self._settle()
        for layer in self.paged_layers:
            if layer.is_initialized:
                layer.select(np.repeat(np.arange(layer.batch_size), repeats))
        self.padding = [(start, np.repeat(fresh, repeats, 0)) for start, fresh in self.padding]
        for other in self.layers:
            if not isinstance(other, RedKnotLayer):
                other.batch_repeat_interleave(repeats)

    def _select(self, indices: torch.Tensor, method: str) -> None:
        self._settle()
        chosen = torch.as_tensor(indices).cpu().numpy()
        if chosen.dtype == bool:
            rows = next((layer.batch_size for layer in self.paged_layers if layer.is_initialized), len(chosen))
            if len(chosen) != rows:
                raise CacheError(f"{method}: a mask of {len(chosen)} entries for a cache with {rows} rows")
            chosen = np.flatnonzero(chosen)
        for layer in self.paged_layers:
            if layer.is_initialized:
                if len(chosen) and not -layer.batch_size <= chosen.min() <= chosen.max() < layer.batch_size:
                    raise CacheError(f"{method}: row {int(chosen.max())} of a cache with {layer.batch_size} rows")
                layer.select(chosen)
        self.padding = [(start, fresh[chosen]) for start, fresh in self.padding]
        for other in self.layers:
            if not isinstance(other, RedKnotLayer):
                getattr(other, method)(indices)

    def activate_past_recording(self) -> None:
        """Keep enough to take drafted tokens back: assisted decoding calls this."""
        self.recording = True
        for layer in self.layers:
            if isinstance(layer, RedKnotLayer):
                layer.set_rollback(max(layer.rollback, RECORDING_ROLLBACK))
            elif hasattr(layer, "activate_past_recording"):
                layer.activate_past_recording()

    # ---------------------------------------------------------------------------------------------- forks, memory
    def fork(self) -> RedKnotCache:
        """An independent cache with the same content; pages are shared until one side writes to them."""
        self._settle()
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        twin.padding, twin._pools, twin._lock = list(self.padding), dict(self._pools), threading.Lock()
        twin._device_lens, twin._states = {}, {}
        twin.layers = [
            layer.fork(twin) if isinstance(layer, RedKnotLayer) else copy.deepcopy(layer) for layer in self.layers
        ]
        return twin

    def _freeze_if_due(self) -> None:
        if self.kv_dtype is not None and self.seen - self.frozen_until >= max(FREEZE_TOKENS, self.frozen_until // 8):
            self.freeze()

    def freeze(self) -> None:
        """Lay what is stored now end to end, for a cache that will rest or be read by many forks.

        With ``kv_dtype`` it is quantised. Without, the partly filled pages of local heads are packed, bit by bit, until
        they are written to or a kernel reads them. See `paging.frozen`.

        Raises:
            CacheError: a forward was interrupted, the cache is of the static form, or keys or values are not finite.
        """
        from .prefix import freeze_cache

        freeze_cache(self)

    # ------------------------------------------------------------------------------------------------- sessions
    def save(self, path: str | os.PathLike[str], *, model: torch.nn.Module | None = None, label: str = "") -> int:
        """Write the session to one file, whole or not at all; returns the file's size in bytes.

        Args:
            path: the file; one that exists is replaced once the new one is complete. By convention ``*.safetensors``.
            model: adds a fingerprint of its weights, which `load` compares (one pass over the weights the first time).
            label: up to 1024 characters of your own, kept in the file.

        Raises:
            RedKnotError: the disk is full or refuses; the old file is unchanged then.
            CacheError: a forward was interrupted, or a layer keeps a state that cannot be saved.
        """
        from .sessions.files import save_session

        return save_session(self, path, model=model, label=label)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        config: Any,
        *,
        device: torch.device | str | None = None,
        verify: bool = True,
        max_bytes: int | None = None,
    ) -> RedKnotCache:
        """The session saved at ``path``; it continues bit by bit like the one that was saved.

        Args:
            path: what `save` wrote. The file is mapped and may be deleted or replaced afterwards.
            config: the model's config (``model.config`` itself), or the model: then its dtype and, if the file has a
                fingerprint, its weights are compared, and its device is taken.
            device: where the pages go; None: where they were, or the model's device.
            verify: check the checksum of the keys and values.
            max_bytes: the most that the pages may take; None: 64 times the size of the file, at least 256 MiB.

        Raises:
            DamagedFile: truncated or damaged; nothing was loaded.
            RedKnotError: it belongs to another model, layout or release, or does not fit.
        """
        from .sessions.files import load_session

        return load_session(cls, path, config, device=device, verify=verify, max_bytes=max_bytes)

    def offload(self, layer_idx: int | None = None, only_non_sliding: bool = True) -> int:
        """Move all tokens to host memory and give the pages back; returns the bytes moved.

        The cache stays usable: it comes back by itself when it is used, or ahead of time with `prefetch`. Pages shared
        with a fork are copied; the fork keeps its own.

        Args:
            layer_idx: this layer alone, as transformers' own method has it; None: all layers.
            only_non_sliding: with ``layer_idx``, do nothing if that layer has a sliding window of the model's own.

        Raises:
            CacheError: the host has no memory; nothing has changed then.
        """
        from .sessions.sleep import offload_cache

        if layer_idx is None:
            return offload_cache(self, self.layers)
        layer = self.layers[layer_idx]
        return 0 if only_non_sliding and layer.is_sliding else offload_cache(self, [layer])

    def prefetch(self, layer_idx: int | None = None, only_non_sliding: bool = True) -> int:
        """Bring an offloaded cache back to its device; returns the bytes moved, 0 if it was there.

        On CUDA the copies run on a stream of their own and the call does not wait for them.

        Args:
            layer_idx: the next offloaded layer from this one on, as transformers' own method has it; None: all layers.
            only_non_sliding: with ``layer_idx``, pass over layers with a sliding window of the model's own.

        Raises:
            PoolExhausted: the device has no memory for it; the cache stays on the host.
        """
        from .sessions.sleep import prefetch_cache, sleeps

        if layer_idx is None:
            return prefetch_cache(self, self.layers)
        circle = self.layers[layer_idx:] + self.layers[:layer_idx]
        asleep = [layer for layer in circle if sleeps(layer) and not (only_non_sliding and layer.is_sliding)]
        return prefetch_cache(self, asleep[:1])

    def __deepcopy__(self, memo: dict[int, Any]) -> RedKnotCache:
        memo[id(self)] = twin = self.fork()
        return twin

    def __copy__(self) -> RedKnotCache:
        return self.fork()

    def __reduce__(self) -> Any:
        raise TypeError("a RedKnotCache cannot be pickled: use cache.save(path) and RedKnotCache.load(path, config)")

    def __del__(self) -> None:
        # forks share the pool: a dropped cache must give its pages back to it
        for layer in self.__dict__.get("layers", ()):
            if isinstance(layer, RedKnotLayer):
                layer.close()

    def __repr__(self) -> str:
        kinds = "all global" if self.profile is None else repr(self.profile)
        return f"RedKnotCache({len(self.paged_layers)} paged layers, tokens={self.seen}, profile={kinds})"

    def memory_report(self) -> MemoryReport:
        """Bytes by allocator, by pages and by tokens; see `MemoryReport`."""
        return report_on(self)
