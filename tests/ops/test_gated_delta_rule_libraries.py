"""Which library the gated delta rule takes and why, and what our op does around it, without a GPU."""

# B batch, T tokens, H key heads, G value heads, K key dim, V value dim

import os
import sys
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from packaging.version import Version

from deltatune.ops import GatedDeltaRuleSpec, _nvidia, choose, gated_delta_rule
from deltatune.ops._gated_delta_rule import fla, flash_qla, library, providers, reference
from deltatune.ops._gated_delta_rule.reference import Inputs
from deltatune.packing.sequences import Sequences

HOPPER, AMPERE = (9, 0), (8, 0)
BF16 = torch.bfloat16
INSTALLED = {"fla-core": "0.6.0", "flash-qla": "0.1.3", "tilelang": "0.1.15", "triton": "3.6.0"}


@pytest.fixture
def machine(monkeypatch):
    """Makes this look like a machine with a GPU of some capability and some packages, all with known signatures."""

    def set_up(capability=HOPPER, nvcc=True, **changed):
        versions = INSTALLED | {name.replace("_", "-"): version for name, version in changed.items()}

        def version_of(*names):
            found = next((versions[name] for name in names if versions.get(name)), None)
            return None if found is None else Version(found)

        monkeypatch.delenv("FLA_TILELANG", raising=False)
        monkeypatch.delenv("FLA_DISABLE_BACKEND_DISPATCH", raising=False)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        for module in (fla, flash_qla):
            monkeypatch.setattr(module, "version_of", version_of)
            monkeypatch.setattr(module, "has_nvcc", lambda: nvcc)
        monkeypatch.setattr(library.Library, "problem", None)

    return set_up


def refused(impl, dtype=BF16, head_dims=None):
    with pytest.raises(ValueError, match=f"impl='{impl}' cannot run here") as error:
        choose(GatedDeltaRuleSpec(torch.device("cuda"), dtype, head_dims=head_dims), impl)
    return str(error.value)


@pytest.mark.parametrize(
    ("setting", "dtype", "head_dims", "expected"),
    [
        ({}, BF16, None, "flash_qla"),
        ({}, torch.float16, (128, 128), "flash_qla"),
        ({"capability": (10, 3)}, BF16, None, "flash_qla"),
        ({}, BF16, (128, 64), "fla"),
        ({}, BF16, (12, 64), "reference"),
        ({}, torch.float32, None, "reference"),
        ({"flash_qla": None}, BF16, None, "fla"),
        ({"capability": AMPERE}, BF16, None, "fla"),
        ({"capability": AMPERE, "nvcc": False, "tilelang": None}, BF16, None, "fla"),
        ({"capability": (7, 5)}, BF16, None, "reference"),
        ({"nvcc": False}, BF16, None, "reference"),
        ({"nvcc": False, "triton": "3.7.1"}, BF16, None, "fla"),
        ({"fla_core": None, "flash_qla": None}, BF16, None, "reference"),
    ],
)
def test_auto_takes_the_first_that_can_run(machine, setting, dtype, head_dims, expected):
    machine(**setting)
    assert choose(GatedDeltaRuleSpec(torch.device("cuda"), dtype, head_dims=head_dims)).impl == expected


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"flash_qla": None}, r"not installed: pip install 'flash-qla>=0.1.3'"),
        ({"flash_qla": "0.1.2"}, r"0.1.2 is older than 0.1.3: pip install"),
        ({"tilelang": None}, r"TileLang is not installed: pip install 'tilelang>=0.1.12'"),
        ({"tilelang": "0.1.11"}, r"TileLang 0.1.11 is older: pip install"),
        ({"nvcc": False}, "finds no nvcc: install the CUDA toolkit"),
        ({"capability": (12, 0)}, r"9.0, 10.0, 10.3, this GPU has 12.0; use impl='fla'"),
    ],
)
def test_flash_qla_says_what_it_misses(machine, setting, message):
    machine(**setting)
    assert message in refused("flash_qla")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"fla_core": None}, "not installed: pip install 'flash-linear-attention>=0.6'"),
        ({"fla_core": "0.4.1"}, "FLA 0.4.1 is older than 0.5, and silently wrong on some GPUs: pip install"),
        ({"capability": (7, 5)}, "needs compute capability 8.0 or newer, this GPU has 7.5"),
    ],
)
def test_fla_says_what_it_misses(machine, setting, message):
    machine(**setting)
    assert message in refused("fla")


