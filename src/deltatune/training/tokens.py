"""Tokens that a recipe adds: in the tokenizer, in the embeddings, and in what trains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers import AddedToken
from torch import nn
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from deltatune.config.schema import LoraSection, ModelSection, Recipe
from deltatune.errors import UserError
from deltatune.hf.model import head_of
from deltatune.training.tokenizer_files import check_new_tokens, grows

__all__ = ["add_tokens", "check_new_rows_train", "embedding_rows", "resize_embeddings", "token_rows"]


def add_tokens(tokenizer: PreTrainedTokenizerBase, section: ModelSection) -> None:
    """Adds ``added_tokens``, then gives ``special_tokens`` their roles.

    Raises:
        UserError: an added token that is in the vocabulary, or a special one that is not.
    """
    check_new_tokens(section, tokenizer.get_vocab())
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in section.added_tokens or ()])
    for role, token in (section.special_tokens or {}).items():
        tokenizer.add_special_tokens({role: token})


def embedding_rows(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> int | None:
    """The rows of the embedding as a recipe trains it, from the configuration; None where that does not say it."""
    rows = getattr(config.get_text_config(), "vocab_size", None)
    if not isinstance(rows, int) or recipe.model.trust_remote_code:
        return None
    return max(rows, len(tokenizer)) if grows(recipe) else rows


def resize_embeddings(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
    """Gives a model whose embeddings end before the tokenizer does a row for each of its tokens, and so its head.

    New rows are drawn from a normal distribution with the mean and covariance of those that are there. PEFT's
    ``AutoPeftModel`` resizes by the same rule, so the adapter loads there.
    """
    base: Any = model
    if len(tokenizer) > base.get_input_embeddings().weight.shape[0]:
        on_meta = base.get_input_embeddings().weight.device.type == "meta"
        base.resize_token_embeddings(len(tokenizer), mean_resizing=not on_meta)


def token_rows(model: nn.Module, ids: Sequence[int], section: LoraSection) -> dict[str, list[int]]:
    """PEFT's ``trainable_token_indices``: rows of the embedding, and of a head of its own, that train beside adapters.

    A module that ``modules_to_save`` trains whole needs none.

    Raises:
        UserError: embedding or head is to have adapters, which PEFT does not combine with rows.
    """
    base: Any = model
    embedding, head = base.get_input_embeddings(), head_of(model)
    tied = head is None or head.weight is embedding.weight
    rows = {}
    for name, module in model.named_modules():
        if module is not embedding and (tied or module is not head):
            continue
        ending = name.rpartition(".")[2]
        if any(name == saved or name.endswith(f".{saved}") for saved in section.modules_to_save or ()):
            continue
        if isinstance(section.target_modules, tuple) and ending in section.target_modules:
            raise UserError(
                f"lora.target_modules: {ending} cannot have adapters beside model.added_tokens; put it into "
                "lora.modules_to_save, which trains it whole"
            )
        rows[name] = list(ids)
    return rows


def check_new_rows_train(model: nn.Module) -> None:
    """Refuses to freeze the embedding that new tokens have just come into.

    Raises:
        UserError: it does not train.
    """
    base: Any = model
    if not base.get_input_embeddings().weight.requires_grad:
        raise UserError(
            "model.added_tokens would not train: training.unfrozen_parameters leaves the embedding out; add a pattern "
            "for it"
        )
