"""A checkpoint folder, conversations and recipes, all of them small."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tiny import tiny_model

CHATML = """\
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def byte_tokenizer() -> Any:
    """One token a byte: every text has tokens, and their number is plain to see."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"], chat_template=CHATML,
    )  # fmt: skip


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    tokenizer = byte_tokenizer()
    tiny_model("qwen3_5", vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def mixture(tmp_path: Path) -> Path:
    """A checkpoint with routed experts."""
    folder, tokenizer = tmp_path / "mixture", byte_tokenizer()
    tiny_model("qwen3_moe", vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def conversation(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., Path]:
    def write(*rows: dict[str, Any] | str, name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        return path

    return write


@pytest.fixture
def pairs(write_rows: Callable[..., Path]) -> Path:
    """Two answers to each of twelve questions."""
    rows = []
    for i in range(12):
        asked = {"role": "user", "content": f"{i} > 5?"}
        answers = ({"role": "assistant", "content": text + "!" * (i % 3)} for text in ("yes", "no way"))
        rows.append({"prompt": [asked], **{role: [a] for role, a in zip(("chosen", "rejected"), answers, strict=True)}})
    return write_rows(*rows, name="pairs.jsonl")


@pytest.fixture
def write_recipe(tmp_path: Path, checkpoint: Path, write_rows: Callable[..., Path]) -> Callable[..., Path]:
    """A recipe that trains two steps; sections given are laid over it."""

    def write(data: Path | None = None, **sections: Any) -> Path:
        rows = data or write_rows(*(conversation(f"{i} + {i}?", str(2 * i)) for i in range(24)))
        recipe = {
            "model": {"name_or_path": str(checkpoint)},
            "data": {"train": [{"path": str(rows)}], "cache_dir": str(tmp_path / "cache")},
            "packing": {"tokens_per_batch": 128},
            "lora": {"r": 4, "target_modules": ["q_proj", "in_proj_qkv"]},
            "training": {
                "output_dir": str(tmp_path / "output"), "max_steps": 2, "save_strategy": "no", "use_cpu": True,
                "disable_tqdm": True,
            },
            "verify": {"lengths": [5, 1, 9]},
        }  # fmt: skip
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({**recipe, **sections}), encoding="utf-8")
        return path

    return write