@pytest.mark.parametrize(
    ("setting", "remedy"),
    [
        ({"tilelang": None}, "pip install 'flash-linear-attention>=0.6' 'tilelang>=0.1.12', or Triton 3.7.1"),
        ({"tilelang": None, "triton": "3.4.0"}, "'tilelang>=0.1.12'"),
        ({"tilelang": None, "triton": "3.7.0"}, "'tilelang>=0.1.12'"),
        ({"fla_core": "0.5.0"}, "'flash-linear-attention>=0.6'"),
        ({"fla_core": "0.5.0", "triton": "3.7.1"}, "'flash-linear-attention>=0.6'"),
        ({"nvcc": False}, "install the CUDA toolkit, or Triton 3.7.1"),
        ({}, None),
        ({"tilelang": None, "triton": "3.3.1"}, None),
        ({"tilelang": None, "triton": "3.7.1"}, None),
        ({"tilelang": None, "capability": AMPERE}, None),
        ({"tilelang": None, "capability": (10, 0)}, None),
    ],
)
def test_the_miscompiled_backward_is_refused_on_hopper(machine, setting, remedy):
    machine(**setting)
    if remedy is None:
        assert choose(GatedDeltaRuleSpec(torch.device("cuda"), BF16), "fla").impl == "fla"
    else:
        message = refused("fla")
        assert "wrong gradients on Hopper" in message
        assert remedy in message


@pytest.mark.parametrize("setting", [("FLA_TILELANG", "0"), ("FLA_DISABLE_BACKEND_DISPATCH", "1")])
def test_tilelang_switched_off_is_refused_too(machine, monkeypatch, setting):
    machine()
    monkeypatch.setenv(*setting)
    assert "unset FLA_TILELANG and FLA_DISABLE_BACKEND_DISPATCH" in refused("fla")


@pytest.mark.parametrize("impl", ["fla", "flash_qla"])
def test_full_precision_and_other_head_dims_are_refused(machine, impl):
    machine()
    assert "float16 and bfloat16" in refused(impl, torch.float32)
    assert "got K=12 and V=128; use impl=" in refused(impl, head_dims=(12, 128))


@pytest.mark.parametrize("impl", ["fla", "flash_qla"])
def test_without_a_gpu_the_library_is_refused(impl):
    inputs = [torch.zeros(1, 4, *shape) for shape in ((1, 16), (1, 16), (1, 16), (1,), (1,))]
    with pytest.raises(ValueError, match=f"impl='{impl}' cannot run here: {impl} needs an NVIDIA GPU.*on cpu"):
        gated_delta_rule(*inputs, impl=impl)


def test_an_unknown_signature_is_named():
    def known(*, q, k, scale=None):
        pass

    def newer(*, q, keys, scale):
        pass

    def problem(function, names):
        calls = {"forward": library.Call(names, {}, ())}
        return library.Library("X", "x", "X 1", "pip install x", lambda: {"forward": function}, calls).problem

    assert problem(known, ("q", "k", "scale")) is None
    assert "its newer lacks k and also wants keys, scale; use X 1: pip install x" in problem(newer, ("q", "k"))


