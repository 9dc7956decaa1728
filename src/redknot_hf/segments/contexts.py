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
from .entry import SegmentRows
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
        sums: dict[int, dict[str, torch.Tensor]] = {}
        for context in contexts:
            mine = [documents[i] for i in batch]
            for j, entry in capture(model, make_target, context, mine, batch_tokens):
                here = _at(relocator, entry, start)
                if batch[j] in sums:
                    for name, sum_so_far in sums[batch[j]].items():
                        sum_so_far += here[name]
                else:
                    sums[batch[j]], extra = here, entry.extra
        dtypes = {name: tensor.dtype for name, tensor in entry.tensors.items()}
        for i, total in sums.items():
            tensors = {name: (x / len(contexts)).to(dtypes[name]) for name, x in total.items()}
            yield i, SegmentEntry(tensors, num_tokens=len(documents[i]), start=start, extra=extra)


def _at(relocator: Relocator, entry: SegmentEntry, start: int) -> dict[str, torch.Tensor]:
    """The tensors of an entry in fp32, its keys rotated for positions from ``start`` on.

    Layers that rotate alike are moved together: a few launches for each document instead of a few for each layer.
    """
    result = {name: tensor.float() for name, tensor in entry.tensors.items()}
    groups = entry.extra["groups"]
    for group in set(groups):
        name, layers = f"k.{group}", [layer for layer, mine in enumerate(groups) if mine == group]
        kinds = {relocator.groups[layer] for layer in layers}
        if len(kinds) == 1 and not set(layers) & (set(relocator._own) | set(relocator.nope_layers)):
            result[name] = _moved(relocator, result[name], layers[0], entry.start, start)
        else:
            moved = [
                _moved(relocator, result[name][index][None], layer, entry.start, start)
                for index, layer in enumerate(layers)
            ]
            result[name] = torch.cat(moved)
    return result


def _moved(relocator: Relocator, k: torch.Tensor, layer: int, source: int, target: int) -> torch.Tensor:
    """fp32 keys ``[layers, heads, n, dim]`` of positions from ``source`` on as of positions from ``target`` on."""
    if source == target or layer in relocator.nope_layers:
        return k
    at = source + torch.arange(k.shape[2], device=k.device)
    return relocator.relocate(k, torch.full_like(at, target - source), layer, source=at)
