"""One decode step of a layer (`append`, then `decode`) again and again, for no more than the driver's own calls.

An eager decode step waits for the host. What a launcher works out (grid, variant, constants, descriptors of the pages)
is the same at every step of a layer as long as its page table stays; only the addresses of the new rows, of the lengths
and of the output move. `record` runs a step and keeps its launches, `Replay` makes them again with other addresses.

A launch that was given a tensor which is neither one of the step's arguments nor its output nor `launching.scratch`
cannot be repeated: then there is no `Replay`, and nothing else is different.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from . import append_kernel, decode_kernel, launching, ops

_LAUNCHER_ARGUMENTS = ("gridX", "gridY", "gridZ", "stream", "function")
# the public function also looks whether CUDA is set up
_current_device = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)


@dataclass(frozen=True)
class _Hole:
    """An argument that is given anew: an offset from the address of one that moves."""

    which: int
    offset: int


class Replay:
    """The launches of one step.

    Attributes:
        scratch_bytes: device memory that a step needs while it runs.
    """

    def __init__(self, launches: Sequence[tuple[Any, ...]], moving: Sequence[Any], out: Tensor, scratch: Tensor):
        """``launches`` as `launching.Recorder` has them; ``moving``: the arguments whose addresses are given anew."""
        self.shape, self.scratch_bytes = out.shape, scratch.untyped_storage().nbytes()
        self.index = out.device.index
        known = [*moving, out]
        base = scratch.untyped_storage().data_ptr()

        def opened(argument: Any) -> Any:
            if not isinstance(argument, Tensor):
                return argument
            for i, other in enumerate(known):
                if argument is other:
                    return _Hole(i, 0)
            if argument.untyped_storage().data_ptr() == base:
                return _Hole(len(known), argument.data_ptr() - base)
            return argument.data_ptr()

        self._launches = []
        for (run, function, metadata, rest), grid, args in launches:
            launch, call = _driver_call(run, (*grid, None, function), metadata, [*map(opened, args), *rest])
            holes = tuple((i, x.which, x.offset) for i, x in enumerate(call) if isinstance(x, _Hole))
            self._launches.append((launch, call, holes))
        self._stream = triton.runtime.driver.active.get_current_stream

    @staticmethod
    def observed() -> bool:
        """Whether somebody follows launches; a replay is not for them to see."""
        return launching.observed()

    def __call__(self, addresses: Sequence[int], like: Tensor, scratch: dict[int, Tensor]) -> Tensor:
        """Launch on the current stream of the device recorded on.

        Args:
            addresses: of the moving arguments; aligned to 16 bytes where those recorded were.
            like: a tensor of the output's dtype and device.
            scratch: memory by stream, kept here from call to call: one launch after the other may use the same.
        """
        if _current_device() != self.index:
            with torch.cuda.device(self.index):  # a model spread over several GPUs does not change the current one
                return self(addresses, like, scratch)
        out = like.new_empty(self.shape)
        stream = self._stream(self.index)
        memory = scratch.get(stream)
        if memory is None or memory.numel() < self.scratch_bytes:
            memory = scratch[stream] = like.new_empty(self.scratch_bytes, dtype=torch.uint8)
        known = (*addresses, out.data_ptr(), memory.data_ptr())
        for run, call, holes in self._launches:
            for place, which, offset in holes:
                call[place] = known[which] + offset
            call[3] = stream
            run(*call)
        return out


def _driver_call(
    run: Any, head: tuple[Any, ...], metadata: Any, args: list[Any]
) -> tuple[Callable[..., Any], list[Any]]:
    """What to call, and with what, for the launch that ``run(*head, metadata, no hooks, *args)`` makes.

    That is ``run`` itself, unless it is the launcher of triton 3.6: then what that calls, with the descriptors among the
    arguments encoded now instead of at every launch.
    """
    hooks = (None, None, None)
    code = getattr(type(run).__call__, "__code__", None)
    known = code is not None and code.co_varnames[1 : code.co_argcount] == _LAUNCHER_ARGUMENTS
    if not known or run.global_scratch_size or run.profile_scratch_size:
        return run, [*head, metadata, *hooks, *args]
    launch, code = run.launch, getattr(run.launch, "__code__", None)
    if code is not None and code.co_freevars == ("launcher", "tensordesc_indices", "tensordesc_meta"):
        encode = launch.__globals__["make_tensordesc_arg"]
        launch, indices, described = (cell.cell_contents for cell in launch.__closure__)
        encoded = iter(described)
        args = [x for i, given in enumerate(args) for x in (encode(given, next(encoded)) if i in indices else (given,))]
    return launch, [*head, run.launch_cooperative_grid, run.launch_pdl, None, None, metadata, *hooks, *args]


def record(
    k: Tensor,
    v: Tensor,
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    before: Tensor,
    after: Tensor,
    sink: Tensor,
    window: Tensor,
    ring: Tensor,
    scale: float,
    softcap: float,
    s_aux: Tensor | None,
    model_window: int,
    exact_positions: bool,
) -> tuple[Tensor, Replay | None]:
    """`append` of ``k`` and ``v`` behind ``before`` tokens and `decode` of ``q`` over ``after``; arguments as there, checked.

    Returns:
        The output, and what repeats the step with other ``k``, ``v``, ``q``, ``before``, ``after`` and ``s_aux`` of the
        same shapes, strides and dtypes over the same pages, table and heads; None where it cannot be repeated.
    """
    place = (k_pages, v_pages, block_table)
    first = (k, v, *place, before, sink, ring)
    second = (q, *place, after, sink, window, ring, scale, softcap, s_aux, model_window, exact_positions)
    moving = (k, v, q, before, after, s_aux)
    if ops.why_not(q, k_pages, v_pages, q.shape[1] // block_table.shape[1]) is None and q.numel() and k is not v:
        with launching.Recorder() as recorder:
            try:
                append_kernel.append(*first)
                out = decode_kernel.decode(*second)
                return out, _replay(recorder, moving, (*place, sink, window, ring), out)
            except Exception as error:
                if not ops.does_not_fit(error):
                    raise
    torch.ops.segpaged_attention.append(*first)
    return torch.ops.segpaged_attention.decode(*second), None


def _replay(recorder: launching.Recorder, moving: Sequence[Any], stays: Sequence[Tensor], out: Tensor) -> Replay | None:
    if recorder.lost or len(recorder.scratch) != 1:
        return None
    base = recorder.scratch[0].untyped_storage().data_ptr()
    for _, _, args in recorder.launches:
        for argument in args:
            known = any(argument is other for other in (*moving, *stays, out))
            if isinstance(argument, Tensor) and not known and argument.untyped_storage().data_ptr() != base:
                return None
    return Replay(recorder.launches, moving, out, recorder.scratch[0])
