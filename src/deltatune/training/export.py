"""What comes out of a run: an adapter or a model that stock transformers and PEFT load, written whole or not at all."""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from deltatune.config.schema import ModelSection
from deltatune.errors import UserError, user_path
from deltatune.hf import model as hf_model
from deltatune.phases import phase
from deltatune.runs.card import merged_card
from deltatune.training.adapter_files import adapter_weights
from deltatune.training.adapter_settings import adapter_settings
from deltatune.training.base_identity import base_identity, check_base
from deltatune.training.beginning import MARKERS
from deltatune.training.checkpoint import empty_model, load_checkpoint, load_config, load_tokenizer
from deltatune.training.disk import writing
from deltatune.training.equality import Compared, compare, difference, logits_of, probe_tokens
from deltatune.training.expert_adapters import current_roles, may_be_old
from deltatune.training.merge_record import MERGE_FILE, merge_record
from deltatune.training.merging import Adapter, load_adapted, merge, refuse_lost_base
from deltatune.training.provenance import now
from deltatune.training.saving import Origin, write_merged, write_trained
from deltatune.training.servers import has_scales_of_its_own, one_scale, per_expert
from deltatune.training.staging import staged
from deltatune.training.starts import begins_in_base
from deltatune.whole import sync, sync_tree, whole

__all__ = ["CARD_FILE", "Origin", "export_adapter", "finite", "merge_adapter", "readable", "save_trained", "write_json"]

CARD_FILE = "README.md"


def save_trained(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
    output_dir: Path,
    origin: Origin | None = None,
    card: str | None = None,
    state: Mapping[str, Tensor] | None = None,
    weights: Callable[[Path], list[str]] | None = None,
) -> list[str]:
    """Saves the adapter of a PEFT model, or the whole model, with its tokenizer and its card, into ``output_dir``.

    Files are written to a folder next to them and moved in when all are on the disk; a resumed run replaces its own
    model, checkpoints and records stay. An adapter is one of the stock base, whatever it began from. With it go the
    files beside the base's weights, and with a whole model the tensors that its class does not load. ``state``
    holds the tensors of a model that is sharded, or ``weights`` writes them into a folder.

    Returns:
        What should be said of these, in words.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    writes = writing(output_dir, "written to", "make room, then go on with --resume")
    with tempfile.TemporaryDirectory(dir=output_dir, prefix=".saving-") as folder, writes:
        said = write_trained(model, tokenizer, Path(folder), origin, state, weights)
        # PEFT's card asks 39 questions and answers none
        (Path(folder) / CARD_FILE).unlink(missing_ok=True)
        if card is not None:
            (Path(folder) / CARD_FILE).write_text(card, encoding="utf-8", errors="backslashreplace")
        readable(Path(folder))
        sync_tree(Path(folder))
        for path in sorted(Path(folder).iterdir(), key=lambda path: path.name in MARKERS):
            target = output_dir / path.name
            if path.is_dir() and target.is_dir():
                shutil.rmtree(target)
            path.replace(target)
        sync(output_dir)
    return said


def readable(folder: Path) -> None:
    """Gives files the mode that new files have: safetensors makes its own readable by their owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o666 & ~mask)


