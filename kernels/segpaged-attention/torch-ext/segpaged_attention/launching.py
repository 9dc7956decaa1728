"""Launching a kernel that was launched before, without asking triton again which compiled variant it is.

``kernel[grid](...)`` binds the arguments, describes each of them, and makes a string of the options, 50 us on the host at
every call; an eager decode step makes three such calls per layer and waits for nothing else. Here a variant is remembered
under what triton derives it from: type and alignment of every tensor, divisibility of every integer, all constants.

The first launch of a variant, anything that is no compiled `JITFunction` (triton's interpreter), and launches that
somebody observes (profilers hook in there) take triton's own way.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
import triton
from triton import knobs

# triton's own cdiv and next_power_of_2 are made for kernels: on the host a call takes longer than the rest of a launcher


def cdiv(x: int, y: int) -> int:
    return -(-x // y)


def power_of_2(n: int) -> int:
    """The smallest power of two that is not below ``n`` (1 or more)."""
    return 1 << (n - 1).bit_length()


class Recorder:
    """What is launched in this thread between entering and leaving, and the scratch memory that was taken for it.

    Attributes:
        launches: (variant, grid, args) of each launch; variant as in `_variants`.
        scratch: what `scratch` gave.
        lost: something was launched in triton's own way, so that ``launches`` is not all of it.
    """

    def __init__(self) -> None:
        self.launches: list[tuple[tuple[Any, ...], tuple[int, int, int], tuple[Any, ...]]] = []
        self.scratch: list[torch.Tensor] = []
        self.lost = False

    def __enter__(self) -> Recorder:
        _here.recorder = self
        return self

    def __exit__(self, *_: Any) -> None:
        _here.recorder = None


_here = threading.local()


def scratch(count: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """``[count]`` numbers for a launch to compute with, of no meaning before and after it.

    Allocated per call: torch's allocator knows about streams and graphs, a cache of our own would not.
    """
    made = torch.empty(count, dtype=dtype, device=device)
    recorder = getattr(_here, "recorder", None)
    if recorder is not None:
        recorder.scratch.append(made)
    return made


_variants: dict[tuple[Any, ...], tuple[Any, Any, Any, tuple[Any, ...]]] = {}
_MOST = 4096  # variants are few; keys are more, for integers that triton does not specialise are told apart, too


def launch(
    kernel: Any, grid: tuple[int, int, int], args: tuple[Any, ...], constants: dict[str, Any], options: dict[str, Any]
) -> None:
    """``kernel[grid](*args, **constants, **options)`` on the device of the first argument.

    Args:
        kernel: a function of ``triton.jit``; its parameters are ``args`` and then the names of ``constants``.
        grid: three numbers.
        args: tensors, integers, floats, None or tensor descriptors; the first is a tensor.
        constants: the kernel's constexprs.
        options: of the compiler: num_warps, launch_pdl, ...
    """
    device = args[0].device
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):  # a model spread over several GPUs does not change the current one
            return launch(kernel, grid, args, constants, options)
    recorder = getattr(_here, "recorder", None)
    if not isinstance(kernel, triton.JITFunction) or observed():
        kernel[grid](*args, **constants, **options)
        if recorder is not None:
            recorder.lost = True
        return
    key = (id(kernel), device.index, *constants.values(), *options.items(), *map(_kind, args))
    variant = _variants.get(key)
    if variant is None:
        compiled = kernel[grid](*args, **constants, **options)
        if len(_variants) >= _MOST:
            _variants.clear()
        rest = tuple(constants[name] for name in kernel.arg_names[len(args) :])
        variant = _variants[key] = compiled.run, compiled.function, compiled.packed_metadata, rest
        if recorder is not None:
            recorder.launches.append((variant, grid, args))
        return
    if recorder is not None:
        recorder.launches.append((variant, grid, args))
    run, function, metadata, rest = variant
    stream = triton.runtime.driver.active.get_current_stream(device.index)
    run(*grid, stream, function, metadata, None, None, None, *args, *rest)


def _kind(argument: Any) -> Any:
    """What triton's choice of a variant depends on in this argument."""
    kind = type(argument)
    if kind is int or kind is bool:
        return kind, argument == 1, argument % 16 == 0, -(1 << 31) <= argument < 1 << 31
    if kind is float or argument is None:
        return kind
    if isinstance(argument, torch.Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    return argument.base.dtype, tuple(argument.block_shape)


def observed() -> bool:
    """Whether somebody follows triton's launches."""
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    if enter is not None and getattr(enter, "calls", True):
        return True
    return leave is not None and bool(getattr(leave, "calls", True))
