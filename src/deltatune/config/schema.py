"""The recipe: one frozen model per section. The docstring under each field is its entry in docs/config.md."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, Strict

from deltatune.config.fields import BEYOND, Count, Flag, Integer, PathText, Ranks, Section, Share, Text
from deltatune.config.row_formats import ColumnRole, Format, MessageField, Role
from deltatune.config.training_section import TrainingSection

__all__ = [
    "AutoQuantization",
    "CompileSection",
    "DataSection",
    "Fp8Quantization",
    "LoraSection",
    "ModelSection",
    "Mxfp4Quantization",
    "Nf4Quantization",
    "Nvfp4Quantization",
    "PackingSection",
    "ParallelSection",
    "PreferenceSection",
    "Recipe",
    "SamplesSection",
    "Source",
    "VerifySection",
]

OpName = Literal[
    "causal_conv",
    "dequantize",
    "fp8_mm",
    "gated_delta_rule",
    "gated_rms_norm",
    "grouped_mm",
    "linear_cross_entropy",
    "lora_gated",
    "rms_norm_rope",
    "varlen_attention",
]


class _Quantization(Section):
    type: str

    compute: Literal["bf16", "fp8"] = "bf16"
    """What products with the base are computed in: `bf16` decodes weights to the dtype of the activations. `fp8`
    multiplies the codes, forward and backward, with activations and gradients rounded to fp8 row by row; of weights in
    fp8 alone, on GPUs from compute capability 8.9 (and on a CPU, where it only serves to try)."""


class AutoQuantization(_Quantization):
    """Weights in few bits as the checkpoint holds them."""

    type: Literal["auto"] = "auto"
    """What the checkpoint's config.json names."""


class Nf4Quantization(_Quantization):
    """4 bits with double quantisation, as QLoRA has them, made from 16 or 32 bits as these are read."""

    type: Literal["nf4"]
    """4.13 bits a weight."""


class Fp8Quantization(_Quantization):
    """8 bits: what an FP8 checkpoint holds, or made from 16 or 32 bits as these are read."""

    type: Literal["fp8"]
    """8 bits a weight, and scales."""

    blocks: Flag = False
    """Where weights are made from 16 or 32 bits, one scale for each 128x128 of them; by default one for each output
    channel."""


class Mxfp4Quantization(_Quantization):
    """4 bits as gpt-oss and compressed-tensors hold them."""

    type: Literal["mxfp4"]
    """4.25 bits a weight."""


class Nvfp4Quantization(_Quantization):
    """4 bits as ModelOpt and compressed-tensors hold them."""

    type: Literal["nvfp4"]
    """4.5 bits a weight."""


def _typed(value: Any) -> Any:
    """``{}`` is ``{type: auto}``."""
    return {"type": "auto", **value} if isinstance(value, dict) else value


class ModelSection(Section):
    """The checkpoint to start from."""

    name_or_path: PathText
    """A folder with a checkpoint, as seen from the current folder, or a name on the Hugging Face Hub."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """The dtype the weights are loaded in; `auto` takes the checkpoint's own."""

    quantization: (
        Annotated[
            Annotated[
                AutoQuantization | Nf4Quantization | Fp8Quantization | Mxfp4Quantization | Nvfp4Quantization,
                Field(discriminator="type"),
            ],
            BeforeValidator(_typed),
        ]
        | None
    ) = None
    """A frozen base in few bits, under adapters. Its `type` is `nf4` or `fp8`, made from 16 or 32 bits as these are
    read; or what the checkpoint holds: `fp8`, `mxfp4`, `nvfp4`, or `auto` for any (`{}` is that too). Left out, a
    checkpoint is taken as it is, in few bits or not. Beside `type`, `compute: fp8` has products computed in fp8."""

    revision: Text | None = None
    """Branch, tag or commit of a model on the Hub; beside a folder it does nothing, and a warning says so."""

    trust_remote_code: Flag = False
    """Run model code that comes with the checkpoint."""

    tokenizer: PathText | None = None
    """Another folder or Hub name for the tokenizer; the checkpoint's own by default."""

    chat_template: PathText | None = None
    """What replaces the tokenizer's chat template: a known format (`chatml`, `gemma`, `llama2`, `llama3`, `mistral`,
    `phi`, `phi4` or `qwen3`), a Jinja file, or Jinja text. A file of such a name is meant by `./chatml`."""

    added_tokens: Annotated[tuple[Text, ...], Field(min_length=1)] | None = None
    """Tokens that the tokenizer gets, each one token wherever it stands in text. Their rows of embedding and head
    train, beside adapters too; embeddings that are too short for them grow."""

    special_tokens: dict[Literal["bos_token", "eos_token", "pad_token", "unk_token"], Text] | None = None
    """Tokens of the vocabulary, or of `added_tokens`, that take a role, such as `{pad_token: "<|endoftext|>"}`."""


