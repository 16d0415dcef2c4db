import re
from itertools import pairwise

import pytest

from deltatune.config.load import dump_recipe, load_recipe
from deltatune.errors import UserError

MINIMAL = "model: {name_or_path: m}\ndata:\n  train:\n    - path: a.jsonl\n"


@pytest.fixture
def load(tmp_path):
    def load(text, *overrides):
        path = tmp_path / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return load_recipe(path, overrides).recipe

    return load


# text -> what the one line must hold, the line number included where there is one
BAD = {
    "": "the recipe is empty",
    "# nothing\n": "the recipe is empty",
    "- 3\n": "expected a section (a mapping of keys), got [3]",
    "model: [\n": "recipe.yaml:2: broken YAML",
    f"model: {'[' * 5000}{']' * 5000}\n": "nested more than 64 levels deep",
    f"model: {'[' * 100}{']' * 100}\n": "recipe.yaml:1: nested more than 64 levels deep",
    "model: &a [*a]\n": "recipe.yaml:1: nested more than 64 levels deep",
    "a: &a [x, x]\n"
    + "".join(f"{name}: &{name} [{', '.join([f'*{of}'] * 9)}]\n" for of, name in pairwise("abcdefghi")): (
        "more than 100,000 keys and items"
    ),
    "model: m\n\tdata: 3\n": "recipe.yaml:2: broken YAML",
    MINIMAL + "model: {}\n": "recipe.yaml:5: model is given twice",
    MINIMAL + "training:\n  seed: 1\n  seed: 2\n": "recipe.yaml:7: training.seed is given twice",
    MINIMAL + "1: 2\n": "recipe.yaml:5: a key must be text, got 1",
    MINIMAL + "trainin: {}\n": "recipe.yaml:5: trainin: unknown key (did you mean training?)",
    MINIMAL
    + "packing:\n  token_per_batch: 5\n": "6: packing.token_per_batch: unknown key (did you mean tokens_per_batch?)",
    MINIMAL
    + "parallel: {expert_capacity: 0.5}\n": "5: parallel.expert_capacity: expected a number of at least 1.0, got 0.5",
    MINIMAL + "lora: {target_module: [q_proj]}\n": "lora.target_module: unknown key (did you mean target_modules?)",
    "model: {name_or_path: m}\ndata: {train: [{pth: a}]}\n": "data.train.0.path is missing",
    "model: {name_or_path: m}\n": "data is missing",
    "model: {name_or_path: m}\ndata: {train: []}\n": "data.train: expected a list of at least 1, got []",
    "model: {name_or_path: ''}\ndata: {train: [{path: a}]}\n": "model.name_or_path: expected text that is not empty",
    MINIMAL + "training: {bf16: yes}\n": 'recipe.yaml:5: training.bf16: expected true or false, got "yes"',
    MINIMAL + "training: {learning_rate: fast}\n": 'training.learning_rate: expected a number, got "fast"',
    MINIMAL + "training: {learning_rate: .inf}\n": "training.learning_rate: expected a finite number",
    MINIMAL + "training: {save_steps: 1.5}\n": "training.save_steps: expected a whole number or a number below 1",
    MINIMAL + "lora: {r: 0}\n": "lora.r: expected a number of at least 1, got 0",
    MINIMAL + "lora: {r: 8.0}\n": "lora.r: expected a whole number, got 8.0",
    MINIMAL + "packing: 4096\n": "packing: expected a section (a mapping of keys), got 4096",
    MINIMAL + "packing: {tokens_per_batch: 4k}\n": 'packing.tokens_per_batch: expected a whole number, got "4k"',
    MINIMAL + "checkpointing: 1.5\n": "checkpointing: expected 'none', 'layer' or 'auto' or a number of at most 1",
    MINIMAL + "checkpointing: true\n": "checkpointing: expected 'none', 'layer' or 'auto' or a number, got true",
    MINIMAL + "kernels: {gated_delta: fla}\n": "kernels.gated_delta: unknown key (did you mean gated_delta_rule?)",
    MINIMAL + "compile: {scope: layers}\n": "expected 'layer' or 'model', got \"layers\" (did you mean layer?)",
    MINIMAL + "lora: {rank: 8}\n": "recipe.yaml:5: lora.rank: unknown key (did you mean r?)",
    "model: {name_or_path: m, dtype: bf16}\n": 'got "bf16" (did you mean bfloat16?)',
    MINIMAL
    + "compile: {options: {shape_padding: 1}}\n": "compile.options.shape_padding: expected true or false, got 1",
}


@pytest.mark.parametrize(("text", "named"), BAD.items(), ids=range(len(BAD)))
def test_a_bad_recipe_is_one_line_that_names_its_place(load, text, named) -> None:
    with pytest.raises(UserError) as caught:
        load(text)
    message = str(caught.value)
    assert named in message
    assert "recipe.yaml" in message
    assert "\n" not in message


def test_two_faults_are_both_named(load) -> None:
    with pytest.raises(UserError, match=r"lora\.r: .*packing\.tokens_per_batch: "):
        load(MINIMAL + "lora: {r: 0}\npacking: {tokens_per_batch: x}\n")


def test_words_and_numbers_mean_what_people_mean(load) -> None:
    given = "{eval_strategy: no, learning_rate: 1e-4, report_to: none, run_name: off, seed: 010}"
    training = load(MINIMAL + f"training: {given}\n").training
    assert (training.eval_strategy, training.learning_rate, training.run_name, training.seed) == ("no", 1e-4, "off", 10)


@pytest.mark.parametrize(("text", "scope"), [("true", "layer"), ("{scope: model}", "model"), ("{}", "layer")])
def test_compile_is_a_switch_or_a_section(load, text, scope) -> None:
    section = load(MINIMAL + f"compile: {text}\n").compile
    assert section is not None
    assert section.scope == scope


