"""The data sets of an Axolotl config: a source of ours for each, and a row of the table for each of their keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from deltatune.config.row_formats import KNOWN_ROLES, ROLES
from deltatune.importing.axolotl_preferences import preference_loss
from deltatune.importing.paths import READERS, is_data_file, is_folder_path
from deltatune.importing.rules import Outcome, Row, Rule, Settings, alone, carried, idle, refused
from deltatune.importing.templates import named_template
from deltatune.importing.values import is_off, mapping, text, texts

__all__ = ["data_sets"]

# the name of a reader, where a data set is one or several files
_THINKING = "reasoning_content"

# prompt strategies for pairs of strings: where they find the question
_QUESTIONS = {"intel": "question", "prompt_pairs": "prompt", "icr": "input"}
_OWN_TEMPLATES = ("chatml", "llama3", "zephyr")


def data_sets(part: str, *, streamed: bool = False) -> Any:
    """The section ``datasets`` (``part`` train), ``test_datasets`` (eval) or ``pretraining_dataset`` (streamed)."""

    def rows(value: Any, settings: Settings, here: Path) -> list[Row]:
        listed, paired = value if isinstance(value, list) else [value], preference_loss(settings) is not None
        found: list[Row] = []
        for index, entry in enumerate(listed):
            where = f"data.{part}.{index}"
            if not isinstance(entry, dict):
                found.append(Row(str(index), entry, Outcome("carried", {f"{where}.path": text(entry)})))
                continue
            found += [
                Row(f"{index}.{key}", inner, _key(where, key, inner, entry, streamed=streamed, paired=paired))
                for key, inner in entry.items()
            ]
        if streamed:
            writes = {"data.streaming": True}
            found.append(
                Row("", "", Outcome("changed", writes, "pretraining data is read as training goes"), given=False)
            )
        del here
        return found

    return rows


def _key(where: str, key: str, value: Any, entry: dict[str, Any], *, streamed: bool, paired: bool) -> Outcome:
    if value is None:
        return Outcome("no effect here", why="not set")
    if key in ("path", "data_files"):
        return _path(where, key, value, entry)
    if key == "type" and paired:
        return _paired_format(where, value, entry)
    if key == "field_messages" and paired:
        return Outcome("carried", {f"{where}.columns.prompt": text(value)})
    if key == "type":
        return Outcome("carried", {f"{where}.format": "text"}) if streamed else _format(where, value)
    if key == "message_property_mappings":
        fields = {_field(ours): text(theirs) for ours, theirs in mapping(value).items()}
        unknown = [name for name in fields if name not in ("role", "content", _THINKING, "tool_calls", "name", "train")]
        if unknown:
            return Outcome("not supported", why=f"messages have no {unknown[0]}")
        return Outcome("carried", {f"{where}.message_fields.{name}": theirs for name, theirs in fields.items()})
    rule = _rules(where).get(key)
    return Outcome("unknown", why="no key of a data set that is known") if rule is None else rule(value, entry)


def _field(name: str) -> str:
    return _THINKING if name == "thinking" else name


def _path(where: str, key: str, value: Any, entry: dict[str, Any]) -> Outcome:
    files, path = entry.get("data_files"), entry.get("path")
    if is_off(files):
        return Outcome("carried", {f"{where}.path": text(value)})
    names = texts(files)
    if path in READERS or (is_off(path) and entry.get("ds_type") in READERS):
        ours = names[0]
    elif is_folder_path(path):
        ours = f"{text(path).rstrip('/')}/{names[0]}"
    elif key == "path":
        return Outcome("carried", {f"{where}.path": text(path)})
    else:
        return Outcome("not supported", why="all files of a data set on the Hub are read, or those of a split or name")
    if key == "path":
        return Outcome("no effect here", why="data_files names the file")
    if len(names) > 1:
        return Outcome("not supported", {f"{where}.path": ours}, "the first alone; give a pattern, or a source each")
    return Outcome("carried", {f"{where}.path": ours})


def _format(where: str, value: Any) -> Outcome:
    if isinstance(value, dict):
        return Outcome("not supported", why="prompts from a format: use alpaca or prompt_completion with columns")
    kind = text(value).split(":")[0].split(".")[0]
    if kind == "chat_template":
        return Outcome("carried", {f"{where}.format": "chat"})
    if kind == "sharegpt":
        return Outcome("changed", {f"{where}.format": "chat"}, "ShareGPT's from and value are known")
    if kind == "completion":
        return Outcome("carried", {f"{where}.format": "text"}, "all of it trains")
    if value in ("alpaca", "alpaca_chat.load") or kind == "alpaca":
        why = "rows go through the chat template, not Alpaca's prompt; the checkpoint needs one (model.chat_template)"
        return Outcome("changed", {f"{where}.format": "alpaca"}, why)
    if value == "alpaca_chat.load_qa":
        writes = {f"{where}.format": "alpaca", f"{where}.columns.instruction": "question"}
        writes[f"{where}.columns.output"] = "answer"
        return Outcome("changed", writes, "rows go through the chat template, not Alpaca's prompt")
    return Outcome("not supported", why="a prompt strategy of its own: make it messages, or prompt and completion")


def _paired_format(where: str, value: Any, entry: dict[str, Any]) -> Outcome:
    """Of pairs of answers; strings that go through a template are what an instruction asks for and gets."""
    if isinstance(value, dict):
        return Outcome("not supported", why="prompts from a format: make prompt and answers messages")
    family, _, strategy = text(value).partition(".")
    pairs = {f"{where}.format": "preference"}
    if family == "chat_template" and strategy in ("", "default"):
        prompt = {} if entry.get("field_messages") else {f"{where}.columns.prompt": "messages"}
        return Outcome("carried", {**pairs, **prompt})
    own = family in _OWN_TEMPLATES
    if family in ("chat_template", "passthrough") or (own and strategy in ("ultra", "argilla_chat")):
        return Outcome("carried", pairs)
    if own and strategy in _QUESTIONS:
        why = "rows go through the checkpoint's chat template (model.chat_template)"
        return Outcome("changed", {**pairs, f"{where}.columns.instruction": _QUESTIONS[strategy]}, why)
    return Outcome("not supported", why="a prompt strategy of its own: make it prompt, chosen and rejected")


@alone
def _roles(value: Any) -> Outcome:
    names = {name: role for role, listed in mapping(value).items() for name in texts(listed) if name != role}
    unknown = [role for role in mapping(value) if role not in ROLES]
    if unknown:
        return Outcome("not supported", why=f"{unknown[0]} is no role here; expected {', '.join(ROLES)}")
    return Outcome("carried", {f"data.roles.{name}": role for name, role in names.items()}, "for all sources")


@alone
def _roles_to_train(value: Any) -> Outcome:
    roles = list(dict.fromkeys(KNOWN_ROLES.get(name, name) for name in texts(value)))
    if roles == ["assistant"]:
        return Outcome("carried", {"data.train_on": "assistant"})
    return Outcome("carried", {"data.train_on": roles}, "for all sources")


@alone
def _train_on_end(value: Any) -> Outcome:
    if value == "turn":
        return Outcome("carried", why="the token that ends a trained turn trains")
    return Outcome("not supported", why="the token that ends a turn trains where the turn does")


def _column(where: str, role: str) -> Rule:
    return carried(f"{where}.columns.{role}", text)


def _split(where: str) -> Rule:
    def rule(value: Any, settings: Settings) -> Outcome:
        local = settings.get("path") in READERS or is_data_file(settings.get("path"))
        if local and text(value) == "train":
            return Outcome("no effect here", why="a file is one split, train")
        return Outcome("carried", {f"{where}.split": text(value)})

    return rule


def _rules(where: str) -> dict[str, Rule]:
    return {
        "split": _split(where),
        "name": carried(f"{where}.name", text),
        "revision": carried(f"{where}.revision", text),
        "ds_type": idle("the names of files tell how they are read"),
        "field_messages": _column(where, "messages"),
        "field_system": _column(where, "system"),
        "field_tools": _column(where, "tools"),
        "field_instruction": _column(where, "instruction"),
        "field_input": _column(where, "input"),
        "field_output": _column(where, "output"),
        "field": _column(where, "text"),
        "text_column": _column(where, "text"),
        "message_field_role": carried(f"{where}.message_fields.role", text),
        "message_field_content": carried(f"{where}.message_fields.content", text),
        "message_field_training": carried(f"{where}.message_fields.train", text),
        "message_field_training_detail": refused("parts of a message cannot be marked, whole ones can"),
        "field_thinking": carried(f"{where}.message_fields.{_THINKING}", text),
        "template_thinking_key": idle("the template is given reasoning_content"),
        "roles": _roles,
        "roles_to_train": _roles_to_train,
        "train_on_eos": _train_on_end,
        "train_on_eot": _train_on_end,
        "chat_template": alone(named_template),
        "chat_template_jinja": refused("one template for all sources: model.chat_template"),
        "conversation": refused("prompts of FastChat: use a chat template"),
        "drop_system_message": refused("take system messages out of the data"),
        "split_thinking": refused("give reasoning in a key of its own, reasoning_content"),
        "shards": refused("use a slice of the split, such as train[:10%]"),
        "shards_idx": refused("use a slice of the split, such as train[10%:20%]"),
        "preprocess_shards": idle("rows are tokenised in shards"),
        "skip": refused("use a slice of the split, such as train[1000:]"),
        "trust_remote_code": refused("data sets with code of their own are not run"),
        "field_chosen": _column(where, "chosen"),
        "field_rejected": _column(where, "rejected"),
        "step_separator": refused("process reward models are not trained here"),
        "max_completion_length": refused("process reward models are not trained here"),
        "train_on_last_step_only": refused("process reward models are not trained here"),
    }
