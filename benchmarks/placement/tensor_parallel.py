"""Tensor parallel: RedKnotCache and DynamicCache under transformers' own plan, against one process.

The model has random weights and is built where it runs: transformers shards a model without memory, and every rank fills
its shard from the same seeded full tensors, so one process and several have the same weights and nothing is on disk.

    python benchmarks/placement/tensor_parallel.py --shape llama-8b --out DIR                       # one process first:
    torchrun --standalone --nproc-per-node 2 benchmarks/placement/tensor_parallel.py --shape llama-8b --out DIR

What is measured, one JSON line per row in DIR/rows.jsonl, written at once:

    equal    fp32, few layers: greedy tokens and logits of a prompt with several caches, against what one process wrote
             to the folder --reference; bf16, all layers: the difference of logits beside the difference that DynamicCache shows
    decode   milliseconds per token over a cache filled with random keys and values, eager and (--graph) as a CUDA graph;
             the slowest rank counts
    prefill  milliseconds for a prompt of that length
    transfer a prompt's cache published to a store (--store) by all ranks and fetched again: seconds, bytes against dense,
             and the same tokens afterwards
    bytes    keys and values on every rank, read from the caches, with the heads where the model has them and after
             place_heads
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import os
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import distributed
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, Qwen3Config, StaticCache
from transformers.distributed import DistributedConfig

import redknot_hf
from redknot_hf import HeadProfile, RedKnotCache
from redknot_hf.attention import HANDLE
from redknot_hf.distributed import fetch, publish
from redknot_hf.heads.order import set_config_order
from redknot_hf.placement import place_heads

SHAPES = {
    "llama-8b": LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, max_position_embeddings=262144, rope_theta=500000.0, eos_token_id=None,
    ),
    "qwen3-32b": Qwen3Config(
        vocab_size=151936, hidden_size=5120, intermediate_size=25600, num_hidden_layers=64, num_attention_heads=64,
        num_key_value_heads=8, head_dim=128, max_position_embeddings=262144, rope_theta=1000000.0, eos_token_id=None,
    ),
    "tiny": LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=16,
        num_key_value_heads=8, head_dim=16, max_position_embeddings=4096, eos_token_id=None,
    ),
}  # fmt: skip


class Ranks:
    """This process among the others; one process needs no torch.distributed."""

    def __init__(self) -> None:
        self.size, self.rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
        self.cuda = torch.cuda.is_available()
        self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if self.cuda else torch.device("cpu")
        if self.cuda:
            torch.cuda.set_device(self.device)

    def gather(self, value: float) -> list[float]:
        if self.size == 1:
            return [value]
        mine = torch.tensor([value], dtype=torch.float64, device=self.device)
        everyone = [torch.empty_like(mine) for _ in range(self.size)]
        distributed.all_gather(everyone, mine)
        return [x.item() for x in everyone]

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()
        if self.size > 1:
            distributed.barrier()


def build(config: Any, dtype: torch.dtype, ranks: Ranks) -> Any:
    """A model with the same random weights in every layout."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="redknot")
    if ranks.size > 1:
        kind = type(model)
        layout, _, mesh = kind.prepare_distribute_model(DistributedConfig(tp_size=ranks.size, tp_plan="auto"))
        model = kind.maybe_distribute_model(model, layout, mesh)
    model.to_empty(device=ranks.device)
    decoder = model.model
    with torch.device(ranks.device):
        decoder.rotary_emb = type(decoder.rotary_emb)(config=config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0)
                continue
            seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "little")
            generator = torch.Generator(ranks.device).manual_seed(seed)
            full = torch.empty(parameter.shape, dtype=dtype, device=ranks.device).normal_(0, 0.02, generator=generator)
            if hasattr(parameter, "to_local"):
                parameter.to_local().copy_(shard(full, parameter))
            else:
                parameter.copy_(full)
    return model.eval()


def shard(full: torch.Tensor, parameter: Any) -> torch.Tensor:
    """This rank's part of a full tensor, without talking to others."""
    part = full
    for dim, placement in enumerate(parameter.placements):
        if placement.is_shard():
            count, mine = parameter.device_mesh.size(dim), parameter.device_mesh.get_local_rank(dim)
            part = part.chunk(count, placement.dim)[mine]
        elif not placement.is_replicate():
            raise SystemExit(f"a parameter is placed as {placement}, which this benchmark cannot fill")
    return part


