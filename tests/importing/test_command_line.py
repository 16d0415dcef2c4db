from pathlib import Path

import pytest

from deltatune.errors import UserError
from deltatune.importing.command_line import settings_of_command
from deltatune.importing.values import NotLiteral


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("trl sft --a 1 --b", {"a": 1, "b": True}),
        ("trl sft --a=1e-4 --b x y", {"a": 0.0001, "b": ["x", "y"]}),
        ("trl sft --no_b", {"b": False}),
        ("trl sft --a-b 1", {"a_b": 1}),
        ("trl sft \\\n  --a '<|im_end|>' \\\n  --b false", {"a": "<|im_end|>", "b": False}),
        ("python examples/scripts/sft.py --a 1 2>&1 | tee log", {"a": 1}),
        ("# trl sft --a 1\ntrl sft --a 2 # later", {"a": 2}),
        ("N=3\ntrl sft --a $N --b ${N}x", {"a": 3, "b": "3x"}),
        ("trl sft --a $HOME/x", {"a": NotLiteral("$HOME/x")}),
        ("N=1\nN=2\ntrl sft --a $N", {"a": NotLiteral("$N")}),
        ("trl kto --a 1\ntrl sft --a 2 && echo done", {"a": 2}),
        ("python trl/scripts/dpo.py --beta 0.2", {"loss_type": "sigmoid", "beta": 0.2}),
        ("trl dpo --loss_type ipo", {"loss_type": "ipo"}),
        ("A=x\nB=${A}/y\ntrl sft --a $B/z", {"a": "x/y/z"}),
        ("A=x\nA+=y\ntrl sft --a $A", {"a": NotLiteral("$A")}),
        ('N="""--b \\\n --c\n"""\nN="--d"\ntrl sft --a 1 $N', {"a": 1, "$N": NotLiteral("$N")}),
        ("trl sft $ARGUMENTS --a", {"$ARGUMENTS": NotLiteral("$ARGUMENTS"), "a": True}),
        ("accelerate launch -m trl.scripts.sft --a 1", {"a": 1}),
        ("python examples/dpo_vlm.py --a 1", {"loss_type": "sigmoid", "a": 1}),
        (
            "trl sft --a 1 && trl dpo --b 2\ntrl sft --c",
            {"a": 1, "trl dpo (command 2)": NotLiteral("--b 2"), "trl sft (command 3)": NotLiteral("--c")},
        ),
    ],
)
def test_flags(source, expected):
    assert settings_of_command(Path("run.sh"), source) == expected


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("trl sft 'x", "cannot be read"),
        ("trl sft x", "expected a flag"),
        ("trl kto --a 1", "found none"),
        ("dpo_online.py --a", "found none"),
    ],
)
def test_what_is_no_command(source, message):
    with pytest.raises(UserError, match=message):
        settings_of_command(Path("run.sh"), source)
