from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from deltatune import Sequences
from deltatune.packing.metadata import Resolved, resolve_metadata

CPU = torch.device("cpu")


def given(rows: int, tokens: int, **call: Any) -> Resolved:
    return resolve_metadata(call, rows=rows, tokens=tokens, device=CPU)


def ids(*rows: list[int]) -> Tensor:
    return torch.tensor(rows)


def cu(*boundaries: int) -> Tensor:
    return torch.tensor(boundaries, dtype=torch.int32)


POSITIONS = ids([0, 1, 2, 0, 1, 0])
FORMS: dict[str, dict[str, Any]] = {
    "sequences": {"sequences": Sequences.from_lengths([3, 2, 1])},
    "cu_seq_lens_q": {"cu_seq_lens_q": cu(0, 3, 5, 6)},
    "attention_mask": {"attention_mask": ids([1, 1, 1, 2, 2, 3])},
    "seq_idx": {"seq_idx": ids([0, 0, 0, 1, 1, 2])},
    "position_ids": {"position_ids": POSITIONS},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_boundaries(form: str) -> None:
    found = given(1, 6, **FORMS[form])
    assert found.source == form
    assert found.sequences.lengths == [3, 2, 1]
    assert found.position_ids.tolist() == POSITIONS.tolist()
    assert (found.padding_mask is not None) == (form == "attention_mask")


def test_forms_are_taken_in_order_of_precedence() -> None:
    forms = list(FORMS)
    for first, form in enumerate(forms):
        call: dict[str, Any] = {}
        for later in forms[first:]:
            call |= FORMS[later]
        assert given(1, 6, **call).source == form


def test_without_metadata_every_row_is_a_document() -> None:
    found = given(2, 3)
    assert found.source == "rows"
    assert found.sequences.lengths == [3, 3]
    assert found.position_ids.tolist() == [[0, 1, 2], [0, 1, 2]]
    assert given(2, 3, position_ids=torch.arange(3).expand(2, -1)).sequences.lengths == [3, 3]
    assert given(2, 3, position_ids=torch.arange(3)[None]).sequences.lengths == [3, 3]


def test_an_all_ones_mask_changes_nothing() -> None:
    found = given(1, 6, position_ids=POSITIONS, attention_mask=torch.ones(1, 6, dtype=torch.long))
    assert found.source == "position_ids"
    assert found.sequences.lengths == [3, 2, 1]
    assert given(2, 3, attention_mask=torch.ones(2, 3, dtype=torch.bool)).sequences.lengths == [3, 3]


def test_a_mask_of_zeros_and_ones_is_one_document_a_row_and_padding() -> None:
    found = given(3, 4, attention_mask=ids([1, 1, 1, 0], [0, 0, 1, 1], [1, 1, 1, 1]))
    assert found.source == "attention_mask"
    assert found.sequences.lengths == [3, 1, 2, 2, 4]
    assert found.padding_mask is not None
    assert found.padding_mask.tolist() == [[True, True, True, False], [False, False, True, True], [True] * 4]


def test_positions_of_padding_say_nothing() -> None:
    # what generation code makes of a left-padded mask
    found = given(2, 4, attention_mask=ids([0, 0, 1, 1], [1, 1, 1, 1]), position_ids=ids([1, 1, 0, 1], [0, 1, 2, 3]))
    assert found.sequences.lengths == [2, 2, 4]


def test_restarting_positions_with_a_padding_mask() -> None:
    found = given(1, 7, attention_mask=ids([1, 1, 1, 1, 1, 0, 0]), position_ids=ids([0, 1, 0, 1, 2, 3, 4]))
    assert found.source == "position_ids"
    assert found.sequences.lengths == [2, 3, 2]


@pytest.mark.parametrize("form", ["attention_mask", "seq_idx", "position_ids", "cu_seq_lens_q", "sequences"])
def test_several_documents_in_each_of_several_rows(form: str) -> None:
    lengths = [2, 2, 1, 3]
    call: dict[str, Any] = {
        "attention_mask": ids([1, 1, 2, 2], [1, 2, 2, 2]),
        "seq_idx": ids([0, 0, 1, 1], [0, 1, 1, 1]),
        "position_ids": ids([0, 1, 0, 1], [0, 0, 1, 2]),
        "cu_seq_lens_q": cu(0, 2, 4, 5, 8),
        "sequences": Sequences.from_lengths(lengths),
    }
    assert given(2, 4, **{form: call[form]}).sequences.lengths == lengths
    assert given(2, 4, **call).sequences.lengths == lengths


def test_ids_that_restart_in_the_next_row_are_not_merged() -> None:
    assert given(2, 3, attention_mask=ids([2, 1, 1], [1, 1, 2])).sequences.lengths == [1, 2, 2, 1]
    assert given(2, 3, seq_idx=ids([0, 1, 1], [1, 1, 2])).sequences.lengths == [1, 2, 2, 1]


def test_indexed_mask_with_padding() -> None:
    found = given(2, 4, attention_mask=ids([1, 2, 2, 0], [0, 1, 1, 0]))
    assert found.sequences.lengths == [1, 2, 1, 1, 2, 1]
    assert found.padding_mask is not None
    assert found.padding_mask.sum() == 5


def test_four_row_mrope_positions_carry_boundaries() -> None:
    rows = torch.cat([POSITIONS[None], torch.zeros(3, 1, 6, dtype=torch.long)])
    found = given(1, 6, position_ids=rows)
    assert found.sequences.lengths == [3, 2, 1]
    assert found.position_ids is rows


def test_three_row_mrope_positions_need_other_boundaries() -> None:
    rows = torch.arange(6).expand(3, 1, 6)
    with pytest.raises(ValueError, match=r"\[3, B, T\] hold no document boundaries"):
        given(1, 6, position_ids=rows)
    for form in ("sequences", "cu_seq_lens_q", "attention_mask", "seq_idx"):
        found = given(1, 6, position_ids=rows, **FORMS[form])
        assert found.sequences.lengths == [3, 2, 1]
        assert found.position_ids is rows
    # an explicit mask says that each row is one document
    assert given(1, 6, position_ids=rows, attention_mask=torch.ones(1, 6, dtype=torch.long)).sequences.lengths == [6]


def test_positions_without_a_batch_dimension() -> None:
    found = given(1, 6, position_ids=POSITIONS[0])
    assert found.sequences.lengths == [3, 2, 1]
    assert found.position_ids.shape == (1, 6)


@pytest.mark.parametrize("boundaries", [[0, 3, 5, 6], cu(0, 3, 5, 6)[None], cu(0, 3, 5, 6, 6, 6)])
def test_forms_of_cu_seqlens(boundaries: Any) -> None:
    for names in (("cu_seq_lens_q",), ("cu_seq_lens_k",), ("cu_seq_lens_q", "cu_seq_lens_k")):
        call = dict.fromkeys(names, boundaries)
        assert given(1, 6, **call, max_length_q=3, max_length_k=3).sequences.lengths == [3, 2, 1]


def test_padding_tail_described_as_a_document() -> None:
    # collators repeat one position over their padding
    found = given(1, 8, cu_seq_lens_q=cu(0, 3, 5, 8), position_ids=ids([0, 1, 2, 0, 1, 0, 0, 0]))
    assert found.sequences.lengths == [3, 2, 3]
    padded = Sequences.from_lengths([3, 2], total=8)
    found = given(1, 8, sequences=padded, attention_mask=ids([1, 1, 1, 1, 1, 0, 0, 0]))
    assert found.sequences.lengths == [3, 2, 3]
    assert found.padding_mask is not None


def test_positions_that_never_restart_are_silent() -> None:
    assert given(1, 6, cu_seq_lens_q=cu(0, 3, 5, 6), position_ids=torch.arange(6)[None]).sequences.lengths == [3, 2, 1]
    assert given(1, 6, seq_idx=FORMS["seq_idx"]["seq_idx"], position_ids=torch.arange(6)[None]).sequences.lengths == [
        3, 2, 1,
    ]  # fmt: skip


OTHER: dict[str, dict[str, Any]] = {
    "cu_seq_lens_q": {"cu_seq_lens_q": cu(0, 2, 5, 6)},
    "attention_mask": {"attention_mask": ids([1, 1, 2, 2, 2, 3])},
    "seq_idx": {"seq_idx": ids([0, 0, 1, 1, 1, 2])},
    "position_ids": {"position_ids": ids([0, 1, 0, 1, 2, 0])},
}


@pytest.mark.parametrize("other", OTHER)
@pytest.mark.parametrize("form", FORMS)
def test_contradictions_on_real_tokens_are_refused(form: str, other: str) -> None:
    if form == other:
        return
    first = next(name for name in FORMS if name in (form, other))
    with pytest.raises(ValueError, match=f"{first} and .* contradict each other: at row 0, token 2"):
        given(1, 6, **FORMS[form], **OTHER[other])


@pytest.mark.parametrize(
    ("shape", "call", "message"),
    [
        ((1, 6), {"cu_seq_lens_q": cu(0, 3, 5)}, "must end at the number of tokens: expected 6, got 5"),
        ((1, 6), {"cu_seq_lens_q": cu(0, 3, 8)}, "expected 6, got 8"),
        ((1, 6), {"cu_seq_lens_q": cu(1, 3, 6)}, "start at 0"),
        ((1, 6), {"cu_seq_lens_q": cu(0, 3, 6), "cu_seq_lens_k": cu(0, 4, 6)}, "cu_seq_lens_k differ"),
        ((1, 6), {"sequences": Sequences.from_lengths([3, 2])}, "describes 5 tokens, but the batch holds 1 x 6"),
        ((1, 6), {"sequences": cu(0, 6)}, "must be a deltatune.Sequences, got Tensor"),
        ((2, 3), {"cu_seq_lens_q": cu(0, 2, 6)}, "spans two of the batch's 2 rows"),
        ((2, 3), {"sequences": Sequences.from_lengths([6])}, "spans two of the batch's 2 rows"),
        ((1, 6), {"seq_idx": ids([0, 0, 1])}, r"seq_idx must be \[1, 6\]"),
        ((1, 6), {"position_ids": ids([0, 1, 2])}, r"position_ids must be \[1, 6\]"),
        ((1, 6), {"attention_mask": ids([1, 1])}, r"attention_mask must be \[1, 6\]"),
        ((1, 6), {"attention_mask": torch.full((1, 6), 0.5)}, "fractions in torch.float32"),
        ((1, 6), {"attention_mask": torch.full((1, 6), torch.inf)}, "fractions in torch.float32"),
        ((1, 6), {"attention_mask": torch.full((1, 6), torch.nan)}, "fractions in torch.float32"),
        ((1, 3), {"attention_mask": torch.ones(1, 1, 3, 3, dtype=torch.bool)}, "mask of pairs cannot be honoured"),
        ((1, 3), {"attention_mask": {"full_attention": None}}, "built masks of its own"),
        ((1, 4), {"attention_mask": ids([1, 0, 1, 1])}, "row 0 has padding between real tokens"),
        ((1, 4), {"attention_mask": ids([1, 0, 1, 1]), "cu_seq_lens_q": cu(0, 4)}, "padding inside a document"),
        ((1, 4), {"attention_mask": ids([1, -2, 3, 3])}, ">= 0"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(shape: tuple[int, int], call: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        given(*shape, **call)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int8, torch.uint8, torch.int64, torch.float32, torch.bfloat16])
def test_masks_of_any_dtype(dtype: torch.dtype) -> None:
    found = given(2, 4, attention_mask=ids([1, 1, 1, 0], [0, 1, 1, 1]).to(dtype))
    assert found.sequences.lengths == [3, 1, 1, 3]
    assert found.padding_mask is not None
    assert found.padding_mask.tolist() == [[True, True, True, False], [False, True, True, True]]
    if dtype != torch.bool:
        assert given(1, 4, attention_mask=ids([1, 1, 2, 0]).to(dtype)).sequences.lengths == [2, 1, 1]


@pytest.mark.parametrize("masked", [-math.inf, torch.finfo(torch.float32).min, -1e9, -1.0])
@pytest.mark.parametrize("row", [[0, 0, 1, 1], [1, 1, 0, 0], [1, 1, 1, 1]])
def test_masks_that_are_added_to_scores_are_refused(masked: float, row: list[int]) -> None:
    additive = torch.zeros(1, 4).masked_fill(ids(row) == 0, masked)
    for call in ({}, {"position_ids": torch.arange(4)[None]}, {"sequences": Sequences.from_lengths([2, 2])}):
        with pytest.raises(ValueError, match=r"must be >= 0.*pass attention_mask=\(mask == 0\).long\(\)"):
            given(1, 4, attention_mask=additive, **call)
    assert given(1, 4, attention_mask=(additive == 0).long()).padding_mask.tolist() == (ids(row) == 1).tolist()  # type: ignore[union-attr]


def test_boundaries_that_a_loader_cut_are_read_from_what_it_left_whole() -> None:
    cut = {"cu_seq_lens_q": cu(0), "cu_seq_lens_k": cu(0), "max_length_q": 3, "max_length_k": 3}
    for form in ("sequences", "attention_mask", "seq_idx", "position_ids"):
        assert given(1, 6, **cut, **FORMS[form]).sequences.lengths == [3, 2, 1]
    for rest in ({}, {"attention_mask": ids([1, 1, 1, 1, 1, 1])}, {"position_ids": torch.arange(6)[None]}):
        with pytest.raises(ValueError, match=r'accelerator_config=\{"dispatch_batches": False\}'):
            given(1, 6, **cut, **rest)


def test_the_model_refuses_what_its_metadata_forbid() -> None:
    from deltatune import prepare
    from tiny import tiny_model

    model = tiny_model("qwen3", layers=1)
    prepare(model)
    tokens = torch.ones(1, 6, dtype=torch.long)
    with pytest.raises(ValueError, match="expected 6, got 5"):
        model(input_ids=tokens, cu_seq_lens_q=cu(0, 3, 5))
    with pytest.raises(ValueError, match="contradict each other"):
        model(input_ids=tokens, sequences=Sequences.from_lengths([3, 3]), position_ids=POSITIONS)
    with pytest.raises(ValueError, match="hold no document boundaries"):
        model(input_ids=tokens, position_ids=torch.arange(6).expand(3, 1, 6))
