"""A training loop of one's own: pack, collate, prepare, compile, step.

python examples/native_loop.py CHECKPOINT [--compile] [--steps 20]
"""

from __future__ import annotations

import argparse
import random

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from deltatune import CompileOptions, PackedCollator, pack, prepare

TOKENS = 512


def main() -> None:
    """Learns a few sums."""
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoint", help="a folder or a name on the Hub")
    parser.add_argument("--output", default="outputs/native_loop")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--compile", action="store_true", help="compile the layers (slower to start)")
    options = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(options.checkpoint)
    model = AutoModelForCausalLM.from_pretrained(options.checkpoint).to(device).train()
    prepared = prepare(model, compile=CompileOptions() if options.compile else None, checkpointing="layer")
    print(prepared.report)

    samples = []
    for a, b in [(a, b) for a in range(20) for b in range(20)]:
        question, answer = (tokenizer(text)["input_ids"] for text in (f"{a} + {b} =", f" {a + b}{tokenizer.eos_token}"))
        samples.append({"input_ids": question + answer, "labels": [-100] * len(question) + answer})
    packs = pack([len(sample["input_ids"]) for sample in samples], TOKENS)
    collate = PackedCollator(tokens_per_batch=TOKENS, pad_token_id=tokenizer.pad_token_id)

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(options.steps):
        batch = collate([samples[i] for i in random.choice(packs)])
        batch = {name: value.to(device) if hasattr(value, "to") else value for name, value in batch.items()}
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 5 == 0 or step == options.steps - 1:
            print(f"step {step}: loss {loss.item():.3f}")
    prepared.revert()
    model.save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)


if __name__ == "__main__":
    main()
