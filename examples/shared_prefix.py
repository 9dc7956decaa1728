"""One system prompt for many requests: forks share its pages.

The prefix runs once with full attention; local heads then keep what their windows show. Every request gets a fork, which
costs the pages it writes to.
"""

from __future__ import annotations

import torch

from redknot_hf import HeadProfile
from redknot_hf.demo_model import get_demo_model
from redknot_hf.prefix import compress_prefix

RULES = "You are the clerk of a small museum. Answer in one short sentence. " + "".join(
    f"Room {n} shows {what}, and is open on {day}. "
    for n, what, day in [
        (1, "clocks", "Mondays"), (2, "maps", "Tuesdays"), (3, "stamps", "Wednesdays"), (4, "bells", "Thursdays"),
        (5, "looms", "Fridays"), (6, "lamps", "Saturdays"), (7, "ships", "Sundays"),
    ] * 8
)  # fmt: skip


def main() -> tuple[int, int]:
    model, tokenizer = get_demo_model(attn_implementation="redknot")
    rules = tokenizer(RULES, return_tensors="pt")["input_ids"]
    prefix = compress_prefix(model, rules, HeadProfile.load("SmolLM2-135M-Instruct"))
    print("prefix:", prefix.prefix_report)
    children = []
    for question in ("Which room shows bells?", "When is the room with lamps open?", "What is in room 2?"):
        request = tokenizer(f"\nVisitor: {question}\nClerk:", add_special_tokens=False, return_tensors="pt")[
            "input_ids"
        ]
        both = torch.cat([rules, request], 1)
        child = prefix.fork()
        with torch.no_grad():
            output = model.generate(both, past_key_values=child, max_new_tokens=10, do_sample=False)
        children.append(child)
        answer = tokenizer.decode(output[0, both.shape[1] :], skip_special_tokens=True).strip().splitlines()
        print(f"{question} {answer[0] if answer else ''}")
    together = children[-1].memory_report().allocated  # of the pool that prefix and children share
    apart = sum(child.memory_report().live for child in [prefix, *children])
    print(f"prefix and {len(children)} children: {together:,} bytes together, {apart:,} if nothing were shared")
    for child in children:
        child.reset()  # its pages are free again at once
    return together, apart


if __name__ == "__main__":
    main()
