"""Compiles the kernels as a launcher would launch them on a GPU that is not there.

A launcher is called with CPU tensors and made-up device facts; the launches it makes are caught, and triton compiles
each for a target. What comes out is what a GPU would run: shared memory from triton, registers and spills from the
cubin.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import triton
from segpaged_attention import append_kernel, decode_kernel, positions_kernel, prefill_kernel, tiles
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

MODULES = (append_kernel, decode_kernel, prefill_kernel, positions_kernel)
SM90 = tiles.Device(processors=132, shared_memory=227 << 10, hopper=True)
SM80 = tiles.Device(processors=108, shared_memory=163 << 10, hopper=False)
_CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
_POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int32: "*i32"}


@dataclass
class Launch:
    """One caught launch of a kernel."""

    kernel: triton.JITFunction
    args: tuple
    options: dict

    def specialise(self) -> tuple[dict[str, str], dict[tuple, object], dict[tuple, list]]:
        """Signature, constants and attributes, as triton derives them: integers by divisibility, unless told not to."""
        names = self.kernel.arg_names
        given = dict(zip(names, self.args, strict=False)) | {n: x for n, x in self.options.items() if n in names}
        plain = {names[x] if isinstance(x, int) else x for x in self.kernel.do_not_specialize or ()}
        signature, constants, attributes = {}, {}, {}
        for i, (name, parameter) in enumerate(zip(names, self.kernel.params, strict=True)):
            value = given[name]
            divisible = True
            if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1 and name not in plain):
                signature[name], constants[(i,)] = "constexpr", value
                continue
            if isinstance(value, torch.Tensor):
                signature[name] = _POINTERS[value.dtype]
                divisible = value.data_ptr() % 16 == 0
            elif isinstance(value, float):
                signature[name], divisible = "fp32", False
            elif isinstance(value, int):
                signature[name] = "i32" if abs(value) < 1 << 31 else "i64"
                divisible = name not in plain and value % 16 == 0
            else:
                kind = _POINTERS[value.base.dtype][1:]
                signature[name], divisible = f"tensordesc<{kind}{list(value.block_shape)}>", False
            if divisible:
                attributes[(i,)] = [["tt.divisibility", 16]]
        return signature, constants, attributes

    @property
    def key(self) -> str:
        """Equal for two launches that run the same compiled kernel."""
        flags = {n: x for n, x in self.options.items() if n not in self.kernel.arg_names}
        return f"{self.kernel.__name__} {self.specialise()} {flags}"

    def compile(self, capability: int) -> triton.compiler.CompiledKernel:
        signature, constants, attributes = self.specialise()
        source = ASTSource(fn=self.kernel, signature=signature, constexprs=constants, attrs=attributes)
        flags = {n: x for n, x in self.options.items() if n not in self.kernel.arg_names}
        return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=flags)


def catch(monkeypatch: pytest.MonkeyPatch, device: tiles.Device, call: Callable[[], object]) -> list[Launch]:
    """The launches that `call` makes on `device`."""
    caught: list[Launch] = []

    class Catcher:
        def __init__(self, kernel: triton.JITFunction) -> None:
            self.kernel = kernel

        def __getitem__(self, _grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda *args, **options: caught.append(Launch(self.kernel, args, options))

    with monkeypatch.context() as patch:
        for module in (*MODULES, tiles):
            if hasattr(module, "device_of"):
                patch.setattr(module, "device_of", lambda _device: device)
            for name, value in list(vars(module).items()):
                if isinstance(value, triton.JITFunction) and name.startswith("_") and name.endswith("_kernel"):
                    patch.setattr(module, name, Catcher(value))
        call()
    return caught


def resources(kernel: triton.compiler.CompiledKernel, folder: Path) -> tuple[int, int]:
    """Registers per thread, and bytes of stack per thread: what was spilled."""
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    listing = subprocess.run([_CUOBJDUMP, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", listing)
    assert found, listing
    return int(found[1]), int(found[2])


@dataclass
class Problem:
    """Arguments of the launchers, all zero: they are only looked at."""

    batch: int = 1
    kv_heads: int = 8
    group: int = 4
    head_dim: int = 128
    page_size: int = 64
    max_pages: int = 512
    dtype: torch.dtype = torch.bfloat16

    def tensor(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype or self.dtype)

    def common(self) -> tuple[torch.Tensor, ...]:
        pages = self.tensor(8, self.page_size, self.head_dim)
        table = self.tensor(self.batch, self.kv_heads, self.max_pages, dtype=torch.int32)
        return pages, pages.clone(), table, self.tensor(self.batch, dtype=torch.int32)

    def per_head(self) -> torch.Tensor:
        return self.tensor(self.kv_heads, dtype=torch.int32)

    def columns(self, heads: int, columns: int) -> torch.Tensor:
        return self.tensor(self.batch, columns, heads, self.head_dim).transpose(1, 2)

    def append(self, columns: int, **more: object) -> None:
        k, head = self.columns(self.kv_heads, columns), self.per_head()
        append_kernel.append(k, k.clone(), *self.common(), head, head, **more)

    def decode(self, rows: int = 1, exact: bool = False, **more: object) -> None:
        q, head = self.columns(self.kv_heads * self.group, rows), self.per_head()
        decode_kernel.decode(q, *self.common(), head, head, head, 0.1, exact_positions=exact, **more)

    def prefill(self, columns: int, past: int, num_global: int = 1, **more: object) -> None:
        q, k, head = (
            self.columns(self.kv_heads * self.group, columns),
            self.columns(self.kv_heads, columns),
            self.per_head(),
        )
        prefill_kernel.prefill(
            q, k, k.clone(), *self.common(), head, head, head, 0.1, num_global=num_global, past_len_hint=past, **more
        )

    def positions(self, rows: int, **more: object) -> None:
        q, head = self.columns(self.kv_heads * self.group, rows), self.per_head()
        pages, v_pages, table, lens = self.common()
        where = self.tensor(self.batch, rows, dtype=torch.int32)
        positions_kernel.prefill_positions(q, where, pages, v_pages, table, lens, head, head, 0.1, **more)
