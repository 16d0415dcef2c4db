"""A pack of samples to one batch of fixed shape, with the document boundaries computed once, on the CPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from deltatune.packing.by_rank import WholeDocuments
from deltatune.packing.sample import IGNORE_INDEX, Sample, as_sample
from deltatune.packing.sequences import Sequences

__all__ = ["PackedCollator"]


@dataclass(frozen=True, kw_only=True)
class PackedCollator:
    """Lays samples one after the other in one row of ``tokens_per_batch`` tokens, the rest of it padding.

    Called with samples that fit together, or with one feature that is itself a pack (a list of samples, or a mapping
    with a list under ``"samples"``), which is what a data loader of packs with batch size 1 passes. A sample is a
    mapping or an object with ``input_ids`` ``[T]`` and ``labels`` ``[T]`` (lists, arrays or CPU tensors); without
    labels every token trains.

    The batch, with ``T = tokens_per_batch`` and padding described as one more document:

    - ``input_ids`` int64 ``[1, T]``, padded with ``pad_token_id``
    - ``labels`` int64 ``[1, T]``, unshifted; ``IGNORE_INDEX`` on padding and on every document's first token, which
      would otherwise be a target of the document before it
    - ``position_ids`` int64 ``[1, T]``, from 0 in every document and in the padding
    - ``sequences``: ``Sequences``, whose shapes depend on ``T`` alone
    - ``cu_seq_lens_q``, ``cu_seq_lens_k`` int32 ``[documents + 1]`` and ``max_length_q``, ``max_length_k`` int, the
      names that stock attention reads

    With ``whole`` the row is that of ranks which hold equal parts of it: where documents fit and it is worth it, each
    lies on one rank, in any order, and padding ends every part as a document of its own. Losses and gradients are those
    of the other order.

    Attributes:
        tokens_per_batch: tokens of every batch, >= 1.
        pad_token_id: the token after the last document; it never trains.
        whole: how documents are laid out for the ranks of a sequence group; one after the other by default.
        allow_unlabelled: accept a sample whose labels are all ``IGNORE_INDEX`` (inference, perplexity by hand).

    Raises:
        ValueError: when called with no sample, more tokens than ``tokens_per_batch``, several packs, an empty sample,
            labels of another length, or a sample that trains nothing; ranks that do not divide ``tokens_per_batch``.
    """

    tokens_per_batch: int
    pad_token_id: int
    allow_unlabelled: bool = False
    whole: WholeDocuments | None = None

    def __post_init__(self) -> None:
        if self.tokens_per_batch < 1:
            raise ValueError(f"tokens_per_batch must be at least 1, got {self.tokens_per_batch}")
        if not isinstance(self.pad_token_id, int) or self.pad_token_id < 0:
            raise ValueError(
                f"pad_token_id must be a token id, got {self.pad_token_id!r}; a tokenizer without a padding token can "
                "use its eos_token_id"
            )
        if self.whole is not None and self.tokens_per_batch % self.whole.ranks:
            raise ValueError(
                f"tokens_per_batch={self.tokens_per_batch} is not a multiple of the {self.whole.ranks} ranks that hold "
                "equal parts of a pack; choose one"
            )

    def __call__(self, samples: Sequence[object]) -> dict[str, object]:
        """One batch from samples that fit together, or from one pack of them."""
        documents = [as_sample(value, f"sample {index}") for index, value in enumerate(_members(samples))]
        self._check(documents)
        row = self._laid_out(documents)
        sequences = Sequences.from_lengths([len(document) for document in row], total=self.tokens_per_batch)
        input_ids = np.concatenate([document.input_ids for document in row], dtype=np.int64)
        labels = np.concatenate([document.labels for document in row], dtype=np.int64)
        labels[sequences.positions.numpy() == 0] = IGNORE_INDEX

        cu_seq_lens = sequences.cu_seqlens_cpu[: sequences.num_sequences + 1]
        # batch-size probes of loaders read the first value: it has to be a tensor
        return {
            "input_ids": torch.from_numpy(input_ids).unsqueeze(0),
            "labels": torch.from_numpy(labels).unsqueeze(0),
            "position_ids": sequences.positions.long().unsqueeze(0),
            "sequences": sequences,
            "cu_seq_lens_q": cu_seq_lens.clone(),
            "cu_seq_lens_k": cu_seq_lens.clone(),
            "max_length_q": sequences.max_length,
            "max_length_k": sequences.max_length,
        }

    def _laid_out(self, documents: list[Sample]) -> list[Sample]:
        """The documents in the order of the row, with padding between them and behind: its tokens exactly."""
        parts, size = [list(range(len(documents)))], self.tokens_per_batch
        if self.whole is not None:
            part = size // self.whole.ranks
            divided = self.whole.divide([len(document) for document in documents], part)
            parts, size = (parts, size) if divided is None else (divided, part)
        row = []
        for members in parts:
            row += [documents[number] for number in members]
            if short := size - sum(len(documents[number]) for number in members):
                row.append(Sample(np.full(short, self.pad_token_id), np.full(short, IGNORE_INDEX)))
        return row

    def _check(self, documents: list[Sample]) -> None:
        if not documents:
            raise ValueError("a batch needs at least one sample, got none")
        used = sum(map(len, documents))
        for index, document in enumerate(documents):
            if len(document) > self.tokens_per_batch:
                raise ValueError(
                    f"sample {index} holds {len(document)} tokens, more than tokens_per_batch={self.tokens_per_batch}; "
                    "split or truncate it, or raise tokens_per_batch"
                )
        if used > self.tokens_per_batch:
            raise ValueError(
                f"{len(documents)} samples hold {used} tokens, more than tokens_per_batch={self.tokens_per_batch}; "
                "pack them with deltatune.pack(lengths, tokens_per_batch) or raise tokens_per_batch"
            )
        if self.allow_unlabelled:
            return
        for index, document in enumerate(documents):
            # a document's first token is nobody's target; a document of one token is legal all the same
            targets = document.labels[1:] if len(document) > 1 else document.labels
            if bool((targets == IGNORE_INDEX).all()):
                raise ValueError(
                    f"sample {index} of {len(document)} tokens trains nothing: all its labels are {IGNORE_INDEX} after "
                    "the first token, which nothing predicts; drop it, or pass allow_unlabelled=True"
                )


def _members(features: Sequence[object]) -> Sequence[object]:
    """The samples of a batch, whether it came as samples or as one pack."""
    inner = [feature.get("samples") if isinstance(feature, Mapping) else feature for feature in features]
    packs = [value for value in inner if isinstance(value, Sequence) and not isinstance(value, str)]
    if not packs:
        return features
    if len(features) > 1:
        raise ValueError(f"a pack is a whole batch, got {len(features)} features; use a batch size of 1 per device")
    return packs[0]
