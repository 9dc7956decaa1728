"""`RedKnotCache.save` and `RedKnotCache.load`: a session as one file.

What is written: the live tokens of every head (ragged, no page rounding, no padding), the page tables that say which
rows of the batch share them, the history of the padding, the head profile and the options of the cache, and what the
keys depend on in the model. A loaded cache continues bit by bit like the one that was saved.

Everything in a file is compared with the bytes that are there, with the profile and with the model before a page is
taken. The format is described in docs/sessions.md.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .. import compat
from ..errors import CacheError, RedKnotError, shorten
from ..heads import HeadProfile
from ..heads.codec import from_document, to_document
from ..heads.model_shape import text_config
from ..layer import RedKnotLayer
from ..paging.frozen import FrozenPages
from ..paging.pages import LayerPages
from ..paging.pool import PagePool
from ..paging.tiers import NEAR_TOKENS, TieredPages
from .container import NAMES, Contents, DamagedFile, Source, read_container, write_container
from .frozen import capture_frozen, check_filled, restore_frozen
from .plain import capture_plain, restore_plain
from .rows import MAX_TOKENS, PageState, frozen_entries, read_rows, write_rows
from .sleep import SleepingPages, install

if TYPE_CHECKING:
    from ..cache import RedKnotCache

__all__ = ["FORMAT", "VERSION", "config_digest", "describe", "load_session", "save_session"]

FORMAT = "redknot_hf.session"
VERSION = 2
ROOM = 256 << 20  # bytes of pages that any file may ask for; beyond that, `EXPANSION` times its own size
EXPANSION = 64

_DTYPE_NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in NAMES}
# what keys and values depend on, besides the weights; fields that only newer releases of transformers add are left out
_CONFIG_FIELDS = (
    "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "hidden_act", "rms_norm_eps", "layer_norm_eps", "layer_types", "sliding_window",
    "attention_chunk_size", "partial_rotary_factor", "rope_parameters", "rope_theta", "rope_scaling", "num_experts",
    "num_local_experts", "num_experts_per_tok",
)  # fmt: skip


def config_digest(config: Any) -> str:
    """64 hex digits over the fields of a config that keys and values depend on; names and dtypes do not matter."""
    text = text_config(config)
    fields = {name: getattr(text, name, None) for name in _CONFIG_FIELDS}
    return hashlib.sha256(json.dumps(fields, sort_keys=True, default=str).encode()).hexdigest()


# ------------------------------------------------------------------------------------------------------------ save
def save_session(
    cache: RedKnotCache, path: str | os.PathLike[str], *, model: torch.nn.Module | None = None, label: str = ""
) -> int:
    """Write ``cache`` to ``path`` and return the file's size in bytes; see `RedKnotCache.save`."""
    cache._settle()
    if len(label) > 1024:
        raise RedKnotError(f"label: at most 1024 characters, got {len(label)}")
    sources: list[Source] = []
    layers: list[dict[str, Any]] = []
    batch = 0
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, RedKnotLayer):  # of either form: what is loaded again is the growing one
            if layer.pages is None:
                layers.append({"kind": "empty", "rollback": layer.rollback})
                continue
            if layer.seen != cache.seen:
                raise CacheError(
                    f"layer {index} holds {layer.seen} of {cache.seen} tokens: an earlier forward was interrupted, so "
                    "there is no whole session to save. Call cache.reset() and feed the prompt again"
                )
            batch = layer.batch_size
            sources += _capture(f"layers.{index}", layer.pages)
            archive = getattr(layer.pages, "archive", None)
            if archive is not None:
                sources += _capture(f"layers.{index}.cold", archive)
            layers.append(_describe_layer(layer))
        else:
            description, tensors = capture_plain(index, layer)
            layers.append({"kind": "plain", **description})
            sources += [Source.of(f"layers.{index}.plain.{name}", tensor) for name, tensor in tensors.items()]
    padding = _padding_bits(cache, batch)
    if padding is not None:
        sources.append(Source.of("padding", torch.from_numpy(padding)))
    options = {
        "prefill": cache.prefill,
        "page_size": cache.page_size,
        "rollback": cache.rollback,
        "tp_rank": cache.tp_rank,
        "tp_size": cache.tp_size,
        "cold": cache.cold,
        "retrieve": None if cache.tier is None else cache.tier.pick,
        "near_tokens": NEAR_TOKENS if cache.tier is None else cache.tier.near,
        "kv_dtype": None if cache.kv_dtype is None else str(cache.kv_dtype).removeprefix("torch."),
    }
    if cache.tier is not None and cache.tier.budget is not None:
        options["resident_pages"] = cache.tier.budget
    description = {
        "format": FORMAT,
        "version": VERSION,
        "label": label,
        "model": _describe_model(cache, model),
        "profile": None if cache.profile is None else to_document(cache.profile),
        "options": options,
        "recording": bool(cache.recording),
        "seen": cache.seen,
        "frozen_until": cache.frozen_until,
        "batch": batch,
        "layers": layers,
    }
    return write_container(path, description, sources)


