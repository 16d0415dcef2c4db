"""What public files of each kind say, and what becomes of their keys.

``public_files.json`` holds, of each file, its address and its keys with their values, as facts. They were chosen by
their place in a list of paths, before any was imported: of Axolotl every tenth of the first hundred ``.yml`` and of the
first hundred ``.yaml`` under ``examples``, and three for preferences; of LLaMA-Factory every seventh under
``examples/train_full`` and ``examples/train_lora``; of TRL every tenth of the first ninety recipes of the
alignment handbook, two more for preferences, and commands in its own scripts and documentation; of Unsloth every fifth
of the first hundred ``python_scripts`` of its notebooks, without those that repeat another's arguments, and scripts of
its tests. A path that does not fine-tune on text or pairs gives way to its neighbour.
"""

import itertools
import json
import re
import shlex
from pathlib import Path

import pytest

from deltatune.config.load import load_recipe
from deltatune.importing.read import read_foreign
from deltatune.importing.recipe import convert

FILES = json.loads((Path(__file__).parent / "public_files.json").read_text())
EACH = [pytest.param(kind, file, id=f"{kind}-{file['path']}") for kind, files in FILES.items() for file in files]
# calls that say nothing of training
OTHERS = ("AutoTokenizer.from_pretrained", "PatchDPOTrainer")
# what is given to them are objects, whose own calls are read
OBJECTS = ("model", "trainer", "tokenizer")


def imported(folder, kind, file):
    if "keys" in file:
        path = folder / "theirs.yaml"
        path.write_text(json.dumps(file["keys"]))
    elif "command" in file:
        path = folder / "theirs.sh"
        path.write_text(" ".join(word if word.startswith("$") else shlex.quote(word) for word in file["command"]))
    else:
        path = folder / "theirs.py"
        path.write_text(
            "\n".join([*(f"{name} = {value!r}" for name, value in file["assigned"].items()), *script(file)])
        )
    foreign = read_foreign(path)
    assert foreign.table.name == kind
    return convert(foreign)


def script(file):
    yield from (f"{name} = {value!r}" for name, value in file["assigned"].items())
    for call in file["calls"]:
        if "function" in call:
            yield f"def {call['function']}({', '.join(call['parameters'])}):"
            yield from (f"    {code(inner)}" for inner in call["calls"])
        else:
            yield code(call)


def code(call):
    named = [f"{name}={expression(value)}" for name, value in call["named"].items()]
    return f"{call['call']}({', '.join([*map(expression, call['positional']), *named])})"


def expression(value):
    return value["code"] if isinstance(value, dict) and "code" in value else repr(value)


def is_explained(row):
    verdict = row.outcome.verdict
    return verdict in ("carried", "changed") or (verdict in ("not supported", "no effect here") and row.outcome.why)


@pytest.mark.parametrize("kind", FILES)
def test_nearly_all_uses_of_keys_are_carried_or_explained(kind, tmp_path):
    assert len({(file["repository"], file["path"]) for file in FILES[kind]}) >= 20
    rows = [(file, row) for file in FILES[kind] for row in imported(tmp_path, kind, file).rows if row.given]
    silent = [f"{file['path']}: {row.key}" for file, row in rows if not is_explained(row)]
    share = 1 - len(silent) / len(rows)
    assert share >= 0.95, f"{share:.1%} of {len(rows)} uses of keys; not of {silent}"


@pytest.mark.parametrize(("kind", "file"), EACH)
def test_every_key_is_in_the_table_and_what_is_written_loads(kind, file, tmp_path):
    found = imported(tmp_path, kind, file)
    rows = {row.key for row in found.rows if row.given}
    assert [use for use in uses(file) if not any(re.fullmatch(use, key) for key in rows)] == []
    recipe = tmp_path / "ours.yaml"
    recipe.write_text(found.text)
    assert load_recipe(recipe).recipe.data.train


def uses(file):
    """Expressions, each of which has to match the key of a row."""
    if "keys" in file:
        yield from (re.escape(name) for name in nested(file["keys"]))
    elif "command" in file:
        flags = itertools.dropwhile(lambda word: not re.search(r"\b(sft|dpo)(_\w+)?(\.py)?$", word), file["command"])
        for before, word in itertools.pairwise(flags):
            if word.startswith("--") or (word.startswith("$") and not before.startswith("--")):
                yield "(no_)?" + re.escape(word.split("=")[0].removeprefix("--").removeprefix("no_"))
    else:
        for call in file["calls"]:
            for inner in call.get("calls", [call]):
                yield from of_call(inner)


def nested(keys):
    """Names of keys, and of those inside data sets."""
    for name, value in keys.items():
        if name not in ("datasets", "dataset", "dataset_mixture", "dataset_mixer"):
            yield name
        elif name == "dataset":
            yield from (f"dataset.{part}" for part in value.split(","))
        elif name == "dataset_mixer":
            yield from (f"dataset_mixer.{part}" for part in value)
        else:
            inside = name if isinstance(value, list) else f"{name}.datasets"
            entries = value if isinstance(value, list) else value["datasets"]
            yield from (f"{inside}.{place}.{part}" for place, entry in enumerate(entries) for part in entry)


def of_call(call):
    if call["call"] in OTHERS:
        return
    # its arguments, or the call as a whole where another of its kind is taken
    whole = rf"{call['call'].split('.')[-1]} \(line \d+\)"
    yield from (rf"(\w+\.)?{name}|{whole}" for name in call["named"] if name not in OBJECTS)
    scalars = sum(expression(value) not in OBJECTS for value in call["positional"])
    if scalars:
        yield rf"(\w+\.)?(model_name|path)|{whole}"
