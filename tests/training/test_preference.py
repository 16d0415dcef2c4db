"""Losses over pairs: their formulas in float64 from whole logits, each document alone."""

from __future__ import annotations

import copy
import math
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor

from deltatune import Sequences, prepare
from deltatune.config.reference import base_is_start
from deltatune.config.schema import LoraSection, PreferenceSection
from deltatune.hf.model import in_mode
from deltatune.training.preference import AnswerLogProbs, answer_log_probs, as_reference, preference_losses
from tiny import VOCAB, documents, tiny_model

#: Documents of three pairs, and the tokens of each that are its prompt.
LENGTHS, PROMPTS = [9, 12, 5, 30, 7, 3], [4, 4, 2, 2, 1, 1]
PADDING = 6
SETTINGS = [
    PreferenceSection(loss="dpo", beta=0.3, label_smoothing=0.2),
    PreferenceSection(loss="hinge", beta=0.2),
    PreferenceSection(loss="ipo"),
    PreferenceSection(loss="simpo", gamma=0.5),
    PreferenceSection(loss="orpo", beta=0.4),
]


def pack() -> dict[str, Any]:
    tokens = torch.cat([*documents(LENGTHS), torch.zeros(PADDING, dtype=torch.long)])
    labels = tokens.clone()
    start = 0
    for length, prompt in zip(LENGTHS, PROMPTS, strict=True):
        labels[start : start + prompt] = -100
        start += length
    labels[start:] = -100
    sequences = Sequences.from_lengths(LENGTHS, total=len(tokens))
    return {"input_ids": tokens[None], "labels": labels[None], "sequences": sequences}


def answers(model: Any) -> AnswerLogProbs:
    call = pack()
    losses = model(**call, loss_reduction="none").loss
    return answer_log_probs(losses, call["labels"], call["sequences"], len(LENGTHS))


