"""Names of layers that adapters go on, held against a checkpoint's files before any model is built."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from deltatune.config.schema import LoraSection, ModelSection, Recipe
from deltatune.errors import UserError, user_path
from deltatune.hf.source import conversion_text, modeling_text

__all__ = ["NAMED_EXPERTS", "check_layer_names", "check_layer_numbers", "json_of", "nearest_layers", "text_settings"]

#: Names of the projections of routed experts, which are no modules.
NAMED_EXPERTS: Final = re.compile(r"(gate|up|down|gate_up)_proj|experts|\bw[123]\b")
# each word of such a regular expression is a part of whatever it matches
_WORDS_ALONE: Final = re.compile(r"\^?(\w|\\?\.|\.[*+])+\$?")
# a group of them, once
_GROUP: Final = re.compile(r"(?<!\\)\((?:\?:)?([^()\[\]?{}]*)\)(?![*+?{])")
_MOST_ALTERNATIVES: Final = 256
_HEADER_BYTES: Final = 100 * 2**20  # the most that the format allows


def check_layer_names(recipe: Recipe) -> None:
    """Refuses names and patterns of layers that neither weights nor source of a model mention.

    Those are names in ``lora``, and patterns there and in ``training``. Nor does it take a number in
    ``layers_to_transform`` of no layer. What is mentioned may still match no module, as what a pattern matches is not
    known here: the model itself says so once it is built. A model that is not on this disk, or brings its own code, is
    not looked at.

    Raises:
        UserError: such a name or pattern, with the nearest layers of the checkpoint; or such a number.
    """
    model, lora = recipe.model, recipe.lora
    folder = user_path(model.name_or_path)
    count = text_settings(model).get("num_hidden_layers")
    if lora is not None and type(count) is int:
        check_layer_numbers(lora, count)
    wanted = list(_wanted(recipe))
    source = None if model.trust_remote_code or not wanted else _source(folder)
    tensors = None if source is None else _tensors(folder)
    if source is None or tensors is None:
        return
    known = set(re.findall(r"\w+", " ".join((source, *tensors))))
    for wish in wanted:
        if not NAMED_EXPERTS.search(wish.text) and not wish.is_among(known):
            layers = [name.removesuffix(".weight") for name, rank in tensors.items() if rank == 2]
            raise UserError(f"{wish.key}: {wish.text!r} matches no {wish.what}{nearest_layers(wish.text, layers)}")


class _Wanted(NamedTuple):
    """A name, or a pattern, of modules or parameters in a recipe."""

    key: str
    text: str
    what: str  # it names
    is_pattern: bool = True

    def is_among(self, known: Collection[str]) -> bool:
        """Whether it may match a name that these words make; True for a pattern that says more than words."""
        if not self.is_pattern:
            return self.text.rpartition(".")[2] in known or self.text == "all-linear"
        return any(_may_match(pattern, known) for pattern in _alternatives(self.text))


def _alternatives(pattern: str) -> list[str]:
    """A regular expression as several without groups, one of which matches what it does; groups that repeat stay."""
    found, done = [pattern], list[str]()
    while found and len(found) + len(done) <= _MOST_ALTERNATIVES:
        text = found.pop()
        group = _GROUP.search(text)
        if group is None:
            # of what is left of groups a bar may be a part
            done += text.split("|") if "(" not in text and "[" not in text else [text]
            continue
        found += [f"{text[: group.start()]}{each}{text[group.end() :]}" for each in group[1].split("|")]
    return [*done, *found]


def _may_match(pattern: str, known: Collection[str]) -> bool:
    """Whether a pattern without groups may match a name made of these words; True where it says more than words."""
    if _WORDS_ALONE.fullmatch(pattern) is None:
        return True
    return all(any(word in name for name in known) for word in re.findall(r"[^\W\d]\w*", pattern))


def _wanted(recipe: Recipe) -> Iterator[_Wanted]:
    training, lora = recipe.training, recipe.lora
    for pattern in training.unfrozen_parameters or ():
        yield _Wanted("training.unfrozen_parameters", pattern, "parameter")
    if lora is None:  # adapters' parameters have names of PEFT's
        for pattern in training.learning_rates:
            yield _Wanted("training.learning_rates", pattern, "parameter")
        return
    for field in ("target_modules", "modules_to_save", "exclude_modules"):
        names = getattr(lora, field)
        if isinstance(names, str):
            yield _Wanted(f"lora.{field}", names, "module", is_pattern=names != "all-linear")
        for name in names if isinstance(names, tuple) else ():
            yield _Wanted(f"lora.{field}", name, "module", is_pattern=False)
    for field in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(lora, field):
            yield _Wanted(f"lora.{field}", pattern, "layer")


def check_layer_numbers(lora: LoraSection, count: int) -> None:
    """``layers_to_transform`` against the number of layers.

    Raises:
        UserError: a number of no layer.
    """
    for index in lora.layers_to_transform or ():
        if not 0 <= index < count:
            raise UserError(f"lora.layers_to_transform: {index} is no layer; the model has layers 0 to {count - 1}")


def text_settings(model: ModelSection) -> dict[str, Any]:
    """What a checkpoint's config.json says of its text model; nothing where it is not here, or has code of its own."""
    config = json_of(user_path(model.name_or_path) / "config.json")
    if not isinstance(config, dict) or model.trust_remote_code or "auto_map" in config:
        return {}
    text = config.get("text_config", config)
    return text if isinstance(text, dict) else {}


