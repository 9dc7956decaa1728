"""Finds the FFNs of a decoder by what they do, not by what they are called.

The decoder runs once over a few tokens while the direct children of its layers are watched. A child with weights that
maps rows ``[batch, n, dim]`` to rows, each by itself, is (part of) the FFN; children that mix rows are mixers, such as
attention. Then each layer runs again with zeros in place of its FFN. Its output must be what stood before the FFN (a
sequential block), or its input plus what the mixer gave (a parallel block): only then does a row without FFN keep its
residual. A block that does not pass is refused by name.

What this module does not know: schedules, caches, importance.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from ..errors import RedKnotError, UnsupportedModel
from ..heads.model_shape import text_config

__all__ = ["Block", "decoder_of", "find_blocks", "gathered_rows"]

PROBE_TOKENS = 8
SOME_ROWS = (2, 5)  # rows that are fed alone to see whether rows are independent
TOLERANCE = 2e-2  # of the largest value: other row counts take other GEMM tiles, in bf16 they differ by about 4e-3
_MIXER_WORDS = {"attention_mask", "past_key_values", "cache", "position_embeddings", "position_ids", "cache_params"}


@dataclass(frozen=True)
class Block:
    """One decoder layer.

    Attributes:
        index: of the layer.
        layer: the module.
        ffn: names of the children that are its FFN, in the order they run.
        mixers: names of the children that mix rows.
        parallel: FFN and mixer read the same input, so that the mixer may run after the FFN.
        ffn_first: the FFN runs before the mixer.
        norm: name of the child that norms rows for the FFN and for nothing else, so that it too can do with the rows that
            pass; "" where there is none.
        adds: the residual gets what the FFN gives, at most times a number; False where it is normed first.
    """

    index: int
    layer: torch.nn.Module
    ffn: tuple[str, ...]
    mixers: tuple[str, ...]
    parallel: bool
    ffn_first: bool
    norm: str = ""
    adds: bool = False


def decoder_of(model: torch.nn.Module) -> torch.nn.Module:
    """The model without its head on top; a decoder itself is returned as it is."""
    getter: Any = getattr(model, "get_decoder", None)
    found = getter() if getter is not None else None
    return found if found is not None else getattr(model, "base_model", model)


_known: weakref.WeakKeyDictionary[torch.nn.Module, tuple[tuple[int, ...], list[dict[str, Any]]]]
_known = weakref.WeakKeyDictionary()


@torch.no_grad()
def find_blocks(model: torch.nn.Module) -> list[Block]:
    """The layers of a decoder-only model, probed once per model: one forward over 8 tokens, and each layer once more.

    Raises:
        UnsupportedModel: no list of layers, or a layer whose FFN cannot be left out row by row; says which and why.
    """
    decoder = decoder_of(model)
    layers = _layers(decoder)
    identity = tuple(id(child) for layer in layers for child in (layer, *layer.children()))
    known = _known.get(decoder)
    if known is None or known[0] != identity:
        watched = _watch(decoder, layers)
        known = identity, [_examine(index, seen) for index, seen in enumerate(watched)]
        _known[decoder] = known
    blocks = [Block(index, layer, **found) for index, (layer, found) in enumerate(zip(layers, known[1], strict=True))]
    if not any(block.ffn for block in blocks):
        raise UnsupportedModel(
            f"{type(layers[0]).__name__} has no FFN module that maps rows to rows (children: "
            f"{', '.join(name for name, _ in layers[0].named_children())}), so a sparse FFN cannot be put in"
        )
    return blocks


def _layers(decoder: torch.nn.Module) -> torch.nn.ModuleList:
    config: Any = getattr(decoder, "config", None)
    count = getattr(text_config(config), "num_hidden_layers", None) if config is not None else None
    lists = [module for module in decoder.modules() if isinstance(module, torch.nn.ModuleList) and len(module)]
    if count is not None:
        lists = [module for module in lists if len(module) == count]
    if not lists:
        raise UnsupportedModel(
            f"{type(decoder).__name__} has no list of {count or ''} decoder layers".replace("  ", " ")
        )
    return lists[0]  # modules() goes from the outside in


@dataclass
class _Call:
    """One call of a child: what went in, what came out, and when."""

    child: torch.nn.Module
    order: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any = None
    times: int = 1

    @property
    def input(self) -> torch.Tensor | None:
        return hidden_states(self.args, self.kwargs)


@dataclass
class _Seen:
    """One layer in the watched forward."""

    layer: torch.nn.Module
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    output: Any = None
    times: int = 0
    calls: dict[str, _Call] = field(default_factory=dict)


def hidden_states(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
    """The rows that a module was called with: its first argument, by position or as ``hidden_states``."""
    first = args[0] if args else kwargs.get("hidden_states")
    return first if isinstance(first, torch.Tensor) else None


def first_of(output: Any) -> Any:
    """A module's output, or the first of several."""
    return output[0] if isinstance(output, (tuple, list)) and output else output