def merge_adapter(
    adapter_dir: str | Path,
    output_dir: str | Path,
    *,
    base: str | None = None,
    dtype: str = "auto",
    trust_remote_code: bool = False,
    allow_other_base: bool = False,
    say: Callable[[str], object] | None = None,
) -> Path:
    """Adds an adapter to its base model's weights and saves a model that needs no PEFT.

    The result is the base checkpoint with other weights: what the adapter leaves alone stays, tensors that the class
    does not load included. It is loaded again, and its logits on a text are those of base and adapter within rounding,
    before it gets its name; where they are not, nothing is written. ``merge.json`` and the model card say what made it.

    Args:
        adapter_dir: a folder that PEFT's ``save_pretrained`` wrote.
        output_dir: the model's folder, which is returned; it must not exist, or be empty.
        base: the base model, where it is no longer where the adapter says.
        dtype: of the merged weights: ``auto`` (the base model's), ``float32``, ``bfloat16`` or ``float16``.
        trust_remote_code: run model code that comes with the base model.
        allow_other_base: merge into other weights than those that the adapter's record has the digest of.
        say: takes lines on what was kept and how far logits differ.

    Raises:
        UserError: a folder that holds no adapter, a base model that cannot be found or is another than it was
            trained on, an adapter that does not fit it or cannot be merged, logits that differ, or an output folder in
            use.
    """
    started = now()
    adapter, output = _adapter_and_output(adapter_dir, output_dir)
    refuse_lost_base(adapter)
    section, config = _base_of(adapter, base, dtype=dtype, trust_remote_code=trust_remote_code)
    known = check_base(adapter.folder, section, trained_on=adapter.base, allow_other=allow_other_base)
    tokenizer = _tokenizer_of(adapter, section)
    model, loaded, loader = load_adapted(section, config, adapter)
    identity = base_identity(section, loaded.model)
    ids = probe_tokens(tokenizer, hf_model.base_model(model).get_input_embeddings().weight.shape[0])
    with phase("computing with the adapter"):
        expected = logits_of(model, ids)
        with model.disable_adapter():
            effect = difference(logits_of(model, ids), expected)
    with staged(output) as folder:
        origin = Origin(section, loaded.unexpected)
        with phase("merging"):
            merged = merge(model)
        with phase("writing the model"):
            said = known + write_merged(merged, tokenizer, folder, origin, config, adapter.folder)
            readable(folder)
        del model, merged, loaded  # two models at once may be too much
        written = ModelSection(name_or_path=str(folder), trust_remote_code=trust_remote_code)
        reloaded = load_checkpoint(written, loader=loader).model.eval()
        with phase("comparing the merged model"):
            compared = compare(reloaded, ids, expected)
        if not compared.ok:
            tokens = {place: tokenizer.decode(ids[0, place]) for place in compared.worst}
            raise UserError(_apart(compared, tokens))
        check = {
            "tokens": compared.num_tokens, "difference": compared.difference, "limit": compared.limit, "effect": effect
        }  # fmt: skip
        record = merge_record(adapter.folder, identity, started=started, dtype=dtype, check=check)
        write_json(folder / MERGE_FILE, record)
        card = merged_card(record, output, trust_remote_code=trust_remote_code)
        (folder / CARD_FILE).write_text(card, encoding="utf-8", errors="backslashreplace")
    said.append(
        f"checked on {compared.num_tokens} tokens: its logits are those of base and adapter within "
        f"{compared.difference:.1e} (limit {compared.limit:.0e}); the adapter changes them by {effect:.1e}"
    )
    if effect <= compared.limit:
        said.append("that is within the limit: on this text the adapter does no more than rounding may")
    if say is not None:
        for line in said:
            say(line)
    return output


def _apart(compared: Compared, tokens: Mapping[int, str]) -> str:
    worst = ", ".join(f"{tokens[place]!r} (token {place + 1}) by {by:.2g}" for place, by in compared.worst.items())
    return (
        f"the merged model is not base and adapter: on {compared.num_tokens} tokens of a text its logits differ by "
        f"{compared.difference:.2g} of their size, where rounding explains {compared.limit:.2g}, most at {worst}; "
        "nothing was written; try --dtype float32, or serve base and adapter as they are"
    )


