"""`SparseFFN`: puts a schedule into effect on a model, in one thread, until the context ends.

Inside, each FFN module of the model, and the norm before it, has an instance attribute ``forward``, and a few hooks feed
what the forward knows.
They are put in when the first context on the model opens and taken out when the last one closes, whatever the order;
afterwards the modules are what they were. A forward in a thread without an open context, or while torch.compile traces,
runs the original.

What this module does not know: how importance is measured (`importance`) and how rows are chosen (`selection`).
"""

from __future__ import annotations

import inspect
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .. import attention
from ..errors import RedKnotError, UnsupportedModel, shorten
from .run import Run, rows_of
from .schedule import SparseFFNSchedule
from .stats import SparseFFNStats
from .structure import Block, decoder_of, find_blocks, first_of, hidden_states

__all__ = ["SparseFFN"]

_lock = threading.RLock()
_installed: weakref.WeakKeyDictionary[torch.nn.Module, _Installation] = weakref.WeakKeyDictionary()
_by_module: dict[int, tuple[_Installation, int]] = {}  # id of a module inside a layer -> layer; replaced as a whole


class SparseFFN:
    """While inside, prefill runs the model's later FFNs only on rows that matter. *Approximate*, unless ``mass=1.0``.

    A row that is left out keeps its residual: the FFN adds nothing to it. Sinks, the first rows of segments, the last
    ``recent`` rows, query rows and decode rows always pass; padding never does. Works with any cache, in batches, in
    chunked prefill (each chunk by itself) and around `SegmentedPrompt.build`, where the one forward over recomputed
    rows and query is made sparse and documents are still captured dense. Contexts may be nested, on one model or
    several: the innermost on a model holds. A context belongs to the thread that entered it.

    Args:
        model: a decoder-only model of transformers, in eval mode.
        schedule: what passes, or the name of a measured preset. There is no default: what a model tolerates has to be
            measured (docs/sparse-ffn.md).
        query_tokens: trailing tokens of the prompt that ask; they always pass, and their attention is what
            "received_attention" counts if they are more than ``schedule.query_block``.
        boundaries: request positions at which segments begin.

    Attributes:
        stats: rows seen and run, by layer, over everything that ran inside.

    Raises:
        UnsupportedModel: a layer's FFN is not of the form norm -> FFN -> residual; says which.
        RedKnotError: the model is in training mode, or attention is to be measured in a model that does not run
            attn_implementation="redknot".

    Example:
        >>> with SparseFFN(model, SparseFFNSchedule(keep=0.5, first_layer=20)):
        ...     model.generate(**inputs, past_key_values=cache)
    """

    def __init__(
        self,
        model: torch.nn.Module,
        schedule: SparseFFNSchedule | str,
        *,
        query_tokens: int = 0,
        boundaries: Sequence[int] = (),
    ):
        if isinstance(schedule, str):
            schedule = SparseFFNSchedule.preset(schedule)
        if not isinstance(schedule, SparseFFNSchedule):
            raise RedKnotError(
                f"schedule={shorten(schedule)}: expected a SparseFFNSchedule, or the name of a preset as a string"
            )
        if not isinstance(query_tokens, int) or isinstance(query_tokens, bool) or query_tokens < 0:
            raise RedKnotError(f"query_tokens={shorten(query_tokens)}: expected a number of tokens, 0 or more")
        self.boundaries = tuple(int(start) for start in boundaries)
        if any(start < 0 for start in self.boundaries):
            raise RedKnotError(f"boundaries={shorten(boundaries)}: expected request positions, 0 or more")
        self.model, self.schedule, self.query_tokens = model, schedule, query_tokens
        self._decoder = decoder_of(model)
        self._refuse_training()
        self._blocks = find_blocks(model)
        self.rules = schedule.rules(len(self._blocks))
        for block, rule in zip(self._blocks, self.rules, strict=True):
            if schedule.fill == "mean" and rule is not None and block.ffn and not block.adds:
                raise UnsupportedModel(
                    f"layer {block.index} ({type(block.layer).__name__}) changes what its FFN gives before it adds it, so "
                    "a mean of it cannot stand for rows that are left out: take fill='nothing'"
                )
        self.observed = self._observed()
        self._check_attention()
        self.stats = SparseFFNStats(len(self._blocks))

    def __enter__(self) -> SparseFFN:
        self._refuse_training()
        self._check_attention()
        with _lock:
            installation = _installed.get(self._decoder)
            if installation is None:
                installation = _Installation(self._decoder, self._blocks)
                installation.install()
                _installed[self._decoder] = installation
            installation.push(self)
        return self

    def __exit__(self, *exception: object) -> None:
        with _lock:
            installation = _installed[self._decoder]
            installation.pop(self)
            if installation.idle:
                installation.remove()
                del _installed[self._decoder]

    def begin(self, arguments: dict[str, Any]) -> Run | None:
        """What a forward with these arguments of the decoder has to do; None for one that runs dense."""
        self._refuse_training()
        if not any(self.rules):
            return None
        rows = rows_of(arguments, max(self.schedule.min_rows, 2))
        if rows is None:
            return None
        splice = rows.splice
        if splice is not None and splice.layout is None:
            return None  # documents are captured, and selectors look, with the model as it is

        def count(layer: int, seen: int, run: int) -> None:
            self.stats.add(layer, seen, run)
            if splice is not None:
                splice.skipped += seen - run

        return Run(self.schedule, self.rules, self.observed, rows, self.query_tokens, self.boundaries, count)

    def _refuse_training(self) -> None:
        if self._decoder.training:
            grad = " with gradients" if torch.is_grad_enabled() else ""
            raise RedKnotError(f"the model is in training mode{grad}: SparseFFN serves inference, call model.eval()")

    def _observed(self) -> frozenset[int]:
        """Layers whose attention is measured: for each that ranks by it the last one that attends before its FFN."""
        if self.schedule.importance != "received_attention":
            return frozenset()
        found, ranking = set(), self.schedule.measured(len(self._blocks))
        for block in self._blocks:
            if block.index in ranking and block.ffn:
                last = block.index - 1 if block.ffn_first else block.index
                attending = [b.index for b in self._blocks[: last + 1] if b.mixers and _attends(b)]
                found.update(attending[-1:])
        if ranking and not found:
            raise UnsupportedModel(
                f"{type(self._decoder).__name__} has no attention before its sparse FFNs that could be measured: take "
                "importance='attention_norm' or 'hidden_change'"
            )
        return frozenset(found)

    def _check_attention(self) -> None:
        if not self.observed:
            return
        running = getattr(self._decoder.config, "_attn_implementation", None)
        if running != attention.NAME:
            raise RedKnotError(
                f"importance='received_attention' is measured inside attn_implementation={attention.NAME!r}, the "
                f"model runs {running!r}: call model.set_attn_implementation({attention.NAME!r}), or take "
                "importance='attention_norm'"
            )


