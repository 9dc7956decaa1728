"""cuDNN's attention is off for calls whose shape changes with every token, and as it was for everything else."""

from __future__ import annotations

import threading

import pytest
import torch
from session_helpers import prompt, tiny_model

from redknot_hf import HeadProfile, RedKnotCache
from redknot_hf.paging import varying_sdpa
from redknot_hf.paging.varying_sdpa import without_cudnn


@pytest.fixture(params=[True, False])
def before(request):
    old = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(request.param)
    yield request.param
    torch.backends.cuda.enable_cudnn_sdp(old)


def test_off_inside_and_as_before_outside(before):
    enabled = torch.backends.cuda.cudnn_sdp_enabled
    with without_cudnn():
        assert not enabled()
        with without_cudnn():
            assert not enabled()
        assert not enabled()
    assert enabled() is before
    with pytest.raises(RuntimeError, match="inside"), without_cudnn():
        raise RuntimeError("inside")
    assert enabled() is before


def test_two_threads_that_overlap(before):
    """A enters, B enters, A leaves, B leaves: a plain save-and-restore would leave it off for good."""
    entered, left = threading.Event(), threading.Event()
    seen = []

    def second():
        with without_cudnn():
            entered.set()
            assert left.wait(30)
            seen.append(torch.backends.cuda.cudnn_sdp_enabled())

    thread = threading.Thread(target=second)
    with without_cudnn():
        thread.start()
        assert entered.wait(30)
    seen.append(torch.backends.cuda.cudnn_sdp_enabled())
    left.set()
    thread.join(30)
    assert seen == [False, False]
    assert torch.backends.cuda.cudnn_sdp_enabled() is before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_steps_of_retrieval_heads_on_a_gpu(monkeypatch):
    model = tiny_model(head_dim=64).to("cuda")
    seen = []

    def watched(*given, **named):
        seen.append(torch.backends.cuda.cudnn_sdp_enabled())
        return inner(*given, **named)

    inner = varying_sdpa.scaled_dot_product_attention
    config = model.config
    shape = (config.num_hidden_layers, config.num_key_value_heads)
    retrieval = HeadProfile(
        *shape, [["retrieval"] * shape[1]] * shape[0], *([[0] * shape[1]] * shape[0] for _ in range(2))
    )
    cache = RedKnotCache(config, retrieval, cold="cpu", retrieve=2, near_tokens=32, page_size=16)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    with torch.no_grad():
        model(prompt(1, 300, 0).cuda(), past_key_values=cache)
        monkeypatch.setattr(varying_sdpa, "scaled_dot_product_attention", watched)
        for _ in range(3):
            model(prompt(1, 1, 1).cuda(), past_key_values=cache)
    assert len(seen) >= 3 * shape[0] and not any(seen)
    assert torch.backends.cuda.cudnn_sdp_enabled() is before
