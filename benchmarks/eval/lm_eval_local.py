"""lm-evaluation-harness on a RedKnotCache, offline: needles and text likelihoods as harness tasks with local data.

    python benchmarks/eval/lm_eval_local.py --model DIR --out benchmarks/results/eval/lm_eval.json

Writes two task files and their data into a temporary folder and runs them through `lm_eval.simple_evaluate` with the
harness's own model ("hf") and with RedKnotLM, on the same weights. What it shows is that tasks run unchanged; n is small.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

import lm_eval
import torch
import transformers
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from redknot_hf.eval.harness import RedKnotLM
from redknot_hf.eval.prompts import PromptMaker
from redknot_hf.eval.tasks import make_examples

NEEDLE = """
task: needle_local
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 12, do_sample: false}
filter_list:
  - name: number
    filter:
      - {function: regex, regex_pattern: "(\\\\d{7})"}
      - {function: take_first}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
TEXT = """
task: text_local
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - {metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}
  - {metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--profile", default="SmolLM2-135M-Instruct")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--n", type=int, default=6)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    maker = PromptMaker(tokenizer, args.tokens)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, task, form in (("needle", "single", NEEDLE), ("text", "ppl", TEXT)):
            rows = []
            for example in make_examples(task, maker, args.n):
                ids = [*example.context, *example.question]
                rows.append({"text": tokenizer.decode(ids), "answer": (example.references or ("",))[0]})
            data = Path(folder, f"{name}.jsonl")
            data.write_text("".join(json.dumps(row) + "\n" for row in rows))
            Path(folder, f"{name}.yaml").write_text(form.replace("DATA", str(data)))
        tasks = TaskManager(include_path=folder, include_defaults=False)
        for name, kind, extra in (("hf", HFLM, {}), ("redknot", RedKnotLM, {"profile": args.profile})):
            model = kind(pretrained=args.model, dtype="float32", device=args.device, batch_size=1, **extra)
            results = lm_eval.simple_evaluate(
                model=model, tasks=["needle_local", "text_local"], task_manager=tasks, bootstrap_iters=0
            )["results"]
            found[name] = {
                task: {key: value for key, value in numbers.items() if isinstance(value, float)}
                for task, numbers in results.items()
            }
    report = {
        "command": "python benchmarks/eval/lm_eval_local.py " + " ".join(sys.argv[1:]),
        "model": Path(args.model).name,
        "tokens": args.tokens,
        "n": args.n,
        "versions": {
            "lm_eval": lm_eval.__version__, "torch": torch.__version__, "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "results": found,
    }  # fmt: skip
    print(json.dumps(report, indent=1))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
