import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch

from deltatune.packing.by_rank import WholeDocuments
from deltatune.packing.collate import PackedCollator
from deltatune.packing.sample import Sample

LENGTHS = [5, 1, 7]


def samples(lengths=LENGTHS):
    starts = np.cumsum([1, *lengths])
    return [{"input_ids": list(range(s, s + n))} for s, n in zip(starts.tolist(), lengths, strict=False)]


@pytest.fixture
def collator():
    return PackedCollator(tokens_per_batch=16, pad_token_id=99)


def test_tokens_lie_in_order_and_the_rest_is_padding(collator):
    batch = collator(samples())
    assert batch["input_ids"].tolist() == [[*range(1, 14), 99, 99, 99]]
    assert batch["input_ids"].dtype == torch.int64


def test_first_token_of_every_document_and_padding_are_no_targets(collator):
    labels = collator(samples())["labels"]
    ignored = (labels[0] == -100).nonzero().flatten().tolist()
    assert ignored == [0, 5, 6, 13, 14, 15]
    assert labels[0, 1:5].tolist() == [2, 3, 4, 5]
    assert labels[0, 7:13].tolist() == [8, 9, 10, 11, 12, 13]


def test_given_labels_are_kept(collator):
    batch = collator([{"input_ids": [1, 2, 3], "labels": [-100, -100, 3]}])
    assert batch["labels"][0, :3].tolist() == [-100, -100, 3]


def test_positions_restart_in_every_document_and_in_the_padding(collator):
    assert collator(samples())["position_ids"].tolist() == [[*range(5), 0, *range(7), 0, 1, 2]]


def test_metadata_describes_the_padding_as_a_document(collator):
    batch = collator(samples())
    assert batch["sequences"].lengths == [5, 1, 7, 3]
    for side in "qk":
        assert batch[f"cu_seq_lens_{side}"].tolist() == [0, 5, 6, 13, 16]
        assert batch[f"cu_seq_lens_{side}"].dtype == torch.int32
        assert batch[f"max_length_{side}"] == 7
        assert type(batch[f"max_length_{side}"]) is int


def test_a_full_pack_has_no_padding_document(collator):
    batch = collator(samples([9, 7]))
    assert batch["sequences"].num_sequences == 2
    assert batch["cu_seq_lens_q"].tolist() == [0, 9, 16]


def test_a_pack_of_one_sample_is_one_document(collator):
    assert collator(samples([16]))["sequences"].lengths == [16]


def test_shapes_do_not_depend_on_the_documents(collator):
    def shapes(batch):
        sequences = batch["sequences"]
        tensors = [batch["input_ids"], batch["labels"], batch["position_ids"]]
        return [t.shape for t in [*tensors, sequences.cu_seqlens, sequences.cu_seqlens_cpu, sequences.positions]]

    assert shapes(collator(samples())) == shapes(collator(samples([16]))) == shapes(collator(samples([1] * 16)))


def test_the_first_value_is_a_tensor(collator):
    assert next(iter(collator(samples()))) == "input_ids"


@pytest.mark.parametrize("convert", [np.array, torch.tensor, lambda ids: np.array(ids, dtype=np.int32)])
def test_arrays_and_tensors_are_taken(collator, convert):
    given = [{"input_ids": convert(s["input_ids"]), "labels": convert(s["input_ids"])} for s in samples()]
    assert torch.equal(collator(given)["labels"], collator(samples())["labels"])


@pytest.mark.parametrize("wrap", [lambda pack: [pack], lambda pack: [{"samples": pack}], lambda pack: [tuple(pack)]])
def test_one_feature_may_be_a_pack(collator, wrap):
    objects = [Sample(np.array(s["input_ids"]), np.array(s["input_ids"])) for s in samples()]
    batch = collator(wrap(objects))
    assert torch.equal(batch["input_ids"], collator(samples())["input_ids"])
    assert batch["sequences"].lengths == [5, 1, 7, 3]


def test_samples_are_not_written_to(collator):
    sample = Sample(np.arange(4), np.arange(4))
    collator([sample])
    assert sample.labels.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "at least one sample"),
        (samples([9, 8]), "2 samples hold 17 tokens, more than tokens_per_batch=16; pack them"),
        (samples([3, 17]), "sample 1 holds 17 tokens, more than tokens_per_batch=16; split or truncate it"),
        ([{"input_ids": [1]}, {"input_ids": []}], "sample 1 is empty"),
        ([{"input_ids": [1, 2], "labels": [1]}], "sample 0 has 2 input_ids but 1 labels"),
        ([{"labels": [1]}], "sample 0 has no input_ids"),
        ([{"input_ids": [1.5]}], "input_ids must be one-dimensional integers"),
        ([{"input_ids": [[1, 2]]}], "one-dimensional"),
        ([{"input_ids": [1, 2]}, {"input_ids": [1, 2], "labels": [-100, -100]}], "sample 1 of 2 tokens trains nothing"),
        ([samples([2]), samples([2])], "batch size of 1"),
    ],
)
def test_bad_batches_are_named(collator, given, message):
    with pytest.raises(ValueError, match=message):
        collator(given)


def test_label_free_samples_on_request():
    collator = PackedCollator(tokens_per_batch=4, pad_token_id=0, allow_unlabelled=True)
    batch = collator([{"input_ids": [1, 2], "labels": [-100, -100]}])
    assert (batch["labels"] == -100).all()


@pytest.mark.parametrize(("arguments", "message"), [((0, 0), "tokens_per_batch"), ((8, None), "eos_token_id")])
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        PackedCollator(tokens_per_batch=arguments[0], pad_token_id=arguments[1])


def test_data_loader_workers_can_carry_it(collator):
    assert pickle.loads(pickle.dumps(collator)) == collator
    loader = torch.utils.data.DataLoader([samples(), samples([3])], batch_size=1, collate_fn=collator, num_workers=1)
    assert [batch["sequences"].lengths for batch in loader] == [[5, 1, 7, 3], [3, 13]]


def test_collating_needs_no_optional_package():
    code = """
import sys
for name in ("pydantic", "datasets", "transformers", "rich"):
    sys.modules[name] = None
from deltatune.packing.by_rank import WholeDocuments
from deltatune.packing.collate import PackedCollator
PackedCollator(tokens_per_batch=4, pad_token_id=0)([{"input_ids": [1, 2]}])
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_documents_lie_whole_on_ranks_where_they_fit():
    whole = WholeDocuments(2)
    collator = PackedCollator(tokens_per_batch=16, pad_token_id=99, whole=whole)
    batch = collator(samples([5, 2, 4, 4]))
    assert batch["sequences"].lengths == [4, 4, 5, 2, 1]
    assert batch["input_ids"].tolist() == [[*range(8, 16), *range(1, 8), 99]]
    assert batch["labels"].tolist() == [[-100, 9, 10, 11, -100, 13, 14, 15, -100, 2, 3, 4, 5, -100, 7, -100]]
    assert batch["position_ids"].tolist() == [[*range(4), *range(4), *range(5), 0, 1, 0]]
    same = PackedCollator(tokens_per_batch=16, pad_token_id=99)
    longer = samples([5, 9, 2])
    assert torch.equal(collator(longer)["input_ids"], same(longer)["input_ids"])


def test_ranks_that_do_not_divide_a_pack_are_refused():
    with pytest.raises(ValueError, match="tokens_per_batch=16 is not a multiple of the 3 ranks"):
        PackedCollator(tokens_per_batch=16, pad_token_id=99, whole=WholeDocuments(3))
