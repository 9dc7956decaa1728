"""Documents computed once, used in any order.

Two prompts over three documents. The first finds an empty store and computes the documents; the second has another order and
another question, finds them, and computes about 15 % of their rows again. The account says what was reused, and
whether the result is exact.
"""

from __future__ import annotations

import torch

from redknot_hf.demo_model import get_demo_model
from redknot_hf.segments import SegmentedPrompt, SegmentStore

DOCUMENTS = [
    "The ferry to Hvar leaves Split at nine in the morning and takes two hours. Bicycles travel free of charge.\n\n",
    "The library of the town is open from Tuesday to Saturday. Visitors may borrow up to five books for a month.\n\n",
    "The old bakery sells its famous walnut bread only on Fridays. It is usually sold out before ten o'clock.\n\n",
]
# Sentences to finish rather than questions: the model has 135 million parameters.
QUESTIONS = ["To sum up, the bakery sells walnut bread only on", "To sum up, the ferry from Split to Hvar takes"]


def main() -> list[str]:
    model, tokenizer = get_demo_model(attn_implementation="redknot")
    store = SegmentStore("memory://")  # or "file:///var/cache/segments", "valkey://host:6379", ...
    prompt = SegmentedPrompt(model, tokenizer, store, header="Answer from the documents.\n\n")
    answers = []
    for question, order in zip(QUESTIONS, ([0, 1, 2], [2, 0, 1]), strict=True):
        segments = prompt.add_many([DOCUMENTS[i] for i in order])
        built = prompt.build(segments, question)
        with torch.no_grad():
            output = model.generate(**built, max_new_tokens=16, do_sample=False)
        answers.append(tokenizer.decode(output[0, built["input_ids"].shape[1] :], skip_special_tokens=True))
        account = built.account
        print(f"{question}{answers[-1]!r}")
        print(
            f"  {account.reused} rows reused, {account.recomputed} computed again; exact: {account.exact} ({account.reason})\n"
        )
    return answers


if __name__ == "__main__":
    main()
