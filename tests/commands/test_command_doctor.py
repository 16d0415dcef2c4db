import pytest
import torch

from deltatune.cli import main
from deltatune.commands import doctor

GOOD = {"torch": "2.13.0", "triton": "3.6.0", "transformers": "5.23.0"}
HOPPER, AMPERE = (9, 0), (8, 0)


@pytest.mark.parametrize(
    ("versions", "capability", "named"),
    [
        (GOOD, None, None),
        (GOOD, HOPPER, None),
        ({**GOOD, "fla": "0.6.0"}, AMPERE, None),
        ({**GOOD, "fla": "0.6.0"}, None, None),
        ({**GOOD, "fla": "0.6.0", "tilelang": "0.1.12"}, HOPPER, None),
        ({**GOOD, "fla": "0.6.0", "triton": "3.7.1"}, HOPPER, None),
        ({**GOOD, "fla": "0.6.0", "triton": "3.3.1"}, HOPPER, None),
        ({**GOOD, "fla": "0.6.0"}, HOPPER, "tilelang"),
        ({**GOOD, "fla": "0.5.0", "triton": "3.4.0"}, HOPPER, "tilelang"),
        ({**GOOD, "fla": "0.4.1", "triton": "3.7.0"}, HOPPER, "wrong gradients"),
        ({**GOOD, "torch": "2.10.1"}, None, "torch>=2.11"),
        ({**GOOD, "transformers": "5.16.2"}, None, "transformers>=5.17"),
    ],
)
def test_known_problems(versions, capability, named) -> None:
    problems = doctor.known_problems(versions, capability)
    assert len(problems) == (named is not None)
    assert named is None or named in problems[0]


def test_doctor_shows_versions_and_kernels(capsys) -> None:
    assert main(["doctor", "--no-compile"]) == 0
    page = capsys.readouterr().out
    assert torch.__version__.split("+")[0] in page
    assert "gated_delta_rule" in page
    assert "no known problem" in page


def test_a_compiler_that_fails_is_a_problem(capsys, monkeypatch) -> None:
    def broken(*args, **kwargs):
        raise RuntimeError("no C++ compiler\nand so on")

    monkeypatch.setattr(torch, "compile", broken)
    assert main(["doctor"]) == 1
    assert "torch.compile on cpu fails: no C++ compiler\n" in capsys.readouterr().out