def fill(cache: Any, config: Any, heads: slice, batch: int, context: int, dtype: torch.dtype, ranks: Ranks) -> None:
    """Random keys and values of this rank's heads through the cache's own update."""
    generator = torch.Generator(ranks.device).manual_seed(0)
    rows = min(context, max(2048, 65536 // batch))
    shape = (batch, config.num_key_value_heads, rows, config.head_dim)
    k, v = (torch.empty(shape, dtype=dtype, device=ranks.device).normal_(generator=generator) for _ in range(2))
    for begin in range(0, context, rows):
        length = min(rows, context - begin)
        for layer in range(config.num_hidden_layers):
            keys, _ = cache.update(k[:, heads, :length].contiguous(), v[:, heads, :length].contiguous(), layer)
            if isinstance(cache, RedKnotCache):
                getattr(keys, HANDLE).store()  # attending would take most of the time


class Bench:
    def __init__(self, args: argparse.Namespace, ranks: Ranks):
        self.args, self.ranks, self.began = args, ranks, time.time()
        self.config = SHAPES[args.shape]
        if args.layers:
            self.config.num_hidden_layers = args.layers
        self.out = Path(args.out)
        self.out.mkdir(parents=True, exist_ok=True)
        count = self.config.num_hidden_layers
        # 1 of 8 heads global, in the first two KV heads of each layer: as maps come, not as ranks would like them
        cells = {(l, l % 2) for l in range(count)}
        self.sparse = HeadProfile.uniform(self.config, sink=64, window=256, global_heads=cells)
        self.dense = HeadProfile.all_global(self.config)
        self.model: Any = None

    def note(self, **row: Any) -> None:
        row = {"shape": self.args.shape, "layers": self.config.num_hidden_layers, "tp": self.ranks.size, **row}
        row["at_s"] = round(time.time() - self.began, 1)
        if self.ranks.rank == 0:
            with open(self.out / "rows.jsonl", "a") as file:
                file.write(json.dumps(row) + "\n")
            print(json.dumps(row), flush=True)

    def heads(self) -> slice:
        count = self.config.num_key_value_heads // self.ranks.size
        return slice(self.ranks.rank * count, (self.ranks.rank + 1) * count)

    def cache(self, kind: str, **options: Any) -> Any:
        self.model.set_attn_implementation("sdpa" if kind == "DynamicCache" else "redknot")
        if kind == "DynamicCache":
            return DynamicCache(config=self.model.config)
        profile = self.dense if kind == "RedKnotCache all global" else self.sparse
        return RedKnotCache(self.model.config, profile, **options)

    # ------------------------------------------------------------------------------------------------- equality
    def equal_tokens(self, layers: int) -> None:
        """fp32 and few layers: the same greedy tokens as one process."""
        whole, self.config.num_hidden_layers = self.config.num_hidden_layers, layers
        profiles = self.sparse, self.dense
        self.sparse, self.dense = (
            HeadProfile(layers, p.num_kv_heads, p.head_class[:layers], p.sink[:layers], p.window[:layers])
            for p in profiles
        )
        self.model = build(self.config, torch.float32, self.ranks)
        ids = torch.randint(1, self.config.vocab_size, (2, 700), generator=torch.Generator().manual_seed(1))
        mask = torch.ones_like(ids)
        mask[1, :123] = 0
        ids, mask = ids.to(self.ranks.device), mask.to(self.ranks.device)
        for kind in ("DynamicCache", "RedKnotCache all global", "RedKnotCache 1/8"):
            made = self.model.generate(
                ids, attention_mask=mask, past_key_values=self.cache(kind), max_new_tokens=24, do_sample=False,
                return_dict_in_generate=True, output_logits=True, pad_token_id=0,
            )  # fmt: skip
            logits = torch.stack(made.logits).float().cpu()
            self.compare(
                f"fp32-{layers}-{kind}", kind, made.sequences.cpu(), logits, dtype="float32", layers_run=layers
            )
        self.model, self.config.num_hidden_layers = None, whole
        self.sparse, self.dense = profiles
        release()

    def compare(self, name: str, kind: str, tokens: torch.Tensor | None, logits: torch.Tensor, **row: Any) -> None:
        folder = Path(self.args.reference or self.out)
        path = folder / f"{self.args.shape}-{name.replace(' ', '_').replace('/', '-')}.safetensors"
        if self.ranks.size == 1:
            folder.mkdir(parents=True, exist_ok=True)
            save_file({"logits": logits} | ({} if tokens is None else {"tokens": tokens}), path)
            return
        if not path.exists():
            self.note(part="equal", cache=kind, error="no result of one process to compare with", **row)
            return
        one = load_file(path)
        found: dict[str, Any] = {}
        if tokens is not None:
            same = (one["tokens"] == tokens).all(0)
            found["same_tokens"] = bool(same.all())
            found["first_difference"] = None if same.all() else int((~same).nonzero()[0])
        theirs = one["logits"]
        found["max_logit_difference"] = float((theirs - logits).abs().max())
        found["logit_std"] = float(theirs.std())
        self.note(part="equal", cache=kind, against="tp=1", **found, **row)

    def equal_logits(self) -> None:
        """bf16, all layers: last logits of one prompt."""
        ids = torch.randint(1, self.config.vocab_size, (1, 2048), generator=torch.Generator().manual_seed(2))
        for kind in ("DynamicCache", "RedKnotCache all global", "RedKnotCache 1/8"):
            with torch.no_grad():
                out = self.model(ids.to(self.ranks.device), past_key_values=self.cache(kind), logits_to_keep=8)
            self.compare(
                f"bf16-{kind}", kind, None, out.logits.float().cpu(), dtype=str(self.dtype).removeprefix("torch.")
            )

    # ------------------------------------------------------------------------------------------------- speed
    def step(self, cache: Any, batch: int, context: int) -> Any:
        token = torch.full((batch, 1), 7, device=self.ranks.device)
        position = torch.full((batch, 1), context, device=self.ranks.device)

        def run(i: int) -> Any:
            with torch.no_grad():
                return self.model(token, past_key_values=cache, position_ids=position + i, use_cache=True).logits

        return run

    def milliseconds(self, run: Any, steps: int, repeats: int, start: int) -> list[float]:
        """Of every rank, per step: the median over repeats of the wall clock around a run that ends synchronised."""
        found = []
        for repeat in range(repeats):
            self.ranks.wait()
            begin = time.perf_counter()
            for i in range(steps):
                run(start + repeat * steps + i)
            if self.ranks.cuda:
                torch.cuda.synchronize()
            found.append((time.perf_counter() - begin) / steps * 1e3)
        return self.ranks.gather(statistics.median(found))

    def decode(self, kind: str, batch: int, context: int) -> None:
        release()
        try:
            cache = self.cache(kind)
            fill(cache, self.config, self.heads(), batch, context, self.dtype, self.ranks)
            run = self.step(cache, batch, context)
            for i in range(3):
                run(i)
            ms = self.milliseconds(run, self.args.steps, 3, 3)
            held = [int(x) for x in self.ranks.gather(float(kv_bytes(cache)))]
            self.note(part="decode", cache=kind, mode="eager", batch=batch, context=context, ms=round(max(ms), 3),
                      ms_per_rank=[round(x, 3) for x in ms], kv_bytes_per_rank=held)  # fmt: skip
        except (torch.OutOfMemoryError, redknot_hf.RedKnotError) as error:
            self.note(part="decode", cache=kind, mode="eager", batch=batch, context=context, error=str(error)[:200])

    def graph(self, batch: int, context: int) -> None:
        """One decode step over a static cache, captured with its collectives and replayed."""
        cases: list[tuple[str, Any]] = [("RedKnotCache 1/8", None), ("RedKnotCache all global", None)]
        if self.ranks.size > 1:
            cases.insert(1, ("RedKnotCache 1/8, place_heads", place_heads(self.sparse, self.ranks.size).permutation))
        for name, order in [*cases, ("StaticCache", None)]:
            release()
            if order is not None:
                set_config_order(self.model.config, order)
            try:
                if name == "StaticCache":
                    self.model.set_attn_implementation("sdpa")
                    cache: Any = StaticCache(config=self.model.config, max_cache_len=context + 256)
                else:
                    cache = self.cache(name.split(",")[0], max_cache_len=context + 256)
                self.captured(name, cache, batch, context)
                del cache
            except (torch.OutOfMemoryError, redknot_hf.RedKnotError) as error:
                self.note(part="decode", cache=name, mode="cuda graph", batch=batch, context=context,
                          error=f"{type(error).__name__}: {error}"[:200])  # fmt: skip
            finally:
                if order is not None:
                    delattr(self.model.config, "redknot_head_order")

    def captured(self, name: str, cache: Any, batch: int, context: int) -> None:
        fill(cache, self.config, self.heads(), batch, context, self.dtype, self.ranks)
        token = torch.full((batch, 1), 7, device=self.ranks.device)
        position = torch.full((batch, 1), context, device=self.ranks.device)

        def run() -> Any:
            with torch.no_grad():
                return self.model(token, past_key_values=cache, position_ids=position, use_cache=True).logits

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(4):
                run()
        torch.cuda.current_stream().wait_stream(side)
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            run()
        ms = self.milliseconds(lambda _: captured.replay(), self.args.steps, 3, 0)
        held = [int(x) for x in self.ranks.gather(float(kv_bytes(cache)))]
        self.note(part="decode", cache=name, mode="cuda graph", batch=batch, context=context,
                  ms=round(max(ms), 3), ms_per_rank=[round(x, 3) for x in ms], kv_bytes_per_rank=held)  # fmt: skip

    def prefill(self, kind: str, context: int) -> None:
        release()
        ids = torch.randint(1, self.config.vocab_size, (1, context), generator=torch.Generator().manual_seed(3))
        ids = ids.to(self.ranks.device)
        times = []
        for _ in range(2):
            cache = self.cache(kind)
            self.ranks.wait()
            begin = time.perf_counter()
            with torch.no_grad():
                self.model(ids, past_key_values=cache, logits_to_keep=1)
            if self.ranks.cuda:
                torch.cuda.synchronize()
            times.append((time.perf_counter() - begin) * 1e3)
            del cache
        ms = self.ranks.gather(times[-1])
        self.note(part="prefill", cache=kind, context=context, ms=round(max(ms), 1))

    def placed_bytes(self, batch: int, context: int) -> None:
        """KV bytes per rank of a profile whose global heads cluster, before and after `place_heads`."""
        if self.ranks.size == 1:
            return
        for name, order in (
            ("model order", None),
            ("place_heads", place_heads(self.sparse, self.ranks.size).permutation),
        ):
            if order is not None:
                set_config_order(self.model.config, order)
            cache = self.cache("RedKnotCache 1/8")
            fill(cache, self.config, self.heads(), batch, context, self.dtype, self.ranks)
            held = [int(x) for x in self.ranks.gather(float(kv_bytes(cache)))]
            run = self.step(cache, batch, context)
            for i in range(3):
                run(i)
            ms = self.milliseconds(run, self.args.steps, 3, 3)
            self.note(part="bytes", heads=name, batch=batch, context=context, kv_bytes_per_rank=held,
                      max_over_mean=round(max(held) * len(held) / sum(held), 4), ms=round(max(ms), 3))  # fmt: skip
            del cache
            release()
        delattr(self.model.config, "redknot_head_order")

    def transfer(self, context: int) -> None:
        """Publish what a prompt left, fetch it again, and go on from both."""
        release()
        device = self.ranks.device
        ids = torch.randint(1, self.config.vocab_size, (1, context), generator=torch.Generator().manual_seed(4)).to(
            device
        )
        mask = torch.ones_like(ids)
        cache = self.cache("RedKnotCache 1/8")
        first = self.model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=1, do_sample=False)
        self.ranks.wait()
        begin = time.perf_counter()
        sent = publish(cache, self.args.store, "benchmark", tokens=first)
        self.ranks.wait()
        middle = time.perf_counter()
        found = fetch(self.args.store, "benchmark", self.model)
        self.ranks.wait()
        end = time.perf_counter()
        texts = [
            self.model.generate(
                **found.inputs, past_key_values=each, max_new_tokens=16, do_sample=False, pad_token_id=0
            ).cpu()
            for each in (cache, found.cache)
        ]
        self.note(part="transfer", context=context, publish_s=round(middle - begin, 3), fetch_s=round(end - middle, 3),
                  nbytes=sent.nbytes, nbytes_per_rank=sent.nbytes_per_rank, dense_nbytes=sent.dense_nbytes,
                  cells=sent.cells, same_tokens=bool(torch.equal(*texts)))  # fmt: skip

    # ------------------------------------------------------------------------------------------------- all of it
    def main(self) -> None:
        args, ranks = self.args, self.ranks
        self.dtype = torch.bfloat16 if ranks.cuda else torch.float32
        if ranks.cuda:  # a cuDNN plan for every new length costs 30-40 ms of CPU a step: that would flatter us
            torch.backends.cuda.enable_cudnn_sdp(False)
        name = torch.cuda.get_device_name() if ranks.cuda else platform.processor()
        self.note(part="machine", device=name, torch=torch.__version__, transformers=transformers.__version__,
                  redknot_hf=redknot_hf.__version__)  # fmt: skip
        parts = args.parts.split(",")
        if "equal" in parts and args.fp32_layers:
            self.equal_tokens(min(args.fp32_layers, self.config.num_hidden_layers))
        begin = time.perf_counter()
        self.model = build(self.config, self.dtype, ranks)
        if ranks.size > 1 and not distributed.is_initialized():
            raise SystemExit("the model was not distributed")
        ranks.wait()
        weights = sum(local(p).nbytes for p in self.model.parameters())
        self.note(part="build", seconds=round(time.perf_counter() - begin, 1), weights_bytes_per_rank=weights)
        if "equal" in parts:
            self.equal_logits()
        cases = [tuple(map(int, case.split("x"))) for case in args.cases.split(",")]
        if "decode" in parts:
            for batch, context in cases:
                for kind in ("RedKnotCache 1/8", "RedKnotCache all global", "DynamicCache"):
                    self.decode(kind, batch, context)
        if "bytes" in parts:
            self.placed_bytes(*cases[-1])
        if "prefill" in parts:
            for context in map(int, args.prefill.split(",")):
                for kind in ("RedKnotCache 1/8", "DynamicCache"):
                    self.prefill(kind, context)
        if "transfer" in parts:
            self.transfer(int(args.prefill.split(",")[0]))
        if "graph" in parts and ranks.cuda:
            for batch, context in cases:
                self.graph(batch, context)
        ranks.wait()
        self.note(part="done")
        self.model = None
        release()


def local(tensor: Any) -> torch.Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def kv_bytes(cache: Any) -> int:
    """Bytes of keys and values: live pages and tables, or DynamicCache's tensors."""
    if isinstance(cache, RedKnotCache):
        return cache.memory_report().live
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-8b", help=f"of {', '.join(SHAPES)}, comma separated")
    parser.add_argument("--layers", type=int, default=0, help="fewer layers than the shape has")
    parser.add_argument("--fp32-layers", type=int, default=4, help="layers of the fp32 equality model; 0 to skip it")
    parser.add_argument("--parts", default="equal,decode,bytes,prefill", help="of those above, and graph")
    parser.add_argument(
        "--cases", default="1x8192,1x131072,8x32768", help="batch x context, comma separated; / between shapes"
    )
    parser.add_argument("--prefill", default="32768", help="prompt lengths, comma separated; / between shapes")
    parser.add_argument("--steps", type=int, default=8, help="decode steps per timed run")
    parser.add_argument("--reference", help="folder for the results of one process that several are compared with")
    parser.add_argument("--store", default="file:///tmp/redknot-transfer", help="URL for the part transfer")
    parser.add_argument("--out", required=True)
    return parser.parse_args()


def run() -> None:
    args = parse()
    shapes, cases, prompts = args.shape.split(","), args.cases.split("/"), args.prefill.split("/")
    ranks = Ranks()
    for i, shape in enumerate(shapes):
        args.shape, args.cases, args.prefill = shape, cases[i % len(cases)], prompts[i % len(prompts)]
        bench = Bench(args, ranks)
        try:
            bench.main()
        except (torch.OutOfMemoryError, redknot_hf.RedKnotError) as error:  # the next shape still has its turn
            bench.note(part="stopped", error=f"{type(error).__name__}: {error}"[:300])
            if ranks.size > 1:
                raise
            del bench
            release()
    if ranks.size > 1:
        distributed.destroy_process_group()


if __name__ == "__main__":
    run()
