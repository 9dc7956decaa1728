"""The operators on the CPU: the reference against a formula, registration, argument checks, and the fallback."""

from __future__ import annotations

import math
import random
import subprocess
import sys

import pytest
import segpaged_attention as sp
import torch
from segpaged_cases import KEEP_ALL, assert_close, dense, heads, make_store


def test_reference_is_the_rule() -> None:
    """Keys picked one by one with the visibility rule, softmax by hand; no code of the package in between."""
    layer = heads([None, (3, 5, 2), (0, 4, 1)])
    store = make_store(0, [11, 4], layer, head_dim=16)
    q = torch.randn(2, 6, 2, 16, generator=torch.Generator().manual_seed(1))
    s_aux = torch.tensor([0.3, -1.0, 2.0, 0.0, 0.5, 1.0])
    got = sp.decode(
        q,
        *store.pages,
        store.seq_lens,
        layer.sink,
        layer.window,
        layer.ring,
        0.3,
        softcap=2.0,
        s_aux=s_aux,
        model_window=7,
    )
    for b in range(2):
        for head in range(6):
            h = head // 2
            for r in range(2):
                p = int(store.seq_lens[b]) - 2 + r
                total, weights = math.exp(float(s_aux[head])), torch.zeros(16)
                for j in range(p + 1):
                    if (j < int(layer.sink[h]) or j > p - int(layer.window[h])) and j > p - 7:
                        score = 2.0 * math.tanh(0.3 * float(q[b, head, r] @ store.k[b, h, j]) / 2.0)
                        total += math.exp(score)
                        weights += math.exp(score) * store.v[b, h, j]
                assert (got[b, r, head] - weights / total).abs().max() < 1e-5


@pytest.mark.parametrize("seed", range(12))
def test_any_chunking_gives_dense_attention(seed: int) -> None:
    """prefill, append and decode in pieces of any size: every row is what the whole text under the mask gives."""
    r = random.Random(seed)
    spec = [None, *r.sample([(s, w, 7) for s in (0, 4, 19) for w in (1, 9, 33, 300)], 2)]
    layer = heads(spec)
    n = 120
    store = make_store(seed, [0, 0], layer, total=n, head_dim=32, page_size=16)
    q = torch.randn(2, 6, n, 32, generator=torch.Generator().manual_seed(seed))
    want = dense(store, q, torch.arange(n).expand(2, -1), 0.2)
    at, out = 0, []
    while at < n:
        size = min(r.choice([1, 2, 8, 25, 60]), n - at)
        piece = slice(at, at + size)
        lens = torch.full((2,), at, dtype=torch.int32)
        new = (store.k[:, :, piece], store.v[:, :, piece])
        per_head = (layer.sink, layer.window, layer.ring)
        if size <= 8:
            sp.append(*new, *store.pages, lens, layer.sink, layer.ring)
            out.append(sp.decode(q[:, :, piece], *store.pages, lens + size, *per_head, 0.2))
        else:
            out.append(sp.prefill(q[:, :, piece], *new, *store.pages, lens, *per_head, 0.2))
            sp.append(*new, *store.pages, lens, layer.sink, layer.ring)
        at += size
    assert_close(torch.cat(out, 1), want)


def test_rows_may_share_pages() -> None:
    """Two rows with the same text read the same pages where they hold the same; results do not change."""
    layer = heads([None, (4, 20, 0)])
    store = make_store(3, [60, 75], layer, head_dim=32, shared=True)
    assert torch.equal(store.block_table[0, 0, :3], store.block_table[1, 0, :3])
    q = torch.randn(2, 4, 1, 32)
    got = sp.decode(q, *store.pages, store.seq_lens, layer.sink, layer.window, layer.ring, 0.2)
    assert_close(got, dense(store, q, store.seq_lens[:, None] - 1, 0.2, store.seq_lens))


def examples() -> dict[str, tuple]:
    layer = heads([None, (2, 9, 0)])
    store = make_store(0, [20, 7], layer, total=30, head_dim=16)
    q, per_head = torch.randn(2, 4, 5, 16), (layer.sink, layer.window, layer.ring)
    k, v = store.k[:, :, 20:25], store.v[:, :, 20:25]
    whole = make_store(0, [20, 7], heads([None, None]), head_dim=16)
    where = torch.tensor([[0, 3, 4, 9, 19], [-1, -1, 0, 5, 6]], dtype=torch.int32)
    angle = torch.randn(2, 4)
    columns = (torch.tensor([0, 2], dtype=torch.int32), torch.tensor([5, 3], dtype=torch.int32))
    return {
        "append": (
            k,
            v,
            *store.pages,
            store.seq_lens,
            layer.sink,
            layer.ring,
            *columns,
            angle.cos(),
            angle.sin(),
            True,
        ),
        "decode": (q, *store.pages, store.seq_lens, *per_head, 0.25, 5.0, torch.randn(4), 8, True),
        "prefill": (q, k, v, *store.pages, store.seq_lens, *per_head, 0.25, 0.0, None, 0, *columns, None, 1, 20),
        "prefill_positions": (q, where, *whole.pages, whole.seq_lens, layer.sink, layer.window, 0.25),
    }


@pytest.mark.parametrize("name", ["append", "decode", "prefill", "prefill_positions"])
def test_opcheck(name: str) -> None:
    torch.library.opcheck(getattr(torch.ops.segpaged_attention, name).default, examples()[name])