@pytest.mark.parametrize("module", [fla, flash_qla])
def test_a_library_of_another_signature_is_refused_with_the_version_to_install(module):
    functions = dict.fromkeys(module.LIBRARY.calls, lambda *, tokens: None)
    problem = replace(module.LIBRARY, load=lambda: functions).problem
    assert "is not the one known here: its <lambda> lacks" in problem
    assert "pip install" in problem


@pytest.mark.parametrize("module", [fla, flash_qla])
def test_a_library_that_cannot_be_imported_is_refused(module):
    def fail():
        raise ImportError("no libcuda")

    assert "cannot be imported (no libcuda)" in replace(module.LIBRARY, load=fail).problem


@pytest.mark.parametrize(("module", "backward"), [(fla, 8), (flash_qla, 6)])
def test_functions_get_the_arguments_they_take_and_results_are_counted(module, backward):
    given, described = [], []

    def function(**arguments):
        given.append(arguments)
        return range(6)

    functions = dict.fromkeys(module.LIBRARY.calls, function)
    called = replace(module.LIBRARY, load=lambda: functions, describe=described.append)
    documents_ = library.documents_of(torch.tensor([0, 5, 12]), torch.device("cpu"))
    inputs = dict.fromkeys(("q", "k", "v", "g", "beta", "scale"), 1)
    found = called.run("forward", documents_, **inputs)
    assert {found[name] for name in ("g", "o", "A")} == {0, 1, 2}
    assert given[0].items() >= (inputs | {"cu_seqlens": documents_.cu_seqlens, "output_final_state": False}).items()
    assert given[0].keys() == {*module.LIBRARY.calls["forward"].takes, *module.LIBRARY.calls["forward"].options}
    assert described == [documents_]
    short = replace(called, load=lambda: dict.fromkeys(functions, lambda **_: (1, 2, 3)))
    with pytest.raises(RuntimeError, match="returns 3 results from its forward where 6 are expected: pip install"):
        short.run("forward", documents_, **inputs)
    with pytest.raises(RuntimeError, match=f"from its backward where {backward} are expected: pip install"):
        short.run("backward", documents_, **inputs, do=1, A=1)


def test_the_choice_is_a_constant_of_a_traced_graph(monkeypatch):
    def traced(x):
        return x + 1 if providers._library_refusal("fla", x.device, x.dtype) == "no" else x - 1

    monkeypatch.setattr(providers, "_library_refusal", _nvidia.constant(lambda name, device, dtype: "no"))
    assert torch.compile(traced, fullgraph=True, backend="eager")(torch.zeros(2)).tolist() == [1, 1]


def test_documents_without_the_empty_ones():
    found = library.documents_of(torch.tensor([0, 0, 5, 5, 75, 82, 82, 82]), torch.device("cpu"))
    assert found.cu_seqlens.tolist() == [0, 5, 75, 82]
    assert found.cu_seqlens.dtype == found.chunk_indices.dtype == torch.int32
    assert found.chunk_indices.tolist() == [[0, 0], [1, 0], [1, 1], [2, 0]]


def test_documents_are_found_once_for_the_same_boundaries():
    sequences, other = Sequences.from_lengths([5, 7]), Sequences.from_lengths([5, 6, 1])
    cpu = torch.device("cpu")
    first = library.documents_of(sequences.cu_seqlens_cpu, cpu)
    assert library.documents_of(sequences.static().cu_seqlens_cpu, cpu) is first
    assert library.documents_of(other.cu_seqlens_cpu, cpu) is not first
    assert library.documents_of(torch.tensor([0, 5, 12]), cpu) is first


def test_documents_of_boundaries_that_are_rewritten_in_place():
    buffer, cpu = torch.tensor([0, 5, 12, 12], dtype=torch.int32), torch.device("cpu")
    assert library.documents_of(buffer, cpu).cu_seqlens.tolist() == [0, 5, 12]
    buffer.numpy()[1] = 7  # no version counter sees it
    assert library.documents_of(buffer, cpu).cu_seqlens.tolist() == [0, 7, 12]


