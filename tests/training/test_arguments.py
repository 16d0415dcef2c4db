"""The recipe's training section as TrainingArguments."""

from __future__ import annotations

from pathlib import Path

import pytest

from deltatune.config.schema import TrainingSection
from deltatune.errors import UserError
from deltatune.training.arguments import training_arguments


def test_names_are_transformers_own_and_defaults_suit_packs(tmp_path: Path) -> None:
    section = TrainingSection(output_dir=str(tmp_path / "out"), adam_beta2=0.95, use_cpu=True, hub_strategy="end")
    arguments = training_arguments(section)
    assert arguments.adam_beta2 == 0.95
    assert arguments.hub_strategy == "end"
    assert arguments.report_to == []
    assert not arguments.logging_nan_inf_filter
    assert not arguments.remove_unused_columns
    assert arguments.average_tokens_across_devices
    assert arguments.per_device_train_batch_size == arguments.per_device_eval_batch_size == 1
    assert arguments.prediction_loss_only
    assert not (tmp_path / "out").exists(), "arguments alone write nothing"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"learnin_rate": 1e-4}, r"training\.learnin_rate.*learning_rate"),
        ({"lr_scheduler_type": "linaer"}, r"training: .*linaer"),
        ({"optim": "adamw_of_no_kind"}, r"training: .*adamw_of_no_kind"),
    ],
)
def test_bad_values_are_user_errors(tmp_path: Path, values: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        training_arguments(TrainingSection(output_dir=str(tmp_path), use_cpu=True, **values))