def export_adapter(
    adapter_dir: str | Path,
    output_dir: str | Path,
    *,
    layout: str,
    base: str | None = None,
    trust_remote_code: bool = False,
) -> Path:
    """Writes an adapter in a form that an inference server reads; see ``servers``.

    Args:
        adapter_dir: a folder that PEFT's ``save_pretrained`` wrote.
        output_dir: the new adapter's folder, which is returned; it must not exist, or be empty.
        layout: ``"peft"``, or ``"per-expert"`` for one pair of matrices for each projection of each routed expert.
        base: the base model, where it is no longer where the adapter says; its config alone is read, and only for
            adapters of experts.
        trust_remote_code: run model code that comes with the base model.

    Raises:
        UserError: a folder that holds no adapter, a base model that cannot be found, adapters that cannot be split, or
            an output folder in use.
    """
    adapter, output = _adapter_and_output(adapter_dir, output_dir)
    init = adapter.config.get("init_lora_weights")
    refuse_lost_base(adapter)
    if begins_in_base(init):
        raise UserError(
            f"{adapter.folder} is an adapter of other base weights ({init}), which no server makes; merge it "
            "(deltatune merge), or train it again, since it is now saved as a plain adapter"
        )
    with phase("reading the adapter"):
        state = adapter_weights(adapter.folder)
    config = adapter.config
    named = bool(config.get("target_parameters")) and (may_be_old(config) or has_scales_of_its_own(config))
    if layout == "per-expert" or named:
        section, _ = _base_of(adapter, base, trust_remote_code=trust_remote_code)
        with phase("dividing the adapter"):
            model = empty_model(section)
            state = current_roles(state, config, model)
            state, config = one_scale(state, config, model)
            if layout == "per-expert":
                state, config = per_expert(state, config, model)
    else:
        state, config = one_scale(state, config, None)
    with staged(output) as folder, phase("writing the adapter"):
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "adapter_model.safetensors")
        write_json(folder / MARKERS[0], config)
        for path in adapter.folder.iterdir():
            if path.is_file() and not path.name.startswith("adapter_"):
                shutil.copy2(path, folder / path.name)
        readable(folder)
    return output


def _adapter_and_output(adapter_dir: str | Path, output_dir: str | Path) -> tuple[Adapter, Path]:
    # a link, or ".", cannot be replaced by a folder; what it stands for can
    folder, output = user_path(adapter_dir), user_path(output_dir).resolve()
    adapter = Adapter(folder, adapter_settings(folder))
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output} exists and is not empty; choose another output folder")
    return adapter, output


def _base_of(
    adapter: Adapter, base: str | None, *, dtype: str = "auto", trust_remote_code: bool
) -> tuple[ModelSection, PreTrainedConfig]:
    """The base model of an adapter as a section of a recipe, and its config."""
    name = base or adapter.base
    if not name:
        raise UserError(f"{adapter.folder} names no base model; pass it with --base")
    # what was trained on is one revision of the model of this name
    revision = adapter.revision if name == adapter.base and not user_path(name).exists() else None
    section = ModelSection.model_validate(
        {"name_or_path": name, "revision": revision, "dtype": dtype, "trust_remote_code": trust_remote_code}
    )
    try:
        return section, load_config(section)
    except UserError as error:
        raise UserError(f"the adapter's base model: {error}; pass another with --base") from error


def _tokenizer_of(adapter: Adapter, section: ModelSection) -> PreTrainedTokenizerBase:
    """The adapter's own, which has its chat template, where it has one."""
    own = {"tokenizer": str(adapter.folder)} if (adapter.folder / "tokenizer_config.json").is_file() else {}
    return load_tokenizer(section.model_copy(update=own))


def write_json(path: Path, value: Any, *, synced: bool = False) -> None:
    """JSON, whole or not at all, with numbers that it does not know (NaN, infinities) as text."""
    write_text(path, json.dumps(finite(value), indent=2, default=str, allow_nan=False) + "\n", synced=synced)


def finite(value: Any) -> Any:
    """The value with numbers that JSON does not know (NaN, infinities) as text."""
    if isinstance(value, Mapping):
        return {str(name): finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def write_text(path: Path, text: str, *, synced: bool = False) -> None:
    """Text, whole or not at all; ``synced``: and on the disk."""
    with whole(path, synced=synced) as part:
        part.write_text(text, encoding="utf-8")