class LoraSection(Section):
    """Low-rank adapters, in PEFT's own names. Leave the section out to train every weight."""

    name_or_path: PathText | None = None
    """An adapter to go on from: a folder, or a name on the Hub. Its ranks, targets and scales are its own; of this
    section `lora_dropout`, `adapter_dtype` and `impl` act, and any other setting must agree with it."""

    r: Count = 16
    """Rank of the adapters."""

    lora_alpha: Count = 32
    """The adapter's output is scaled by `lora_alpha / r` (by `lora_alpha / sqrt(r)` with `use_rslora`)."""

    lora_dropout: Annotated[float, Strict(), Field(ge=0, lt=1)] = 0.0
    """Dropout before the adapter."""

    target_modules: Text | Annotated[tuple[Text, ...], Field(min_length=1)] | None = "all-linear"
    """Module name endings as a list, one regular expression over full names, or `all-linear` (every linear layer
    but the head). A target that matches nothing is an error; `null` leaves `target_parameters` alone."""

    target_parameters: Text | Annotated[tuple[Text, ...], Field(min_length=1)] | None = None
    """Parameters that get adapters, by name endings such as `mlp.experts.gate_up_proj`, or `all-experts` (both weights
    of all routed experts). They take neither `lora_dropout` nor `use_dora`, and start as `init_lora_weights` `true`,
    `false` or `gaussian` says."""

    exclude_modules: Text | tuple[Text, ...] | None = None
    """Names, or one regular expression, that `target_modules` shall not match; by default all of a tower for images or
    sound, which text gives no gradient."""

    modules_to_save: tuple[Text, ...] | None = None
    """Modules trained fully and saved with the adapter, such as `lm_head`."""

    layers_to_transform: tuple[Integer, ...] | None = None
    """Indices of the decoder layers that get adapters; all by default."""

    rank_pattern: dict[Text, Count] = Field(default_factory=dict)
    """Ranks that differ from `r`, by name endings or regular expressions of layers and of Parameters such as
    `experts.down_proj`; the first that matches acts, and one that matches nothing adapted is an error."""

    alpha_pattern: dict[Text, Count] = Field(default_factory=dict)
    """Alphas that differ from `lora_alpha`, by names as in `rank_pattern`."""

    bias: Literal["none", "all", "lora_only"] = "none"
    """Which biases train as well."""

    use_rslora: Flag = False
    """Scale by `lora_alpha / sqrt(r)`."""

    use_dora: Flag = False
    """Weight-decomposed adapters on PEFT's own layers, which torch 2.13 takes with `compile.strict: false` alone."""

    init_lora_weights: Flag | Text = True
    """PEFT's initialisation of A and B: `true` and `gaussian` start at the base model exactly; also `false`,
    `orthogonal`, `mica`, and `pissa`, `pissa_niter_4` and `olora`, which are saved as plain adapters of rank `2 r`."""

    adapter_dtype: Literal["float32", "model"] = "float32"
    """The dtype of A and B; `model` takes the base weights' and halves the optimizer's memory at some precision."""

    impl: Literal["auto", "fused", "stock"] = "auto"
    """`fused` makes the adapter part of the base product, `stock` is PEFT's layer; `auto` fuses where it can."""

    def peft_arguments(self) -> dict[str, Any]:
        """Keyword arguments of ``peft.LoraConfig``; the others are ours and left out."""
        return self.model_dump(mode="json", exclude={"name_or_path", "adapter_dtype", "impl"}, exclude_none=True)


