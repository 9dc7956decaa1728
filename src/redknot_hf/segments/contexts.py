"""Documents captured in the middle of something: the mean of their keys and values behind several sample contexts.

Right behind the header a document sees nothing but the header and itself. In a prompt other documents stand before it,
which draw attention and add their values, whatever they say. What they say is not known when a document is captured;
that they are there is. So a document that will not come first is captured behind the header and each of a few sample
texts, its keys are rotated back to where they would be right behind the header, and the mean is kept: of everything
that does not depend on the document's own content it is the best guess in the sense of least squares.

It costs one capture for every context, once, and nothing in a build.

What this module does not know: stores, keys of segments, and which contexts are typical.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from ..cache import RedKnotCache
from .capture import batches, capture
from .codec import SegmentEntry
from .entry import SegmentRows, pack
from .rope import Relocator

__all__ = ["capture_mean"]


def capture_mean(
    model: torch.nn.Module,
    make_target: Callable[[], RedKnotCache],
    relocator: Relocator,
    start: int,
    contexts: Sequence[SegmentRows],
    documents: Sequence[Sequence[int]],
    batch_tokens: int = 16384,
) -> Iterator[tuple[int, SegmentEntry]]:
    """Compute documents behind each context and average.

    Args:
        relocator: of the model; moves keys.
        start: position that the entries' keys are rotated for: the header's length.
        contexts: keys and values of header and context from position 0; at least one.
        documents: token ids; at least one each.
        batch_tokens: tokens of one forward.

    Yields:
        (index of the document, its entry), as `capture` does. Sums are kept in fp32 and rounded once.
    """
    for batch in batches([len(document) for document in documents], batch_tokens):
        sums: dict[int, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
        for context in contexts:
            mine = [documents[i] for i in batch]
            for j, entry in capture(model, make_target, context, mine, batch_tokens):
                rows = SegmentRows(entry.tensors, entry.extra["groups"], entry.start, "", 0)
                keys = [
                    _moved(relocator, rows.key(layer), layer, rows.start, start) for layer in range(len(rows.where))
                ]
                values = [rows.value(layer).float() for layer in range(len(rows.where))]
                if batch[j] not in sums:
                    sums[batch[j]] = (keys, values)
                    continue
                for total, new in zip(sums[batch[j]], (keys, values), strict=True):
                    for t, x in zip(total, new, strict=True):
                        t += x
        dtype = next(iter(entry.tensors.values())).dtype
        for i, (keys, values) in sums.items():
            mean_k, mean_v = ([(x / len(contexts)).to(dtype) for x in part] for part in (keys, values))
            yield i, pack(mean_k, mean_v, start)


def _moved(relocator: Relocator, k: torch.Tensor, layer: int, source: int, target: int) -> torch.Tensor:
    """Keys ``[heads, n, dim]`` of positions from ``source`` on as fp32 keys of positions from ``target`` on."""
    k = k.float()
    if source == target or layer in relocator.nope_layers:
        return k
    at = source + torch.arange(k.shape[1], device=k.device)
    return relocator.relocate(k[None], torch.full_like(at, target - source), layer, source=at)[0]
