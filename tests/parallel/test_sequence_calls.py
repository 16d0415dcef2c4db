"""Calls of a model in a sequence group: what they may say of documents, and what stays of the group in copies."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from sequence_cases import THREE, TRACED, Case, build, pack
from torch.distributed import ProcessGroup

from deltatune import Prepared, Sequences, prepare
from deltatune.compile.memory import estimate_memory
from deltatune.compile.trace import trace_layer
from deltatune.errors import UserError
from deltatune.packing.group import Recurrent, SequenceGroup
from deltatune.parallel.sequence import shard_sequence
from deltatune.parallel.slice import cut_batch
from deltatune.subclass import Swapped, stock_class
from tiny import tiny_conditional, tiny_model


def member(model: Any, rank: int = 1, size: int = 2, recurrent: Recurrent = "heads", **options: Any) -> Prepared:
    """A model that one rank of a group holds, of which no other rank is there: calls that exchange nothing."""
    prepared = prepare(model, **options)
    prepared._state.sequence = SequenceGroup("nobody", size, rank, recurrent)
    return prepared


def part(**changes: Any) -> dict[str, Any]:
    found = cut_batch(pack(THREE), rank=1, size=2) | changes
    return {name: value for name, value in found.items() if value is not None}


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no boundaries": ({"sequences": None}, "needs sequences=.*got NoneType"),
    "boundaries of the part": (
        {"sequences": Sequences.from_lengths([24, 40])},
        "describes 64 tokens, but 64 tokens on each rank of a sequence group of 2 ranks are 128",
    ),
    "the whole pack": ({"input_ids": pack(THREE)["input_ids"]}, "describes 128 tokens, but 128 tokens on each rank"),
    "several rows": ({"input_ids": torch.ones(2, 32, dtype=torch.long)}, "got 2 rows"),
    "other boundaries": (
        {"cu_seq_lens_q": torch.tensor([0, 64]), "attention_mask": torch.ones(1, 64)},
        "leave cu_seq_lens_q, attention_mask out",
    ),
    "positions of the part": (
        {"position_ids": torch.arange(64)[None]},
        "token 0 of rank 1 has position 27 in its document by sequences, 0 by position_ids",
    ),
    "positions of the pack": ({"position_ids": torch.arange(128)[None]}, r"must be \[1, 64\]"),
    "three-row positions": ({"position_ids": torch.zeros(3, 1, 64, dtype=torch.long)}, r"must be \[1, 64\]"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_part_that_does_not_fit_the_boundaries_is_refused(case: str) -> None:
    changes, message = REFUSED[case]
    model = build(Case(()))
    member(model)
    for called in (model, model.get_decoder()):
        call = part(**changes)
        for name in ("labels", "shift_labels") if called is not model else ():
            del call[name]
        with pytest.raises(ValueError, match=message):
            called(**call)


def test_images_are_refused() -> None:
    model = tiny_conditional()
    member(model)
    with pytest.raises(ValueError, match="leave pixel_values out"):
        model(**part(), pixel_values=torch.zeros(4, 8))


def test_a_loss_of_the_model_s_own_is_refused() -> None:
    model = build(Case(()))
    member(model)
    model.loss_function = lambda **_: torch.zeros(())
    with pytest.raises(ValueError, match="has a loss of its own"):
        model(**part())


def test_a_cached_call_is_the_rank_s_own() -> None:
    model, stock = (tiny_model("qwen3").eval() for _ in range(2))
    member(model)
    tokens = pack([9])["input_ids"]
    ours, theirs = (one.generate(tokens, max_new_tokens=4, do_sample=False) for one in (model, stock))
    assert torch.equal(ours, theirs)


def test_a_copy_is_in_the_group_and_a_pickle_in_none() -> None:
    model = build(Case((), family="qwen3"))
    prepared = member(model)
    assert copy.deepcopy(model)._deltatune.sequence == prepared._state.sequence
    restored = pickle.loads(pickle.dumps(model))
    assert restored._deltatune.sequence is None
    whole = pack(THREE)
    prepare(model)
    assert torch.equal(restored(**whole).loss, model(**whole).loss)


class Ranks(ProcessGroup):
    """A group of so many ranks that never speak."""

    def __init__(self, size: int) -> None:
        super().__init__(0, size)


def test_sizes_are_checked_and_the_model_is_left_as_it_was() -> None:
    model = build(Case((), model={"num_attention_heads": 6, "num_key_value_heads": 3}))
    prepared = prepare(model)
    with pytest.raises(UserError, match=r"sequence=2 .* one of 1$"):
        shard_sequence(prepared, Ranks(2))
    assert prepared._state.sequence is None
    shard_sequence(prepared, Ranks(1))
    assert prepared._state.sequence is None


def test_another_way_to_divide_recurrent_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="recurrent must be one of heads, state, got 'tokens'"):
        shard_sequence(prepare(build(Case(()))), Ranks(2), recurrent="tokens")  # type: ignore[arg-type]


def test_a_model_that_is_not_prepared_is_refused() -> None:
    with pytest.raises(ValueError, match=r"call prepare\(model\) first"):
        shard_sequence(tiny_model("qwen3"), Ranks(2))


@pytest.mark.parametrize(
    ("family", "exchanged"),
    [
        # q, k and v of one rank's heads for every token, and attention's output of every head for the rank's own
        ("qwen3", 128 * (2 + 1 + 1) * 16 + 64 * 4 * 16),
        # the same of the delta rule, with write strength and decay
        ("qwen3_5", 128 * (8 + 8 + 2 * 12 + 2 + 2) + 64 * 4 * 12),
    ],
)
def test_a_checkpointed_layer_keeps_its_input_and_what_was_exchanged(family: str, exchanged: int) -> None:
    model = build(Case((), family=family, layers=1))
    member(model, compile=TRACED)
    layer = model.model.layers[0]
    assert kept_bytes(model, pack(THREE)["sequences"]) == 4 * (64 * 32 + exchanged)
    assert sum(part.exchanged(2) for part in layer.modules() if isinstance(part, Swapped)) * 64 == exchanged


def kept_bytes(model: Any, sequences: Sequences) -> int:
    """Of the first layer, checkpointed, on one of two ranks."""
    layer, tokens = model.model.layers[0], sequences.total // 2
    hidden = torch.zeros(1, tokens, 32, requires_grad=True)
    positions = torch.arange(tokens).expand(*([3] if "qwen3_5" in model.config.model_type else []), 1, tokens)
    shared = {**vars(sequences), "part": SequenceGroup("nobody", 2, 1).part(sequences)}
    call = {"position_embeddings": model.model.rotary_emb(hidden, positions), "sequences": Sequences(**shared).static()}
    traced = trace_layer(stock_class(layer).forward, layer, (hidden,), call, settings=("layer",), options=TRACED)
    return traced["layer"].kept


def test_what_passes_states_on_keeps_as_much_whatever_the_number_of_tokens() -> None:
    model = build(Case((), layers=1))
    member(model, recurrent="state", compile=TRACED)
    few, many = (kept_bytes(model, Sequences.from_lengths([2 * tokens])) for tokens in (64, 128))
    assert many - few == 4 * 64 * 32
    parts = [part for part in model.model.layers[0].modules() if isinstance(part, Swapped)]
    assert sum(part.exchanged(2, recurrent="state") for part in parts) == 0


@pytest.mark.parametrize("attached", [False, True])
def test_the_memory_estimate_knows_how_recurrent_layers_will_be_divided(*, attached: bool) -> None:
    model = build(Case((), layers=1))
    if attached:
        member(model, recurrent="state")
    else:
        prepare(model)

    def activations(recurrent: Recurrent, checkpointing: str = "none", sequence: int = 2) -> int:
        given: Any = {"checkpointing": checkpointing, "sequence": sequence, "recurrent": recurrent}
        return estimate_memory(model, tokens_per_batch=64, **given).activations

    layer = model.model.layers[0].linear_attn
    heads, keys, values = layer.num_v_heads, layer.head_k_dim, layer.head_v_dim
    # the inputs of two rows with values as wide as keys, their rows of 64 entries, and what is read of the state
    rows = 4 * layer.key_dim + heads * (2 * (max(keys, values) + 64) + keys)
    gates = 2 * 2 * heads
    assert activations("state") - activations("heads") == 64 * 4 * (rows + gates)
    assert activations("state", sequence=1) == activations("heads", sequence=1)
    # one layer is computed again whole, and what is exchanged is there in any case
    assert activations("state", "layer") == activations("state")


def test_what_was_exchanged_is_a_part_of_the_memory_estimate() -> None:
    model = build(Case((), family="qwen3", layers=3))
    prepare(model)

    def activations(checkpointing: str, sequence: int) -> int:
        return estimate_memory(model, tokens_per_batch=64, checkpointing=checkpointing, sequence=sequence).activations

    # of the layer that is computed again it is there in any case
    assert activations("layer", 2) - activations("layer", 1) == (3 - 1) * 4 * 64 * 2 * (4 + 2) * 16
    # four ranks read two key-value heads, each twice
    assert activations("layer", 4) - activations("layer", 2) == (3 - 1) * 4 * 64 * 2 * 2 * 16
    assert activations("none", 2) == activations("none", 1)


def test_memory_is_decided_with_the_boundaries_of_all_ranks() -> None:
    prepared = member(build(Case((), family="qwen3", layers=1)), checkpointing="auto")
    assert prepared.decide_checkpointing(64) is not None
    assert prepared._state.facts.auto is not None
    assert prepared._state.facts.auto.tokens == 64