class Source(Section):
    """One data set: a file, a folder of files, or a name on the Hugging Face Hub."""

    path: PathText
    """A file (JSONL, JSON, Parquet, Arrow, CSV, TSV or text; all but tables also compressed), a folder or a pattern of
    such files, a folder that `save_to_disk` wrote, as seen from the current folder; or the name of a data set on the
    Hub."""

    format: Literal["auto", Format] = "auto"
    """What a row holds: `chosen` and `rejected`, with or without `prompt` (preference); `messages`; `prompt` and
    `completion`; `instruction` and `output` (Alpaca); `text`; or tokens, as `input_ids`. `auto` takes the first of
    these whose columns are there."""

    split: Text | None = None
    """A split of a folder or of a data set on the Hub, `train` by default; a sum of splits, or slices of them, such as
    `train[:90%]` and `train[90%:]`, which divide a single file too."""

    name: Text | None = None
    """A configuration of a data set on the Hub, or of a folder whose README.md lists configurations."""

    revision: Text | None = None
    """Branch, tag or commit of a data set on the Hub."""

    columns: dict[ColumnRole, Text] = Field(default_factory=dict)
    """Columns that go by another name, such as `{messages: conversation}`."""

    message_fields: dict[MessageField, Text] = Field(default_factory=dict)
    """Keys of a message that go by another name, such as `{role: speaker, content: text}`. ShareGPT's `from` and
    `value` need no entry. Beside `columns`, since each file has names of its own."""

    limit: Count | None = None
    """Use the first so many rows only."""

    weight: Annotated[float, Strict(), Field(gt=0)] | None = None
    """This source's share of an epoch, in any unit, beside the weights of the others, which then all have one. An
    epoch is as long as it can be without a source giving more than all of its documents (`repeat` times); of the
    others each epoch takes the next part."""

    repeat: Count = 1
    """How often an epoch sees each document; with weights, how often it may."""


