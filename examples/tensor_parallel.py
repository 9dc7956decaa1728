"""Tensor parallel on this machine: transformers shards the model, each rank's cache takes its own heads.

    python examples/tensor_parallel.py                                        # starts torchrun by itself
    torchrun --nproc-per-node 3 examples/tensor_parallel.py

SmolLM2-135M has 3 KV heads per layer, so it runs on 3 ranks (or 1): the number of ranks has to divide them. On a machine
with 3 GPUs each rank takes one; without, they are processes on the CPU.
"""

from __future__ import annotations

import os
import subprocess
import sys

import torch
from torch import distributed
from transformers import AutoModelForCausalLM, AutoTokenizer

from redknot_hf import HeadProfile, RedKnotCache
from redknot_hf.demo_model import get_demo_model_path
from redknot_hf.distributed import world_report
from redknot_hf.placement import place_heads

RANKS = 3
QUESTION = "The keeper writes down every ship. " * 80 + "In one word, what does the keeper write down? Every"


def main() -> bool:
    """Run on every rank; whether the text is that of one process."""
    rank = int(os.environ["RANK"])
    cuda = torch.cuda.device_count() >= RANKS
    torch.set_num_threads(1)
    distributed.init_process_group("nccl" if cuda else "gloo")
    if rank == 0:
        get_demo_model_path()  # fetched once, not by every rank
    distributed.barrier()
    path = get_demo_model_path(progress=False)
    profile = HeadProfile.load("SmolLM2-135M-Instruct")

    model = AutoModelForCausalLM.from_pretrained(
        path, tp_plan="auto", attn_implementation="redknot", dtype=torch.float32
    )
    inputs = AutoTokenizer.from_pretrained(path)(QUESTION, return_tensors="pt").to(model.device)
    options = {"max_new_tokens": 12, "do_sample": False}

    cache = RedKnotCache(model.config, profile)  # the whole model's profile: the rank's heads are found by the config
    text = model.generate(**inputs, past_key_values=cache, **options)
    report = world_report(cache)

    same = True
    if rank == 0:
        one = AutoModelForCausalLM.from_pretrained(path, attn_implementation="redknot", dtype=torch.float32)
        alone = RedKnotCache(one.config, profile)
        inputs = inputs.to("cpu")
        same = torch.equal(text.cpu(), one.generate(**inputs, past_key_values=alone, **options))
        print(AutoTokenizer.from_pretrained(path).decode(text[0, -12:]))
        print("the same tokens as one process:", same)
        print("one process:", alone.memory_report())
        print(f"{RANKS} ranks:   ", report)
        placed = place_heads(profile, RANKS)
        print(f"at 32768 tokens, largest over mean: {placed.contiguous(profile, RANKS).imbalance(32768):.3f} in the model's "
              f"order, {placed.imbalance(32768):.3f} after place_heads")  # fmt: skip
    distributed.barrier()
    distributed.destroy_process_group()
    return same


def launch() -> bool:
    """Start this file under torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS), __file__]
    return subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=600).returncode == 0


if __name__ == "__main__":
    sys.exit(0 if (main() if "RANK" in os.environ else launch()) else 1)