class FakeLibrary:
    """A library on the CPU: the reference, checked for what a library is promised."""

    def __init__(self):
        self.calls = Counter()
        self.given = []

    def run(self, direction, found, *, scale, **tensors):
        self.calls[direction] += 1
        self.given.append(tensors)
        assert (found.cu_seqlens.diff() > 0).all()
        for x in tensors.values():
            assert x.is_contiguous()
            assert x.shape[:2] == (1, found.cu_seqlens_cpu[-1])
        inputs = Inputs(*(tensors[name] for name in ("q", "k", "v", "g", "beta")), None, scale, qk_l2norm=False)
        if direction == "backward":
            grads = reference.backward(tensors["do"], inputs, found.cu_seqlens_cpu)
            return {f"d{name}": grad for name, grad in grads._asdict().items()}
        o, _ = reference.forward(inputs, found.cu_seqlens_cpu)
        solved = inputs.k.new_ones(*inputs.v.shape[:3], library.CHUNK_SIZE)
        return {"o": o, "g": inputs.g + 0, "A": solved}


class FakeNorm:
    """In place of the Triton kernels."""

    @staticmethod
    def normalise(x):
        assert x.ndim == 3
        y, rstd = reference._normalise(x)
        return y.contiguous(), rstd.squeeze(-1)

    @staticmethod
    def normalise_backward(dy, y, rstd):
        return (dy - y * (y * dy).sum(-1, keepdim=True)) * rstd.unsqueeze(-1)


@pytest.fixture
def fake(monkeypatch):
    """The op with ``impl="fla"`` runs the fake library."""
    found = FakeLibrary()
    monkeypatch.setattr(providers.GatedDeltaRuleSpec, "load", lambda impl: SimpleNamespace(LIBRARY=found))
    monkeypatch.setitem(sys.modules, "deltatune.ops._gated_delta_rule.l2_norm", FakeNorm)
    monkeypatch.setattr(providers, "_library_refusal", lambda name, device, dtype: None)
    monkeypatch.setattr(fla, "dim_refusal", lambda *dims: None)
    return found


def make_inputs(tokens, *, batch=1):
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 8), (2, 8), (4, 12), (4,), (4,)]
    q, k, v, g, beta = (torch.randn(batch, tokens, *shape, generator=generator) for shape in shapes)
    return [x.requires_grad_() for x in (q, k, v, -0.05 * g.sigmoid(), beta.sigmoid())]


def run(inputs, **kwargs):
    o = gated_delta_rule(*inputs, **kwargs)
    weights = torch.randn(o.shape, generator=torch.Generator().manual_seed(1))
    return [o.detach(), *torch.autograd.grad((o * weights).sum(), inputs)]


@pytest.mark.parametrize("qk_l2norm", [True, False])
@pytest.mark.parametrize("lengths", [None, [5, 1, 0, 70, 7], [3, 2, 1, 63]])
def test_a_library_and_the_reference_agree_through_the_op(fake, lengths, qk_l2norm):
    inputs = make_inputs(90)
    with torch.no_grad():
        inputs[1] /= 4
    options = {"qk_l2norm": qk_l2norm}
    if lengths is not None:
        options["sequences"] = Sequences.from_lengths(lengths, total=90)
    got, expected = run(inputs, impl="fla", **options), run(inputs, impl="reference", **options)
    assert fake.calls == {"forward": 1, "backward": 1}
    for x, y in zip(got, expected, strict=True):
        assert torch.allclose(x, y, rtol=1e-5, atol=1e-6)


def test_rows_and_strided_inputs_reach_a_library_as_one_stream(fake):
    inputs = make_inputs(30, batch=3)
    strided = [torch.cat([x, x], dim=-1).detach()[..., : x.shape[-1]].requires_grad_() for x in inputs]
    for x, y in zip(run(strided, impl="fla"), run(inputs, impl="reference"), strict=True):
        assert torch.allclose(x, y, rtol=1e-5, atol=1e-6)