class DataSection(Section):
    """What to train on, and which of its tokens."""

    train: Annotated[tuple[Source, ...], Field(min_length=1)]
    """The training data, one entry per source."""

    eval: tuple[Source, ...] = ()
    """Held-out data, packed the same way: evaluated after training, and during it as `training.eval_strategy` says."""

    val_size: Annotated[float, Strict(), Field(gt=0, lt=1)] | Count | None = None
    """Rows of `train` to evaluate on and not train on: a share below 1, or a number. A row's content decides, so equal
    rows are never on both sides, and a row stays on its side when others come and go."""

    weight_by: Literal["tokens", "documents"] = "tokens"
    """Whether the `weight` of sources is a share of the tokens or of the documents."""

    train_on: Literal["assistant", "last", "all"] | Annotated[tuple[Role, ...], Field(min_length=1)] = "assistant"
    """Which tokens of a conversation are targets: every assistant turn, the last one, all tokens, or every message of
    the roles in a list, such as `[assistant, tool]`."""

    roles: dict[Text, Role] = Field(default_factory=dict)
    """Roles of speakers whose names in the files are others, such as `{bot: assistant}`. Names of ShareGPT files
    (`human`, `gpt`, `observation`, ...) need no entry; an unknown name is an error."""

    overlong: Literal["error", "split", "truncate", "drop"] = "error"
    """What to do with a document that is too long. `error` by default, because each other choice loses context or
    data: cut into independent documents, keep the beginning, or leave out. All are counted. A pair of `preference` is
    too long where one of its two documents is longer than `max_length`, or both together than a pack; it is not
    `split`, and `truncate` keeps half a pack of each at most."""

    streaming: Flag = False
    """Read `train` as training goes, without tokenising it first: for data that does not fit the disk, or is not there
    yet. Rows are shuffled and packed in blocks of 8,192; several sources are mixed in equal parts, or by `weight` with
    `weight_by: documents`. Needs `training.max_steps`, and `eval` in place of `val_size`."""

    max_length: Annotated[int, Strict(), Field(ge=2, lt=BEYOND)] | None = None
    """The most tokens of a document; `packing.tokens_per_batch`, which it cannot exceed, by default."""

    on_bad_row: Literal["error", "drop"] = "error"
    """What to do with a row that is broken, cannot be rendered or trains nothing: stop, naming the first of them, or
    leave it out, name and count."""

    cache_dir: PathText | None = None
    """Where tokenised data is kept; the cache of the `datasets` package by default."""

    num_proc: Count | None = None
    """Processes that tokenise; by default as many as there are cores."""

    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Variables handed to the chat template, such as `{enable_thinking: false}`; one it never reads is an error."""


class PackingSection(Section):
    """How documents are packed. A batch is one pack: a row of whole documents without padding between them."""

    tokens_per_batch: Annotated[int, Strict(), Field(ge=2, lt=BEYOND)] = 4096
    """Tokens of a pack, and so of a batch on one device. Multiples of 64 suit the kernels."""


class PreferenceSection(Section):
    """Training on pairs of answers to one prompt, for data of `format: preference`. `preference: {}` is DPO."""

    loss: Literal["dpo", "ipo", "hinge", "simpo", "orpo"] = "dpo"
    """Which loss. `dpo`, `ipo` and `hinge` hold the model against a reference: the model without its adapter, or as it
    was at the start. `simpo` and `orpo` need none."""

    beta: Annotated[float, Strict(), Field(gt=0)] | None = None
    """The scale of rewards, or of ORPO's odds; 0.1 by default, 2 for `simpo`."""

    gamma: Annotated[float, Strict(), Field(ge=0)] | None = None
    """The margin of `simpo`; 1 by default."""

    label_smoothing: Annotated[float, Strict(), Field(ge=0, lt=0.5)] = 0.0
    """For `dpo`: the share of pairs whose preference is taken to be the wrong way round."""

    @property
    def has_reference(self) -> bool:
        """Whether the loss holds the model against a reference."""
        return self.loss in ("dpo", "ipo", "hinge")

    @property
    def scale(self) -> float:
        """``beta``, or what stands for it."""
        return self.beta if self.beta is not None else 2.0 if self.loss == "simpo" else 0.1

    @property
    def margin(self) -> float:
        """``gamma``, or what stands for it."""
        return 1.0 if self.gamma is None else self.gamma


class CompileSection(Section):
    """How the model is compiled. `compile: false` runs it eagerly, `compile: true` takes the defaults below."""

    scope: Literal["layer", "model"] = "layer"
    """One graph per kind of decoder layer, compiled once whatever the depth, or the whole text model as one graph."""

    strict: Flag = True
    """Stop at a graph break, with its reason; otherwise it is reported and the run goes on."""

    options: dict[str, Flag] = Field(default_factory=dict)
    """Inductor settings, for this model's graphs only."""


class VerifySection(Section):
    """The independence probe at the start of a run: no document may see another."""

    enabled: Flag = True
    """Probe before the first step; a leak stops the run."""

    lengths: Annotated[tuple[Count, ...], Field(min_length=2)] | None = None
    """Lengths of the probe's documents, in tokens; a set of awkward ones by default."""

    tolerance: Annotated[float, Strict(), Field(gt=0)] | None = None
    """Largest relative difference between packed and alone; by dtype by default. Gradients that cross documents
    must be zero exactly, whatever is set here."""


