"""A training loop of one's own on several processes that hold one copy of the weights among them.

torchrun --nproc-per-node 2 examples/sharded_loop.py CHECKPOINT [--steps 20] [--sequence 2] [--expert 2]

With --sequence so many neighbours also hold each pack together, for documents that one device has no memory for; with
--expert they hold the experts of a mixture together, and tokens travel to them.
"""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, AutoTokenizer

from deltatune import PackedCollator, pack, parallelize, prepare

TOKENS = 512


def main() -> None:
    """Learns a few sums."""
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoint", help="a folder or a name on the Hub")
    parser.add_argument("--output", default="outputs/sharded_loop")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--sequence", type=int, default=1)
    parser.add_argument("--expert", type=int, default=1)
    parser.add_argument("--expert-capacity", type=float, default=1.5)
    options = parser.parse_args()

    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    tokenizer = AutoTokenizer.from_pretrained(options.checkpoint)
    model = AutoModelForCausalLM.from_pretrained(options.checkpoint).to(device).train()
    parallel = parallelize(
        prepare(model),
        shard=dist.get_world_size(),
        sequence=options.sequence,
        expert=options.expert,
        expert_capacity=options.expert_capacity,
    )
    mesh = parallel.mesh

    samples = []
    for a, b in [(a, b) for a in range(20) for b in range(20)]:
        question, answer = (tokenizer(text)["input_ids"] for text in (f"{a} + {b} =", f" {a + b}{tokenizer.eos_token}"))
        samples.append({"input_ids": question + answer, "labels": [-100] * len(question) + answer})
    packs = pack([len(sample["input_ids"]) for sample in samples], TOKENS)
    collate = PackedCollator(tokens_per_batch=TOKENS, pad_token_id=tokenizer.pad_token_id)

    optimizer = torch.optim.AdamW(parallel.model.parameters(), lr=1e-3)
    for step in range(options.steps):
        # every data rank takes the next pack of its own, and each of its ranks a part of that
        batch = collate([samples[i] for i in packs[(step * mesh.data_size + mesh.data_rank) % len(packs)]])
        batch = {name: value.to(device) if hasattr(value, "to") else value for name, value in batch.items()}
        targets = mesh.sum_over_data((batch["labels"] != -100).sum())
        loss = parallel.model(**parallel.part(batch), num_items_in_batch=targets).loss
        (loss * mesh.size).backward()
        parallel.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 10 == 0 or step == options.steps - 1:
            parallel.check()  # that no visit to an expert was left out; it waits for the device
            loss = mesh.sum_over_ranks(loss.detach())
            if mesh.rank == 0:
                print(f"step {step}: loss {loss.item():.3f}")
    state = parallel.state_dict()
    if mesh.rank == 0:
        model.save_pretrained(options.output, state_dict=state)
        tokenizer.save_pretrained(options.output)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
