"""The kernel that places stored rows does what copying and `rotate` do, in Triton's interpreter and on a GPU."""

from __future__ import annotations

import pytest
import torch

from redknot_hf.segments import place_kernel
from redknot_hf.segments.rope import rotate

LAYERS, HEADS = 3, 2


TRITON_MODULE = "redknot_hf.segments._place_triton"  # what the fixture `device` makes anew for the interpreter


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("dim", "v_dim", "rotary", "layout"),
    [
        (64, 64, 64, "half"),
        (128, 64, 32, "half"),
        (80, 80, 20, "half"),
        (64, 24, 64, "interleaved"),
        (48, 48, 16, "interleaved"),
        (64, 64, 0, "half"),
    ],
)
def test_segments_go_to_their_places_and_turn(device, dtype, dim, v_dim, rotary, layout):
    torch.manual_seed(0)
    tokens, starts = [70, 5, 1, 130], [3, 73, 78, 79]
    end = starts[-1] + tokens[-1]
    keys = [torch.randn(LAYERS, HEADS, n, dim, device=device).to(dtype) for n in tokens]
    values = [torch.randn(LAYERS, HEADS, n, v_dim, device=device).to(dtype) for n in tokens]
    cos = sin = None
    if rotary:
        angle = torch.randn(end, rotary // 2, device=device)
        angle[starts[1] : starts[2]] = 0  # one segment does not move
        cos, sin = angle.cos(), angle.sin()
    placed = place_kernel.PlacedSegments(keys, values, starts)
    # storage with room behind each head, as the views of pages have
    k_out = torch.zeros(HEADS, end + 9, dim, dtype=dtype, device=device)[:, : end + 2]
    v_out = torch.zeros(HEADS, end + 5, v_dim, dtype=dtype, device=device)[:, : end + 1]
    for layer in range(LAYERS):
        placed.place(layer, cos, sin, layout == "interleaved", k_out, v_out)
        for k, v, start, n in zip(keys, values, starts, tokens, strict=True):
            here = slice(start, start + n)
            want = k[layer] if cos is None else rotate(k[layer], cos[here], sin[here], layout)
            if cos is None or start == starts[1]:
                assert torch.equal(k_out[:, here], k[layer])
            # a fused multiply-add may round the other way
            torch.testing.assert_close(
                k_out[:, here], want, rtol=torch.finfo(dtype).eps, atol=2 * torch.finfo(torch.float32).eps
            )
            assert torch.equal(v_out[:, here], v[layer])
        assert not k_out[:, : starts[0]].any() and not k_out[:, end:].any()
        assert not v_out[:, : starts[0]].any() and not v_out[:, end:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("dim", "v_dim", "rotary", "layout"),
    [(64, 64, 64, "half"), (80, 24, 20, "half"), (48, 48, 16, "interleaved"), (64, 64, 0, "half")],
)
def test_rows_in_int8_are_multiplied_out_before_they_turn(device, dtype, dim, v_dim, rotary, layout):
    torch.manual_seed(0)
    tokens, starts = [70, 5, 130], [3, 73, 78]
    end = starts[-1] + tokens[-1]

    def stored(width):
        return [torch.randint(-127, 128, (LAYERS, HEADS, n, width), device=device).to(torch.int8) for n in tokens]

    keys, values = stored(dim), stored(v_dim)
    scales = [torch.rand(LAYERS, HEADS, n, 2, device=device) for n in tokens]
    cos = sin = None
    if rotary:
        angle = torch.randn(end, rotary // 2, device=device)
        cos, sin = angle.cos(), angle.sin()
    placed = place_kernel.PlacedSegments(keys, values, starts, scales)
    k_out = torch.zeros(HEADS, end + 9, dim, dtype=dtype, device=device)[:, : end + 2]
    v_out = torch.zeros(HEADS, end + 5, v_dim, dtype=dtype, device=device)[:, : end + 1]
    for layer in range(LAYERS):
        placed.place(layer, cos, sin, layout == "interleaved", k_out, v_out)
        for i, (start, n) in enumerate(zip(starts, tokens, strict=True)):
            here = slice(start, start + n)
            k = keys[i][layer].float() * scales[i][layer][..., :1]
            want = k if cos is None else rotate(k, cos[here], sin[here], layout)
            # a fused multiply-add may round the other way, and sums that cancel keep the products' error
            torch.testing.assert_close(
                k_out[:, here].float(), want, rtol=torch.finfo(dtype).eps, atol=300 * torch.finfo(torch.float32).eps
            )
            v = (
                values[i][layer].float() * scales[i][layer][..., 1:]
            )  # the interpreter cuts bfloat16 instead of rounding
            torch.testing.assert_close(v_out[:, here].float(), v, rtol=torch.finfo(dtype).eps, atol=0)
        assert not k_out[:, : starts[0]].any() and not k_out[:, end:].any()
        assert not v_out[:, : starts[0]].any() and not v_out[:, end:].any()
