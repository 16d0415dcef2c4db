import pytest
import torch

from deltatune.bench.ops.catalog import OPS
from deltatune.bench.shapes import SHAPES
from deltatune.cli import main
from deltatune.commands import doctor, prebuild

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


def test_without_a_gpu_nothing_is_built_and_it_says_so(capsys, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["doctor", "--no-compile", "--build", "qwen3.5-2b", "--tokens", "4096"]) == 1
    page = capsys.readouterr().out
    assert "build qwen3.5-2b, packs of 4096 tokens, bfloat16: would run each op once" in page
    assert "problem: --build qwen3.5-2b did nothing: no CUDA device" in page


@pytest.mark.parametrize(
    ("more", "named"), [(["--build", "qwen9"], "unknown model 'qwen9'"), (["--tokens", "7"], "64 or more")]
)
def test_what_cannot_be_built_is_one_line(capsys, more, named) -> None:
    assert main(["doctor", *more]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert named in captured.err


def test_building_runs_every_op_of_the_model_once() -> None:
    cpu = torch.device("cpu")
    built = list(prebuild.build(SHAPES["tiny"], 64, cpu))
    assert [one.op for one in built] == [op for op in OPS if op != "lora_linear"]
    assert all(one.seconds > 0 for one in built)


def test_attention_alone_builds_no_delta_rule(monkeypatch) -> None:
    ran = []
    monkeypatch.setattr(prebuild, "_first_call", lambda case, device: ran.append(case.op) or 0.0)
    list(prebuild.build(SHAPES["qwen3-8b"], 64, torch.device("cpu")))
    assert ran == ["rms_norm_rope", "linear_cross_entropy", "varlen_attention"]


@pytest.mark.parametrize("model", ["qwen3.5-2b", "qwen3.5-9b", "qwen3.5-27b"])
@pytest.mark.parametrize("processors", [132, 148])
def test_document_counts_meet_every_kernel_of_flash_qla(monkeypatch, model, processors) -> None:
    class Properties:
        multi_processor_count = processors

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    shape = SHAPES[model]
    heads = shape.values["linear_num_value_heads"]

    def block(documents: int) -> int:
        """As FlashQLA 0.1.3 chooses: 70% of the processors should have a block of their own."""
        wanted = int(0.7 * processors)
        return 128 if documents * heads >= wanted else 64 if 2 * documents * heads >= wanted else 32

    counts = prebuild.document_counts(shape, torch.device("cuda"))
    assert {block(count) for count in counts} == {block(count) for count in range(1, 200)}