def _watch(decoder: torch.nn.Module, layers: torch.nn.ModuleList) -> list[_Seen]:
    if decoder.training:
        raise RedKnotError("the model is in training mode: call model.eval() before SparseFFN")
    seen = [_Seen(layer) for layer in layers]
    order = 0
    hooks = []

    def before_layer(entry: _Seen) -> Any:
        def hook(module: torch.nn.Module, args: Any, kwargs: Any) -> None:
            entry.args, entry.kwargs, entry.times = args, kwargs, entry.times + 1

        return hook

    def after_layer(entry: _Seen) -> Any:
        def hook(module: torch.nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            entry.output = output

        return hook

    def after_child(entry: _Seen, name: str) -> Any:
        def hook(module: torch.nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            nonlocal order
            order += 1
            times = entry.calls[name].times + 1 if name in entry.calls else 1
            entry.calls[name] = _Call(module, order, args, kwargs, output, times)

        return hook

    for entry in seen:
        hooks.append(entry.layer.register_forward_pre_hook(before_layer(entry), with_kwargs=True))
        hooks.append(entry.layer.register_forward_hook(after_layer(entry), with_kwargs=True))
        for name, child in entry.layer.named_children():
            hooks.append(child.register_forward_hook(after_child(entry, name), with_kwargs=True))
    device = next(decoder.parameters()).device
    ids = torch.arange(1, 1 + PROBE_TOKENS, device=device)[None]
    vocabulary = getattr(text_config(decoder.config), "vocab_size", None) or 1 << 30
    try:
        decoder(input_ids=ids % vocabulary, use_cache=False)
    except RedKnotError:
        raise
    except Exception as error:  # a model that needs more than tokens
        raise UnsupportedModel(f"{type(decoder).__name__} does not run over plain tokens: {error}") from error
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _examine(index: int, seen: _Seen) -> dict[str, Any]:
    name = f"layer {index} ({type(seen.layer).__name__})"
    rows = hidden_states(seen.args, seen.kwargs)
    if seen.times != 1 or rows is None or rows.dim() != 3:
        raise UnsupportedModel(f"{name} is not called once with hidden states [batch, rows, dim]: no sparse FFN")
    mixers: list[str] = []
    ffn: list[str] = []
    for child, call in seen.calls.items():
        if call.kwargs.keys() & _MIXER_WORDS:
            mixers.append(child)
        elif _has_matrix(call.child) and call.times == 1 and call.input is not None:
            (ffn if _is_by_row(call, rows.shape[:2]) else mixers).append(child)
    ffn.sort(key=lambda child: seen.calls[child].order)
    if not ffn:
        return {"ffn": (), "mixers": tuple(mixers), "parallel": False, "ffn_first": False}
    without = _without_ffn(seen, ffn)
    before = [call.input for call in seen.calls.values() if call.input is not None]
    full = first_of(seen.output)
    sequential = any(_is_residual(without, x, full) for x in before if x is not rows)
    added = [first_of(seen.calls[mixer].output) for mixer in mixers]
    sums = [rows + sum(added)] if added and all(_alike(x, rows) for x in added) else [rows]
    parallel = not sequential and any(_is_residual(without, x, full) for x in sums)
    if not sequential and not parallel:
        raise UnsupportedModel(
            f"{name}: without {' and '.join(ffn)} its output is not its residual, so rows cannot leave the FFN out. A "
            "sparse FFN needs blocks of the form norm -> FFN -> residual"
        )
    first = bool(mixers) and seen.calls[ffn[0]].order < min(seen.calls[mixer].order for mixer in mixers)
    norm = "" if parallel or len(ffn) > 1 else _norm_of(seen, ffn[0], mixers, rows.shape[:2])
    half = _without_ffn(seen, ffn, 0.5)
    adds = _is_residual(half, (full + without) / 2, without)
    return {
        "ffn": tuple(ffn), "mixers": tuple(mixers), "parallel": parallel, "ffn_first": first, "norm": norm, "adds": adds,
    }  # fmt: skip


def _norm_of(seen: _Seen, ffn: str, mixers: list[str], shape: torch.Size) -> str:
    """The child whose output is the FFN's input and nothing else's; found by running the layer with few rows in between."""
    ffn_call = seen.calls[ffn]
    for name, call in seen.calls.items():
        made = first_of(call.output)
        if name == ffn or name in mixers or call.times != 1 or made is not ffn_call.input or _has_matrix(call.child):
            continue
        if made is None or not _is_by_row(call, shape):
            continue
        index = torch.tensor(SOME_ROWS, device=made.device)
        with _replaced_rows(ffn_call.child, index, shape, compact=False):
            expected = first_of(seen.layer(*seen.args, **seen.kwargs))
        try:
            with _few_rows(call.child, index), _replaced_rows(ffn_call.child, index, shape, compact=True):
                found = first_of(seen.layer(*seen.args, **seen.kwargs))
        except Exception:  # whatever a layer does with rows that are fewer than it expects
            continue
        if _is_residual(found, expected, first_of(seen.output)):
            return name
    return ""


@contextlib.contextmanager
def _few_rows(norm: torch.nn.Module, index: torch.Tensor) -> Iterator[None]:
    """Inside, the norm gives the rows of ``index`` alone."""
    handle = norm.register_forward_hook(lambda module, args, output: output.flatten(0, 1).index_select(0, index)[None])
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def _replaced_rows(ffn: torch.nn.Module, index: torch.Tensor, shape: torch.Size, compact: bool) -> Iterator[None]:
    """Inside, what the FFN gives is zero but in the rows of ``index``; ``compact``: these alone are what it is given."""

    def hook(module: torch.nn.Module, args: Any, output: Any) -> Any:
        result = first_of(output).flatten(0, 1)
        few = result if compact else result.index_select(0, index)
        whole = result.new_zeros(shape.numel(), result.shape[-1]).index_copy_(0, index, few).unflatten(0, tuple(shape))
        return whole if isinstance(output, torch.Tensor) else type(output)([whole, *output[1:]])

    handle = ffn.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _has_matrix(module: torch.nn.Module) -> bool:
    weights = [*module.parameters(), *module.buffers()]  # quantised weights are buffers in some libraries
    return any(weight.dim() >= 2 for weight in weights)


def _is_by_row(call: _Call, shape: torch.Size) -> bool:
    """Whether the child maps each row by itself to a row of the same shape."""
    whole, output = call.input, first_of(call.output)
    if whole is None or not _alike(output, whole) or whole.shape[:2] != shape:
        return False
    index = torch.tensor(SOME_ROWS, device=whole.device)
    args = gathered_rows(call.args, index, shape)
    kwargs = gathered_rows(call.kwargs, index, shape)
    try:
        alone = first_of(call.child(*args, **kwargs))
    except Exception:  # whatever a module raises that was not made for this
        return False
    return isinstance(alone, torch.Tensor) and _close(alone, output.index_select(1, index))


def gathered_rows(value: Any, index: torch.Tensor, shape: torch.Size | tuple[int, int]) -> Any:
    """``value`` with every tensor ``[batch, rows, ...]`` in it reduced to ``[1, n, ...]``, the rows of ``index``.

    Args:
        value: a tensor, or tuples, lists and dicts of them; anything else stays.
        index: int64 ``[n]`` into the flattened ``[batch * rows]``.
        shape: (batch, rows).
    """
    if type(value) is torch.Tensor and value.dim() >= 2 and value.shape[:2] == tuple(shape):
        return value.flatten(0, 1).index_select(0, index)[None]
    if type(value) in (tuple, list):
        return type(value)(gathered_rows(item, index, shape) for item in value)
    if type(value) is dict:
        return {key: gathered_rows(item, index, shape) for key, item in value.items()}
    return value


def _without_ffn(seen: _Seen, ffn: list[str], share: float = 0.0) -> Any:
    """The layer's output with ``share`` of what its FFN gives."""
    with contextlib.ExitStack() as stack:
        for name in ffn:
            stack.enter_context(_scaled(seen.calls[name].child, share))
        return first_of(seen.layer(*seen.args, **seen.kwargs))


@contextlib.contextmanager
def _scaled(module: torch.nn.Module, share: float) -> Iterator[None]:
    def hook(module: torch.nn.Module, args: Any, output: Any) -> Any:
        part = torch.zeros_like(first_of(output)) if share == 0 else first_of(output) * share
        return part if isinstance(output, torch.Tensor) else type(output)([part, *output[1:]])

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _alike(x: Any, y: torch.Tensor) -> bool:
    return isinstance(x, torch.Tensor) and x.shape == y.shape


def _is_residual(without: Any, x: torch.Tensor, full: torch.Tensor) -> bool:
    """Whether ``without`` equals ``x``, measured by what the FFN adds: small weights must not make everything equal."""
    if not _alike(without, x) or not _alike(full, x):
        return False
    added = (full.float() - without.float()).abs().max()
    rounding = 2 * torch.finfo(x.dtype).eps * x.float().abs().max()
    return bool((without.float() - x.float()).abs().max() <= 1e-2 * added + rounding)


def _close(x: Any, y: torch.Tensor) -> bool:
    if not _alike(x, y) or not x.is_floating_point():
        return False
    x, y = x.float(), y.float()
    return bool((x - y).abs().max() <= TOLERANCE * y.abs().max())
