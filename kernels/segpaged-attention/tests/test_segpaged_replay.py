"""A repeated decode step: the calls of the driver that the launchers themselves would make, with the new addresses."""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import triton
from segpaged_attention import append_kernel, decode_kernel, launching, replay, tiles
from segpaged_offline import SM80, SM90
from triton.tools.tensor_descriptor import TensorDescriptor

B, HKV, GROUP, D, PAGE = 2, 4, 2, 64, 64
I32 = torch.int32


class Kernel:
    """Stands for a compiled kernel whose calls of the driver are kept."""

    def __init__(self, kernel: Any, calls: list[tuple[Any, ...]]) -> None:
        self.arg_names, name = kernel.arg_names, kernel.__name__
        compiled = types.SimpleNamespace(run=lambda *call: calls.append(call), function=name, packed_metadata="m")
        self.compiled, self.calls = compiled, calls

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(*args: Any, **constants: Any) -> Any:
            rest = [constants[name] for name in self.arg_names[len(args) :]]
            self.compiled.run(*grid, 7, self.compiled.function, "m", None, None, None, *args, *rest)
            return self.compiled

        return run


@pytest.fixture(params=[SM90, SM80], ids=["hopper", "ampere"])
def driver(request: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Any, ...]]]:
    calls: list[tuple[Any, ...]] = []
    for module in (append_kernel, decode_kernel, tiles):
        monkeypatch.setattr(module, "device_of", lambda _device: request.param)
    for module, name in (
        (append_kernel, "_append_kernel"),
        (decode_kernel, "_decode_kernel"),
        (decode_kernel, "_combine_kernel"),
    ):
        monkeypatch.setattr(module, name, Kernel(getattr(module, name), calls))
    active = types.SimpleNamespace(get_current_stream=lambda index: 7)
    monkeypatch.setattr(triton, "JITFunction", Kernel)
    monkeypatch.setattr(triton.runtime, "driver", types.SimpleNamespace(active=active))
    monkeypatch.setattr(launching, "_variants", {})
    monkeypatch.setattr(replay.ops, "why_not", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)
    monkeypatch.setattr(replay, "_current_device", lambda: None)
    yield calls


def stays() -> dict[str, torch.Tensor]:
    heads = torch.zeros(HKV, dtype=I32)
    pages = torch.zeros(9, PAGE, D, dtype=torch.bfloat16)
    table = torch.zeros(B, HKV, 4, dtype=I32)
    return {
        "k_pages": pages, "v_pages": pages.clone(), "block_table": table, "sink": heads, "window": heads.clone(),
        "ring": heads.clone(),
    }  # fmt: skip


def moves(aux: bool = False) -> dict[str, torch.Tensor | None]:
    def rows(heads: int) -> torch.Tensor:  # as a projection gives them
        return torch.zeros(B, 1, heads, D, dtype=torch.bfloat16).transpose(1, 2)

    lens = torch.zeros(B, dtype=I32)
    return {
        "k": rows(HKV), "v": rows(HKV), "q": rows(HKV * GROUP), "before": lens, "after": lens.clone(),
        "s_aux": torch.zeros(HKV * GROUP) if aux else None,
    }  # fmt: skip


def record(still: dict[str, Any], moving: dict[str, Any], exact: bool = False, softcap: float = 0.0) -> Any:
    return replay.record(**still, **moving, scale=0.5, softcap=softcap, model_window=0, exact_positions=exact)


def again(made: replay.Replay, moving: dict[str, Any], scratch: dict[int, torch.Tensor]) -> torch.Tensor:
    order = ("k", "v", "q", "before", "after", "s_aux")
    return made([0 if moving[name] is None else moving[name].data_ptr() for name in order], moving["q"], scratch)


def named(calls: list[tuple[Any, ...]], out: torch.Tensor, scratch: torch.Tensor) -> list[list[Any]]:
    """Calls with addresses as numbers, those of the output and of scratch memory as names."""

    def name(argument: Any) -> Any:
        if isinstance(argument, TensorDescriptor):
            return (
                "pages",
                argument.base.data_ptr(),
                tuple(argument.shape),
                tuple(argument.strides),
                tuple(argument.block_shape),
            )
        if isinstance(argument, torch.Tensor):
            argument = argument.data_ptr()
        base = scratch.untyped_storage().data_ptr()
        if isinstance(argument, int) and argument == out.data_ptr():
            return "out"
        if isinstance(argument, int) and base <= argument < base + scratch.untyped_storage().nbytes():
            return "scratch", argument - base
        return argument

    return [[name(argument) for argument in call] for call in calls]


