"""The shortcut around triton's own launch: the same call to the driver, and never a variant of other arguments."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from segpaged_attention import launching
from segpaged_offline import SM90, Problem, catch


class Kernel:
    """Stands for a compiled kernel: records who was called with what."""

    arg_names = ("p_x", "p_y", "stride", "scale", "D", "FLAG")

    def __init__(self) -> None:
        self.asked: list[tuple[Any, ...]] = []
        self.direct: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(*args: Any, **options: Any) -> Any:
            self.asked.append((grid, args, options))
            return types.SimpleNamespace(
                run=lambda *call: self.direct.append(call), function="function", packed_metadata="metadata"
            )

        return run


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    monkeypatch.setattr(launching, "_variants", {})
    monkeypatch.setattr(launching.triton, "JITFunction", Kernel)
    driver = types.SimpleNamespace(get_current_stream=lambda index: f"stream of {index}")
    monkeypatch.setattr(launching.triton.runtime, "driver", types.SimpleNamespace(active=driver))
    return Kernel()


X = torch.zeros(64)
BASE = dict(args=(X, X[16:], 32, 0.5), constants={"FLAG": True, "D": 64}, options={"num_warps": 4})


def start(kernel: Kernel, **change: Any) -> None:
    call = {**BASE, **change}
    launching.launch(kernel, (3, 2, 1), call["args"], call["constants"], call["options"])


def test_the_second_launch_is_triton_s_call_of_the_driver(kernel: Kernel) -> None:
    start(kernel)
    assert len(kernel.asked) == 1 and not kernel.direct
    start(kernel, args=(X, X[32:], 48, 0.25))
    assert len(kernel.asked) == 1
    (call,) = kernel.direct
    # grid, stream, function, metadata, no hooks, the arguments, and the constants in the order of the parameters
    assert call[:9] == (3, 2, 1, "stream of None", "function", "metadata", None, None, None)
    assert call[9] is X and call[11:] == (48, 0.25, 64, True)


@pytest.mark.parametrize(
    "change",
    [
        {"args": (X, X[1:], 32, 0.5)},  # alignment
        {"args": (X, X.double(), 32, 0.5)},
        {"args": (X, None, 32, 0.5)},
        {"args": (X, X[16:], 33, 0.5)},  # divisibility
        {"args": (X, X[16:], 1, 0.5)},
        {"args": (X, X[16:], 1 << 40, 0.5)},
        {"constants": {"FLAG": False, "D": 64}},
        {"constants": {"FLAG": True, "D": 128}},
        {"options": {"num_warps": 8}},
        {"options": {"num_warps": 4, "launch_pdl": True}},
    ],
)
def test_what_triton_compiles_apart_is_told_apart(kernel: Kernel, change: dict[str, Any]) -> None:
    start(kernel)
    start(kernel, **change)
    assert len(kernel.asked) == 2 and not kernel.direct


def test_profilers_see_every_launch(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    start(kernel)
    monkeypatch.setattr(launching.knobs.runtime, "launch_enter_hook", lambda metadata: None)
    start(kernel)
    assert len(kernel.asked) == 2 and not kernel.direct


def test_keys_are_at_least_as_fine_as_triton_s_variants(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over real launches: two that triton compiles apart never have the same key here."""
    launches = []
    for batch in (1, 3):
        for columns in (1, 2, 64):
            for dtype in (torch.bfloat16, torch.float32):
                for head_dim in (64, 128):
                    problem = Problem(batch=batch, dtype=dtype, head_dim=head_dim)
                    launches += catch(monkeypatch, SM90, lambda p=problem, c=columns: p.append(c))
    variants: dict[Any, set[str]] = {}
    for caught in launches:
        key = (*sorted(caught.options.items()), *map(launching._kind, caught.args))
        variants.setdefault(key, set()).add(caught.key)
    assert len({name for names in variants.values() for name in names}) > 4
    assert all(len(names) == 1 for names in variants.values())


def test_host_arithmetic() -> None:
    assert [launching.power_of_2(n) for n in (1, 2, 3, 64, 65, 80)] == [1, 2, 4, 64, 128, 128]
    assert [launching.cdiv(n, 64) for n in (0, 1, 64, 65)] == [0, 1, 1, 2]
