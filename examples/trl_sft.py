"""Fine-tune an adapter with TRL's SFTTrainer, padding-free, on a prepared model; documents stay apart.

    python examples/trl_sft.py CHECKPOINT [--data rows.jsonl] [--steps 20]

``rows.jsonl`` holds one JSON object a line with ``messages`` (role and content). Without it a few sums are learnt.
"""

from __future__ import annotations

import argparse

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from deltatune import prepare


def conversations(path: str | None) -> Dataset:
    """The rows of a file, or sums made up here."""
    if path is not None:
        return Dataset.from_json(path)
    rows = [
        {"messages": [{"role": "user", "content": f"{a} + {b}?"}, {"role": "assistant", "content": str(a + b)}]}
        for a in range(20)
        for b in range(20)
    ]
    return Dataset.from_list(rows)


def main() -> None:
    """Loads, prepares, trains, saves the adapter."""
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoint", help="a folder or a name on the Hub")
    parser.add_argument("--data")
    parser.add_argument("--output", default="outputs/trl_sft")
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()

    model = AutoModelForCausalLM.from_pretrained(options.checkpoint)
    # TRL's own checkpointing is on by default; ours runs inside the layer, so its is turned off below
    print(prepare(model, checkpointing="layer").report)
    arguments = SFTConfig(
        options.output,
        packing=True,  # TRL's packing implies padding_free=True: rows of max_length tokens, several documents each
        max_length=512,
        per_device_train_batch_size=1,
        gradient_checkpointing=False,
        max_steps=options.steps,
        learning_rate=1e-3,
        logging_steps=5,
        report_to="none",
        save_strategy="no",
        use_cpu=not torch.cuda.is_available(),
    )
    trainer = SFTTrainer(
        model,
        arguments,
        train_dataset=conversations(options.data),
        processing_class=AutoTokenizer.from_pretrained(options.checkpoint),
        peft_config=LoraConfig(r=16, target_modules="all-linear"),
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
