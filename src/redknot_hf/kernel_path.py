"""Attention over pages on GPUs: hands page tables and lengths to the `segpaged_attention` operators.

The same three things as `paging.torch_attention` does (store a chunk, decode, prefill), with everything the kernels read
on the device. A decode step uploads nothing: the table goes up when it changes (once per page), lengths count there.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import segpaged_attention as ops
import torch

from .paging.pages import KEEP_ALL, LayerPages
from .paging.pool import upload
from .paging.torch_attention import AttentionSpec

MAX_DECODE_ROWS = 8

_append = torch.ops.segpaged_attention.append.default
_decode = torch.ops.segpaged_attention.decode.default


def unavailable(device: torch.device, dtype: torch.dtype, key_dim: int, value_dim: int, page_size: int) -> str | None:
    """Why the kernels cannot serve such a layer, or None."""
    if not ops.is_available(device):
        return f"no kernels for {device}"
    return ops.supported(key_dim, dtype, page_size, 1) or ops.supported(value_dim, dtype, page_size, 1)


@dataclass
class Lengths:
    """Tokens stored, on the device of a layer.

    Attributes:
        before, after: int32 ``[batch]``, around the step.
        fed: int32 ``[batch]``, real tokens of each row in this step; None when every column is real.
        scratch: memory that the kernels of the step's layers compute with one after the other, by stream.
        watched: whether somebody follows triton's launches; asked once per step.
    """

    before: torch.Tensor
    after: torch.Tensor
    fed: torch.Tensor | None
    scratch: dict[int, torch.Tensor] = field(default_factory=dict)
    watched: bool | None = None


class KernelLayer:
    """The device side of one layer's page tables. It is uploaded when it is first used: a prompt that is put together in
    the pages edits the tables several times before a kernel reads them.

    Attributes (there after `sync`, which whatever runs a kernel calls):
        table: int32 ``[batch, kv_heads, max_pages]``; sink, window, ring: int32 ``[kv_heads]``.
        order: int32 ``[kv_heads]``, heads that keep everything first; num_full: how many those are.
    """

    def __init__(self, pages: LayerPages):
        self.pages, self.device = pages, pages.pool.k.device
        self.version = -1
        self.replays = self.device.type == "cuda"
        self.checked = False  # the operators' arguments fit: the layer has decoded a token
        self.replay: Any = None  # a decode step as it was launched before, and what that was made from
        self.form: tuple[Any, ...] = ()
        self.num_full = len(pages.full_heads)

    def sync(self) -> None:
        """Bring table and rings up to date with the host's."""
        pages = self.pages
        if self.version == pages.version:
            return
        if self.version < 0:  # which heads are which never changes
            self.order = upload(np.concatenate([pages.full_heads, pages.ring_heads]), self.device, np.int32)
        self.version, self.replay = pages.version, None
        self.table = upload(pages.table, self.device, np.int32)
        self.sink, self.window, self.ring = (
            upload(values, self.device, np.int32) for values in (pages.sink, pages.window, pages.ring)
        )

    def append(self, k: torch.Tensor, v: torch.Tensor, lengths: Lengths) -> None:
        """Store a compact chunk ``[batch, kv_heads, n, dim]``."""
        self.sync()
        pool = self.pages.pool
        start = None if lengths.fed is None else torch.zeros_like(lengths.fed)
        with pool.lock:
            ops.append(
                k, v, pool.k, pool.v, self.table, lengths.before, self.sink, self.ring, q_start=start, q_len=lengths.fed
            )

    def decode(self, q: torch.Tensor, spec: AttentionSpec, lengths: Lengths) -> torch.Tensor:
        """The last ``n`` stored tokens of every row, ``q [batch, q_heads, n, dim]`` -> ``[batch, n, q_heads, dim]``."""
        self.sync()
        pool = self.pages.pool
        return ops.decode(
            q,
            pool.k,
            pool.v,
            self.table,
            lengths.after,
            self.sink,
            self.window,
            self.ring,
            spec.scale,
            spec.softcap,
            None if spec.s_aux is None else spec.s_aux.float(),
            spec.model_window,
            exact_positions=self.pages.rollback > 0,
        )

    def step_one(
        self,
        k: torch.Tensor,
        v: torch.Tensor,
        q: torch.Tensor,
        scale: float,
        softcap: float,
        s_aux: torch.Tensor | None,
        model_window: int,
        lengths: Lengths,
    ) -> torch.Tensor:
        """`append` and `decode` of one token for every row; arguments are checked the first time.

        On a GPU the launches are worked out once per layer and page (`segpaged_attention.replay`) and then made again.

        Args:
            k, v: ``[batch, kv_heads, 1, dim]``. q: ``[batch, q_heads, 1, dim]``.
        """
        self.sync()
        if not self.checked:
            self.append(k, v, lengths)
            out = self.decode(q, AttentionSpec(scale, softcap, s_aux, model_window), lengths)
            self.checked = True
            return out
        pages = self.pages
        pool, before, after = pages.pool, lengths.before, lengths.after
        aux = None if s_aux is None else s_aux.float()
        exact = pages.rollback > 0
        with pool.lock:
            rows = (pool.k, pool.v, self.table)
            if not self.replays:
                _append(k, v, *rows, before, self.sink, self.ring)
                return _decode(
                    q, *rows, after, self.sink, self.window, self.ring, scale, softcap, aux, model_window, exact
                )
            moving = (
                k.data_ptr(), v.data_ptr(), q.data_ptr(), before.data_ptr(), after.data_ptr(),
                0 if aux is None else aux.data_ptr(),
            )  # fmt: skip
            # what the launches were worked out from; the addresses of the pages stand for the pool, which may grow
            odd = (moving[0] | moving[1] | moving[2] | moving[5]) % 16  # which of them, matters only then
            form = (
                q.shape, q.stride(), q.dtype, k.stride(), v.shape, v.stride(), v.dtype, scale, softcap, model_window,
                exact, rows[0].data_ptr(), rows[1].data_ptr(), pool.num_pages,
                None if aux is None else aux.stride(), odd and tuple(address % 16 for address in moving),
            )  # fmt: skip
            if self.replay is not None and form == self.form:
                if lengths.watched is None:
                    lengths.watched = self.replay.observed()
                if not lengths.watched:
                    return self.replay(moving, q, lengths.scratch)
            from segpaged_attention.replay import record  # imports triton, which is there where a GPU is

            self.form = form
            out, self.replay = record(
                k, v, q, *rows, before, after, self.sink, self.window, self.ring,
                scale, softcap, aux, model_window, exact,
            )  # fmt: skip
            return out

    def prefill(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        spec: AttentionSpec,
        lengths: Lengths,
        past: int,
        unwindowed: bool,
    ) -> torch.Tensor:
        """A compact chunk over the stored past and itself, before `append`; ``past``: most tokens stored in a row."""
        self.sync()
        pool = self.pages.pool
        window, full = self.window, self.num_full
        if unwindowed:
            window, full = torch.full_like(window, KEEP_ALL), len(window)
        with _current(self.device):
            return ops.prefill(
                q,
                k,
                v,
                pool.k,
                pool.v,
                self.table,
                lengths.before,
                self.sink,
                window,
                self.ring if not unwindowed else window,
                spec.scale,
                spec.softcap,
                None if spec.s_aux is None else spec.s_aux.float(),
                spec.model_window,
                q_start=None if lengths.fed is None else torch.zeros_like(lengths.fed),
                q_len=lengths.fed,
                head_order=self.order,
                num_global=full,
                past_len_hint=past,
            )


def _current(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Make ``device`` the current one: triton launches there, and a model may be spread over several GPUs."""
    if device.type != "cuda" or device.index in (None, torch.cuda.current_device()):
        return contextlib.nullcontext()
    return torch.cuda.device(device)