def _capture(prefix: str, pages: LayerPages | SleepingPages) -> list[Source]:
    halves: list[tuple[str, torch.dtype, int, Callable[[], Iterable[torch.Tensor]]]]
    if isinstance(pages, SleepingPages):
        state, keys, values = pages.rest()
        halves = [
            ("k", keys.dtype, keys.shape[1], lambda: [keys]),
            ("v", values.dtype, values.shape[1], lambda: [values]),
        ]
    else:
        state, rows = PageState.of(pages)
        pool = pages.pool
        halves = [
            ("k", pool.k.dtype, pool.k.shape[2], lambda: read_rows(pool.k, rows)),
            ("v", pool.v.dtype, pool.v.shape[2], lambda: read_rows(pool.v, rows)),
        ]
    found = [
        Source.of(f"{prefix}.table", torch.from_numpy(state.table)),
        Source.of(f"{prefix}.lens", torch.from_numpy(state.lens)),
        Source.of(f"{prefix}.oldest", torch.from_numpy(state.oldest)),
        Source.of(f"{prefix}.sink", torch.from_numpy(pages.sink)),
        Source.of(f"{prefix}.window", torch.from_numpy(pages.window)),
    ]
    found += [Source(f"{prefix}.{name}", dtype, (state.num_rows, dim), get) for name, dtype, dim, get in halves]
    held = pages.frozen if isinstance(pages, SleepingPages) else pages
    return found + (capture_frozen(prefix, held, state.table.shape[2]) if isinstance(held, FrozenPages) else [])


def _describe_layer(layer: RedKnotLayer) -> dict[str, Any]:
    return {
        "kind": "pages",
        "heads": layer.num_heads,
        "key_dim": layer.key_dim,
        "value_dim": layer.value_dim,
        "dtype": str(layer.dtype).removeprefix("torch."),
        "device": str(layer.device),
        "model_window": layer.model_window,
        "rollback": layer.rollback,
    }


def _describe_model(cache: RedKnotCache, model: torch.nn.Module | None) -> dict[str, Any]:
    weights = None
    if model is not None:
        from ..segments.keys import model_fingerprint

        weights = model_fingerprint(model)
    name = str(getattr(cache.config, "_name_or_path", "") or "")
    return {
        "name": name,
        "model_type": str(getattr(cache.config, "model_type", "")),
        "config": config_digest(cache.config),
        "weights": weights,
    }


def _padding_bits(cache: RedKnotCache, batch: int) -> np.ndarray | None:
    """uint8 ``[batch, bytes]``, one bit per logical column up to the last one with padding; None without padding."""
    ends = [start + fresh.shape[1] for start, fresh in cache.padding]
    if not ends:
        return None
    real = cache.real_columns(batch, min(max(ends), cache.seen))
    return np.packbits(real, axis=1)


