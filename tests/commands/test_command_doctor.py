from dataclasses import replace
from itertools import groupby

import pytest
import torch

from deltatune import ops, prepare
from deltatune.bench.ops.case import Setting
from deltatune.bench.ops.catalog import OPS
from deltatune.bench.shapes import SHAPES, Shape
from deltatune.cli import main
from deltatune.commands import doctor, prebuild
from deltatune.layers.final_norm import FinalNorm
from deltatune.ops._lora_linear import gated, gated_act, up_backward
from tiny import tiny_model

GOOD = {"torch": "2.13.0", "triton": "3.6.0", "transformers": "5.23.0"}
HOPPER, AMPERE = (9, 0), (8, 0)
CPU = torch.device("cpu")


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


def test_building_runs_every_op_of_the_model() -> None:
    built = list(prebuild.build(SHAPES["tiny"], 64, CPU))
    assert [op for op, _ in groupby(one.op for one in built)] == [op for op in OPS if op != "lora_linear"]
    assert all(one.seconds > 0 for one in built)


def few_words(name) -> Shape:
    """Without the time it takes to draw a head's weights."""
    return replace(SHAPES[name], values={**SHAPES[name].values, "vocab_size": 96})


def test_attention_alone_builds_no_delta_rule(monkeypatch) -> None:
    ran = []
    monkeypatch.setattr(prebuild, "_first_call", lambda case, device: ran.append(case.op) or 0.0)
    list(prebuild.build(few_words("qwen3-8b"), 64, CPU))
    assert list(dict.fromkeys(ran)) == [
        "rms_norm_rope",
        "final_norm",
        "linear_cross_entropy",
        "lora_gated",
        "lora_low_rank",
        "varlen_attention",
    ]


@pytest.mark.parametrize("name", SHAPES)
def test_every_known_model_can_be_built(monkeypatch, name) -> None:
    monkeypatch.setattr(prebuild, "_first_call", lambda case, device: 0.0)
    assert list(prebuild.build(few_words(name), 64, CPU))


@pytest.mark.parametrize("name", ["qwen3.5-2b", "qwen3-8b"])
def test_the_final_norm_is_built_as_the_layer_calls_it(monkeypatch, name) -> None:
    shape, calls = SHAPES[name], []
    width, tokens = shape.values["hidden_size"], 64

    def recorded(*tensors, **options):
        calls.append(([(x.shape, x.stride(), x.dtype, x.requires_grad) for x in tensors], options))
        return rms_norm_rope(*tensors, **options)

    rms_norm_rope = ops.rms_norm_rope
    monkeypatch.setattr(ops, "rms_norm_rope", recorded)
    prebuild._first_call(OPS["final_norm"].build(shape, tokens, Setting(CPU, documents=1)), CPU)
    model = tiny_model("qwen3_5" if shape.hybrid else "qwen3", hidden_size=width).bfloat16().requires_grad_(False)
    prepare(model)
    norm = model.get_decoder().norm
    monkeypatch.setattr(FinalNorm, "_kernel", lambda self, x: "reference")
    norm(torch.randn(1, tokens, width, dtype=torch.bfloat16, requires_grad=True))
    built, called = calls
    assert built == called


def test_both_kernels_that_read_a_gradient_once_are_built(monkeypatch) -> None:
    """As on Hopper, where they run; here two products stand in for each."""
    monkeypatch.setattr(up_backward, "triton_refusal", lambda device, dtype: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(up_backward, "_FEWEST", 0)
    reads_once, met = up_backward._reads_once, []

    def recorded(dy, up, narrow):
        met.append((up.shape[1], reads_once(dy, up, narrow)))
        return False

    monkeypatch.setattr(up_backward, "_reads_once", recorded)
    monkeypatch.setattr(prebuild, "OPS", {"lora_low_rank": OPS["lora_low_rank"]})
    built = [one.kind for one in prebuild.build(SHAPES["tiny"], 64, CPU)]
    assert built == ["rank 16", "rank 32"]
    assert met == [(16, True), (32, True)]


def test_both_kernels_of_a_gated_activation_are_built(monkeypatch) -> None:
    """As on a GPU, where they run; here the call of the op stands for each."""
    met = []

    def recorded(gate, up, down, used):
        met.append(used)
        return gated_act.gated_act(gate, up, down, used)

    monkeypatch.setattr(gated, "gated_act", recorded)
    monkeypatch.setattr(prebuild, "OPS", {"lora_gated": OPS["lora_gated"]})
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    assert [one.kind for one in prebuild.build(SHAPES["tiny"], 64, CPU)] == ["rank 16", "rank 32"]
    assert met == [16, 32]


@pytest.mark.parametrize("name", [name for name in SHAPES if name != "tiny"])
def test_the_layer_that_is_built_is_wide_enough_for_that_kernel(name) -> None:
    case = OPS["lora_low_rank"].build(SHAPES[name], 16384, Setting(CPU, documents=1))
    assert 16384 * case.config["N"] >= up_backward._FEWEST


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
