"""A chat saved to a file, woken in a new process, going on where it was.

The first run makes the file; a second Python process loads it and answers the next question without reading the chat
again. At the end both are compared with a chat that never slept.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from redknot_hf import HeadProfile, RedKnotCache
from redknot_hf.demo_model import get_demo_model

FIRST = [{"role": "user", "content": "Name three rivers in Austria."}]
SECOND = {"role": "user", "content": "Which of them is the longest?"}


def say(model: Any, tokenizer: Any, chat: list[dict[str, str]], cache: RedKnotCache) -> list[dict[str, str]]:
    """Answer the last message; only what the cache has not seen is computed."""
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        output = model.generate(**inputs, past_key_values=cache, max_new_tokens=24, do_sample=False)
    answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [*chat, {"role": "assistant", "content": answer}]


def wake(folder: Path) -> None:
    """What the second process does."""
    model, tokenizer = get_demo_model(attn_implementation="redknot")
    cache = RedKnotCache.load(folder / "chat.safetensors", model)
    chat = json.loads((folder / "chat.json").read_text(encoding="utf-8"))
    print(f"woken with {cache.get_seq_length()} tokens")
    chat = say(model, tokenizer, [*chat, SECOND], cache)
    (folder / "chat.json").write_text(json.dumps(chat), encoding="utf-8")


def main() -> bool:
    model, tokenizer = get_demo_model(attn_implementation="redknot")
    profile = HeadProfile.load("SmolLM2-135M-Instruct")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cache = RedKnotCache.for_model(model, profile)
        chat = say(model, tokenizer, FIRST, cache)
        size = cache.save(folder / "chat.safetensors", model=model)
        (folder / "chat.json").write_text(json.dumps(chat), encoding="utf-8")
        print(f"{cache.get_seq_length()} tokens put to sleep in {size:,} bytes")
        subprocess.run([sys.executable, __file__, name], check=True)
        woken = json.loads((folder / "chat.json").read_text(encoding="utf-8"))
    for message in woken:
        print(f"{message['role']:>10}: {message['content']}")
    never_slept = say(model, tokenizer, [*chat, SECOND], cache)
    print("the same as a chat that never slept:", woken == never_slept)
    return woken == never_slept


if __name__ == "__main__":
    if len(sys.argv) > 1:
        wake(Path(sys.argv[1]))
    else:
        sys.exit(0 if main() else 1)