def nearest_layers(entry: str, layers: Sequence[str]) -> str:
    """The names of layers nearest to one that is none of them, or all, to follow the words that it matches nothing."""
    names = list(dict.fromkeys(layer.rpartition(".")[2] for layer in layers))
    wanted = re.sub(r"\W+", " ", entry).split()
    close = difflib.get_close_matches(wanted[-1] if wanted else entry, names, n=3, cutoff=0.4)
    return f"; nearest: {', '.join(close)}" if close else f"; linear layers here: {', '.join(names)}"


def _source(folder: Path) -> str | None:
    """The source of a checkpoint's model and of the renaming of its weights; None where it is not known for certain."""
    config = json_of(folder / "config.json")
    if not isinstance(config, dict) or "auto_map" in config:
        return None
    texts = [modeling_text(name.removesuffix("_text")) for name in _model_types(config)]
    renaming = conversion_text()
    return None if not texts or None in texts or renaming is None else "\n".join((*filter(None, texts), renaming))


def _model_types(config: dict[str, Any]) -> Iterator[str]:
    """Of a model and the parts that it is made of."""
    if isinstance(config.get("model_type"), str):
        yield config["model_type"]
    for name, part in config.items():
        if name.endswith("_config") and isinstance(part, dict):
            yield from (kind.removesuffix("_vision").removesuffix("_audio") for kind in _model_types(part))


def _tensors(folder: Path) -> dict[str, int] | None:
    """The number of dimensions of each tensor in a checkpoint, by name; None where they cannot be read."""
    index = json_of(folder / "model.safetensors.index.json")
    places = index.get("weight_map") if isinstance(index, dict) else None
    files = set(places.values()) if isinstance(places, dict) else {"model.safetensors"}
    headers = [_header(folder / str(file)) for file in files]
    if None in headers:
        return None
    return {
        name: len(entry["shape"])
        for header in headers
        for name, entry in (header or {}).items()
        if isinstance(entry, dict) and isinstance(entry.get("shape"), list)
    }


def _header(file: Path) -> dict[str, Any] | None:
    """What a safetensors file says of its tensors: JSON after eight bytes that count it."""
    try:
        with file.open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            found = json.loads(stream.read(size)) if size <= _HEADER_BYTES else None
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def json_of(file: Path) -> object:
    """What a JSON file holds; None where it cannot be read."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
