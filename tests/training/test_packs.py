import pytest
from training_cases import byte_tokenizer, make_recipe

from deltatune.data.preview import preview
from deltatune.training.packs import load_packs

CALLING = """{%- for m in messages %}{{- m.role + ':' + (m.content or '') }}
{%- for call in m.tool_calls or [] %}{{- call.function.arguments | tojson }}{%- endfor %}{{- '<|im_end|>' }}
{%- endfor %}{%- if add_generation_prompt %}{{- 'assistant:' }}{%- endif %}"""


def previews(folder, rows, files=1, **data):
    """The samples of Parquet files of these rows, as text."""
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    for number in range(files):
        parquet.write_table(pa.Table.from_pylist(rows), folder / f"rows-{number}.parquet")
    source = {"path": str(folder / "rows-*.parquet"), **data.pop("source", {})}
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CALLING
    recipe = make_recipe(folder, folder, data={"train": [source], **data})
    packs = load_packs(recipe.data.train, recipe, tokenizer)
    return [preview(sample, tokenizer, color=False) for pack in range(len(packs)) for sample in packs[pack]]


def test_names_of_speakers_and_keys_come_from_the_recipe(tmp_path):
    rows = [{"messages": [{"speaker": "customer", "text": "q"}, {"speaker": "agent", "text": "a"}]}]
    assert previews(
        tmp_path,
        rows,
        roles={"customer": "user", "agent": "assistant"},
        source={"message_fields": {"role": "speaker", "content": "text"}},
    ) == ["user:q<|im_end|>assistant:«a<|im_end|>»"]


@pytest.mark.parametrize("files", [1, 2])
def test_keys_that_a_parquet_file_fills_are_absent(files, tmp_path):
    calls = [{"function": {"name": "f", "arguments": {"a": 1}}}, {"function": {"name": "g", "arguments": {"b": 2}}}]
    rows = [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": calls}]}]
    assert previews(tmp_path, rows, files) == ['user:q<|im_end|>assistant:«{"a": 1}{"b": 2}<|im_end|>»'] * files
