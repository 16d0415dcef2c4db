from deltatune.importing.rules import Outcome, Row
from deltatune.importing.table import table_lines
from deltatune.importing.values import NotLiteral


def test_table():
    rows = [
        Row("lora_r", 8, Outcome("carried", {"lora.r": 8})),
        Row("output_dir", NotLiteral("folder()"), Outcome("not supported", why="no literal")),
        Row("dtype", None, Outcome("changed", {"model.dtype": "bfloat16"}, "the default there"), given=False),
    ]
    assert table_lines(rows) == [
        "key         value                    here                   why",
        "lora_r      8         carried        lora.r: 8",
        "output_dir  folder()  not supported                         no literal",
        "(dtype)     null      changed        model.dtype: bfloat16  the default there",
        "",
        "2 keys: 1 carried, 0 changed, 1 not supported, 0 no effect here, 0 unknown",
    ]


def test_a_long_cell_moves_its_own_row_alone():
    rows = [
        Row("a", 1, Outcome("carried", {f"lora.key_number_{n}": n for n in range(9)}, "long")),
        Row("b", 1, Outcome("carried", {}, "short")),
    ]
    assert table_lines(rows)[2].index("short") == len("key  value           ") + 60 + 2


def test_a_narrow_terminal_gets_paragraphs():
    rows = [Row("lora_dropout", 0.1, Outcome("changed", {"lora.dropout": 0.1}, "word " * 30))]
    lines = table_lines(rows, 60)
    assert lines[:2] == ["lora_dropout: 0.1 (changed)", "  lora.dropout: 0.1"]
    assert max(map(len, lines)) <= 60
    assert table_lines(rows, 400) == table_lines(rows)