@pytest.mark.parametrize("text", ["", "compile: false\n", "compile: null\n"])
def test_compile_is_off_by_default(load, text) -> None:
    assert load(MINIMAL + text).compile is None


def test_overrides_set_one_key_each(load) -> None:
    recipe = load(
        MINIMAL + "compile: true\n",
        "training.max_steps=5",
        "data.train.0.path=b.jsonl",
        "data.train.1.path=c.jsonl",
        "compile.options.triton.cudagraphs=true",
        "lora.target_modules=[q_proj, v_proj]",
        "data.chat_template_kwargs.a.b=1",
        "training.adam_beta1=0.8",
    )
    assert recipe.training.max_steps == 5
    assert [source.path for source in recipe.data.train] == ["b.jsonl", "c.jsonl"]
    assert recipe.compile is not None
    assert recipe.compile.options == {"triton.cudagraphs": True}
    assert recipe.lora is not None
    assert recipe.lora.target_modules == ("q_proj", "v_proj")
    assert recipe.data.chat_template_kwargs == {"a.b": 1}
    assert recipe.training.adam_beta1 == 0.8


@pytest.mark.parametrize(
    ("override", "fault"),
    [
        ("trainig.max_steps=3", "--set trainig.max_steps=3: trainig: unknown key"),
        ("training.seed=x", "--set training.seed=x: training.seed: expected a whole number"),
        ("packing={tokens_per_batch: x}", "--set packing={tokens_per_batch: x}: packing.tokens_per_batch: expected"),
        ("data.train.0.pth=x", "--set data.train.0.pth=x: data.train.0.pth: unknown key"),
    ],
)
def test_a_fault_of_an_override_is_named_there(load, override, fault) -> None:
    with pytest.raises(UserError) as caught:
        load(MINIMAL + "packing:\n  tokens_per_batch: 64\n", override)
    assert str(caught.value).startswith(fault)


def test_a_fault_of_the_file_keeps_its_line_beside_an_override(load) -> None:
    with pytest.raises(UserError, match=r"recipe\.yaml:6: training\.seed: expected a whole number"):
        load(MINIMAL + "training:\n  seed: x\n", "training.max_steps=3")


@pytest.mark.parametrize(("off", "override"), [("compile: false", "compile.scope=model"), ("lora: null", "lora.r=4")])
def test_a_key_of_a_section_that_is_off_says_how_to_switch_it_on(load, off, override) -> None:
    section = off.partition(":")[0]
    said = f"--set {override}: {off.replace(':', ' is')} in the recipe; pass --set {section}={{}} before it"
    with pytest.raises(UserError, match=re.escape(said)):
        load(MINIMAL + off + "\n", override)
    assert getattr(load(MINIMAL + off + "\n", f"{section}={{}}", override), section) is not None


@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson", ".parquet"])
def test_a_data_file_is_no_recipe(tmp_path, suffix) -> None:
    path = tmp_path / f"rows{suffix}"
    path.write_text('{"messages": []}\n')
    with pytest.raises(UserError, match=r"expected a recipe \(a YAML file\), got data; .*data\.train\.0\.path="):
        load_recipe(path)


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("training.max_steps", "expected key=value"),
        ("=3", "expected key=value"),
        ("modl.name_or_path=x", "modl: unknown key (did you mean model?)"),
        ("learning_rate=1", "learning_rate: unknown key (did you mean training.learning_rate?)"),
        ("r=8", "r: unknown key (did you mean lora.r?)"),
        ("eval_delay=8", "eval_delay: unknown key (did you mean training.eval_delay?)"),
        ("data.train.0.pth=x", "data.train.0.pth: unknown key (did you mean path?)"),
        ("data.train.7.path=x", "data.train is a list of 1"),
        ("data.train.first.path=x", "data.train is a list of 1"),
        ("compile.scope=model", "compile is false in the recipe"),
        ("lora.r=[", "broken YAML"),
        ("training.seed=x", 'training.seed: expected a whole number, got "x"'),
        ("training.seed=-1", "training.seed: "),
        ("training.data_seed=4294967296", "training.data_seed: "),
    ],
)
def test_a_bad_override_is_one_line(load, override, named) -> None:
    with pytest.raises(UserError) as caught:
        load(MINIMAL + "compile: false\n", override)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_resolved_recipe_is_read_back_as_itself(load) -> None:
    recipe = load(
        MINIMAL + "training: {max_steps: 7, learning_rate: 1e-5, output_dir: '1e-4', torch_empty_cache_steps: 3}\n"
        "compile: {options: {shape_padding: true}}\nlora: {target_modules: [q_proj]}\nverify: {lengths: [3, 1]}\n"
        "checkpointing: 0.5\nkernels: {causal_conv: reference}\n"
    )
    assert load(dump_recipe(recipe)) == recipe
    assert recipe.training.output_dir == "1e-4"


def test_a_resolved_recipe_says_nothing_that_says_nothing(load) -> None:
    """Null as a value that is no default stays."""
    text = dump_recipe(load(MINIMAL + "lora: {target_modules: null, target_parameters: all-experts}\n"))
    nulls = [line.strip() for line in text.splitlines() if line.endswith((" null", " []", " {}"))]
    assert nulls == ["target_modules: null"]
    assert "\ncompile: false\n" in text
    assert "learning_rate: 5.0e-05" in text


def test_no_such_file(tmp_path) -> None:
    with pytest.raises(UserError, match="no such recipe"):
        load_recipe(tmp_path / "nothing.yaml")
    with pytest.raises(UserError, match="got a folder"):
        load_recipe(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="UTF-8"):
        load_recipe(tmp_path / "binary.yaml")
