"""The model card of what a run saved: README.md with the front matter that the Hub reads."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pydantic
import yaml
from huggingface_hub import ModelCardData, metadata_load, try_to_load_from_cache

from deltatune.config.schema import Recipe
from deltatune.config.yaml_text import dump_yaml
from deltatune.errors import user_path
from deltatune.runs.folder import RunFolder, mapping, number

__all__ = ["merged_card", "model_card"]

_LOAD_ADAPTER = """\
```python
from peft import PeftModel
from transformers import AutoTokenizer, {name}

base = {name}.from_pretrained({base})
model = PeftModel.from_pretrained(base, {folder})
tokenizer = AutoTokenizer.from_pretrained({folder})
```

One model of both: `{merge}`"""

_LOAD_MODEL = """\
```python
from transformers import AutoTokenizer, {name}

model = {name}.from_pretrained({folder})
tokenizer = AutoTokenizer.from_pretrained({folder})
```"""


def model_card(run: RunFolder, saved_step: int | None = None) -> str:
    """The card of the adapter or model in a run's folder, from its record and its recipe.

    ``saved_step``: of the weights, where they are not the last.

    ``base_model`` and ``datasets`` are in the front matter where they are on the Hub, and ``license`` where the base
    model's own card says one.
    """
    base = str(mapping(run.record.get("model")).get("name_or_path") or "an unknown model")
    adapter = bool(run.recipe.get("lora"))
    title = run.path.expanduser().resolve().name
    what = f"{_adapter(mapping(run.recipe.get('lora')))} for" if adapter else "A fine-tune of"
    version = mapping(_last_leg(run).get("deltatune")).get("version")
    lines = [
        "---",
        _front_matter(run, base, adapter),
        "---",
        "",
        f"# {title}",
        "",
        f"{what} {_linked(base)}, trained with deltatune {version}.",
        "",
        "## How to load it",
        "",
        _loading(run, base, adapter),
        "",
        "## How it was trained",
        "",
        *_table(("", ""), _facts(run, saved_step)),
        "",
        *_table(("data", "digest of the rows"), mapping(_last_leg(run).get("data")).items()),
        "",
        f"The settings{' of the last leg' if len(run.legs) > 1 else ''} that are not the defaults or were chosen by "
        "their section, as `deltatune train` takes them:",
        "",
        "```yaml",
        dump_yaml(_excerpt(run.recipe)).rstrip(),
        "```",
    ]
    return "\n".join(lines) + "\n"


def merged_card(record: Mapping[str, Any], folder: Path, *, trust_remote_code: bool = False) -> str:
    """The card of a merged model, from its ``merge.json``; ``folder`` is where the model will be."""
    model, adapter = mapping(record.get("model")), mapping(record.get("adapter"))
    base, commit = str(model.get("name_or_path")), model.get("commit") or model.get("revision")
    trusted = ", trust_remote_code=True" if trust_remote_code else ""
    name = "AutoModelForCausalLM" if trusted else model.get("class")
    run = mapping(adapter.get("run"))
    facts = {
        "base model": f"{base}{f' at {commit}' if commit else ''}, {model.get('class')}",
        "adapter": f"{adapter.get('path')}, SHA-256 {adapter.get('sha256')}",
        "its run": f"{run.get('folder')}, started {run.get('started')}" if run else "unknown",
        "command": record.get("command"),
        "versions": ", ".join(f"{name} {version}" for name, version in mapping(record.get("versions")).items()),
    }
    lines = [
        "---",
        _metadata(base, model.get("commit"), adapter=False).to_yaml(),
        "---",
        "",
        f"# {folder.name}",
        "",
        f"A LoRA adapter merged into {_linked(base)} with deltatune {mapping(record.get('deltatune')).get('version')}; "
        "`merge.json` has the record.",
        "",
        "## How to load it",
        "",
        _LOAD_MODEL.format(name=name, folder=json.dumps(str(folder)) + trusted),
        "",
        "## How it was made",
        "",
        *_table(("", ""), facts.items()),
    ]
    return "\n".join(lines) + "\n"


def _adapter(section: dict[str, Any]) -> str:
    if start := section.get("name_or_path"):
        return f"A LoRA adapter that went on from `{start}`,"  # its rank is that one's
    # what begins inside the base weights is saved as a plain adapter of twice the rank
    inside = str(section.get("init_lora_weights")).lower().startswith(("pissa", "olora"))
    return f"A LoRA adapter of rank {section.get('r', 0) * (2 if inside else 1)}"


def _front_matter(run: RunFolder, base: str, adapter: bool) -> str:
    sources = [str(name) for name in mapping(_last_leg(run).get("data"))]
    data = _metadata(base, mapping(run.record.get("model")).get("commit"), adapter=adapter)
    data.datasets = [name for name in sources if not _is_local(name)] or None
    return data.to_yaml()


def _metadata(base: str, commit: Any, *, adapter: bool) -> ModelCardData:
    on_hub = not _is_local(base)
    tags = ["deltatune", *(["lora"] if adapter else [])]
    if on_hub:
        tags.append(f"base_model:{'adapter' if adapter else 'finetune'}:{base}")
    return ModelCardData(
        base_model=base if on_hub else None,
        library_name="peft" if adapter else "transformers",
        license=_license(base, commit),
        pipeline_tag="text-generation",
        tags=tags,
    )


def _is_local(name: str) -> bool:
    """Whether a model or data set goes by a path rather than by a name on the Hub."""
    return name.startswith((".", "/", "~")) or name.count("/") != 1 or Path(name).exists()


def _license(base: str, commit: Any) -> str | None:
    """What the base model's card says, where that is on this machine."""
    if _is_local(base):
        card: Any = user_path(base) / "README.md"
    else:
        card = try_to_load_from_cache(base, "README.md", revision=commit)
    if not isinstance(card, str | Path) or not Path(card).is_file():
        return None
    try:
        found = (metadata_load(card) or {}).get("license")
    except (ValueError, OSError, yaml.YAMLError):
        return None
    return found if isinstance(found, str) else None