class ParallelSection(Section):
    """How the processes of a run (`--nproc`, `torchrun`) divide the work."""

    replicate: Literal["auto"] | Ranks = "auto"
    """Copies of the weights; `replicate * shard` is the number of processes."""

    shard: Literal["auto"] | Ranks = "auto"
    """Processes that hold one copy of the weights among them (FSDP2). `auto` takes the fewest with which a step is
    estimated to fit the device: 1, which is plain replicas, wherever the whole model fits."""

    sequence: Literal["auto"] | Ranks = "auto"
    """Processes that hold a pack of `packing.tokens_per_batch` tokens together, each an equal part of it; all others
    read packs of their own. It is the innermost axis: `{shard: 4, sequence: 2}` on 4 processes are 2 data ranks. `auto`
    is 1, unless a step is estimated to fit the device with no number of shards."""

    recurrent: Literal["heads", "state"] = "heads"
    """What processes with parts of one pack send each other in recurrent layers (Gated DeltaNet): `heads`, tokens for
    heads, as in attention; `state`, the state of the document that goes on, so that each computes all heads of its own
    tokens. It acts where `sequence` is above 1."""

    expert: Literal["auto"] | Ranks = 1
    """Processes that hold the routed experts of every layer together, each as many; tokens travel to their experts, and
    all other weights go by `replicate` and `shard`. It divides the experts of a layer and the number of processes, and
    goes with `sequence` too, over the same processes or others. `auto` is 1: shards hold a model that does not fit
    without a room that a run may exceed, and which of both is faster was not timed."""

    expert_capacity: Annotated[float, Strict(), Field(ge=1)] = 1.5
    """How many times its even share of all visits of tokens to experts a process has room for, where `expert` is above
    1. A run that needs more stops with an error at the next log line or save; from `expert` on that cannot be."""

    timeout_s: Annotated[int, Strict(), Field(ge=10, lt=BEYOND)] = 45
    """Seconds without a sign of life after which a process is lost; all others have ended within 15 s more. A process
    that trains, compiles, tokenises or saves gives one every second; one that is stopped, or whose machine is gone,
    gives none."""


class SamplesSection(Section):
    """Completions at each evaluation, greedy, kept in `samples.jsonl` of the run's folder."""

    prompts: tuple[Text, ...] = ()
    """Questions: each is a user's turn in the chat template, up to where the answer begins. Plain text where the
    tokenizer has no template; `plan` and the run say which."""

    chat: bool = True
    """Whether `prompts` go through the chat template; `false` begins with them as they are, as rows of text begin."""

    held_out: Annotated[int, Strict(), Field(ge=0, lt=BEYOND)] = 0
    """How many of the held-out documents are begun, each up to its first answer."""

    max_new_tokens: Count = 64
    """The most tokens of a completion."""


def _compile_switch(value: object) -> object:
    if value is True:
        return {}
    return None if value is False else value


class Recipe(Section):
    """A fine-tuning run."""

    model: ModelSection
    """The checkpoint to start from."""

    data: DataSection
    """What to train on."""

    packing: PackingSection = PackingSection()
    """How documents are packed."""

    preference: PreferenceSection | None = None
    """Preference training, such as DPO; without this section training is supervised."""

    lora: LoraSection | None = None
    """Low-rank adapters; without this section every weight trains."""

    compile: Annotated[CompileSection | None, BeforeValidator(_compile_switch)] = None
    """`true`, `false`, or a section; false by default."""

    checkpointing: Literal["none", "layer", "auto"] | Share = "none"
    """What backward recomputes: nothing; every layer; or, as a number (with `compile` only), the share of a layer's
    activations that may stay in memory. `auto` picks the least recomputation that fits the device."""

    activation_offloading: Flag = False
    """Keep what layers save for backward in pinned host memory: with `checkpointing: layer` their inputs, otherwise all
    that is saved. It changes no number; not with `checkpointing: auto`, whose prediction is made without it."""

    kernels: Literal["auto"] | dict[OpName, Text] = "auto"
    """The implementation of each op: `auto`, or a mapping such as `{gated_delta_rule: fla}` for some of them.
    Naming one that cannot run here is an error."""

    training: TrainingSection = TrainingSection()
    """The training loop."""

    verify: VerifySection = VerifySection()
    """The independence probe at the start of the run."""

    parallel: ParallelSection = ParallelSection()
    """How several processes divide the work."""

    samples: SamplesSection | None = None
    """Completions at each evaluation; none without this section."""
