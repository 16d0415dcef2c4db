"""Fine-tune a checkpoint with plain transformers.Trainer: full packs, documents kept apart, layers compiled.

    python examples/transformers_trainer.py CHECKPOINT [--data rows.jsonl] [--compile] [--steps 20]

``rows.jsonl`` holds one JSON object a line with ``messages`` (role and content). Without it a few sums are learnt.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from deltatune import CompileOptions, PackedCollator, pack, prepare, verify

TOKENS = 512


def conversations(path: Path | None) -> list[list[dict[str, str]]]:
    """The messages of every row, or sums made up here."""
    if path is not None:
        return [json.loads(line)["messages"] for line in path.read_text(encoding="utf-8").splitlines()]
    return [
        [{"role": "user", "content": f"{a} + {b}?"}, {"role": "assistant", "content": str(a + b)}]
        for a in range(20)
        for b in range(20)
    ]


def main() -> None:
    """Loads, prepares, verifies, trains, saves."""
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoint", help="a folder or a name on the Hub")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--output", default="outputs/transformers_trainer")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--compile", action="store_true", help="compile the layers (slower to start)")
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.checkpoint)
    model = AutoModelForCausalLM.from_pretrained(options.checkpoint)
    prepared = prepare(model, compile=CompileOptions() if options.compile else None)
    print(prepared.report)
    print(verify(model))

    rows = [tokenizer.apply_chat_template(turns, return_dict=True) for turns in conversations(options.data)]
    samples = [{"input_ids": row["input_ids"][:TOKENS]} for row in rows]
    # every element is one full batch: Trainer shuffles packs, and the collator lays each out at one fixed shape
    bins = pack([len(sample["input_ids"]) for sample in samples], TOKENS)
    packs = [[samples[i] for i in members] for members in bins]
    arguments = TrainingArguments(
        options.output,
        per_device_train_batch_size=1,
        max_steps=options.steps,
        learning_rate=1e-3,
        logging_steps=5,
        report_to="none",
        save_strategy="no",
    )
    collator = PackedCollator(tokens_per_batch=TOKENS, pad_token_id=tokenizer.pad_token_id)
    trainer = Trainer(model, arguments, train_dataset=packs, data_collator=collator, processing_class=tokenizer)
    trainer.train()
    trainer.save_model()
    if options.compile:
        print(prepared.compile_report)


if __name__ == "__main__":
    main()