def test_gradients_have_the_dtypes_of_the_inputs_and_the_decay_is_bounded(fake):
    inputs = [x.detach().bfloat16().requires_grad_() for x in make_inputs(20)]
    with torch.no_grad():
        inputs[3][:, 3] = -torch.inf
    o, *grads = run(inputs, impl="fla")
    assert fake.given[0]["g"].dtype == torch.float32
    assert fake.given[0]["g"].min() == -100
    assert [x.dtype for x in (o, *grads)] == [BF16] * 6


def test_no_tokens_never_reach_a_library(fake):
    inputs = make_inputs(0)
    gated_delta_rule(*inputs, impl="fla").sum().backward()
    assert inputs[0].grad.shape == inputs[0].shape
    assert not fake.calls


@pytest.mark.parametrize("qk_l2norm", [True, False])
def test_opcheck_with_what_a_library_keeps(fake, qk_l2norm):
    inputs = make_inputs(13)
    with torch.no_grad():
        inputs[1] /= 4
    sequences = Sequences.from_lengths([5, 1, 7])
    options = (None, 0.5, qk_l2norm, sequences.cu_seqlens_cpu, "fla")
    torch.library.opcheck(torch.ops.deltatune.gated_delta_rule.default, (*inputs, *options))
    detached = [x.detach() for x in inputs]
    o, q, k, *kept, _ = torch.ops.deltatune.gated_delta_rule(*detached, *options)
    q, k = (q, k) if qk_l2norm else detached[:2]
    arguments = (q, k, *detached[2:], *options, torch.ones_like(o), None, *kept)
    torch.library.opcheck(torch.ops.deltatune.gated_delta_rule_backward.default, arguments)


def test_compiled_layers_share_the_documents_of_a_batch(fake):
    library._documents.cache_clear()

    def two_layers(q, k, v, g, beta, sequences):
        o = gated_delta_rule(q, k, v, g, beta, sequences=sequences, impl="fla")
        return gated_delta_rule(q, k, o, g, beta, sequences=sequences, impl="fla")

    torch._dynamo.reset()
    compiled = torch.compile(two_layers, fullgraph=True, backend="aot_eager")
    inputs = make_inputs(83)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for lengths in ([5, 1, 70, 7], [40, 43]):
            compiled(*inputs, sequences=Sequences.from_lengths(lengths)).sum().backward()
    assert fake.calls == {"forward": 4, "backward": 4}
    assert library._documents.cache_info().misses == 2


def test_results_are_kept_only_where_backward_wants_them():
    q, v = torch.zeros(2, 3, 2, 8), torch.zeros(2, 3, 4, 12)
    inputs = Inputs(q, q, v, v[..., 0], v[..., 0], None, 1.0, qk_l2norm=True)
    assert [x.numel() for x in library.results_like(inputs, saves=False)[1:]] == [0] * 6
    shapes = [list(x.shape) for x in library.results_like(inputs, saves=True)]
    assert shapes == [[2, 3, 4, 12], [2, 3, 2, 8], [2, 3, 2, 8], [2, 3, 2], [2, 3, 2], [1, 6, 4], [1, 6, 4, 64]]


@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1, set by test_interpreted.py"
)
@pytest.mark.parametrize("dim", [16, 24])
def test_interpreted_normalisation(dim):
    from deltatune.ops._gated_delta_rule.l2_norm import normalise, normalise_backward

    x = torch.randn(7, 9 * dim)[:, : 3 * dim].unflatten(1, (3, dim)).requires_grad_()
    expected, dy = x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6), torch.randn(7, 3, dim)
    y, rstd = normalise(x.detach())
    (dx,) = torch.autograd.grad(expected, x, dy)
    torch.testing.assert_close(y, expected.detach(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(normalise_backward(dy, y, rstd), dx, rtol=1e-5, atol=1e-6)