def _loading(run: RunFolder, base: str, adapter: bool) -> str:
    """Code that loads it: by the base model's own class, since the automatic ones read some configs as another."""
    model, section = mapping(run.record.get("model")), mapping(run.recipe.get("model"))
    trusted = ", trust_remote_code=True" if section.get("trust_remote_code") else ""
    name = "AutoModelForCausalLM" if trusted else model.get("class") or "AutoModelForCausalLM"
    revision = model.get("commit") or model.get("revision")
    named = json.dumps(base) + (f", revision={json.dumps(revision)}" if revision else "")
    template = _LOAD_ADAPTER if adapter else _LOAD_MODEL
    merge = shlex.join(["deltatune", "merge", str(run.path), "--output", "MERGED"])
    return template.format(name=name, base=named + trusted, folder=json.dumps(str(run.path)), merge=merge)


def _facts(run: RunFolder, saved_step: int | None) -> Iterator[tuple[str, object]]:
    model, last = mapping(run.record.get("model")), _last_leg(run)
    commit = model.get("commit") or model.get("revision")
    yield "base model", f"{model.get('name_or_path')}{f' at {commit}' if commit else ''}, {model.get('class')}"
    earlier = saved_step is not None and saved_step != last.get("to_step")
    legs = f" in {len(run.legs)} legs" if len(run.legs) > 1 else ""
    yield "steps", f"{last.get('to_step')}{legs}{f'; the weights are those of step {saved_step}' if earlier else ''}"
    for leg in run.legs:
        if changes := leg.get("changes"):
            yield f"changed after step {leg.get('from_step')}", "; ".join(map(str, changes))
    counts = [sum(number(leg.get(name)) or 0 for leg in run.legs) for name in ("tokens", "trained_tokens", "seconds")]
    yield "tokens", f"{counts[0]:,.0f}, {counts[1]:,.0f} of them trained, in {counts[2]:,.0f} s"
    losses = [value for _, value in run.series("loss")]
    if losses:
        yield "loss", f"{losses[0]:.4f} at first, {losses[-1]:.4f} at last"
    held_out = [(step, value) for step, value in run.series("eval_loss") if not earlier or step == saved_step]
    if held_out:
        yield "held-out loss", f"{held_out[-1][1]:.4f} at step {held_out[-1][0]}"
    yield "device", last.get("device")
    yield "versions", ", ".join(f"{name} {version}" for name, version in mapping(last.get("versions")).items())
    if own := mapping(last.get("deltatune")).get("git"):
        yield "deltatune's commit", own


def _excerpt(recipe: dict[str, Any]) -> dict[str, Any]:
    """The keys of a recipe that are not what they are by default; all of one that this version does not take.

    A section that is there by choice, with its defaults, says what those are.
    """
    try:
        read = Recipe.model_validate(recipe)
    except pydantic.ValidationError:
        return recipe
    changed: dict[str, Any] = read.model_dump(mode="json", exclude_defaults=True)
    # an adapter that a run goes on from has its own rank and targets
    if read.lora is not None and read.lora.name_or_path is None:
        chosen = read.lora.model_dump(mode="json", include={"r", "lora_alpha", "target_modules"})
        changed["lora"] = chosen | changed["lora"]
    if read.preference is not None:
        changed["preference"] = {"loss": read.preference.loss, "beta": read.preference.scale} | changed["preference"]
    return changed | ({"compile": True} if changed.get("compile") == {} else {})


def _last_leg(run: RunFolder) -> dict[str, Any]:
    return run.legs[-1] if run.legs else {}


def _linked(base: str) -> str:
    return f"`{base}`" if _is_local(base) else f"[{base}](https://huggingface.co/{base})"


def _table(header: tuple[str, str], found: Any) -> Iterator[str]:
    yield f"| {header[0]} | {header[1]} |"
    yield "|---|---|"
    for name, value in found:
        yield "| {} | {} |".format(*(" ".join(str(cell).split()).replace("|", "\\|") for cell in (name, value)))