# ------------------------------------------------------------------------------------------------------------ load
def describe(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The description inside a saved session, without reading the tensors.

    Raises:
        RedKnotError: it cannot be opened, or is not a saved session.
    """
    contents = read_container(path, header_only=True)
    _check_format(contents.description, path)
    return contents.description


def load_session(
    cls: type[RedKnotCache],
    path: str | os.PathLike[str],
    config: Any,
    *,
    device: torch.device | str | None = None,
    verify: bool = True,
    max_bytes: int | None = None,
) -> RedKnotCache:
    """The cache saved at ``path``; see `RedKnotCache.load`."""
    model = config if isinstance(config, torch.nn.Module) else None
    if model is not None:
        config = model.config
    contents = read_container(path, verify=verify)
    if max_bytes is None:
        max_bytes = max(ROOM, EXPANSION * contents.nbytes)
    try:
        return _Loader(cls, contents, config, model, device, max_bytes, path).load()
    except DamagedFile:
        raise
    except RedKnotError as error:
        raise type(error)(f"{os.fspath(path)}: {error}") from error


_Part = tuple[LayerPages, PageState, torch.Tensor, torch.Tensor]


class _Loader:
    """One load: checks what the file says, part by part, and builds the cache."""

    def __init__(
        self,
        cls: type[RedKnotCache],
        contents: Contents,
        config: Any,
        model: torch.nn.Module | None,
        device: torch.device | str | None,
        max_bytes: int,
        path: str | os.PathLike[str],
    ):
        self.cls, self.config, self.model, self.path = cls, config, model, path
        self.said, self.tensors = contents.description, dict(contents.tensors)
        self.max_bytes = max_bytes
        self.real = np.zeros(0, np.int64)  # real tokens of each row
        self.device = None if device is None else torch.device(device)

    def load(self) -> RedKnotCache:
        _check_format(self.said, self.path)
        self._check_model()
        cache = self._empty_cache()
        batch = _integer(self.said, "batch", 0, 1 << 20)
        cache.seen = _integer(self.said, "seen", 0, MAX_TOKENS)
        cache.frozen_until = _integer(self.said, "frozen_until", 0, MAX_TOKENS)
        cache.recording = _flag(self.said, "recording")
        layers = _typed(self.said, "layers", list)
        if len(layers) != len(cache.layers):
            raise CacheError(f"the session has {len(layers)} layers, the model has {len(cache.layers)}")
        self._restore_padding(cache, batch)
        wanted: list[tuple[RedKnotLayer, LayerPages, list[_Part]]] = []
        for index, (layer, said) in enumerate(zip(cache.layers, layers, strict=True)):
            if not isinstance(said, dict):
                raise CacheError(f"layer {index} is described by {shorten(said)}")
            if isinstance(layer, RedKnotLayer):
                prepared = self._prepare(cache, index, layer, said, batch)
                if prepared is not None:
                    wanted.append(prepared)
            elif said.get("kind") == "plain":
                mine = self._take_all(f"layers.{index}.plain.")
                restore_plain(index, layer, said, mine, self._device(said, index))
            else:
                raise CacheError(
                    f"layer {index} was saved as {shorten(said.get('kind'))}, this model keeps a plain layer"
                )
        if self.tensors:
            raise CacheError(f"unknown tensors {shorten(sorted(self.tensors))}")
        self._fill(wanted)
        return cache

    # ------------------------------------------------------------------------------------------------ the whole
    def _check_model(self) -> None:
        said = _typed(self.said, "model", dict)
        here = config_digest(self.config)
        if said.get("config") != here:
            raise CacheError(
                f"the session was saved from another model ({shorten(said.get('name') or said.get('model_type'))}, "
                f"config {shorten(said.get('config'), 16)}) than the one given "
                f"({getattr(self.config, '_name_or_path', '') or 'unnamed'!r}, config {here[:12]}...): load it with "
                "the config of the model it was made with"
            )
        weights = said.get("weights")
        if self.model is not None and weights is not None:
            from ..segments.keys import model_fingerprint

            if weights != model_fingerprint(self.model):
                raise CacheError(
                    "the session was saved with other weights than those of the model given (same architecture): its "
                    "keys and values would not fit. Load the model that the session was made with"
                )

    def _empty_cache(self) -> RedKnotCache:
        options = _typed(self.said, "options", dict)
        known = {
            "prefill", "page_size", "rollback", "tp_rank", "tp_size", "cold", "retrieve", "near_tokens", "kv_dtype"
        }  # fmt: skip
        if set(options) - {"resident_pages"} != known:
            raise CacheError(
                f"unknown or missing options {shorten(sorted((set(options) ^ known) - {'resident_pages'}))}"
            )
        for name in set(options) - {"prefill", "cold", "retrieve", "kv_dtype"}:
            _integer(options, name, 0, 1 << 30)
        _typed(options, "cold", str)
        document = self.said.get("profile")
        profile = None if document is None else from_document(document, "the profile in the session")
        sharded = compat.config_tensor_parallel(self.config)
        if self.model is not None or sharded[1] > 1:
            rank, size = sharded if self.model is None else compat.tensor_parallel(self.model)
            if (rank, size) != (options["tp_rank"], options["tp_size"]):
                raise CacheError(
                    f"the session is the share of rank {options['tp_rank']} of {options['tp_size']}, this process is "
                    f"rank {rank} of {size}: save and load with the same tensor-parallel layout, or write the cache of "
                    "all ranks with redknot_hf.distributed.save_world"
                )
        cache = self.cls(self.config, profile or HeadProfile.all_global(self.config), **options)
        cache.profile = profile  # None stays None: whatever number of heads the layers feed is then accepted
        return cache

    def _restore_padding(self, cache: RedKnotCache, batch: int) -> None:
        bits = self.tensors.pop("padding", None)
        self.real = np.full(batch, cache.seen, np.int64)
        if bits is None:
            return
        if bits.dtype != torch.uint8 or bits.ndim != 2 or bits.shape[0] != batch or bits.shape[1] > -(-cache.seen // 8):
            raise CacheError("the padding history does not fit the batch and the number of tokens")
        real = np.unpackbits(bits.numpy(), axis=1)[:, : cache.seen].astype(bool)
        self.real = real.sum(1, dtype=np.int64) + cache.seen - real.shape[1]
        cache.padding = [(0, real)]

    def _device(self, said: dict[str, Any], index: int) -> torch.device:
        if self.device is not None:
            return self.device
        if self.model is not None:
            devices = {parameter.device for parameter in self.model.parameters()}
            if len(devices) == 1:
                return devices.pop()
        name = said.get("device")
        try:
            device = torch.device("cpu" if name is None else str(name))
        except RuntimeError as error:
            raise CacheError(f"layer {index} was on an unknown device {shorten(name)}") from error
        if device.type not in ("cpu", "cuda") or (
            device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()
        ):
            raise CacheError(
                f"layer {index} was on {device}, which this machine does not have: pass device=, e.g. 'cpu'"
            )
        return device

    # ----------------------------------------------------------------------------------------------- one layer
    def _prepare(
        self, cache: RedKnotCache, index: int, layer: RedKnotLayer, said: dict[str, Any], batch: int
    ) -> tuple[RedKnotLayer, LayerPages, list[_Part]] | None:
        layer.rollback = _integer(said, "rollback", 0, 1 << 29)
        if said.get("kind") == "empty":
            return None
        if said.get("kind") != "pages":
            raise CacheError(f"layer {index} was saved as {shorten(said.get('kind'))}, this model keeps pages there")
        heads = _integer(said, "heads", 1, 1 << 20)
        key_dim, value_dim = _integer(said, "key_dim", 8, 1 << 20), _integer(said, "value_dim", 8, 1 << 20)
        dtype = _DTYPE_NAMES.get(_typed(said, "dtype", str))
        if dtype is None or not dtype.is_floating_point:
            raise CacheError(f"layer {index}: dtype is {shorten(said['dtype'])}, expected a floating-point type")
        if self.model is not None and self.model.dtype != dtype:
            raise CacheError(
                f"the session holds {dtype}, the model runs in {self.model.dtype}: load the model in {dtype}"
            )
        window = said.get("model_window")
        if window is not None:
            window = _integer(said, "model_window", 1, 1 << 30)
        layer.model_window = window
        layer.sink, layer.window, layer.extra_window = cache.geometry(index, heads, window)
        layer.batch_size, layer.num_heads = batch, heads
        layer.key_dim, layer.value_dim, layer.dtype = key_dim, value_dim, dtype
        layer.device, layer.is_initialized, layer.seen = self._device(said, index), True, cache.seen

        pages = self._frozen(f"layers.{index}", index, cache.new_pages(layer))
        parts = [self._part(f"layers.{index}", index, pages)]
        archive = getattr(pages, "archive", None)
        if archive is not None:
            parts.append(self._part(f"layers.{index}.cold", index, archive))
        return layer, pages, parts

    def _frozen(self, prefix: str, index: int, pages: LayerPages) -> LayerPages:
        """``pages``, with the frozen ones that the file has for it."""
        mine = self._take_all(f"{prefix}.frozen.")
        if not mine:
            return pages
        if type(pages) is not LayerPages:
            raise CacheError(f"layer {index}: frozen pages in front of a cold tier")
        try:
            return restore_frozen(mine, pages)
        except CacheError as error:
            raise CacheError(f"layer {index}: {error}") from error

    def _part(self, prefix: str, index: int, pages: LayerPages) -> _Part:
        """One page table and its rows, checked."""
        pool, batch, heads = pages.pool, pages.batch_size, pages.num_heads
        dtype, key_dim, value_dim = pool.k.dtype, pool.k.shape[2], pool.v.shape[2]
        for name, here in (("sink", pages.sink), ("window", pages.window)):
            there = self._array(f"{prefix}.{name}", torch.int32, (heads,))
            if (there != here).any():
                raise CacheError(f"layer {index}: the {name}s in the file do not follow from its profile")
        table = self._array(f"{prefix}.table", torch.int32, (batch, heads, None))
        lens = self._array(f"{prefix}.lens", torch.int64, (batch,))
        oldest = self._array(f"{prefix}.oldest", torch.int64, (batch, heads))
        if (lens != self.real).any():
            raise CacheError(f"layer {index}: its lengths do not fit the number of tokens and the padding")
        try:
            frozen = frozen_entries(pages, table.shape[2])
            state = PageState.checked(pages, table, lens, oldest, self.max_bytes // pool.page_bytes, frozen)
            if isinstance(pages, FrozenPages):
                check_filled(pages, lens, oldest)
        except CacheError as error:
            raise CacheError(f"layer {index}: {error}") from error
        self.max_bytes -= len(state.live) * pool.page_bytes
        for half, dim in (("k", key_dim), ("v", value_dim)):
            rows = self.tensors.get(f"{prefix}.{half}")
            if rows is None or rows.dtype != dtype or tuple(rows.shape) != (state.num_rows, dim):
                raise CacheError(
                    f"layer {index}: {half} is {_shape(rows)}, the page tables need {dtype} [{state.num_rows}, {dim}]"
                )
        return pages, state, self.tensors.pop(f"{prefix}.k"), self.tensors.pop(f"{prefix}.v")

    def _fill(self, wanted: list[tuple[RedKnotLayer, LayerPages, list[_Part]]]) -> None:
        """Take all pages at once, then copy; a pool without memory is noticed before the first copy."""
        totals: dict[int, tuple[PagePool, int]] = {}
        for _, _, parts in wanted:
            for table, state, _, _ in parts:
                pool, count = totals.get(id(table.pool), (table.pool, 0))
                totals[id(pool)] = (pool, count + state.pages_wanted(table))
        for pool, count in totals.values():
            pool.reserve(count)
        for layer, pages, parts in wanted:
            for table, state, keys, values in parts:
                rows = state.place(table)
                write_rows(table.pool.k, rows, keys)
                write_rows(table.pool.v, rows, values)
            if isinstance(pages, TieredPages) and pages.far is not None:
                pages.far.bounds.update(pages.archive, np.zeros(pages.batch_size, np.int64))
            install(layer, pages)

    # ------------------------------------------------------------------------------------------------- tensors
    def _array(self, name: str, dtype: torch.dtype, shape: tuple[int | None, ...]) -> np.ndarray:
        tensor = self.tensors.pop(name, None)
        fits = tensor is not None and tensor.ndim == len(shape)
        fits = fits and all(want in (None, have) for want, have in zip(shape, tensor.shape, strict=True))  # type: ignore[union-attr]
        if not fits or tensor.dtype != dtype:  # type: ignore[union-attr]
            raise CacheError(f"{name} is {_shape(tensor)}, expected {dtype} {list(shape)}")
        return tensor.numpy().copy()  # type: ignore[union-attr]

    def _take_all(self, prefix: str) -> dict[str, torch.Tensor]:
        names = [name for name in self.tensors if name.startswith(prefix)]
        return {name[len(prefix) :]: self.tensors.pop(name) for name in names}


# ----------------------------------------------------------------------------------------------------------- checks
def _check_format(said: dict[str, Any], path: str | os.PathLike[str]) -> None:
    if said.get("format") != FORMAT:
        raise DamagedFile(f"{os.fspath(path)} is not a saved session: format is {shorten(said.get('format'))}")
    version = said.get("version")
    if type(version) is not int or version != VERSION:
        raise CacheError(
            f"version is {shorten(version)}; this release reads version {VERSION}. A newer one may read it"
        )


def _typed(said: dict[str, Any], name: str, kind: type) -> Any:
    value = said.get(name)
    if type(value) is not kind:
        raise CacheError(f"{name} is {shorten(value)} in the description, expected {kind.__name__}")
    return value


def _flag(said: dict[str, Any], name: str) -> bool:
    return _typed(said, name, bool)


def _integer(said: dict[str, Any], name: str, least: int, most: int) -> int:
    value = said.get(name)
    if type(value) is not int or not least <= value <= most:
        raise CacheError(f"{name} is {shorten(value)} in the description, expected {least} to {most}")
    return value


def _shape(tensor: torch.Tensor | None) -> str:
    return "missing" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
