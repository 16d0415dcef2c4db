"""The choice of an implementation: what a spec holds, who is asked in which order, what is said."""

from __future__ import annotations

import dataclasses
import doctest
from typing import get_args

import pytest
import torch

from deltatune import ops
from deltatune.config.kernel_names import kernel_names
from deltatune.config.schema import OpName
from deltatune.ops import _nvidia, _registry
from deltatune.ops._linear_cross_entropy import providers as loss_providers
from deltatune.ops._numerics import most_demanding
from deltatune.packing.sequences import Sequences

SPECS = [
    ops.CausalConvSpec,
    ops.DequantizeSpec,
    ops.Fp8MmSpec,
    ops.GatedDeltaRuleSpec,
    ops.GatedRmsNormSpec,
    ops.GroupedMmSpec,
    ops.LinearCrossEntropySpec,
    ops.LoraGatedSpec,
    ops.RmsNormRopeSpec,
    ops.VarlenAttentionSpec,
]
WITH_TRITON = [spec for spec in SPECS if any(provider.name == "triton" for provider in spec.providers)]
#: whose Triton kernels "auto" takes wherever they run
FIRST = [spec for spec in WITH_TRITON if spec not in (ops.LinearCrossEntropySpec, ops.LoraGatedSpec)]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def gpu(monkeypatch):
    """Makes this look like a machine with Triton and a GPU of some compute capability."""

    def set_up(capability):
        monkeypatch.setattr(torch.version, "hip", None)
        monkeypatch.setattr(_nvidia, "_has_triton", lambda: True)
        monkeypatch.setattr(loss_providers, "_has_descriptors", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)

    return set_up


@pytest.mark.parametrize("spec", SPECS)
def test_every_op_ends_with_a_reference_that_runs_on_a_cpu(spec):
    assert spec.providers[-1].name == "reference"
    assert spec.load("reference").__name__.endswith("reference")
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        given = spec(CPU, dtype)
        named = ops.choose(given, "reference")
        assert named.reason == "named by the caller"
        assert ops.choose(given).reason


def test_names_of_implementations_are_known_without_torch():
    declared = {spec.op: tuple(provider.name for provider in spec.providers) for spec in SPECS}
    assert kernel_names() == declared
    assert kernel_names().keys() == set(get_args(OpName))


@pytest.mark.parametrize("spec", SPECS)
def test_an_unknown_name_and_one_that_cannot_run_are_errors_with_the_remedy(spec):
    known = ", ".join(repr(provider.name) for provider in spec(CPU, torch.float64).preferred())
    with pytest.raises(ValueError, match=f"{spec.op}: unknown impl='x'; expected 'auto' or one of {known}"):
        ops.choose(spec(CPU, torch.float64), "x")
    first = spec.providers[0].name
    remedy = rf"use impl='reference'.* \(kernels\.{spec.op}: reference in a recipe\)$"
    with pytest.raises(ValueError, match=f"{spec.op}: impl='{first}' cannot run here: .*{remedy}"):
        ops.choose(spec(CPU, torch.float64), first)


@pytest.mark.parametrize("capability", [(7, 0), (7, 5)])
@pytest.mark.parametrize("spec", SPECS)
def test_no_kernel_of_bf16_is_chosen_on_a_gpu_without_it(gpu, spec, capability):
    gpu(capability)
    assert ops.choose(spec(CUDA, torch.bfloat16)).impl == "reference"


@pytest.mark.parametrize("spec", WITH_TRITON)
def test_an_old_gpu_says_what_it_lacks(gpu, spec):
    gpu((7, 5))
    with pytest.raises(ValueError, match=r"bf16 kernels need compute capability 8\.0 or newer, this GPU has 7\.5"):
        ops.choose(spec(CUDA, torch.bfloat16), "triton")
    gpu((6, 1))
    with pytest.raises(ValueError, match=r"triton needs compute capability 7\.0 or newer, this GPU has 6\.1"):
        ops.choose(spec(CUDA, torch.float16), "triton")


@pytest.mark.parametrize("spec", FIRST)
def test_an_old_gpu_runs_fp16_and_a_new_one_bf16(gpu, spec):
    gpu((7, 5))
    assert ops.choose(spec(CUDA, torch.float16)).impl == "triton"
    gpu((8, 0))
    assert ops.choose(spec(CUDA, torch.bfloat16)).impl == "triton"


def test_the_capability_is_a_constant_of_a_traced_graph(monkeypatch):
    monkeypatch.setattr(_nvidia, "capability_of", _nvidia.constant(lambda device: (9, 0)))
    spec = ops.GatedRmsNormSpec

    def traced(x):
        return x + 1 if ops.choose(spec(x.device, x.dtype)).impl == "reference" else x - 1

    assert torch.compile(traced, fullgraph=True, backend="eager")(torch.zeros(2)).tolist() == [1, 1]


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        ((torch.bfloat16, torch.float32), torch.bfloat16),
        ((torch.float32, torch.float16), torch.float32),
        ((torch.float64, torch.bfloat16), torch.float64),
        ((torch.float16,), torch.float16),
    ],
)
def test_the_dtype_that_asks_most(dtypes, expected):
    assert most_demanding(*dtypes) == most_demanding(*dtypes[::-1]) == expected


def test_specs_are_values():
    """Layers build them, reports compare them."""
    one = ops.VarlenAttentionSpec(CPU, torch.float32, head_dim=64)
    assert one == dataclasses.replace(one)
    assert hash(one) == hash(dataclasses.replace(one))
    assert one != dataclasses.replace(one, head_dim=None)
    assert isinstance(one, _registry.Spec)


def test_where_nothing_runs_every_refusal_is_said():
    class Nowhere(ops.Spec):
        op = "nothing"
        providers = tuple(
            ops.Provider(name, lambda _, name=name: ops.Support(False, f"no {name}"), "nowhere") for name in "ab"
        )

    with pytest.raises(ValueError, match="nothing: no implementation can run here: no a; no b"):
        ops.choose(Nowhere(CPU, torch.float32))


@pytest.mark.parametrize("op", ["causal_conv", "gated_delta_rule", "varlen_attention"])
def test_examples_say_what_happens(op):
    function = getattr(ops, op)
    torch.manual_seed(0)
    finder, runner = doctest.DocTestFinder(recurse=False), doctest.DocTestRunner()
    (example,) = finder.find(function, globs={"torch": torch, "Sequences": Sequences, op: function})
    assert example.examples
    assert runner.run(example).failed == 0
