from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import deltatune.layers.causal_lm
import deltatune.layers.decoder
from deltatune import CompileOptions, Sequences, VerifyReport, ops, prepare, verify
from deltatune.compile.graphs import compile_options
from deltatune.layers.attention import Attention, SinkAttention
from deltatune.verification.measure import Pack, Run, Subject, measure, relative
from deltatune.verification.report import VerifyRow
from deltatune.verification.rounding import limits_of
from tiny import FAMILIES, HYBRIDS, tiny_conditional, tiny_model

LENGTHS = (1, 66, 3)


@pytest.mark.parametrize("family", FAMILIES)
def test_prepared_models_are_independent(family: str) -> None:
    model = tiny_model(family)
    prepare(model)
    report = verify(model) if family == "gpt_oss" else verify(model, lengths=LENGTHS)
    assert report.ok, str(report)
    assert report.prepared
    assert report.exact
    for row in report.rows:
        assert max(row.forward, row.input_grad, row.parameter_grads) < 1e-5
        assert row.cross_document_gradient == row.perturbation == 0
    kinds = {"full_attention", *(["linear_attention"] if family in HYBRIDS else [])}
    kinds |= {"sliding_attention"} if family == "gpt_oss" else set()
    assert {row.name.partition(",")[0] for row in report.rows} == kinds | {"model"}
    assert all(("experts" in row.name) == ("qwen3" != family != "qwen3_5") for row in report.rows[:-1])


@pytest.mark.parametrize("family", HYBRIDS)
def test_a_stock_hybrid_leaks_in_its_recurrent_layers(family: str) -> None:
    report = verify(tiny_model(family), lengths=LENGTHS)
    assert not report.ok
    assert not report.prepared
    failed = {row.name.partition(",")[0] for row in report.rows if not row.ok}
    assert failed == {"linear_attention", "model"}
    linear = report.rows[0]
    assert linear.forward > 0.1
    assert linear.cross_document_gradient > 0.1
    assert linear.perturbation > 0.1
    assert report.verdict.startswith("LEAK: linear_attention")
    assert "prepare(model)" in report.verdict


def test_a_stock_decoder_with_attention_alone_is_independent_without_a_cache() -> None:
    report = verify(tiny_model("qwen3"), lengths=LENGTHS)
    assert report.ok, str(report)
    assert not report.prepared
    assert report.padding == 0


@pytest.mark.parametrize("adapters_first", [True, False])
def test_adapters(adapters_first: bool) -> None:
    model = tiny_model("qwen3_5")
    if not adapters_first:
        prepare(model)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.5))
    if adapters_first:
        prepare(wrapped)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    report = verify(wrapped, lengths=LENGTHS)
    assert report.ok, str(report)
    assert "lora" in report.rows[-1].worst_parameter


def test_conditional_generation_and_a_bare_text_model() -> None:
    model = tiny_conditional()
    assert not verify(model, lengths=LENGTHS).ok
    prepare(model)
    report = verify(model, lengths=LENGTHS)
    assert report.ok, str(report)
    bare = tiny_model("qwen3_5").model
    prepare(bare)
    report = verify(bare, lengths=LENGTHS)
    assert report.ok, str(report)
    assert report.rows[-1].forward > 0


def test_frozen_model_is_probed_all_the_same() -> None:
    model = tiny_model("qwen3").requires_grad_(False)
    prepare(model)
    report = verify(model, lengths=LENGTHS)
    assert report.ok, str(report)
    assert all(row.parameter_grads > 0 for row in report.rows)
    assert not any(p.requires_grad for p in model.parameters())


def test_the_compiled_graphs_can_be_probed() -> None:
    model = tiny_model("qwen3", layers=1)
    prepared = prepare(model, compile=CompileOptions(backend="aot_eager"))
    eager = verify(model, lengths=LENGTHS)
    assert eager.ok
    assert not eager.compiled
    assert "probed without the graphs that training runs" in str(eager)
    compile_report = prepared.compile_report
    assert compile_report is not None
    assert not compile_report.graphs, "the default probe must not compile"
    report = verify(model, lengths=LENGTHS, tokens=96, compiled=True)
    assert report.ok, str(report)
    assert report.compiled
    assert report.padding == 96 - sum(LENGTHS)
    assert list(compile_report.graphs.values()) == [1]


