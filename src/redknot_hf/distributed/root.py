"""The description of a published cache: everything about it but the keys and values.

It is an entry of the store like every other (`segments.codec`): JSON under a checksum, with the padding history and the
token ids as tensors. What it says is checked when it is read; whether it fits a model is not decided here.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..errors import CacheError, RedKnotError, shorten
from ..heads import HeadProfile
from ..heads.codec import from_document, to_document
from ..heads.order import original_order
from ..layer import RedKnotLayer
from ..segments.codec import SegmentEntry
from ..segments.keys import hash_fields
from ..segments.stores import SegmentStore
from ..sessions.files import config_digest

if TYPE_CHECKING:
    from ..cache import RedKnotCache

__all__ = ["CacheMissing", "NotPublished", "Root", "cell_name", "root_name"]

FORMAT = "redknot_hf.published_cache"
VERSION = 1
MAX_TOKENS = 1 << 40
MAX_CELLS = 1 << 20
MAX_COLUMNS = 1 << 32  # of a batch with padding, rows times tokens


class CacheMissing(RedKnotError):
    """No whole cache could be fetched: nothing is published under the key, or some of it is gone or damaged."""


class NotPublished(RedKnotError):
    """The store did not take a cache; readers find what was there before, or nothing."""


def root_name(key: str) -> str:
    """The entry that describes what is published under ``key``."""
    if not isinstance(key, str) or not 0 < len(key) <= 512:
        raise RedKnotError(f"key must have 1 to 512 characters, got {shorten(key)}")
    return hash_fields("redknot-hf/published-cache/1", [key.encode("utf-8", "surrogatepass")])


def cell_name(root: str, edition: str, layer: int, head: int) -> str:
    """The entry of one (layer, KV head), the head counted in the model's original order."""
    return hash_fields("redknot-hf/published-cell/1", [root.encode(), edition.encode(), b"%d" % layer, b"%d" % head])


