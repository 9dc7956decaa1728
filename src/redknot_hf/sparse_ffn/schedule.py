"""Which layers run their FFN on which share of the rows: plain, immutable data.

A schedule says per layer how many rows pass (`Band`), which rows always pass, and what makes a row important. It does
not know models; layers are numbers, and a schedule without numbers takes the last third.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..errors import RedKnotError, shorten

__all__ = ["IMPORTANCES", "Band", "SparseFFNSchedule"]

IMPORTANCES = ("received_attention", "attention_norm", "hidden_change")
FILLS = ("nothing", "mean")
_RULES = ("mass", "keep", "above_mean")


@dataclass(frozen=True)
class Band:
    """What layers from `first` on keep, up to the next band. Exactly one of `mass`, `keep`, `above_mean` is set.

    Attributes:
        first: layer index; negative counts from the last layer.
        mass: of the rows that may be skipped, the smallest set whose importance sums to at least this share of theirs;
            the row that crosses the line is kept. 1.0 is dense, bit for bit; 0.0 skips all that may be skipped.
        keep: share of all real rows that pass, rows that always pass included.
        above_mean: rows whose importance is at least this multiple of the mean over all real rows.
    """

    first: int
    mass: float | None = None
    keep: float | None = None
    above_mean: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.first, int) or isinstance(self.first, bool):
            raise RedKnotError(f"first={shorten(self.first)}: expected the index of a layer")
        given = [name for name in _RULES if getattr(self, name) is not None]
        if len(given) != 1:
            raise RedKnotError(
                f"a band of a sparse FFN schedule has {given or 'no rule'}: give exactly one of mass, keep, above_mean"
            )
        _check_number(given[0], getattr(self, given[0]), math.inf if given[0] == "above_mean" else 1.0)

    @property
    def dense(self) -> bool:
        """Every row passes."""
        return self.mass == 1.0 or self.keep == 1.0 or self.above_mean == 0.0

    @property
    def ranks(self) -> bool:
        """Importance has a say: neither all rows pass nor only those that always do."""
        return not self.dense and self.mass != 0.0 and self.keep != 0.0


@dataclass(frozen=True)
class SparseFFNSchedule:
    """A schedule for `SparseFFN`.

    Attributes:
        mass, keep, above_mean: what sparse layers keep, as in `Band`. At most one of them; none if `bands` say it all.
        first_layer: layers before it run dense. None: two thirds of the layers, because early FFNs are not optional
            (docs/sparse-ffn.md).
        bands: other rules for deeper layers; a band holds until the next one begins.
        sink: first tokens of a request that always pass.
        boundary: first tokens of each segment that always pass.
        recent: last rows of a forward that always pass. A forward of at most this many rows is dense, so decode steps
            and drafts of assisted decoding are.
        importance: "received_attention": attention that a row's key receives from the last `query_block` queries, summed
            over query heads; "attention_norm": L2 norm of what attention adds to the row (the paper's);
            "hidden_change": |x - x'| / |x'| of the layer's input x and the input x' of the layer before; or a callable
            that takes a `LayerView` and returns float ``[batch, rows]``.
        query_block: queries whose attention counts, the last real ones; all query rows if the query is known and longer.
        memory: received attention of a layer is that of this layer plus so much of what the sparse layer measured before it
            had; 0 looks at each layer alone, 1 sums all.
        fill: what a row that is left out gets from the FFN. "nothing": it keeps its residual; "mean": the mean of what the
            FFN gives to the rows of its sequence that pass, sinks apart.
        bucket: kept rows of each sequence are rounded up to a multiple of this, with the next rows in importance, and
            where only rows pass that always do, with the most recent ones. 64 suits GEMM tiles; 1 keeps exactly what
            the rule says.
        min_rows: forwards of fewer rows per sequence are dense: gathering would cost more than it saves.
        name: what to call it in reports.
        notes: what an imported file says that a schedule cannot.

    Raises:
        RedKnotError: a value is out of range; the message names it.
    """

    mass: float | None = None
    keep: float | None = None
    above_mean: float | None = None
    first_layer: int | None = None
    bands: tuple[Band, ...] = ()
    sink: int = 4
    boundary: int = 8
    recent: int = 128
    importance: str | Callable[[Any], Any] = "received_attention"
    query_block: int = 64
    memory: float = 0.0
    fill: str = "nothing"
    bucket: int = 64
    min_rows: int = 256
    name: str = ""
    notes: tuple[str, ...] = dataclasses.field(default=(), compare=False)

    def __post_init__(self) -> None:
        given = [name for name in _RULES if getattr(self, name) is not None]
        if len(given) > 1:
            raise RedKnotError(f"a sparse FFN schedule has {' and '.join(given)}: give one of them")
        object.__setattr__(self, "bands", tuple(self.bands))
        if not given and not self.bands:
            raise RedKnotError("a sparse FFN schedule keeps what? Give mass, keep or above_mean, or bands")
        if given:
            Band(0, **{given[0]: getattr(self, given[0])})
        elif self.first_layer is not None:
            raise RedKnotError("first_layer without mass, keep or above_mean: give the rule, or put it into bands")
        if self.first_layer is not None:
            Band(self.first_layer, keep=1.0)
        for band in self.bands:
            if not isinstance(band, Band):
                raise RedKnotError(f"bands holds {shorten(band)}: expected Band(first, mass=... or keep=...)")
        for name in ("sink", "boundary", "recent", "query_block", "bucket", "min_rows"):
            value, least = getattr(self, name), int(name in ("query_block", "bucket"))
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise RedKnotError(f"{name}={shorten(value)}: expected a whole number, {least} or more")
        if self.fill not in FILLS:
            raise RedKnotError(f"fill={shorten(self.fill)}: expected one of {', '.join(map(repr, FILLS))}")
        _check_number("memory", self.memory, 1.0)
        if not callable(self.importance) and self.importance not in IMPORTANCES:
            raise RedKnotError(
                f"importance={shorten(self.importance)}: expected one of {', '.join(map(repr, IMPORTANCES))}, or a "
                "callable that takes a LayerView and returns a score per row"
            )

    def rules(self, layers: int) -> list[Band | None]:
        """The band of every layer of a model with this many; None for layers that run dense.

        Raises:
            RedKnotError: the schedule names a layer that the model does not have.
        """
        bands = []
        given = [name for name in _RULES if getattr(self, name) is not None]
        if given:
            first = layers * 2 // 3 if self.first_layer is None else self.first_layer
            bands.append(Band(first, **{given[0]: getattr(self, given[0])}))
        bands += self.bands
        starts = []
        for band in bands:
            if not -layers <= band.first <= layers:
                raise RedKnotError(f"the schedule begins at layer {band.first}, the model has {layers} layers")
            starts.append(band.first % layers if band.first < 0 else band.first)
        rules: list[Band | None] = [None] * layers
        for start, band in sorted(zip(starts, bands, strict=True), key=lambda pair: pair[0]):
            rules[start:] = [None if band.dense else band] * (layers - start)
        return rules

    def measured(self, layers: int) -> tuple[int, ...]:
        """Layers of a model with this many in which importance is measured: those where it has a say."""
        return tuple(layer for layer, rule in enumerate(self.rules(layers)) if rule is not None and rule.ranks)

    def replace(self, **changes: Any) -> SparseFFNSchedule:
        """A copy with some attributes changed."""
        return dataclasses.replace(self, **changes)

    @classmethod
    def preset(cls, name: str) -> SparseFFNSchedule:
        """A measured schedule by name, e.g. ``"smollm2-135m-kl0.008"``: model, then measured KL on text.

        Raises:
            RedKnotError: there is no such preset; the message lists them.
        """
        from .presets import PRESETS

        if name not in PRESETS:
            raise RedKnotError(f"preset={shorten(name)}: expected one of {', '.join(sorted(PRESETS))}")
        return PRESETS[name].schedule

    @classmethod
    def import_from(cls, path: Any) -> SparseFFNSchedule:
        """Read a parameter file of the RedKnot authors (``sparse_ffn_params/*.json``).

        Raises:
            RedKnotError: the file is not one; the message says why.
        """
        from .import_redknot import read_parameters

        return read_parameters(path)


def _check_number(name: str, value: Any, most: float) -> None:
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not good or not 0 <= value <= most:
        upto = f"a number from 0 to {most:g}" if math.isfinite(most) else "a finite number, 0 or more"
        raise RedKnotError(f"{name}={shorten(value)}: expected {upto}")
