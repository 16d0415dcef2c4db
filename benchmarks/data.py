"""CPU and wall time of tokenising against ``datasets.map`` on the same rows, and memory of packing.

    python -m benchmarks.data                                  # 24,000 conversations, 2 processes, 3 turns each
    python -m benchmarks.data --rows 4000 --num-proc 1
    python -m benchmarks.data --documents 10000000             # memory and time of packing so many

Two baselines: ``map`` of the tokenizer's own ``apply_chat_template`` with the mask of assistant tokens, and ``map`` of
our renderer. Turns alternate; the medians are printed. Every run starts from files and ends with files.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deltatune.data.chat import Renderer
from deltatune.data.dataset import pack_documents
from deltatune.data.documents import Documents, tokenize
from deltatune.data.formats import Layout
from deltatune.data.shards import Shard
from deltatune.data.sources import load_rows

__all__ = ["compare", "main", "packing"]

_WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog", "what", "is", "two", "plus", "four", "hello")
_BLOCKS = """{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' }}
{%- if message.role == 'assistant' %}{%- generation %}{{- message.content + '<|im_end|>' }}{%- endgeneration %}
{%- else %}{{- message.content + '<|im_end|>' }}{%- endif %}{{- '\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""


def main(argv: Sequence[str] | None = None) -> int:
    """Prints both tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rows", type=int, default=24_000)
    parser.add_argument("--num-proc", type=int, default=2)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--documents", type=int, default=1_000_000)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        found = compare(Path(folder), args.rows, args.num_proc, args.turns)
    ours = found["deltatune"]
    sys.stdout.write(f"{args.rows:,} conversations, {args.num_proc} processes\n")
    for name, (cpu, wall) in found.items():
        share = "" if found[name] == ours else f"; deltatune takes {ours[0] / cpu:.2f} and {ours[1] / wall:.2f} of that"
        sys.stdout.write(f"{name:28} CPU {cpu:6.1f} s, wall {wall:6.1f} s{share}\n")
    sys.stdout.write(packing(args.documents) + "\n")
    return 0


def compare(folder: Path, rows: int, num_proc: int, turns: int) -> Mapping[str, tuple[float, float]]:
    """Medians of CPU and wall seconds by system."""
    import datasets

    datasets.disable_progress_bars()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    file = folder / "rows.jsonl"
    _write(file, rows)
    tokenizer = _tokenizer()
    renderer, layout = Renderer(tokenizer), Layout("chat")

    def ours() -> None:
        tokenize(load_rows(str(file)), layout, renderer, num_proc=num_proc, cache_dir=folder / "ours")

    def rendered(row: Mapping[str, Any]) -> dict[str, Any]:
        (sample,) = renderer.render(row, layout, "row")
        return {"input_ids": sample.input_ids, "labels": sample.labels}

    def applied(row: Mapping[str, Any]) -> dict[str, Any]:
        made = tokenizer.apply_chat_template(
            row["messages"], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        return {"input_ids": made["input_ids"], "mask": made["assistant_masks"]}

    def mapped(function: Callable[[Mapping[str, Any]], dict[str, Any]]) -> Callable[[], None]:
        def run() -> None:
            cache = str(folder / "hub")
            table = datasets.load_dataset("json", data_files=str(file), split="train", cache_dir=cache)
            table.map(function, remove_columns=table.column_names, num_proc=num_proc if num_proc > 1 else None)

        return run

    systems = {"deltatune": ours, "map(apply_chat_template)": mapped(applied), "map(our renderer)": mapped(rendered)}
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in systems}
    for _ in range(turns):
        for name, run in systems.items():
            for cache in ("ours", "hub"):
                shutil.rmtree(folder / cache, ignore_errors=True)
            cpu, wall = _cpu(), time.perf_counter()
            run()
            samples[name].append((_cpu() - cpu, time.perf_counter() - wall))
    return {
        name: (statistics.median(cpu for cpu, _ in taken), statistics.median(wall for _, wall in taken))
        for name, taken in samples.items()
    }


def packing(documents: int) -> str:
    """Time and memory of packing so many documents, in words; the tokens themselves lie on disk in a run."""
    lengths = np.clip(np.random.default_rng(0).lognormal(5.6, 1.0, documents), 8, 4096).astype(np.int32)
    shard = Shard(
        tokens=np.zeros(0, dtype=np.int32),
        trained=np.zeros(0, dtype=np.bool_),
        lengths=lengths,
        targets=lengths - 1,
        rows=np.arange(documents),
        contents=np.zeros(documents, dtype=np.uint64),
    )
    source: Any = range(documents)
    before, started = _resident(), time.perf_counter()
    packs = pack_documents([Documents([shard], source, Layout("text"))], tokens_per_batch=16384)
    packed = time.perf_counter() - started
    packs.epochs(1)
    used = (_resident() - before) / 2**20
    report = packs.report
    mixed = f"{report.variance_between_packs:.1%} of the variance of length between packs"
    return f"{documents:,} documents packed in {packed:.1f} s, {report.fill:.2%} full, {mixed}; {used:,.0f} MiB more"


def _cpu() -> float:
    """CPU seconds of this process and of those that it waited for."""
    own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def _resident() -> int:
    """The most memory that this process has had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _write(file: Path, count: int) -> None:
    rng = np.random.default_rng(0)

    def text(words: int) -> str:
        return " ".join(_WORDS[index] for index in rng.integers(0, len(_WORDS), words))

    with file.open("w", encoding="utf-8") as stream:
        for _ in range(count):
            turns = [("user", 30), ("assistant", 80), ("user", 20), ("assistant", 60)]
            row = {"messages": [{"role": role, "content": text(words)} for role, words in turns]}
            stream.write(json.dumps(row) + "\n")


def _tokenizer() -> Any:
    """A byte-level BPE of the words, with ChatML in generation blocks."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([" ".join(_WORDS)] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", chat_template=_BLOCKS)


if __name__ == "__main__":
    sys.exit(main())
