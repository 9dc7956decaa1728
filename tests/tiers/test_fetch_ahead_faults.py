"""What is on its way when a step, or the process, does not go on as usual is never taken for something that has come."""

from __future__ import annotations

import os
import threading
import time
import warnings

import numpy as np
import pytest
import torch
from session_helpers import prompt, tiny_model

from redknot_hf import HeadProfile, RedKnotCache
from redknot_hf.paging import resident
from redknot_hf.paging.pool import PagePool
from redknot_hf.paging.resident import ResidentPages
from redknot_hf.paging.retrieval import FarHeads

PAGES, SIZE, DIM = 6, 4, 8
CPU = torch.device("cpu")


def wanting(*pages: int) -> np.ndarray:
    wanted = np.zeros((1, PAGES), bool)
    wanted[0, list(pages)] = True
    return wanted


def bringing(page: int) -> ResidentPages:
    """A page is on its way."""
    source = PagePool(SIZE, DIM, DIM, torch.float32, CPU, capacity=PAGES)
    source.k.normal_(), source.v.normal_()
    here = ResidentPages(1, SIZE, DIM, DIM, torch.float32, CPU)
    here.look(wanting(0), 4)
    placed = here.place(wanting(page), wanting(page))
    here.bring(source, placed[1], placed)
    return here


@pytest.mark.parametrize("error", [RuntimeError("CUDA error: gone"), KeyboardInterrupt()])
def test_what_failed_is_not_here(monkeypatch, error):
    def fails(*_):
        raise error

    monkeypatch.setattr(resident, "_copy", fails)
    here = bringing(3)
    with pytest.raises(type(error)):
        here.look(wanting(3), 4)
    assert here.look(wanting(3), 4)[0].nonzero()[0].tolist() == [3]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a system without fork")
def test_a_forked_process_does_not_wait_for_threads_that_it_does_not_have(monkeypatch):
    gate = threading.Event()
    monkeypatch.setattr(resident, "_copy", lambda *_: gate.wait(30) and None)
    here = bringing(3)
    with resident._workers_lock, warnings.catch_warnings():  # whatever another thread does just then
        warnings.simplefilter("ignore", DeprecationWarning)  # forking beside threads is what is tested
        child = os.fork()
        if not child:
            missing = here.look(wanting(3), 4)
            free = resident._workers_lock.acquire(timeout=1)
            os._exit(0 if missing[0, 3] and free and not resident._workers else 1)
    deadline, status = time.monotonic() + 20, None
    while status is None and time.monotonic() < deadline:
        done, code = os.waitpid(child, os.WNOHANG)
        status = os.waitstatus_to_exitcode(code) if done else time.sleep(0.01)
    if status is None:
        os.kill(child, 9)
        os.waitpid(child, 0)
    gate.set()
    assert status == 0
    assert not here.look(wanting(3), 4).any()  # here it has come


def test_what_a_step_could_not_fetch_is_not_here(monkeypatch):
    """The memory ends in the middle of a step; whoever goes on must not read slots that nobody filled."""
    model = tiny_model(head_dim=64)
    shape = (model.config.num_hidden_layers, model.config.num_key_value_heads)
    profile = HeadProfile(*shape, [["retrieval"] * shape[1]] * shape[0], 0, 0)
    cache = RedKnotCache(model.config, profile, cold="cpu", retrieve=2, near_tokens=32, page_size=16)

    def fails(*_):
        raise MemoryError("no room")

    with torch.no_grad():
        model(prompt(1, 300, 0), past_key_values=cache)
        monkeypatch.setattr(FarHeads, "_fetch", fails)
        with pytest.raises(MemoryError, match="no room"):
            model(prompt(1, 1, 1), past_key_values=cache)
    (here,) = cache.layers[0].pages.far.resident
    assert here.slots > 0 and here.look_for(np.ones((shape[1], 5), bool)).all()