def alone(model: Any) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the answers in float64, each document by itself, and their tokens."""
    sums = []
    for tokens, prompt in zip(documents(LENGTHS), PROMPTS, strict=True):
        log_p = model(tokens[None], use_cache=False).logits[0, prompt - 1 : -1].log_softmax(-1)
        sums.append(log_p.gather(1, tokens[prompt:, None]).sum())
    return torch.stack(sums), torch.tensor(LENGTHS) - torch.tensor(PROMPTS)


def by_formula(sums: Tensor, counts: Tensor, reference: Tensor, settings: PreferenceSection) -> Tensor:
    losses = []
    for pair in range(len(LENGTHS) // 2):
        chosen, rejected = 2 * pair, 2 * pair + 1
        ratio = (sums[chosen] - reference[chosen]) - (sums[rejected] - reference[rejected])
        p = torch.exp(sums / counts)
        if settings.loss == "dpo":
            right, wrong = (torch.sigmoid(side * 0.3 * ratio) for side in (1, -1))
            losses.append(-0.8 * right.log() - 0.2 * wrong.log())
        elif settings.loss == "hinge":
            losses.append(torch.clamp(1 - 0.2 * ratio, min=0))
        elif settings.loss == "ipo":
            each = (sums - reference) / counts
            losses.append((each[chosen] - each[rejected] - 5) ** 2)
        elif settings.loss == "simpo":
            losses.append(-torch.sigmoid(2 * (p[chosen].log() - p[rejected].log()) - 0.5).log())
        else:
            odds = p / (1 - p)
            losses.append(-p[chosen].log() - 0.4 * torch.sigmoid((odds[chosen] / odds[rejected]).log()).log())
    return torch.stack(losses)


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: settings.loss)
def test_losses_and_gradients_are_those_of_lone_documents_in_float64(settings: PreferenceSection) -> None:
    model, before = tiny_model("qwen3_5"), tiny_model("qwen3_5", seed=1)
    stock = copy.deepcopy(model).double()
    with torch.no_grad():
        reference, _ = alone(before.double())
    exact = by_formula(*alone(stock), reference, settings)
    prepare(model)
    found = preference_losses(answers(model), settings, reference.float()).losses
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-6)
    found.mean().backward()
    exact.mean().backward()
    for (name, ours), theirs in zip(model.named_parameters(), stock.parameters(), strict=True):
        assert theirs.grad is not None
        error = torch.linalg.vector_norm(ours.grad.double() - theirs.grad)
        assert error <= 1e-5 * torch.linalg.vector_norm(theirs.grad) + 1e-9, name


def test_rewards_are_those_of_the_loss() -> None:
    policy = AnswerLogProbs(torch.tensor([-4.0, -9.0]), torch.tensor([2.0, 3.0]))
    dpo = preference_losses(policy, PreferenceSection(beta=0.5), torch.tensor([-5.0, -7.0]))
    assert (dpo.chosen_rewards.tolist(), dpo.rejected_rewards.tolist()) == ([0.5], [-1.0])
    simpo = preference_losses(policy, PreferenceSection(loss="simpo"))
    assert (simpo.chosen_rewards.tolist(), simpo.rejected_rewards.tolist()) == ([-4.0], [-6.0])
    assert simpo.losses.item() == pytest.approx(math.log(1 + math.exp(-1)))


def test_equal_answers_teach_nothing() -> None:
    sums = torch.tensor([-4.0, -4.0], requires_grad=True)
    found = preference_losses(AnswerLogProbs(sums, torch.full((2,), 3.0)), PreferenceSection(), torch.full((2,), -5.0))
    assert found.losses.item() == pytest.approx(math.log(2))
    (gradient,) = torch.autograd.grad(found.losses.sum(), sums)
    assert gradient[0] == -gradient[1]


def test_odds_of_a_sure_answer_are_finite() -> None:
    sums = torch.tensor([0.0, -80.0], requires_grad=True)
    found = preference_losses(AnswerLogProbs(sums, torch.ones(2)), PreferenceSection(loss="orpo"))
    found.losses.sum().backward()
    assert found.losses.isfinite().all()
    assert sums.grad is not None
    assert sums.grad.isfinite().all()


def test_no_document_at_all_has_a_gradient_of_zero() -> None:
    """Of a rank that has run out of packs: its backward must reach every parameter all the same."""
    call = pack()
    losses = torch.rand(call["labels"].shape, requires_grad=True)
    policy = answer_log_probs(losses, call["labels"], call["sequences"], 0)
    preference_losses(policy, PreferenceSection(loss="simpo")).losses.sum().backward()
    assert losses.grad is not None
    assert not losses.grad.any()


def test_the_reference_is_the_model_under_the_adapter_and_leaves_no_trace() -> None:
    """Without its dropout."""
    config = transformers.Phi3Config(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, resid_pdrop=0.5, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    base = transformers.Phi3ForCausalLM(config)
    stock = copy.deepcopy(base).eval()
    adapter = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, adapter).train()
    prepare(model)
    before = {name: (weight.requires_grad, weight.grad) for name, weight in model.named_parameters()}
    with torch.no_grad(), as_reference(model):
        found = answers(model).sums
    torch.testing.assert_close(found, alone(stock)[0], rtol=1e-5, atol=1e-5)
    assert {name: (weight.requires_grad, weight.grad) for name, weight in model.named_parameters()} == before
    assert all(module.training for module in model.modules())
    with torch.no_grad(), in_mode(model, training=False):
        assert not torch.allclose(answers(model).sums, found, rtol=1e-2), "the adapter acts again"


@pytest.mark.parametrize(
    ("lora", "expected"),
    [
        (None, False),
        (LoraSection(), True),
        (LoraSection(init_lora_weights="gaussian"), True),
        (LoraSection(init_lora_weights="pissa"), False),
        (LoraSection(bias="lora_only"), False),
        (LoraSection(name_or_path="adapter"), False),
    ],
)
def test_a_base_that_changes_is_no_reference(lora: LoraSection | None, expected: bool) -> None:
    assert base_is_start(lora) is expected
    assert not base_is_start(lora, ["norm"])
