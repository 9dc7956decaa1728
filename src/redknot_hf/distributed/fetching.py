"""The reader's side of `transfer`: from a description and cells to a cache of this process's heads.

Ranks of one model fetch together: they agree on the publication before they read cells, and on success afterwards, so
that no rank goes on to a forward while another one gives up.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..errors import CacheError, RedKnotError, shorten
from ..heads import HeadProfile
from ..heads.order import config_order
from ..layer import RedKnotLayer
from ..segments.codec import SegmentEntry
from ..segments.stores import SegmentStore
from ..sessions.files import config_digest
from .cells import cell_tokens, fill_layer
from .ranks import Ranks
from .root import CacheMissing, Root, cell_name
from .weights import weights_digest

if TYPE_CHECKING:
    from ..cache import RedKnotCache

__all__ = ["Fetched", "Fetcher"]

ATTEMPTS = 3  # a publication may be replaced while it is read
OPTIONS = ("page_size", "rollback", "kv_dtype")


@dataclass(frozen=True)
class Fetched:
    """A cache that came from a store.

    Attributes:
        cache: holds the heads of this process.
        tokens: int64 ``[batch, n]`` as the writer gave them, on the device of the cache; None if it gave none.
        cells: entries of single heads that were read.
        nbytes: keys and values in them.
        dense_nbytes: what the same tokens of the same heads take in a `DynamicCache`.
    """

    cache: RedKnotCache = field(repr=False)
    tokens: torch.Tensor | None = field(repr=False)
    cells: int
    nbytes: int
    dense_nbytes: int

    @property
    def attention_mask(self) -> torch.Tensor:
        """int64 ``[batch, n]`` for `tokens` (without them, for what the cache holds): 0 for padding."""
        held = [layer for layer in self.cache.paged_layers if layer.is_initialized]
        batch = held[0].batch_size if held else 0
        seen = self.cache.get_seq_length()
        columns = seen if self.tokens is None else self.tokens.shape[1]
        mask = np.ones((batch, max(columns, seen)), np.int64)
        mask[:, :seen] = self.cache.real_columns(batch, seen)
        return torch.from_numpy(mask[:, :columns]).to(held[0].device if held else "cpu")

    @property
    def inputs(self) -> dict[str, torch.Tensor]:
        """What `generate` takes beside the cache: ``input_ids`` and ``attention_mask``.

        Raises:
            RedKnotError: the writer published no tokens.
        """
        if self.tokens is None:
            raise RedKnotError("the cache was published without tokens: pass input_ids and attention_mask of your own")
        return {"input_ids": self.tokens, "attention_mask": self.attention_mask}


class _Missing(Exception):
    """A cell was not there; the publication may have been replaced meanwhile."""


class Fetcher:
    """One call of `fetch`; arguments as there."""

    def __init__(
        self,
        store: SegmentStore,
        key: str,
        name: str,
        config: Any,
        device: torch.device | str | None,
        rank: int | None,
        world_size: int | None,
        group: Any,
        options: dict[str, Any],
    ):
        self.store, self.key, self.name = store, key, name
        self.model = config if isinstance(config, torch.nn.Module) else None
        self.config = config if self.model is None else self.model.config
        self.device = None if device is None else torch.device(device)
        unknown = sorted(set(options) - set(OPTIONS))
        if unknown:
            raise RedKnotError(f"fetch() got {unknown[0]}=; it takes {', '.join(OPTIONS)} for the new cache")
        self.options = {name: value for name, value in options.items() if value is not None}
        if (rank is None) != (world_size is None):
            raise RedKnotError(f"rank={rank}, world_size={world_size}: give both or neither")
        if rank is None or world_size is None:
            self.ranks = Ranks.of_model(self.config, self.model, group)
            self.ranks.require("fetch a cache")
        else:
            self.ranks = Ranks(rank, world_size)
        self.nbytes = self.cells = self.local = 0
        self._devices: dict[int, torch.device] | None = None

    def fetch(self) -> Fetched:
        for attempt in range(ATTEMPTS):
            root = self._agree_on_root(last=attempt == ATTEMPTS - 1)
            if root is None:
                continue
            self._compare_model(root)
            cache, problem, error = None, "", None
            try:
                cache = self._build(root)
            except _Missing as missing:
                problem = str(missing)
            except Exception as other:  # whatever stops this rank must stop the others, too
                problem, error = f"{type(other).__name__}: {other}", other
            if not self.ranks.connected:
                said = [{"problem": problem, "final": error is not None}]
            else:
                said = self.ranks.exchange({"problem": problem, "final": error is not None})
            failed = [(rank, each) for rank, each in enumerate(said) if each["problem"]]
            if not failed:
                assert cache is not None
                return self._fetched(cache, root)
            if error is not None:
                raise error
            where = f"rank {failed[0][0]}: " if len(said) > 1 else ""
            if any(each["final"] for _, each in failed) or attempt == ATTEMPTS - 1 or not self._replaced(root):
                raise CacheMissing(
                    f"the cache published under {shorten(self.key)} cannot be had whole: {where}"
                    f"{failed[0][1]['problem']}. Feed the prompt instead"
                )
        raise AssertionError

    def _agree_on_root(self, last: bool) -> Root | None:
        """The root, the same on all ranks; None if they see different ones and should look again."""
        root, problem = None, ""
        try:
            root = Root.read(self.store, self.name)
        except RedKnotError as error:
            problem = str(error)
        mine = {"edition": None if root is None else root.edition, "problem": problem}
        said = self.ranks.exchange(mine) if self.ranks.connected else [mine]
        for each in said:
            if each["problem"]:
                raise CacheError(f"{shorten(self.key)}: {each['problem']}")
        editions = {each["edition"] for each in said}
        if len(editions) > 1 and not last:
            return None
        if root is None or len(editions) > 1:
            raise CacheMissing(
                f"no cache is published under {shorten(self.key)} in {self.store.url}, or the store did not answer (its "
                "warning says so). Feed the prompt instead"
            )
        return root

    def _replaced(self, root: Root) -> bool:
        """Whether all ranks should look again, because one of them now sees another publication."""
        now = Root.read(self.store, self.name)
        changed = now is not None and now.edition != root.edition
        return any(self.ranks.exchange(changed)) if self.ranks.connected else changed

    def _compare_model(self, root: Root) -> None:
        if root.config != config_digest(self.config):
            raise CacheError(
                f"what is published under {shorten(self.key)} was made with another model than "
                f"{getattr(self.config, '_name_or_path', '') or type(self.config).__name__!r}"
            )
        if self.model is None or root.weights is None or (self.ranks.size > 1 and not self.ranks.connected):
            return
        if weights_digest(self.model, self.ranks) != root.weights:
            raise CacheError(
                f"what is published under {shorten(self.key)} was computed with other weights than this model's: its keys "
                "and values would not fit"
            )

    # ------------------------------------------------------------------------------------------------ the cache
    def _build(self, root: Root) -> RedKnotCache:
        """The cache of this rank; nothing outside it has changed if this fails."""
        from ..cache import RedKnotCache

        profile = HeadProfile.all_global(self.config) if root.profile is None else root.profile
        options = {**root.options, **self.options, "tp_rank": self.ranks.rank, "tp_size": self.ranks.size}
        cache = RedKnotCache(self.config, profile, **options)
        if len(root.layers) != len(cache.layers) or (root.heads and root.heads != profile.num_kv_heads):
            raise CacheError(
                f"it has {len(root.layers)} layers of {root.heads} KV heads, the model {len(cache.layers)} of "
                f"{profile.num_kv_heads}"
            )
        kept = root.kept_rows()
        lens = np.array(root.lens, np.int64)[kept]
        self.local = root.heads // self.ranks.size
        self.nbytes = self.cells = 0
        for index, (layer, said) in enumerate(zip(cache.layers, root.layers, strict=True)):
            if said is None:
                continue
            if not isinstance(layer, RedKnotLayer):
                raise CacheError(f"layer {index} of this model is a {type(layer).__name__}, not one with pages")
            self._prepare(cache, layer, said, root, len(kept))
            names = self._names(cache, index, root)
            entries = self.store.get_many([cell_name(self.name, root.edition, index, head) for head in names])
            cells = [
                self._checked(layer, i, head, entry, lens)
                for i, (head, entry) in enumerate(zip(names, entries, strict=True))
            ]
            fill_layer(cache, layer, lens, cells)
            if len(kept) < len(root.row_of):
                layer.select(np.searchsorted(kept, root.row_of))
        cache.seen = root.seen
        if root.padding is not None:
            real = root.real_columns()
            assert real is not None
            cache.padding = [(0, real)]
        return cache

    def _names(self, cache: RedKnotCache, index: int, root: Root) -> list[int]:
        return root.heads_of_rank(index, self.ranks.rank, self.ranks.size, config_order(cache.config))

    def _prepare(self, cache: RedKnotCache, layer: RedKnotLayer, said: dict[str, Any], root: Root, rows: int) -> None:
        dtype = getattr(torch, said["dtype"])
        if self.model is not None and self.model.dtype != dtype:
            raise CacheError(f"it holds {dtype}, the model runs in {self.model.dtype}: load the model in {dtype}")
        layer.model_window = said["model_window"]
        layer.sink, layer.window, layer.extra_window = cache.geometry(layer.index, self.local, said["model_window"])
        layer.batch_size, layer.num_heads = rows, self.local
        layer.key_dim, layer.value_dim, layer.dtype = said["key_dim"], said["value_dim"], dtype
        layer.device, layer.is_initialized, layer.seen = self._device(layer.index), True, root.seen

    def _device(self, index: int) -> torch.device:
        if self.device is not None:
            return self.device
        if self.model is None:
            return torch.device("cpu")
        if self._devices is None:
            self._devices = dict(layer_devices(self.model))
        return self._devices.get(index) or next(self.model.parameters()).device

    def _checked(
        self, layer: RedKnotLayer, place: int, head: int, entry: SegmentEntry | None, lens: np.ndarray
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if entry is None:
            raise _Missing(
                f"layer {layer.index}, head {head} is missing or damaged, or the store did not answer (its warning says "
                "which)"
            )
        tokens = cell_tokens(layer, place, lens)
        expected = {"k": (tokens, layer.key_dim), "v": (tokens, layer.value_dim)}
        found = {name: tuple(tensor.shape) for name, tensor in entry.tensors.items()}
        wrong = any(tensor.dtype != layer.dtype for tensor in entry.tensors.values())
        if found != expected or wrong or (entry.extra.get("layer"), entry.extra.get("head")) != (layer.index, head):
            raise _Missing(f"layer {layer.index}, head {head} holds {found}, expected {expected} of {layer.dtype}")
        self.nbytes += entry.nbytes
        self.cells += 1
        return entry.tensors["k"], entry.tensors["v"]

    def _fetched(self, cache: RedKnotCache, root: Root) -> Fetched:
        held = [layer for layer in cache.paged_layers if layer.is_initialized]
        device = held[0].device if held else torch.device("cpu")
        return Fetched(
            cache=cache,
            tokens=None if root.tokens is None else root.tokens.to(device),
            cells=self.cells,
            nbytes=self.nbytes,
            dense_nbytes=root.dense_nbytes // self.ranks.size,
        )


def layer_devices(model: torch.nn.Module) -> Iterator[tuple[int, torch.device]]:
    """Where each attention layer runs: accelerate's execution device, or that of its weights."""
    for module in model.modules():
        index = getattr(module, "layer_idx", None)
        if not isinstance(index, int):
            continue
        hook = getattr(module, "_hf_hook", None)
        for part in (module, *module.children()):
            hook = hook or getattr(part, "_hf_hook", None)
        device = getattr(hook, "execution_device", None)
        if device is None:
            device = next((p.device for p in module.parameters() if not p.is_meta), None)
        if device is not None:
            yield index, torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