def _attends(block: Block) -> bool:
    """Whether a mixer of the block looks like attention to the attention interface: modules called by it say causal."""
    return any(hasattr(m, "is_causal") for name in block.mixers for m in getattr(block.layer, name).modules())


class _Installation:
    """The wrapped norms and FFNs and the hooks of one decoder, and who uses them.

    Args:
        decoder, blocks: of the model. The decoder is held weakly: it is the key under which this is found.
    """

    def __init__(self, decoder: torch.nn.Module, blocks: list[Block]):
        self._decoder = weakref.ref(decoder)
        self.blocks = blocks
        self.open: dict[int, list[SparseFFN]] = {}  # thread -> contexts, innermost last
        self.runs: dict[int, Run | None] = {}  # thread -> forward that is running
        self._hooks: list[Any] = []
        self._wrapped: list[tuple[torch.nn.Module, Callable[..., Any], Any]] = []

    @property
    def idle(self) -> bool:
        return not self.open

    def push(self, context: SparseFFN) -> None:
        self.open.setdefault(threading.get_ident(), []).append(context)

    def pop(self, context: SparseFFN) -> None:
        thread = threading.get_ident()
        if context not in self.open.get(thread, ()):  # closed by another thread than it was opened by
            thread = next(key for key, contexts in self.open.items() if context in contexts)
        contexts = self.open[thread]
        del contexts[len(contexts) - 1 - contexts[::-1].index(context)]
        if not contexts:
            del self.open[thread]
            self.runs.pop(thread, None)

    def run(self) -> Run | None:
        return self.runs.get(threading.get_ident())

    # ------------------------------------------------------------------------------------------- putting in, taking out
    def install(self) -> None:
        global _by_module
        decoder = self._decoder()
        assert decoder is not None
        try:
            signature = inspect.signature(decoder.forward)
            self._hooks += [
                decoder.register_forward_pre_hook(self._enter(signature), with_kwargs=True),
                decoder.register_forward_hook(self._leave, always_call=True),
            ]
            found = {}
            for block in self.blocks:
                self._hooks.append(block.layer.register_forward_pre_hook(self._enter_layer, with_kwargs=True))
                for name in block.mixers:
                    mixer = getattr(block.layer, name)
                    self._hooks.append(mixer.register_forward_hook(self._after_mixer))
                    found.update({id(module): (self, block.index) for module in mixer.modules()})
                if block.norm:
                    ffn = getattr(block.layer, block.ffn[0])
                    self._wrap(getattr(block.layer, block.norm), block.index, Run.norm, before=ffn)
                for name in block.ffn:
                    self._wrap(getattr(block.layer, name), block.index, Run.ffn)
            _by_module = {**_by_module, **found}
            attention.observe(_look)
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        global _by_module
        for hook in self._hooks:
            hook.remove()
        for module, wrapper, before in self._wrapped:
            if module.__dict__.get("forward") is not wrapper:
                continue  # somebody wrapped the wrapper; it passes everything on by now
            if before is None:
                del module.forward
            else:
                module.forward = before
        self._hooks, self._wrapped = [], []
        _by_module = {key: entry for key, entry in _by_module.items() if entry[0] is not self}
        if not _by_module:
            attention.observe(_look, wanted=False)

    def _wrap(
        self, module: torch.nn.Module, layer: int, how: Callable[..., Any], before: torch.nn.Module | None = None
    ) -> None:
        """``before``: the FFN that `module` norms rows for."""
        original, own = module.forward, module.__dict__.get("forward")

        def forward(*args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling():
                return original(*args, **kwargs)
            if before is not None and getattr(before, "_compiled_call_impl", None) is not None:
                return original(*args, **kwargs)  # `before.compile()`: it runs dense and must get all rows
            run = self.run()
            x = hidden_states(args, kwargs)
            if run is None or x is None or x.dim() != 3:
                return original(*args, **kwargs)
            if args:
                return how(run, layer, original, x, args[1:], kwargs)
            rest = {key: value for key, value in kwargs.items() if key != "hidden_states"}
            return how(run, layer, original, x, (), rest)

        module.forward = forward
        self._wrapped.append((module, forward, own))

    # ------------------------------------------------------------------------------------------------------------- hooks
    def _enter(self, signature: inspect.Signature) -> Callable[..., None]:
        def hook(module: torch.nn.Module, args: Any, kwargs: Any) -> None:
            if torch.compiler.is_compiling():
                return
            thread = threading.get_ident()
            contexts = self.open.get(thread)
            if contexts:
                bound = signature.bind_partial(*args, **kwargs).arguments
                self.runs[thread] = contexts[-1].begin({**bound, **bound.get("kwargs", {})})

        return hook

    def _leave(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        if not torch.compiler.is_compiling():
            self.runs.pop(threading.get_ident(), None)

    def _enter_layer(self, module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        if torch.compiler.is_compiling():
            return
        run, rows = self.run(), hidden_states(args, kwargs)
        if run is not None and rows is not None:
            run.enter_layer(rows)

    def _after_mixer(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        run, added = self.run(), first_of(output)
        if run is not None and isinstance(added, torch.Tensor):
            run.attention_output = added


def _look(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    mask: Any,
    scaling: float | None,
    sliding_window: int | None,
    softcap: float | None,
    s_aux: torch.Tensor | None,
    other: dict[str, Any],
) -> None:
    """The observer of the attention function, for all installations."""
    if torch.compiler.is_compiling():
        return
    found = _by_module.get(id(module))
    run = found[0].run() if found is not None else None
    if found is None or run is None or other.get("position_bias") is not None:
        return
    if scaling is None:
        scaling = getattr(module, "scaling", None) or query.shape[-1] ** -0.5
    run.see_attention(found[1], query, key, mask, float(scaling), sliding_window, softcap, s_aux)