@pytest.mark.parametrize("name", ["append", "decode", "prefill", "prefill_positions"])
def test_compiled_is_one_node(name: str) -> None:
    """torch.compile without a graph break; the graph calls the operator once."""
    args, again = examples()[name], examples()[name]
    seen = []

    def backend(graph: torch.fx.GraphModule, _inputs: list) -> torch.fx.GraphModule:
        seen.extend(str(node.target) for node in graph.graph.nodes if "segpaged" in str(node.target))
        return graph

    torch.manual_seed(0)
    got = torch.compile(getattr(sp, name), fullgraph=True, backend=backend)(*args)
    want = getattr(sp, name)(*args) if name != "append" else None
    assert seen == [f"segpaged_attention.{name}"]
    if name == "append":
        assert not torch.equal(args[2], again[2])
    else:
        assert torch.equal(got, want)


def test_supported_names_what_is_wrong() -> None:
    for head_dim in (64, 96, 128, 256):
        for page_size in (16, 32, 64, 128, 256):
            assert sp.supported(head_dim, torch.bfloat16, page_size, 16) is None
    assert "head_dim 320" in sp.supported(320, torch.float16, 64, 1)
    assert "page_size 48" in sp.supported(64, torch.float16, 48, 1)
    assert "float64" in sp.supported(64, torch.float64, 64, 1)
    assert "17 query heads" in sp.supported(64, torch.float16, 64, 17)
    assert not sp.is_available("cpu")


def test_errors_name_the_argument() -> None:
    args = list(examples()["decode"])
    with pytest.raises(ValueError, match="sink is int64"):
        sp.decode(*args[:5], args[5].long(), *args[6:])
    with pytest.raises(ValueError, match=r"q has 9 rows per sequence; decode takes 1 to 8"):
        sp.decode(torch.zeros(2, 4, 9, 16), *args[1:])
    with pytest.raises(ValueError, match="block_table is int64"):
        sp.decode(*args[:3], args[3].long(), *args[4:])
    with pytest.raises(ValueError, match="s_aux is float32"):
        sp.decode(*args[:10], torch.zeros(3), *args[11:])
    new = list(examples()["append"])
    with pytest.raises(ValueError, match="q_len alone"):
        sp.append(*new[:8], None, new[9])
    with pytest.raises(ValueError, match="cos alone"):
        sp.append(*new[:8], None, None, new[10])


def test_fallback_warns_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the kernels cannot serve a call on CUDA, the reference does, and says so once per reason."""
    from segpaged_attention import ops, support

    monkeypatch.setattr(support, "_warned", set())
    args = examples()["decode"]
    calls = lambda: ops._run("a reason", "decode_kernel:decode", sp.reference.decode, args)  # noqa: E731
    with pytest.warns(RuntimeWarning, match="torch path: a reason") as caught:
        first, second = calls(), calls()
    assert len(caught) == 1
    assert torch.equal(first, second) and torch.equal(first, sp.decode(*args))


def test_import_needs_no_triton() -> None:
    """The package imports, and its operators run on the CPU, where triton is not installed."""
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, segpaged_attention as sp\n"
        "assert not sp.is_available('cuda')\n"
        "z = torch.zeros(1, dtype=torch.int32); p = torch.zeros(2, 16, 16)\n"
        "out = sp.decode(torch.ones(1, 1, 1, 16), p, p, z.view(1, 1, 1), z, z, z + 4, z + 4, 1.0)\n"
        "assert out.abs().max() == 0\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(6))
def test_operators_on_a_gpu(seed: int) -> None:
    """The chunking test through the operators, launch parameters as chosen, in bfloat16 with CUDA graphs for decode."""
    r = random.Random(seed)
    spec = [None, (4, 64, 0), (19, 300, 0), None]
    layer = heads(spec, "cuda")
    n, per_head = 1500, (layer.sink, layer.window, layer.ring)
    store = make_store(seed, [0, 0], layer, total=n, head_dim=128, page_size=64, dtype=torch.bfloat16)
    gen = torch.Generator().manual_seed(seed)
    q = torch.randn(2, 16, n, 128, generator=gen).to("cuda", torch.bfloat16)
    want = dense(store, q, torch.arange(n, device="cuda").expand(2, -1), 0.09)
    order = torch.tensor([0, 3, 1, 2], dtype=torch.int32, device="cuda")
    at, out = 0, []
    while at < n - 4:
        size = min(r.choice([9, 100, 500, 777]), n - 4 - at)
        piece, lens = slice(at, at + size), torch.full((2,), at, dtype=torch.int32, device="cuda")
        new = (store.k[:, :, piece], store.v[:, :, piece])
        options = {"head_order": order, "num_global": 2, "past_len_hint": at}
        out.append(sp.prefill(q[:, :, piece], *new, *store.pages, lens, *per_head, 0.09, **options))
        sp.append(*new, *store.pages, lens, layer.sink, layer.ring)
        at += size
    lens = torch.full((2,), at, dtype=torch.int32, device="cuda")
    one_q, one_k, one_v = (x[:, :, at : at + 1].clone() for x in (q, store.k, store.v))

    def step() -> torch.Tensor:
        sp.append(one_k, one_v, *store.pages, lens, layer.sink, layer.ring)
        return sp.decode(one_q, *store.pages, lens + 1, *per_head, 0.09, exact_positions=False)

    step()  # compiles; writing the same token twice changes nothing
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for t in range(at, n):
        for x, whole in ((one_q, q), (one_k, store.k), (one_v, store.v)):
            x.copy_(whole[:, :, t : t + 1])
        lens.fill_(t)
        graph.replay()
        out.append(captured.clone())
    assert_close(torch.cat(out, 1), want)


def test_keep_all_is_two_to_the_thirtieth() -> None:
    """The number that page tables and tests use for heads that keep everything."""
    from segpaged_attention import support

    assert support.KEEP_ALL == KEEP_ALL == 2**30