Break = Callable[[Callable[..., Any]], Callable[..., Any]]


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Break], VerifyReport]:
    """Verifies a prepared hybrid one of whose ops is replaced."""

    def run(op: str, wrapper: Break) -> VerifyReport:
        model = tiny_model("qwen3_5")
        prepare(model)
        monkeypatch.setattr(ops, op, wrapper(getattr(ops, op)))
        return verify(model, lengths=LENGTHS)

    return run


def _each(change: Callable[[Tensor], Tensor], outputs: Tensor | tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
    """The layer's convolution returns q, k and v."""
    return tuple(map(change, outputs)) if isinstance(outputs, tuple) else change(outputs)


def _rows(report: VerifyReport) -> dict[str, Any]:
    return {row.name: row for row in report.rows}


def test_a_convolution_that_ignores_boundaries_is_found(broken: Callable[..., VerifyReport]) -> None:
    def ignore(op: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *args, sequences=None, **kwargs: op(*args, **kwargs)

    report = broken("causal_conv", ignore)
    rows = _rows(report)
    assert not report.ok
    assert rows["full_attention"].ok
    linear = rows["linear_attention"]
    assert min(linear.forward, linear.cross_document_gradient, linear.perturbation) > 1e-3
    assert report.verdict.startswith("LEAK: linear_attention: ")
    assert "full_attention" not in report.verdict


def test_the_delta_rule_that_ignores_boundaries_is_found_however_fast_the_model_forgets(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model("qwen3_5")
    for name, parameter in model.named_parameters():
        if name.endswith("A_log"):
            nn.init.constant_(parameter, 6.0)
    prepare(model)
    op = ops.gated_delta_rule
    monkeypatch.setattr(ops, "gated_delta_rule", lambda *args, sequences=None, **kwargs: op(*args, **kwargs))
    report = verify(model, lengths=LENGTHS)
    assert _rows(report)["linear_attention"].cross_document_gradient > 1e-3
    assert all(bool((p == 6.0).all()) for name, p in model.named_parameters() if name.endswith("A_log"))


def test_attention_that_ignores_boundaries_is_found(broken: Callable[..., VerifyReport]) -> None:
    def ignore(op: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *args, sequences=None, **kwargs: op(*args, **kwargs)

    rows = _rows(broken("varlen_attention", ignore))
    assert rows["linear_attention"].ok
    assert not rows["full_attention"].ok
    assert rows["full_attention"].cross_document_gradient > 1e-3


class _ShiftedGradient(torch.autograd.Function):
    """Identity whose gradient moves one token on, over boundaries."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad + 1e-3 * grad.roll(1, dims=1)


def test_a_leak_in_backward_alone_is_found(broken: Callable[..., VerifyReport]) -> None:
    report = broken("causal_conv", lambda op: lambda *a, **k: _each(_ShiftedGradient.apply, op(*a, **k)))
    row = _rows(report)["linear_attention"]
    assert row.forward < 1e-5
    assert row.input_grad > 1e-5
    assert row.cross_document_gradient > 0
    assert row.verdict == "gradients reach other documents"


class _ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.scale, None


def test_a_wrong_weight_gradient_of_packs_is_found(broken: Callable[..., VerifyReport]) -> None:
    def scale(op: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def wrong(x: Tensor, weight: Tensor, *args: Any, sequences: Sequences, **kwargs: Any) -> Tensor:
            scaled = _ScaledGradient.apply(weight, 1.01 if int((sequences.positions == 0).sum()) > 1 else 1.0)
            return op(x, scaled, *args, sequences=sequences, **kwargs)

        return wrong

    report = broken("causal_conv", scale)
    row = _rows(report)["linear_attention"]
    assert row.parameter_grads == pytest.approx(0.01, rel=1e-2)
    assert max(row.forward, row.input_grad) < 1e-5
    assert row.cross_document_gradient == row.perturbation == 0
    assert "conv1d" in row.worst_parameter
    assert report.verdict.startswith("FAILED")
    assert "conv1d" in report.verdict


def test_a_weight_gradient_that_is_not_finite_is_not_passed_over(broken: Callable[..., VerifyReport]) -> None:
    def poison(op: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x, weight, *a, **k: op(x, _ScaledGradient.apply(weight, float("nan")), *a, **k)

    row = _rows(broken("causal_conv", poison))["linear_attention"]
    assert "not finite" in row.verdict
    assert max(row.forward, row.input_grad) < 1e-5


def test_an_influence_below_the_tolerance_is_found_by_the_perturbation(broken: Callable[..., VerifyReport]) -> None:
    def faint(op: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def wrong(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            return _each(lambda y: y + 1e-8 * x.detach().sum().sin(), op(x, *args, **kwargs))

        return wrong

    row = _rows(broken("causal_conv", faint))["linear_attention"]
    assert row.forward < 1e-5
    assert row.cross_document_gradient == 0
    assert row.perturbation > 0
    assert not row.ok
    assert row.verdict == "rounding depends on what other documents hold"


def _unseen(x: Tensor, leak: Tensor) -> Tensor:
    """``x``, with the gradient of ``x + leak``."""
    return x + (leak - leak.detach())


class _GradientByValues(torch.autograd.Function):
    """Identity whose gradient depends on the values of the token before."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad * (1 + 1e-6 * F.pad(x, (0, 0, 1, 0))[:, :-1])


FAINT = {
    "to the document before": lambda x: _unseen(x, 1e-12 * F.pad(x, (0, 0, 1, 0))[:, :-1]),
    "to the document after": lambda x: _unseen(x, 1e-12 * F.pad(x, (0, 0, 0, 1))[:, 1:]),
}


def _two_documents(packed: Callable[[Tensor], Tensor], tolerance: float = 1e-5) -> VerifyRow:
    """The row of a layer that is ``1.1 x`` of a document alone, and ``packed(1.1 x)`` of a pack."""
    inputs, others, weight = torch.randn(3, 1, 7, 4, generator=torch.Generator().manual_seed(0))

    def run(function: Callable[[Tensor], Tensor], place: slice) -> Run:
        def runs(x: Tensor, trained: Tensor) -> tuple[Tensor, Tensor]:
            output = function(1.1 * x)
            return output, (output * weight[:, place])[:, trained].sum()

        return runs

    pack = Pack((3, 4), padding=0)
    alone = [run(lambda x: x, place) for place in pack.places]
    subject = Subject("layer", 1, inputs, others, {}, run(packed, slice(None)), alone)
    return measure(subject, pack, tolerance=tolerance, exact=True)


@pytest.mark.parametrize("where", FAINT)
def test_the_faintest_gradient_that_crosses_documents_is_found(where: str) -> None:
    assert _two_documents(lambda x: x).ok
    row = _two_documents(FAINT[where])
    assert row.forward == row.input_grad == row.perturbation == 0
    assert row.cross_document_gradient > 0
    assert not row.ok


def test_a_gradient_that_depends_on_what_other_documents_hold_is_found() -> None:
    row = _two_documents(_GradientByValues.apply)
    assert row.forward == row.cross_document_gradient == 0
    assert row.input_grad < row.limits[1]
    assert row.perturbation > 0
    assert not row.ok


def test_no_limit_is_raised_where_a_gradient_crosses_documents() -> None:
    row = _two_documents(lambda x: x + 1e-3 * F.pad(x, (0, 0, 1, 0))[:, :-1], tolerance=1e-9)
    assert row.limits == (1e-9,) * 3
    assert not row.ok


def test_values_that_are_not_finite_fail(broken: Callable[..., VerifyReport]) -> None:
    report = broken("causal_conv", lambda op: lambda *a, **k: _each(lambda y: y * float("nan"), op(*a, **k)))
    assert not report.ok
    assert "not finite" in report.verdict
    str(report)


def test_a_loss_across_a_boundary_is_found_in_the_model_row(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("qwen3")
    prepare(model)

    def unmasked(call: dict[str, Any]) -> tuple[dict[str, Any], Tensor]:
        return dict(call), (call["labels"] != -100).sum()

    monkeypatch.setattr(deltatune.layers.causal_lm, "without_crossing_labels", unmasked)
    rows = _rows(verify(model, lengths=LENGTHS))
    assert rows["full_attention"].ok
    assert not rows["model"].ok
    assert rows["model"].cross_document_gradient > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("prepared", [True, False])
def test_the_model_is_left_as_found(prepared: bool, dtype: torch.dtype) -> None:
    model = tiny_model("qwen3_5", dtype=dtype)
    if prepared:
        prepare(model, compile=CompileOptions(), checkpointing="layer")
    model.train()
    model.model.layers[0].eval()
    model.lm_head.weight.requires_grad_(False)
    model.lm_head.weight.grad = None
    for parameter in model.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    state = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    trained = [p.requires_grad for p in model.parameters()]
    addresses = [p.data_ptr() for p in model.parameters()]
    attributes = [sorted(vars(module)) for module in model.modules()]
    config = model.config.to_dict()
    torch.manual_seed(11)
    rng = torch.get_rng_state()
    verify(model, lengths=LENGTHS)
    assert torch.equal(rng, torch.get_rng_state())
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert [module.training for module in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == trained
    assert [p.data_ptr() for p in model.parameters()] == addresses
    assert [sorted(vars(module)) for module in model.modules()] == attributes
    assert model.config.to_dict() == config
    assert all(bool((p.grad == 1).all()) for p in model.model.parameters())
    assert model.lm_head.weight.grad is None
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_the_model_is_restored_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("qwen3_5")
    prepare(model, compile=CompileOptions())
    before = copy.deepcopy(model.state_dict())

    def fail(*args: Any, **kwargs: Any) -> Tensor:
        raise RuntimeError("no")

    monkeypatch.setattr(ops, "varlen_attention", fail)
    with pytest.raises(RuntimeError, match="no"):
        verify(model, lengths=LENGTHS)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert compile_options(model._deltatune) is not None
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_it_works_without_gradients_around_it() -> None:
    model = tiny_model("qwen3")
    prepare(model)
    with torch.no_grad():
        assert verify(model, lengths=LENGTHS).ok


def test_many_tiny_documents() -> None:
    model = tiny_model("qwen3_5")
    prepare(model)
    report = verify(model, lengths=[1 + i % 3 for i in range(18)])
    assert report.ok, str(report)
    assert "18 documents" in str(report)


def test_a_model_that_amplifies_rounding_is_not_called_a_leak() -> None:
    model = tiny_model("qwen3_5", layers=4)
    prepare(model)
    report = verify(model, lengths=(3, 1, 17), tolerance=1e-6)
    row = report.rows[-1]
    assert max(row.forward, row.input_grad, row.parameter_grads) > 1e-6
    assert max(row.limits) > 1e-6
    assert report.ok, str(report)
    assert "its own rounding is beyond the tolerance" in str(report)


def gemma() -> Any:
    """Embeddings scaled by the width and weights that ship small: input gradients round by more than 1e-5."""
    values = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "head_dim": 8, "vocab_size": 262145}
    values |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model("gemma3_text", **values)
    return transformers.AutoModelForCausalLM.from_config(config)


def test_limits_follow_the_rounding_of_the_model() -> None:
    model = gemma()
    prepare(model)
    report = verify(model, lengths=(3, 17), tolerance=2e-7)  # below what any float32 model rounds
    row = report.rows[-1]
    figures = (row.forward, row.input_grad, row.parameter_grads)
    assert max(figures) > 2e-7
    assert report.ok, str(report)
    assert max(row.limits) < 1e-3  # where a leak begins


def test_a_gradient_that_is_rounding_alone_is_no_leak() -> None:
    """That of a key's bias where nothing is rotated: a softmax takes it out again."""
    values = {"vocab_size": 96, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model("opt", **values, attention_dropout=0.0, pad_token_id=0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    prepare(model)
    report = verify(model)
    assert report.ok, str(report)
    assert max(row.limits[2] for row in report.rows) < 1e-3


def test_a_small_gradient_that_is_wrong_is_found() -> None:
    """At a hundred thousandth of the largest it counts as one of that size."""
    found, expected = torch.full((8,), 2e-5), torch.full((8,), 1e-5)
    assert relative(found, expected) == relative(found, expected, least=1e-6) == pytest.approx(1)
    assert relative(found, expected, least=1e-3) == pytest.approx(1e-2)


def in_tf32(x: Tensor) -> Tensor:
    """Rounded to ten bits of fraction, as products on tensor cores take float32."""
    return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


@pytest.mark.parametrize("tf32", [True, False])
def test_what_may_run_in_tf32_is_held_to_its_rounding(tf32: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(64, 64, generator=generator) for _ in range(2))
    figure = relative(in_tf32(x) @ in_tf32(weight), x @ weight)
    (limit,) = limits_of([figure], 1e-5, lambda: x @ weight, lambda a, b: [relative(a, b)], tf32=tf32)
    assert 1e-4 < figure < 1e-3
    assert (figure <= limit) is tf32
    assert limit < 5e-3  # where another function begins


def test_tf32_of_torchs_own_products_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    (limit,) = limits_of([1e-4], 1e-5, lambda: x @ x, lambda a, b: [relative(a, b)])
    assert 1e-4 < limit < 5e-3


@pytest.mark.parametrize(("tolerance", "most"), [(1e-5, 0.1), (1e-2, 0.25)])
def test_no_rounding_raises_a_limit_to_where_another_function_begins(tolerance: float, most: float) -> None:
    x = torch.randn(4, generator=torch.Generator().manual_seed(0))
    limits = limits_of([1.0], tolerance, lambda: x * x, lambda *_: [1.0])  # as of a model that amplifies all rounding
    assert limits == pytest.approx((most,))


@pytest.mark.parametrize(
    ("dtype", "figure", "limit", "runs"),
    [
        (torch.bfloat16, 0.05, 0.07, 1),  # the first draw is enough
        (torch.bfloat16, 0.2, 0.21, 3),
        (torch.bfloat16, 0.24, 0.21, 4),  # beyond the largest of all draws
        (torch.float32, 0.26, 0.25, 1),  # a margin in place of more draws
    ],
)
def test_limits_without_a_margin_rest_on_several_draws(
    dtype: torch.dtype, figure: float, limit: float, runs: int
) -> None:
    x = torch.randn(4, generator=torch.Generator().manual_seed(0)).to(dtype)
    draws, seen = [0.07, 0.03, 0.21, 0.11], []

    def differ(other: Tensor, _: Tensor) -> list[float]:
        seen.append(other)
        return [draws[len(seen) - 1]]

    assert limits_of([figure], 1e-2, lambda: x * x, differ) == pytest.approx((limit,))
    assert len(seen) == runs
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(seen, 2)), "independent"


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral"])
def test_limits_of_a_mixture_of_experts_stay_those_of_rounding(kind: str) -> None:
    values = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    values |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4}
    torch.manual_seed(0)
    stock = transformers.MixtralForCausalLM(transformers.MixtralConfig(**values))
    model = stock if kind == "mixtral" else tiny_model("qwen3_moe")
    prepare(model)
    report = verify(model, lengths=LENGTHS, tolerance=2e-7)
    assert report.ok, str(report)
    for one in (*report.rows, *report.checks):
        assert max(one.limits) < 1e-3  # numbers of experts are not rounded, so no token goes elsewhere


@pytest.mark.parametrize("tolerance", [2e-7, 1e-5])
def test_a_leak_without_a_gradient_hides_in_no_limit(tolerance: float, monkeypatch: pytest.MonkeyPatch) -> None:
    attention = ops.varlen_attention

    def longer_packs_are_louder(q: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return attention(q, *args, **kwargs) * (1 + 1e-6 * q.shape[1])

    model = tiny_model("qwen3")
    prepare(model)
    monkeypatch.setattr(ops, "varlen_attention", longer_packs_are_louder)
    report = verify(model, lengths=LENGTHS, tolerance=tolerance)
    row = _rows(report)["full_attention"]
    assert row.cross_document_gradient == row.perturbation == 0
    assert not row.ok
    assert report.verdict.startswith("LEAK: full_attention")


def test_a_layer_that_computes_another_function_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    attention = ops.varlen_attention
    monkeypatch.setattr(ops, "varlen_attention", lambda *a, **k: 1.01 * attention(*a, **k))
    model = tiny_model("qwen3")
    prepare(model)
    report = verify(model, lengths=LENGTHS)
    assert all(row.ok for row in report.rows)  # packed and alone are wrong alike
    (check,) = report.checks
    assert not check.ok
    assert not report.ok
    assert report.verdict.startswith("FAILED: what is computed differs from the stock model on documents alone")
    assert "one document of 66 tokens against the stock class" in str(report)
    assert report.to_dict()["checks"][0]["ok"] is False


def test_what_stock_layers_compute_for_their_own_attention_alone_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """As sparse attention, which masks keys where it knows the implementation's name, and else leaves it to that."""
    values = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    values |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**values))
    attention = type(model.model.layers[0].self_attn)
    dense = attention.forward

    def sparse(self: Any, *args: Any, **kwargs: Any) -> Any:
        output, weights = dense(self, *args, **kwargs)
        return output * (0.5 if self.config._attn_implementation in ("eager", "sdpa") else 1), weights

    monkeypatch.setattr(attention, "forward", sparse)
    prepare(model)
    config = model.model.config
    report = verify(model, lengths=LENGTHS)
    assert all(row.ok for row in report.rows)
    assert [check.ok for check in report.checks] == [False]
    assert {id(m.config) for m in model.model.modules() if hasattr(m, "config")} == {id(config)}


def test_a_wrong_gradient_of_the_right_function_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    attention = ops.varlen_attention

    def wrong(*args: Any, **kwargs: Any) -> Tensor:
        out = attention(*args, **kwargs)
        return out.detach() + 1.01 * (out - out.detach())

    monkeypatch.setattr(ops, "varlen_attention", wrong)
    model = tiny_model("qwen3")
    prepare(model)
    (check,) = verify(model, lengths=LENGTHS).checks
    assert check.figures[0] <= check.limits[0]
    assert max(check.figures[1:]) > 1e-4
    assert not check.ok


def test_a_window_that_is_dropped_is_found_beyond_its_width(monkeypatch: pytest.MonkeyPatch) -> None:
    window = {"sliding_window": 80, "use_sliding_window": True, "max_window_layers": 1}
    attention = ops.varlen_attention
    monkeypatch.setattr(ops, "varlen_attention", lambda *a, **k: attention(*a, **{**k, "window": None}))
    model = tiny_model("qwen3", **window)
    prepare(model)
    alone, longer = verify(model).checks
    assert alone.ok
    assert not longer.ok
    assert longer.name == "a document of 121 tokens (longer than sliding_window=80)"


DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}


def test_frequencies_of_the_longest_document_for_all_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("qwen3", max_position_embeddings=80, rope_parameters=DYNAMIC)
    prepare(model)
    assert [check.ok for check in verify(model).checks] == [True, True]
    monkeypatch.setattr(deltatune.layers.rotary, "boundaries", lambda: None)
    report = verify(model)
    assert [check.ok for check in report.checks] == [True, False]
    assert "longer than max_position_embeddings=80" in report.verdict


def test_long_calls_before_the_probe_change_no_verdict() -> None:
    model = tiny_model("qwen3", max_position_embeddings=64, rope_parameters=DYNAMIC)
    prepare(model)
    model(torch.ones(1, 200, dtype=torch.long), use_cache=True)  # the stock path remembers its length
    report = verify(model)
    assert report.ok, str(report)


def test_a_stock_model_leaks_through_the_frequencies_of_the_longest_document() -> None:
    report = verify(tiny_model("qwen3", max_position_embeddings=80, rope_parameters=DYNAMIC))
    assert all(row.ok for row in report.rows)
    assert report.verdict.startswith("LEAK: a document of 121 tokens (longer than max_position_embeddings=80)")
    assert "prepare(model)" in report.verdict


def test_a_length_that_is_too_long_to_run_is_told() -> None:
    model = tiny_model("qwen3", sliding_window=5000, use_sliding_window=True, max_window_layers=1)
    prepare(model)
    report = verify(model, lengths=LENGTHS)
    assert len(report.checks) == 1
    assert "documents longer than sliding_window=5000 were not run: 1024 tokens are the most" in str(report)


@pytest.mark.parametrize("prepared", [True, False])
def test_a_rotary_embedding_forgets_the_probe(prepared: bool) -> None:
    model = tiny_model("qwen3", max_position_embeddings=80, rope_parameters=DYNAMIC)
    if prepared:
        prepare(model)
    rotary = model.model.rotary_emb
    before = copy.deepcopy(rotary.__dict__), dict(rotary._buffers)
    verify(model)
    assert rotary.max_seq_len_cached == before[0]["max_seq_len_cached"] == 80
    for name, buffer in before[1].items():
        assert rotary._buffers[name] is buffer
        assert torch.equal(buffer, before[0]["_buffers"][name])


def test_bfloat16_has_a_budget_of_its_own_and_no_leak_hides_in_it() -> None:
    model = tiny_model("qwen3_5", dtype=torch.bfloat16)
    assert not verify(model, lengths=LENGTHS).ok
    prepare(model)
    report = verify(model, lengths=LENGTHS)
    assert report.ok, str(report)
    assert report.dtype == "bfloat16"
    assert report.tolerance == 2e-2


def scaled_queries(by: float, layer: type[Attention] = Attention) -> Callable[..., Any]:
    stock = layer.norm_and_rotate

    def wrong(*args: Any) -> tuple[Tensor, Tensor]:
        q, k = stock(*args)
        return q * by, k

    return wrong


@pytest.mark.parametrize("family", FAMILIES)
def test_another_function_is_found_in_16_bits(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(family, dtype=torch.bfloat16)
    prepare(model)
    layer = SinkAttention if family == "gpt_oss" else Attention
    monkeypatch.setattr(layer, "norm_and_rotate", scaled_queries(1.02, layer))
    report = verify(model, lengths=LENGTHS)
    assert all(row.ok for row in report.rows)
    assert report.checks[1].name == "the first layers in float32: one document of 66 tokens against the stock class"
    assert not report.checks[1].ok
    assert report.verdict.startswith("FAILED: what is computed differs from the stock model")


@pytest.mark.parametrize(
    ("family", "seed", "dtype"),
    [
        *((family, 1, torch.bfloat16) for family in FAMILIES),
        ("qwen3_5_moe", 2, torch.bfloat16),
        ("qwen3_5", 1, torch.float16),
    ],
)
def test_rounding_in_16_bits_is_no_other_function(family: str, seed: int, dtype: torch.dtype) -> None:
    model = tiny_model(family, seed=seed, dtype=dtype)
    prepare(model)
    report = verify(model, lengths=LENGTHS)
    assert report.ok, str(report)
    assert all(limit <= 1e-3 for limit in report.checks[1].limits)
    assert max(report.checks[1].figures) < 1e-5


def test_the_first_layers_are_compared_in_float32_whatever_kernels_were_asked_for() -> None:
    model = tiny_model("qwen3", dtype=torch.bfloat16, layers=3)
    prepare(model, kernels={"varlen_attention": "reference"}, compile=CompileOptions())
    options, layers = model._deltatune.options, model.model.layers
    assert verify(model, lengths=LENGTHS).ok
    assert model._deltatune.options is options
    assert model.model.layers is layers
    assert not torch.is_autocast_enabled("cpu")
    with torch.autocast("cpu", torch.bfloat16):
        model = tiny_model("qwen3")
        prepare(model)
        report = verify(model, lengths=LENGTHS)
        assert report.ok, str(report)
        assert [len(check.figures) for check in report.checks] == [1, 3]
        assert torch.is_autocast_enabled("cpu")


def test_report_prints_and_saves() -> None:
    model = tiny_model("qwen3_5")
    prepare(model)
    report = verify(model, lengths=LENGTHS)
    text = str(report)
    assert "linear_attention" in text
    assert "slow decay" in text
    assert text.endswith("OK: every document is as independent as if it were alone")
    saved = json.loads(json.dumps(report.to_dict()))
    assert saved["ok"] is True
    assert saved["lengths"] == list(LENGTHS)
    assert [row["name"] for row in saved["rows"]] == ["linear_attention", "full_attention", "model"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lengths": [5]}, "two or more"),
        ({"lengths": [5, 0]}, "at least one token"),
        ({"lengths": [5, 6], "tokens": 10}, "tokens=10 cannot hold"),
        ({"compiled": True}, "prepared with compile"),
    ],
)
def test_arguments_are_checked(arguments: dict[str, Any], message: str) -> None:
    model = tiny_model("qwen3")
    prepare(model)
    with pytest.raises(ValueError, match=message):
        verify(model, **arguments)


def test_what_is_no_decoder_is_refused() -> None:
    with pytest.raises(ValueError, match="Linear without decoder layers"):
        verify(nn.Linear(2, 2))
    with torch.device("meta"):
        model = copy.deepcopy(tiny_model("qwen3").config)
        empty = type(tiny_model("qwen3"))(model)
    with pytest.raises(ValueError, match="meta device"):
        verify(empty)