@dataclass
class Root:
    """One publication.

    Attributes:
        edition: random; tells the cells of this publication from those of another one under the same key.
        config: digest of the model's config; weights: of its weights, or None.
        heads: KV heads of every layer, over all ranks.
        profile: in the model's original order; None if the cache had none (all heads global).
        layers: per layer None (it held nothing) or its ``key_dim``, ``value_dim``, ``dtype`` and ``model_window``.
        seen: logical tokens; row_of: for every row of the batch the first row with the same tokens and pages.
        lens: real tokens of every row.
        options: ``prefill``, ``page_size``, ``rollback`` of the cache.
        padding: uint8 ``[batch, bytes]``, one bit per column, or None; tokens: int64 ``[batch, n]`` or None.
        nbytes: keys and values of all cells; dense_nbytes: of the same tokens in a `DynamicCache`.
    """

    edition: str
    config: str
    weights: str | None
    heads: int
    profile: HeadProfile | None
    layers: list[dict[str, Any] | None]
    seen: int
    row_of: list[int]
    lens: list[int]
    options: dict[str, Any]
    padding: torch.Tensor | None
    tokens: torch.Tensor | None
    nbytes: int = 0
    dense_nbytes: int = 0

    # -------------------------------------------------------------------------------------------------- the writer
    @classmethod
    def of(cls, cache: RedKnotCache, tokens: torch.Tensor | None, weights: str | None) -> Root:
        """The description of a settled cache, without an edition.

        Raises:
            RedKnotError: ``tokens`` does not fit the cache.
        """
        layers: list[dict[str, Any] | None] = []
        held = [layer for layer in cache.layers if isinstance(layer, RedKnotLayer) and layer.pages is not None]
        batch, dense = (held[0].batch_size if held else 0), 0
        for layer in cache.layers:
            if not isinstance(layer, RedKnotLayer) or layer.pages is None:
                layers.append(None)
                continue
            layers.append(
                {
                    "key_dim": layer.key_dim,
                    "value_dim": layer.value_dim,
                    "dtype": str(layer.dtype).removeprefix("torch."),
                    "model_window": layer.model_window,
                }
            )
            token = (layer.key_dim + layer.value_dim) * layer.dtype.itemsize
            dense += batch * layer.num_heads * cache.tp_size * cache.seen * token
        profile = cache.profile
        if profile is not None:
            profile = original_order(profile)
            keep = {k: v for k, v in profile.metadata.items() if k not in ("scores", "validation")}
            profile = HeadProfile(
                profile.num_layers, profile.num_kv_heads, profile.head_class, profile.sink, profile.window, keep
            )
        return cls(
            edition="",
            config=config_digest(cache.config),
            weights=weights,
            heads=max((layer.num_heads for layer in held), default=0) * cache.tp_size,
            profile=profile,
            layers=layers,
            seen=cache.seen,
            row_of=_same_rows(held, batch),
            lens=held[0].pages.lens.tolist() if held else [],  # type: ignore[union-attr]
            options={"prefill": cache.prefill, "page_size": cache.page_size, "rollback": cache.rollback},
            padding=_padding(cache, batch),
            tokens=_checked_tokens(tokens, batch, cache.seen),
            dense_nbytes=dense,
        )

    def agreement(self) -> dict[str, Any]:
        """What all ranks of a writer must agree on."""
        said = self._document()
        for name in ("padding", "tokens"):
            tensor = getattr(self, name)
            said[name] = None if tensor is None else hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
        text = json.dumps(said, sort_keys=True)
        return {"seen": self.seen, "digest": hashlib.sha256(text.encode()).hexdigest()}

    def entry(self) -> SegmentEntry:
        found = {name: getattr(self, name) for name in ("padding", "tokens")}
        tensors = {name: tensor for name, tensor in found.items() if tensor is not None}
        return SegmentEntry(tensors, self.seen, extra=self._document())

    def _document(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "version": VERSION,
            "edition": self.edition,
            "config": self.config,
            "weights": self.weights,
            "heads": self.heads,
            "profile": None if self.profile is None else to_document(self.profile),
            "layers": self.layers,
            "seen": self.seen,
            "row_of": self.row_of,
            "lens": self.lens,
            "options": self.options,
            "nbytes": self.nbytes,
            "dense_nbytes": self.dense_nbytes,
        }

    # -------------------------------------------------------------------------------------------------- the reader
    @classmethod
    def read(cls, store: SegmentStore, name: str) -> Root | None:
        """The root of that name; None if the store has none, or not one that can be read.

        Raises:
            CacheError: it is of another version.
        """
        entry = store.get(name)
        return None if entry is None else cls.checked(entry)

    @classmethod
    def checked(cls, entry: SegmentEntry) -> Root:
        """From an entry whose bytes are what somebody wrote; that they make sense is checked here.

        Raises:
            CacheError: they do not.
        """
        said = entry.extra
        if said.get("format") != FORMAT or said.get("version") != VERSION:
            raise CacheError(
                f"what is stored is {shorten(said.get('format'))} version {shorten(said.get('version'))}; this release "
                f"reads {FORMAT} version {VERSION}"
            )
        try:
            root = cls(
                edition=_text(said, "edition", r"[0-9a-f]{32}"),
                config=_text(said, "config", r"[0-9a-f]{64}"),
                weights=None if said["weights"] is None else _text(said, "weights", r"[0-9a-f]{64}"),
                heads=_count(said["heads"], 1 << 20),
                profile=None if said["profile"] is None else from_document(said["profile"], "the published profile"),
                layers=[None if layer is None else _layer(layer) for layer in said["layers"]],
                seen=_count(said["seen"], MAX_TOKENS),
                row_of=[_count(row, 1 << 20) for row in said["row_of"]],
                lens=[_count(length, MAX_TOKENS) for length in said["lens"]],
                options=_options(said["options"]),
                padding=entry.tensors.get("padding"),
                tokens=entry.tensors.get("tokens"),
                nbytes=_count(said["nbytes"], 1 << 60),
                dense_nbytes=_count(said["dense_nbytes"], 1 << 60),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CacheError(f"the description of the published cache makes no sense: {shorten(str(error))}") from error
        root._check()
        return root

    def _check(self) -> None:
        batch = len(self.lens)
        good = len(self.row_of) == batch and len(self.layers) * self.heads <= MAX_CELLS
        good &= all(first <= row and self.row_of[first] == first for row, first in enumerate(self.row_of))
        good &= all(length <= self.seen for length in self.lens)
        if self.padding is None:
            good &= all(length == self.seen for length in self.lens)
        else:
            real = self.real_columns()
            good &= real is not None and real.sum(1).tolist() == self.lens
        if self.tokens is not None:
            good &= self.tokens.dtype == torch.int64 and self.tokens.dim() == 2
            good = good and self.tokens.shape[0] == batch and self.tokens.shape[1] >= self.seen
        if not good:
            raise CacheError("the description of the published cache contradicts itself")

    def real_columns(self) -> np.ndarray | None:
        """Which logical columns hold real tokens, bool ``[batch, seen]``; None without padding, or if it does not fit."""
        batch, bits = len(self.lens), self.padding
        if bits is None or bits.dtype != torch.uint8 or bits.dim() != 2 or bits.shape[0] != batch:
            return None
        if bits.shape[1] > -(-self.seen // 8) or batch * self.seen > MAX_COLUMNS:
            return None
        real = np.ones((batch, self.seen), bool)
        known = np.unpackbits(bits.numpy(), axis=1)[:, : self.seen].astype(bool)
        real[:, : known.shape[1]] = known
        return real

    # -------------------------------------------------------------------------------------------------------- both
    def kept_rows(self) -> np.ndarray:
        """The rows of the batch that cells hold: each of those that are alike once."""
        return np.array([row for row, first in enumerate(self.row_of) if row == first], np.int64)

    def heads_of_rank(self, layer: int, rank: int, size: int, order: list[list[int]] | None) -> list[int]:
        """Original numbers of the heads of rank ``rank`` of ``size``; ``order`` is that of its model's heads."""
        count = self.heads // size
        mine = range(rank * count, (rank + 1) * count)
        return list(mine) if order is None else [order[layer][position] for position in mine]

    def cell_names(self, name: str) -> Iterator[str]:
        for layer, said in enumerate(self.layers):
            if said is not None:
                for head in range(self.heads):
                    yield cell_name(name, self.edition, layer, head)


def _same_rows(held: list[RedKnotLayer], batch: int) -> list[int]:
    """For every row the first row that shares all its pages: beams of one prompt are stored once."""
    first: dict[bytes, int] = {}
    found = []
    for row in range(batch):
        parts = []
        for layer in held:
            pages = layer.pages
            frozen = getattr(pages, "frozen", None)
            parts += [pages.table[row].tobytes(), pages.lens[row].tobytes()]  # type: ignore[union-attr]
            parts += [] if frozen is None else [frozen[row].tobytes()]
        found.append(first.setdefault(hashlib.sha256(b"".join(parts)).digest(), row))
    return found


def _padding(cache: RedKnotCache, batch: int) -> torch.Tensor | None:
    ends = [start + fresh.shape[1] for start, fresh in cache.padding]
    if not ends:
        return None
    return torch.from_numpy(np.packbits(cache.real_columns(batch, min(max(ends), cache.seen)), axis=1))


def _checked_tokens(tokens: torch.Tensor | None, batch: int, seen: int) -> torch.Tensor | None:
    if tokens is None:
        return None
    if not isinstance(tokens, torch.Tensor) or tokens.dim() != 2 or tokens.dtype.is_floating_point:
        raise RedKnotError(f"tokens: expected integer ids [batch, n], got {shorten(tokens)}")
    if tokens.shape[0] != batch or tokens.shape[1] < seen:
        raise RedKnotError(
            f"tokens has shape {list(tokens.shape)}, but the cache holds {batch} rows of {seen} tokens: pass all ids so far"
        )
    return tokens.detach().to("cpu", torch.int64)


def _text(said: dict[str, Any], name: str, pattern: str) -> str:
    if not isinstance(said[name], str) or not re.fullmatch(pattern, said[name]):
        raise ValueError(f"{name} is {shorten(said[name])}")
    return said[name]


def _count(value: Any, most: int) -> int:
    if type(value) is not int or not 0 <= value <= most:
        raise ValueError(f"{shorten(value)} is no number up to {most}")
    return value


def _layer(said: dict[str, Any]) -> dict[str, Any]:
    if set(said) != {"key_dim", "value_dim", "dtype", "model_window"}:
        raise ValueError(f"a layer is described by {shorten(said)}")
    if not getattr(getattr(torch, str(said["dtype"]), None), "is_floating_point", False):
        raise ValueError(f"dtype is {shorten(said['dtype'])}")
    for name in ("key_dim", "value_dim"):
        _count(said[name], 1 << 20)
    if said["model_window"] is not None:
        _count(said["model_window"], 1 << 30)
    return said


def _options(said: dict[str, Any]) -> dict[str, Any]:
    if set(said) != {"prefill", "page_size", "rollback"}:
        raise ValueError(f"options are {shorten(said)}")
    return said
