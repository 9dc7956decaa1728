"""Launching a kernel that was launched before, without asking triton again which compiled variant it is.

``kernel[grid](...)`` binds the arguments, describes each of them, and makes a string of the options, 50 us on the host at
every call; an eager decode step makes three such calls per layer and waits for nothing else. Here a variant is remembered
under what triton derives it from: type and alignment of every tensor, divisibility of every integer, all constants.

The first launch of a variant, anything that is no compiled `JITFunction` (triton's interpreter), and launches that
somebody observes (profilers hook in there) take triton's own way.
"""

from __future__ import annotations

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
    if not isinstance(kernel, triton.JITFunction) or _observed():
        kernel[grid](*args, **constants, **options)
        return
    key = (id(kernel), device.index, *constants.values(), *options.items(), *map(_kind, args))
    variant = _variants.get(key)
    if variant is None:
        compiled = kernel[grid](*args, **constants, **options)
        if len(_variants) >= _MOST:
            _variants.clear()
        rest = tuple(constants[name] for name in kernel.arg_names[len(args) :])
        _variants[key] = compiled.run, compiled.function, compiled.packed_metadata, rest
        return
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


def _observed() -> bool:
    hooks = (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook)
    return any(hook is not None and getattr(hook, "calls", True) for hook in hooks)
