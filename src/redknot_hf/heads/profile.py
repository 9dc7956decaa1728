"""`HeadProfile`: which KV heads of a model keep every token and which keep sinks and a recent window.

A profile is plain data about one architecture: a class, a sink size and a window for every (layer, KV head), with where
it came from. It knows nothing of tensors, caches or transformers; `redknot_hf.cache` turns it into storage. The JSON
form is in `codec.py` and docs/profile-format.md, foreign formats in `importers.py`.
"""

from __future__ import annotations

import copy
import math
import numbers
import os
import warnings
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import ProfileError, shorten
from .model_shape import MAX_CELLS, describe_config, model_shape, provenance_difference
from .selection import MAX_TOKENS, choose_global, integer, select_by_score

__all__ = ["HEAD_CLASSES", "MAX_TOKENS", "HeadProfile"]

HEAD_CLASSES = ("global", "local", "retrieval", "dense")
"""Class names in the order of the documentation. Only `"local"` evicts."""

_ITEMSIZE = {
    "float64": 8, "float32": 4, "float": 4, "fp32": 4, "float16": 2, "half": 2, "fp16": 2, "bfloat16": 2, "bf16": 2,
    "float8_e4m3fn": 1, "float8_e5m2": 1, "fp8": 1, "int8": 1, "uint8": 1,
}  # fmt: skip
_warned: set[str] = set()


