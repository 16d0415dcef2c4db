"""The recipe's section ``training``. The docstring under each field is its entry in docs/config.md."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, Strict

from deltatune.config.fields import BEYOND, Count, Flag, Integer, PathText, Section, Seed, Steps, Text

__all__ = ["OWN_TRAINING_NAMES", "TrainingSection"]

#: Fields of ``training`` that transformers.TrainingArguments does not have.
OWN_TRAINING_NAMES = frozenset(
    (
        "early_stopping_patience",
        "early_stopping_threshold",
        "learning_rates",
        "loraplus_lr_embedding",
        "loraplus_lr_ratio",
        "on_nonfinite",
        "unfrozen_parameters",
    )
)


class TrainingSection(Section):
    """The training loop, in the names of `transformers.TrainingArguments` and a few of ours.

    The fields below are the usual ones; any other TrainingArguments name may be given as well. Names that have no
    effect here, or another home in the recipe, are refused, and so is a value that another one leaves without effect,
    such as `adam_beta2` of `sgd` or `warmup_steps` of a `constant` schedule. What a short run turns off by its own key
    (`save_strategy: no`, `eval_strategy: no`, `report_to: none`, `push_to_hub: false`) may keep its settings.
    """

    model_config = ConfigDict(extra="allow")

    output_dir: PathText = "outputs"
    """Where checkpoints, the resolved recipe and the trained model go."""

    num_train_epochs: Annotated[float, Strict(), Field(gt=0)] = 3.0
    """Passes over the data, unless `max_steps` is given."""

    max_steps: Integer = -1
    """Optimizer steps to run; -1 counts epochs instead."""

    gradient_accumulation_steps: Count = 1
    """Packs per device in one optimizer step; the loss is divided once, by all their trained tokens."""

    learning_rate: Annotated[float, Strict(), Field(ge=0)] = 5e-5
    """The peak learning rate."""

    lr_scheduler_type: Text = "linear"
    """The learning-rate schedule, such as `linear`, `cosine` or `constant`."""

    lr_scheduler_kwargs: dict[str, Any] | None = None
    """Arguments of the schedule."""

    warmup_steps: Steps | Literal[0] = 0
    """Steps of linear warm-up; a number below 1 is a share of all steps."""

    unfrozen_parameters: Annotated[tuple[Text, ...], Field(min_length=1)] | None = None
    """Parameters that train, by regular expressions that are found in their names, such as `[norm, "layers\\.3[0-9]"]`:
    these alone, or with a section `lora` these whole beside the adapters."""

    learning_rates: dict[Text, Annotated[float, Strict(), Field(ge=0)]] = Field(default_factory=dict)
    """Peak learning rates that differ from `learning_rate`, by a regular expression that is found in the names of
    parameters, such as `{embed_tokens: 1e-5}`. The schedule scales all."""

    loraplus_lr_ratio: Annotated[float, Strict(), Field(gt=0)] | None = None
    """LoRA+: the learning rate of adapters' B matrices (and of vectors) is `learning_rate` times this."""

    loraplus_lr_embedding: Annotated[float, Strict(), Field(ge=0)] = 1e-6
    """The learning rate of adapters of embeddings with LoRA+."""

    optim: Text = "adamw_torch_fused"
    """The optimizer, by transformers' name; or `muon`, which steps weights of hidden linear layers by
    `torch.optim.Muon` and all others by AdamW, both scaled to one learning rate."""

    weight_decay: Annotated[float, Strict(), Field(ge=0)] = 0.0
    """Decoupled weight decay."""

    adam_beta1: Annotated[float, Strict(), Field(ge=0, lt=1)] = 0.9
    """Decay of Adam's first moment."""

    adam_beta2: Annotated[float, Strict(), Field(ge=0, lt=1)] = 0.999
    """Decay of Adam's second moment."""

    adam_epsilon: Annotated[float, Strict(), Field(gt=0)] = 1e-8
    """Adam's term against division by zero."""

    max_grad_norm: Annotated[float, Strict(), Field(ge=0)] = 1.0
    """Gradients are clipped to this norm; 0 clips nothing."""

    seed: Seed = 42
    """Seed of initialisation, dropout and, unless `data_seed` is given, the order of the data."""

    data_seed: Seed | None = None
    """Seed of the order of the data."""

    bf16: Flag = False
    """Autocast to bfloat16; for float32 weights."""

    fp16: Flag = False
    """Autocast to float16 with a loss scaler; for float32 weights."""

    use_cpu: Flag = False
    """Stay on the CPU though an accelerator is there."""

    logging_steps: Steps = 10
    """Steps between log lines; a number below 1 is a share of all steps. The last step is logged too."""

    logging_first_step: Flag = False
    """Log the first step as well."""

    report_to: Text | tuple[Text, ...] = "none"
    """Trackers to log to, such as `wandb` or `tensorboard`."""

    run_name: Text | None = None
    """The run's name in `wandb`, `trackio`, `mlflow`, `comet_ml` and `swanlab`."""

    disable_tqdm: Flag | None = None
    """Show no progress bars; log entries are printed anyway."""

    eval_strategy: Literal["no", "steps", "epoch"] = "no"
    """When held-out data (`data.eval`, `data.val_size`) is evaluated during training; it always is afterwards."""

    eval_steps: Steps | None = None
    """Steps between evaluations; `logging_steps` by default."""

    save_strategy: Literal["no", "steps", "epoch", "best"] = "steps"
    """When checkpoints are written."""

    save_steps: Steps = 500
    """Steps between checkpoints; a number below 1 is a share of all steps."""

    save_total_limit: Count | None = None
    """Checkpoints to keep; all by default."""

    save_only_model: Flag = False
    """Leave optimizer and random state out of checkpoints; a run cannot resume from them."""

    load_best_model_at_end: Flag = False
    """Save the weights of the best evaluation rather than the last ones. Each evaluation that is the best so far writes
    a checkpoint."""

    early_stopping_patience: Count | None = None
    """End the run after so many evaluations in a row without a better loss."""

    early_stopping_threshold: Annotated[float, Strict(), Field(ge=0)] = 0.0
    """By how much a loss must be below the best one to count as better."""

    dataloader_num_workers: Annotated[int, Strict(), Field(ge=0, lt=BEYOND)] = 0
    """Processes that collate batches."""

    dataloader_pin_memory: Flag = True
    """Collate into pinned memory, which copies to an accelerator faster."""

    on_nonfinite: Literal["stop", "skip", "dump"] = "stop"
    """What becomes of a step whose loss or gradient norm is no number. `stop` ends the run at its next log line or
    checkpoint and names the rows; `skip` leaves the update out, names the rows, and ends the run after 10 in a row;
    `dump` ends it before the update and writes the step's packs into the run's folder. `skip` and `dump` wait for the
    device once a step."""

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of ``transformers.TrainingArguments``, those given under other names included."""
        return self.model_dump(mode="json", exclude=set(OWN_TRAINING_NAMES), exclude_none=True)