@pytest.mark.parametrize(
    "aux,exact,softcap", [(False, False, 0.0), (True, True, 30.0)], ids=["plain", "sinks, positions, cap"]
)
def test_a_replay_makes_the_calls_of_the_launchers(
    driver: list[Any], monkeypatch: pytest.MonkeyPatch, aux: bool, exact: bool, softcap: float
) -> None:
    still, first, second = stays(), moves(aux), moves(aux)
    _, made = record(still, first, exact, softcap)
    assert made is not None and len(driver) == 3
    driver.clear()
    with launching.Recorder() as recorder:
        place = (still["k_pages"], still["v_pages"], still["block_table"])
        append_kernel.append(second["k"], second["v"], *place, second["before"], still["sink"], still["ring"])
        out = decode_kernel.decode(
            second["q"], *place, second["after"], still["sink"], still["window"], still["ring"], 0.5, softcap,
            second["s_aux"], 0, exact,
        )  # fmt: skip
    want = named(driver, out, recorder.scratch[0])
    driver.clear()
    memory: dict[int, torch.Tensor] = {}
    got = again(made, second, memory)
    assert named(driver, got, memory[7]) == want
    assert (got.shape, got.dtype) == (out.shape, out.dtype)
    places = [x for call in want for x in call]
    assert places.count("out") == 2 and ("scratch", 0) in places
    driver.clear()
    again(made, first, memory)  # addresses are not kept
    assert named(driver, got, memory[7]) != want


def test_steps_share_scratch_memory_of_one_stream(driver: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    still, moving, memory = stays(), moves(), {}
    _, made = record(still, moving)
    again(made, moving, memory)
    kept = memory[7]
    again(made, moving, memory)
    assert memory == {7: kept} and kept.numel() == made.scratch_bytes > 0
    monkeypatch.setattr(made, "_stream", lambda index: 8)
    again(made, moving, memory)
    assert set(memory) == {7, 8} and memory[8] is not kept


def test_an_unknown_tensor_makes_no_replay(driver: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_kernel, "scratch", lambda n, dtype, device: torch.empty(n, dtype=dtype, device=device))
    out, made = record(stays(), moves())
    assert made is None and out.shape == (B, 1, HKV * GROUP, D) and len(driver) == 3


def test_keys_that_are_the_values_make_no_replay(driver: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay.torch.ops.segpaged_attention, "append", lambda *_: None)
    monkeypatch.setattr(replay.torch.ops.segpaged_attention, "decode", lambda *_: "out")
    moving = moves()
    assert record(stays(), moving | {"v": moving["k"]}) == ("out", None)


def test_observed_launches_make_no_replay(driver: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    _, made = record(stays(), moves())
    assert not made.observed()
    monkeypatch.setattr(launching.knobs.runtime, "launch_enter_hook", lambda metadata: None)
    assert made.observed()
    assert record(stays(), moves())[1] is None


def make_tensordesc_arg(given: TensorDescriptor, metadata: Any) -> list[Any]:
    return [("encoded", given.base.data_ptr(), metadata), *given.shape, *given.strides]


def wrapped(launcher: Any, tensordesc_indices: set[int], tensordesc_meta: list[Any]) -> Any:
    """The launcher of triton 3.6 for a kernel with descriptors, in outline."""

    def inner(*args: Any) -> Any:
        final, met = list(args[:13]), iter(tensordesc_meta)
        for i, argument in enumerate(args[13:]):
            final.extend(make_tensordesc_arg(argument, next(met)) if i in tensordesc_indices else [argument])
        return launcher(*final)

    return inner


class Launcher:
    """What triton 3.6 calls ``run``."""

    global_scratch_size = profile_scratch_size = 0
    launch_cooperative_grid, launch_pdl = False, True

    def __init__(self, launch: Any) -> None:
        self.launch = launch

    def __call__(self, gridX: int, gridY: int, gridZ: int, stream: int, function: str, *args: Any) -> None:
        more = (self.launch_cooperative_grid, self.launch_pdl, None, None)
        self.launch(gridX, gridY, gridZ, stream, function, *more, *args)


@pytest.mark.parametrize("descriptors", [True, False])
def test_the_driver_is_called_as_triton_s_launcher_calls_it(monkeypatch: pytest.MonkeyPatch, descriptors: bool) -> None:
    calls: list[tuple[Any, ...]] = []
    pages = torch.zeros(128, D, dtype=torch.bfloat16)
    described = TensorDescriptor(pages, [128, D], [D, 1], [64, D])
    run = Launcher(wrapped(lambda *call: calls.append(call), {1, 2}, ["a", "b"]))
    args = [11, described, described, 0.5, replay._Hole(0, 4), D, True]
    if not descriptors:
        run, args = Launcher(lambda *call: calls.append(call)), [11, 0.5, replay._Hole(0, 4)]
    head, hooks = (3, 2, 1, 7, "function"), ("m", None, None, None)
    run(*head, *hooks, *args)
    launch, call = replay._driver_call(run, head, "m", args)
    monkeypatch.setitem(globals(), "make_tensordesc_arg", None)
    launch(*call)
    assert launch is not run and calls[0] == calls[1]
    if descriptors:
        assert calls[0][14:19] == (("encoded", pages.data_ptr(), "a"), 128, D, D, 1)
    run.global_scratch_size = 16  # a launcher that also allocates is called as it is
    assert replay._driver_call(run, head, "m", args) == (run, [*head, *hooks, *args])