@dataclass
class HeadProfile:
    """Head class, sink and window of every (layer, KV head) of one model.

    A query at position p sees, through a local head with sink s and window W, the keys j <= p with j < s or j > p - W
    (W counts p itself, as transformers' `sliding_window` does). Every other class sees all j <= p.

    Every layer of the model has a row. In a layer without attention (linear attention, SSM) the row is never read; in a
    layer with the model's own sliding window, that window is intersected with the head's: a head with a wider window
    stores the model's window and no sinks.

    Attributes:
        num_layers: decoder layers of the model, L.
        num_kv_heads: KV heads per layer, H.
        head_class: `[L][H]` of `HEAD_CLASSES`: "global" keeps all tokens, "local" keeps sink + window, "retrieval"
            keeps all (far pages may be cold and picked page-wise), "dense" is global and never reused approximately.
        sink: `[L][H]` first tokens a local head always keeps, 0 <= sink <= 2**30. An int stands for all local heads.
        window: `[L][H]` last tokens a local head keeps, 1 <= window <= 2**30. An int stands for all local heads.
            Sinks and windows of heads that keep everything have no meaning and are set to 0.
        metadata: provenance (docs/profile-format.md lists the keys): model, revision, config_hash, head_dim,
            attention_layers, date, method, seed, scores, validation.

    Raises:
        ProfileError: on construction, naming the first bad cell.
    """

    num_layers: int
    num_kv_heads: int
    head_class: list[list[str]]
    sink: list[list[int]] = 0  # type: ignore[assignment]  # an int stands for all local heads
    window: list[list[int]] = 0  # type: ignore[assignment]
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.validate()

    # ---------------------------------------------------------------- making one

    @classmethod
    def all_global(cls, config: Any) -> HeadProfile:
        """Every head keeps every token: exact, and the baseline of every comparison.

        Args:
            config: the model's transformers config.
        """
        shape = model_shape(config)
        rows = [["global"] * shape.num_kv_heads for _ in range(shape.num_layers)]
        metadata = {**describe_config(config), "method": "all_global"}
        return cls(shape.num_layers, shape.num_kv_heads, rows, metadata=metadata)

    @classmethod
    def uniform(
        cls,
        config: Any,
        sink: int = 4,
        window: int = 256,
        global_heads: float | Collection[tuple[int, int]] | None = None,
    ) -> HeadProfile:
        """One sink and one window for all local heads, and a choice of global heads.

        Args:
            config: the model's transformers config.
            sink: first tokens every local head keeps. 4 because position 0 is the sink of every model measured; the
                other three cost nothing.
            window: last tokens every local head keeps.
            global_heads: None makes every head local. A fraction in [0, 1] makes that share of the heads global, spread
                evenly over layers and head indices: a placeholder for measurements, not a measured map. A collection of
                `(layer, kv_head)` makes exactly those global.

        Raises:
            ProfileError: a bad sink or window, a fraction outside [0, 1] or a head the model does not have.
        """
        shape = model_shape(config)
        layers = range(shape.num_layers) if shape.attention_layers is None else shape.attention_layers
        cells = [(l, h) for l in layers for h in range(shape.num_kv_heads)]
        chosen = choose_global(global_heads, cells, shape.num_kv_heads)
        attention = set(layers)
        rows = [
            ["local" if l in attention and (l, h) not in chosen else "global" for h in range(shape.num_kv_heads)]
            for l in range(shape.num_layers)
        ]
        # Checked here as well: a profile without local heads would accept any sink and window.
        integer(sink, "sink", 0)
        integer(window, "window", 1)
        metadata = {**describe_config(config), "method": "uniform"}
        return cls(shape.num_layers, shape.num_kv_heads, rows, sink, window, metadata)  # type: ignore[arg-type]

    @classmethod
    def load(cls, source: str | os.PathLike[str], *, revision: str | None = None) -> HeadProfile:
        """Read a profile from a file, from the package or from the Hub.

        Args:
            source: in this order: an existing file (or a directory that holds `head_profile.json`); the name of a
                shipped profile, e.g. "SmolLM2-135M-Instruct" (`redknot_hf.heads.shipped_names()` lists them); a Hub
                repository "owner/name" that holds `head_profile.json`.
            revision: branch, tag or commit of the Hub repository.

        Raises:
            ProfileError: nothing found there, or what was found is not a valid profile.
        """
        from .sources import load_profile

        return load_profile(source, revision=revision)

    @classmethod
    def import_from(cls, path: str | os.PathLike[str], format: str = "auto", **options: Any) -> HeadProfile:
        """Read a head map of another project; `redknot_hf.heads.importers.import_profile` has formats and options."""
        from .importers import import_profile

        return import_profile(path, format, **options)

    # ---------------------------------------------------------------- keeping one

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the JSON form. The file appears whole or not at all; score matrices are rounded to 4 digits.

        Returns:
            The path written; a directory gets `head_profile.json`.
        """
        from .sources import save_profile

        return save_profile(self, path)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload the profile with a card and, where matplotlib is installed, a picture: `redknot_hf.heads.hub.push`."""
        from .hub import push

        return push(self, repo_id, **options)

    def plot(self, path: str | os.PathLike[str]) -> Path:
        """Draw the head map into a .png, .svg or .pdf file (needs the extra `plots`)."""
        from .plots import save_heatmap

        return save_heatmap(self, path)

    def with_budget(self, fraction: float, score: str, sink: int = 4, window: int = 256) -> HeadProfile:
        """Choose other global heads by a score kept in the profile: the `fraction` of heads that scores highest.

        Args:
            fraction: share of global heads over the attention layers, 0 to 1.
            score: key of `metadata["scores"]`; higher must mean more in need of all tokens.
            sink: for heads that were not local so far; local heads keep theirs.
            window: same.

        Returns:
            A new profile without validation figures: those belong to the old map.

        Raises:
            ProfileError: no such score, a head without one, or a fraction outside [0, 1].
        """
        scores = self.metadata.get("scores", {})
        if score not in scores:
            raise ProfileError(f"the profile has no score {shorten(score)}; it has {', '.join(scores) or 'none'}")
        matrix = scores[score]
        layers = self.attention_layers
        if any(x is None for l in layers for x in matrix[l]):
            raise ProfileError(f"the score {shorten(score)} is missing for some heads")
        chosen = {(layers[i], h) for i, h in select_by_score([matrix[l] for l in layers], fraction=fraction)}
        held = set(layers)
        classes = [
            ["local" if l in held and (l, h) not in chosen else "global" for h in range(self.num_kv_heads)]
            for l in range(self.num_layers)
        ]
        old = [[name == "local" for name in row] for row in self.head_class]
        sinks = [[s if o else sink for s, o in zip(*rows, strict=True)] for rows in zip(self.sink, old, strict=True)]
        windows = [
            [w if o else window for w, o in zip(*rows, strict=True)] for rows in zip(self.window, old, strict=True)
        ]
        metadata = {key: value for key, value in copy.deepcopy(self.metadata).items() if key != "validation"}
        metadata.update(budget=fraction, method=f"{fraction:.4g} of the heads by {score}")
        return HeadProfile(self.num_layers, self.num_kv_heads, classes, sinks, windows, metadata)

    # ---------------------------------------------------------------- asking one

    def __repr__(self) -> str:
        """One line: the matrices of a large model are thousands of entries (`redknot show` prints them)."""
        counts = ", ".join(f"{n} {name}" for name in HEAD_CLASSES if (n := self.count(name)))
        return f"HeadProfile({self.num_layers} layers x {self.num_kv_heads} KV heads: {counts})"

    def count(self, head_class: str) -> int:
        """Number of (layer, KV head) cells of that class, over the layers that hold KV."""
        return sum(row.count(head_class) for row in (self.head_class[l] for l in self.attention_layers))

    @property
    def attention_layers(self) -> list[int]:
        """Layers that hold keys and values; all of them unless `metadata["attention_layers"]` says otherwise."""
        layers = self.metadata.get("attention_layers")
        return list(range(self.num_layers)) if layers is None else list(layers)

    @property
    def model_windows(self) -> list[int]:
        """The model's own sliding window of every layer, 0 where there is none or the metadata does not record it."""
        window = self.metadata.get("sliding_window") or 0
        layers = set(self.attention_layers) & set(self.metadata.get("sliding_layers", range(self.num_layers)))
        return [window if l in layers else 0 for l in range(self.num_layers)]

    def stored_tokens(self, seq_len: int, rollback: int = 0) -> list[list[int]]:
        """Tokens each (layer, KV head) stores after `seq_len` tokens of one sequence, `[L][H]`.

        Args:
            seq_len: tokens processed.
            rollback: extra slots in every ring, for decoding that takes tokens back.
        """
        integer(seq_len, "seq_len", 0, 2**40)
        integer(rollback, "rollback", 0)
        held = set(self.attention_layers)
        stored = []
        for l, model_window in enumerate(self.model_windows):
            limits = [
                s + w + rollback if c == "local" and (not model_window or w < model_window)
                else model_window + rollback if model_window
                else seq_len
                for c, s, w in zip(self.head_class[l], self.sink[l], self.window[l], strict=True)
            ]  # fmt: skip
            stored.append([min(seq_len, limit) if l in held else 0 for limit in limits])
        return stored

    def kv_bytes(
        self,
        seq_len: int,
        batch_size: int = 1,
        dtype: Any = "bfloat16",
        page_size: int = 64,
        rollback: int = 0,
        *,
        head_dim: int | None = None,
    ) -> int:
        """Bytes of live pages a paged allocator holds for `batch_size` sequences of `seq_len` tokens.

        Every (sequence, layer, KV head) fills `ceil(stored / page_size)` pages of K and as many of V. Page tables are
        not in this figure: `table_bytes` gives them. Pages shared between sequences (forks, beams) count once in the
        allocator and once per sequence here.

        Args:
            seq_len: tokens processed by each sequence.
            batch_size: sequences.
            dtype: of K and V: a torch dtype or its name.
            page_size: tokens per page; 1 gives the ragged ideal.
            rollback: extra slots in every ring.
            head_dim: elements per head; default `metadata["head_dim"]`.

        Raises:
            ProfileError: head_dim unknown or a negative argument.
        """
        integer(batch_size, "batch_size", 0)
        integer(page_size, "page_size", 1)
        page_bytes = 2 * page_size * self._head_dim(head_dim) * _itemsize(dtype)
        pages = sum(-(-tokens // page_size) for row in self.stored_tokens(seq_len, rollback) for tokens in row)
        return batch_size * pages * page_bytes

    def dense_kv_bytes(
        self, seq_len: int, batch_size: int = 1, dtype: Any = "bfloat16", *, head_dim: int | None = None
    ) -> int:
        """Bytes of a cache that keeps every token of every head in contiguous tensors, as `DynamicCache` does."""
        integer(seq_len, "seq_len", 0, 2**40)
        integer(batch_size, "batch_size", 0)
        cells = len(self.attention_layers) * self.num_kv_heads
        return batch_size * cells * seq_len * 2 * self._head_dim(head_dim) * _itemsize(dtype)

    def table_bytes(self, seq_len: int, batch_size: int = 1, page_size: int = 64, rollback: int = 0) -> int:
        """Bytes of the page tables after one prefill: int32 `block_table [batch, kv_heads, max_pages]` per layer, wide
        enough for the layer's longest head. A table that grew while decoding may have spare columns."""
        integer(page_size, "page_size", 1)
        total = 0
        tokens = self.stored_tokens(seq_len, rollback)
        for layer in self.attention_layers:
            total += self.num_kv_heads * -(-max(tokens[layer]) // page_size)
        return 4 * batch_size * total

    # ---------------------------------------------------------------- checking one

    def validate(self) -> None:
        """Check every cell, and bring rows to plain lists of ints.

        Raises:
            ProfileError: naming the first bad cell, its value and what was expected.
        """
        self.num_layers = integer(self.num_layers, "num_layers", 1, MAX_CELLS)
        self.num_kv_heads = integer(self.num_kv_heads, "num_kv_heads", 1, MAX_CELLS)
        classes = self._rows(self.head_class, "head_class")
        for l, row in enumerate(classes):
            for h, name in enumerate(row):
                if not isinstance(name, str) or name not in HEAD_CLASSES:
                    expected = ", ".join(map(repr, HEAD_CLASSES))
                    raise ProfileError(f"head_class[{l}][{h}] is {shorten(name)}; expected one of {expected}")
        self.head_class = classes
        self.sink = self._token_counts(self.sink, "sink", 0)
        self.window = self._token_counts(self.window, "window", 1)
        self._validate_metadata()

    def validate_for(self, config: Any) -> None:
        """Check that the profile fits a model.

        Args:
            config: the model's transformers config.

        Raises:
            ProfileError: the model has another number of layers or KV heads, or the profile has become invalid.

        Warns:
            UserWarning: once per process, when the profile records another model, revision or architecture of the same
                shape: its heads were then measured on other weights.
        """
        self.validate()
        shape = model_shape(config)
        if (shape.num_layers, shape.num_kv_heads) != (self.num_layers, self.num_kv_heads):
            made_for = f" (made for {self.metadata['model']})" if self.metadata.get("model") else ""
            raise ProfileError(
                f"the head profile has {self.num_layers} layers x {self.num_kv_heads} KV heads{made_for}, but the "
                f"model {shape.name or shape.model_type!r} has {shape.num_layers} layers x {shape.num_kv_heads} KV "
                "heads; pass a profile made for this model, or HeadProfile.all_global(config), which is exact"
            )
        difference = provenance_difference(self.metadata, config)
        if difference and difference not in _warned:
            _warned.add(difference)
            warnings.warn(difference, UserWarning, stacklevel=2)

    # ---------------------------------------------------------------- private

    def _rows(self, value: Any, what: str) -> list[list[Any]]:
        value = _listed(value)
        if not isinstance(value, list):
            raise ProfileError(f"{what} is {shorten(value)}; expected {self.num_layers} rows of {self.num_kv_heads}")
        if len(value) != self.num_layers:
            raise ProfileError(f"{what} has {len(value)} rows; expected {self.num_layers} (num_layers)")
        rows = []
        for l, row in enumerate(value):
            row = _listed(row)
            if not isinstance(row, list):
                raise ProfileError(f"{what}[{l}] is {shorten(row)}; expected a list of {self.num_kv_heads} entries")
            if len(row) != self.num_kv_heads:
                raise ProfileError(f"{what}[{l}] has {len(row)} entries; expected {self.num_kv_heads} (num_kv_heads)")
            rows.append(list(row))
        return rows

    def _token_counts(self, value: Any, what: str, least: int) -> list[list[int]]:
        if isinstance(value, numbers.Number):
            value = [[value] * self.num_kv_heads] * self.num_layers
        rows = self._rows(value, what)
        for l, row in enumerate(rows):
            for h, tokens in enumerate(row):
                local = self.head_class[l][h] == "local"
                lowest = least if local else 0
                if type(tokens) is not int or not lowest <= tokens <= MAX_TOKENS:  # caches check every cell: few calls
                    tokens = integer(tokens, f"{what}[{l}][{h}]" + (" of a local head" if local else ""), lowest)
                row[h] = tokens if local else 0
        return rows

    def _validate_metadata(self) -> None:
        if not isinstance(self.metadata, dict):
            raise ProfileError(f"metadata is {shorten(self.metadata)}; expected a dictionary")
        for key in ("attention_layers", "sliding_layers"):
            layers = self.metadata.get(key)
            if layers is None:
                self.metadata.pop(key, None)
                continue
            bad = not isinstance(layers, (list, tuple)) or [l for l in layers if type(l) is not int]
            if bad or sorted(set(layers)) != list(layers) or not all(0 <= l < self.num_layers for l in layers):
                raise ProfileError(
                    f"metadata[{key!r}] is {shorten(layers)}; expected increasing layer numbers below {self.num_layers}"
                )
        for key in ("head_dim", "sliding_window"):
            if self.metadata.get(key) is not None:
                integer(self.metadata[key], f"metadata[{key!r}]", 1)
        scores = self.metadata.get("scores", {})
        if not isinstance(scores, dict):
            raise ProfileError(
                f"metadata['scores'] is {shorten(scores)}; expected a dictionary of [layers][heads] matrices"
            )
        for key, matrix in scores.items():
            what = f"metadata['scores'][{shorten(key)}]"
            for l, row in enumerate(self._rows(matrix, what)):
                for h, score in enumerate(row):
                    if score is None:
                        continue
                    if isinstance(score, bool) or not isinstance(score, numbers.Real) or not math.isfinite(score):
                        raise ProfileError(f"{what}[{l}][{h}] is {shorten(score)}; expected a finite number or null")

    def _head_dim(self, given: int | None) -> int:
        head_dim = given if given is not None else self.metadata.get("head_dim")
        if head_dim is None:
            raise ProfileError("head_dim is unknown: the profile's metadata does not record it; pass head_dim=")
        return integer(head_dim, "head_dim", 1)


def _listed(value: Any) -> Any:
    """Tuples, arrays and tensors as lists; everything else unchanged."""
    if isinstance(value, tuple):
        return list(value)
    return value.tolist() if hasattr(value, "tolist") and not isinstance(value, numbers.Number) else value


def _itemsize(dtype: Any) -> int:
    name = str(dtype).removeprefix("torch.")
    if name not in _ITEMSIZE:
        raise ProfileError(f"dtype is {shorten(dtype)}; expected one of {', '.join(_ITEMSIZE)}")
    return _ITEMSIZE[name]
