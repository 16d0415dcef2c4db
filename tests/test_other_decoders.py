"""Decoders without a family of their own: attention through transformers' interface, refusals by name."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import transformers

from deltatune import CompileOptions, Sequences, ops, prepare, verify
from forked import run_ranks
from tiny import documents

LENGTHS = [5, 1, 30, 7]


def packed_call(**extra: Any) -> dict[str, Any]:
    return {"input_ids": torch.cat(documents(LENGTHS))[None], "sequences": Sequences.from_lengths(LENGTHS), **extra}


@pytest.mark.parametrize("kind", ["phi", "gpt_neox", "persimmon", "opt"])
def test_decoders_whose_last_norm_has_another_name(kind: str) -> None:
    model = dense(kind, num_key_value_heads=4, ffn_dim=48)
    assert not hasattr(model.base_model, "norm")
    prepare(model)
    report = verify(model, lengths=(3, 1, 20))
    assert report.ok, str(report)


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_another_dense_decoder(kind: str) -> None:
    values = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    values |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    extra = {"sliding_window": 6} if kind == "mistral" else {}
    config = transformers.AutoConfig.for_model(kind, **values, **extra)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    stock = copy.deepcopy(model)
    prepared = prepare(model)
    assert prepared.report.family == "any"
    packed = model(**packed_call()).logits[0].split(LENGTHS)
    for part, doc in zip(packed, documents(LENGTHS), strict=True):
        torch.testing.assert_close(part, stock(doc[None], use_cache=False).logits[0], rtol=1e-4, atol=1e-5)
    tokens = torch.stack(documents([12, 12]))
    generate = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    generate["attention_mask"] = torch.ones_like(tokens)
    assert torch.equal(model.generate(tokens, **generate), stock.generate(tokens, **generate))
    prepared.revert()
    assert model.config._attn_implementation == stock.config._attn_implementation


def test_experts_of_another_layout_keep_their_own_forward_and_the_report_says_so() -> None:
    model = dense("qwen2_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8)
    experts = [layer.mlp.experts for layer in model.model.layers]
    for module in experts:
        del module.is_transposed  # a note of transformers' decorator
    prepared = prepare(model)
    assert prepared.report.experts == (
        "2 Qwen2MoeExperts of another layout: their own forward runs, adapters on them are PEFT's"
    )
    assert "grouped_mm" not in {row.op for row in prepared.report.kernels}
    for module in experts:
        module.is_transposed = False
    assert "grouped_mm" in {row.op for row in prepare(model).report.kernels}


def dense(kind: str, **changes: Any) -> Any:
    """A tiny decoder of a family without own layers."""
    values = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "pad_token_id": 0}
    values |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, **changes}
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **values))


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("gemma2", {}, "soft-capped"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "not causal"),
        ("llama", {"index_topk": 4}, "chosen tokens alone"),
    ],
)
def test_attention_that_cannot_be_honoured_is_refused(kind: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prepare(dense(kind, **changes))


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("nemotron", {}, "do not hand their keyword arguments on"),
        ("phimoe", {"sliding_window": 5, "num_local_experts": 2}, "only a mask expresses"),
    ],
)
def test_boundaries_that_get_lost_on_the_way_are_refused(kind: str, changes: dict[str, Any], message: str) -> None:
    model = dense(kind, **changes)
    prepare(model)
    with pytest.raises(ValueError, match=message):
        model(**packed_call())


def test_a_capped_head_is_known_while_its_logits_are_small() -> None:
    stock = dense("gemma2", attn_logit_softcapping=None, final_logit_softcapping=5.0)
    model = copy.deepcopy(stock)
    prepare(model)
    (tokens,) = documents([20])
    for m in (stock, model):
        m(tokens[None], labels=tokens[None])
        with torch.no_grad():
            m.lm_head.weight.mul_(400)
    call = {"input_ids": tokens[None], "labels": tokens[None], "use_cache": False}
    torch.testing.assert_close(model(**call).loss, stock(**call).loss, rtol=1e-5, atol=0)


def test_a_capped_head_is_known_before_its_logits_say_anything() -> None:
    stock = dense("gemma2", attn_logit_softcapping=None, final_logit_softcapping=5.0, tie_word_embeddings=False)
    torch.nn.init.zeros_(stock.lm_head.weight)
    model = copy.deepcopy(stock)
    prepare(model)
    (tokens,) = documents([20])
    call = {"input_ids": tokens[None], "labels": tokens[None], "use_cache": False}
    for m in (stock, model):
        m(**call)
        torch.manual_seed(0)
        torch.nn.init.normal_(m.lm_head.weight)
    torch.testing.assert_close(model(**call).loss, stock(**call).loss, rtol=1e-5, atol=0)
    # nothing is left on the head, and its gradient is the stock model's
    assert not model.lm_head._forward_hooks
    for m in (stock, model):
        m(**call).loss.backward()
    torch.testing.assert_close(model.lm_head.weight.grad, stock.lm_head.weight.grad, rtol=1e-4, atol=1e-6)


def scaled_in_place(logits: torch.Tensor) -> torch.Tensor:
    return logits.mul_(0.25)


def biased_at_one_word(logits: torch.Tensor) -> torch.Tensor:
    return logits + torch.nn.functional.one_hot(torch.tensor(0), logits.shape[-1]).to(logits) * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("follows", [scaled_in_place, biased_at_one_word, lambda x: x])
def test_what_follows_a_head_is_in_the_loss(follows: Any, dtype: torch.dtype) -> None:
    class Followed(transformers.LlamaForCausalLM):
        def forward(self, *args: Any, labels: Any = None, logits_to_keep: Any = 0, **kwargs: Any) -> Any:
            output = self.model(*args, **kwargs)
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = follows(self.lm_head(input=output[0][:, kept]))
            loss = None if labels is None else self.loss_function(logits, labels, self.vocab_size, **kwargs)
            return transformers.modeling_outputs.CausalLMOutputWithPast(loss=loss, logits=logits)

    stock = Followed(dense("llama", head_dim=8).config).to(dtype)
    model = copy.deepcopy(stock)
    prepare(model)
    (tokens,) = documents([20])
    call = {"input_ids": tokens[None], "labels": tokens[None], "use_cache": False}
    for _ in range(2):
        tolerance = 1e-5 if dtype == torch.float32 else 5e-3
        torch.testing.assert_close(model(**call).loss.float(), stock(**call).loss.float(), rtol=tolerance, atol=0)


def test_others_that_call_the_head_in_the_first_loss_get_its_output() -> None:
    stock = dense("llama")
    model = copy.deepcopy(stock)
    prepare(model)
    (tokens,) = documents([20])
    seen: dict[int, list[torch.Tensor]] = {}

    def lens(m: Any) -> None:
        m.model.layers[0].register_forward_hook(
            lambda _, __, out: seen.setdefault(id(m), []).append(m.lm_head(out[0] if isinstance(out, tuple) else out))
        )

    for m in (stock, model):
        lens(m)
        m(input_ids=tokens[None], labels=tokens[None], use_cache=False)
    torch.testing.assert_close(*(seen[id(m)][0] for m in (model, stock)), rtol=1e-4, atol=1e-5)
    assert not model.lm_head._forward_hooks


def test_another_thread_that_calls_the_head_in_the_first_loss_gets_its_output() -> None:
    pairs = []

    class Threaded(transformers.LlamaForCausalLM):
        def forward(self, *args: Any, logits_to_keep: Any = 0, **kwargs: Any) -> Any:
            output = self.model(*args, **kwargs)
            kept = output[0][:, slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep]
            with ThreadPoolExecutor() as pool:
                pairs.append((pool.submit(self.lm_head, kept).result(), kept @ self.lm_head.weight.T))
            return transformers.modeling_outputs.CausalLMOutputWithPast(logits=self.lm_head(kept))

    model = Threaded(dense("llama").config).train()
    prepare(model)
    (tokens,) = documents([20])
    assert model(input_ids=tokens[None], labels=tokens[None], use_cache=False).loss.isfinite()
    torch.testing.assert_close(*pairs[0], rtol=1e-4, atol=1e-5)


def test_a_first_loss_that_fails_leaves_nothing_on_the_head() -> None:
    model = dense("llama")
    prepare(model)
    (tokens,) = documents([20])
    call = {"input_ids": tokens[None], "labels": tokens[None]}

    def fails(*_: Any) -> None:
        raise OSError("for this test")

    handle = model.model.layers[0].register_forward_pre_hook(fails)
    model.train()
    with pytest.raises(OSError, match="for this test"):
        model(**call)
    handle.remove()
    assert not model.lm_head._forward_hooks
    assert model(**call).loss.isfinite()


def test_no_config_keeps_a_word_of_ours(tmp_path: Any) -> None:
    model = dense("llama").model
    before = model.config.to_dict()
    prepare(model)
    assert model.config.to_dict() == before
    model.save_pretrained(tmp_path)
    assert "deltatune" not in (tmp_path / "config.json").read_text()


def test_cached_calls_of_an_attention_class_of_ones_own() -> None:
    from transformers.models.llama.modeling_llama import LlamaAttention

    class Mine(LlamaAttention):
        pass

    stock = dense("llama", attn_implementation="eager").eval()
    for layer in stock.model.layers:
        layer.self_attn.__class__ = Mine
    model = copy.deepcopy(stock)
    prepare(model)
    tokens = torch.stack(documents([12, 12]))
    assert torch.equal(model(tokens, use_cache=True).logits, stock(tokens, use_cache=True).logits)


def test_cached_calls_of_an_attention_that_was_registered_without_a_mask() -> None:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    def causal(*args: Any, **kwargs: Any) -> Any:
        assert args[4] is None
        return sdpa_attention_forward(*args, **kwargs)

    transformers.AttentionInterface.register("mine_for_a_test", causal)
    stock = dense("llama", attn_implementation="mine_for_a_test").eval()
    model = copy.deepcopy(stock)
    prepare(model)
    tokens = torch.stack(documents([12, 12]))
    assert torch.equal(model(tokens, use_cache=True).logits, stock(tokens, use_cache=True).logits)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_cached_call_runs_the_attention_that_the_model_was_loaded_with(attention: str) -> None:
    stock = dense("llama", attn_implementation=attention)
    model = copy.deepcopy(stock)
    prepare(model)
    tokens = torch.stack(documents([12, 12]))
    mask = torch.ones_like(tokens)
    mask[0, :4] = 0
    call = {"input_ids": tokens, "attention_mask": mask, "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    call |= {"return_dict_in_generate": True, "output_attentions": attention == "eager", "output_logits": True}
    found, expected = model.generate(**call), stock.generate(**call)
    assert all(map(torch.equal, found.logits, expected.logits))
    if attention == "eager":
        pairs = zip(found.attentions, expected.attentions, strict=True)
        assert all(torch.equal(x, y) for step in pairs for x, y in zip(*step, strict=True))


def load_and_call(_rank: int, path: str) -> None:
    """What another process makes of a prepared model."""
    model, tokens = torch.load(f"{path}/model.pt", weights_only=False)
    generated = model.generate(tokens, max_new_tokens=4, do_sample=False, attention_mask=torch.ones_like(tokens))
    torch.save((model(**packed_call()).logits.detach(), generated), f"{path}/results.pt")


def test_another_process_may_load_a_prepared_model(tmp_path: Any) -> None:
    model, tokens = dense("llama"), torch.stack(documents([12, 12]))
    prepare(model)
    torch.save((model, tokens), tmp_path / "model.pt")
    run_ranks(load_and_call, str(tmp_path), count=1)
    logits, generated = torch.load(tmp_path / "results.pt")
    expected = model.generate(tokens, max_new_tokens=4, do_sample=False, attention_mask=torch.ones_like(tokens))
    assert torch.equal(generated, expected)
    torch.testing.assert_close(logits, model(**packed_call()).logits.detach())


def test_two_models_may_share_a_config() -> None:
    config = dense("llama").config
    first, second = transformers.LlamaForCausalLM(config), transformers.LlamaForCausalLM(config)
    before = config._attn_implementation
    prepared = prepare(first)
    assert config._attn_implementation == before
    assert second.model.config is config
    kept = prepare(second)
    expected = second(**packed_call()).logits
    prepared.revert()
    assert torch.equal(second(**packed_call()).logits, expected)
    kept.revert()
    assert second.model.config is config


def upscale(model: Any) -> None:
    layer = copy.deepcopy(model.model.layers[1])
    layer.self_attn.layer_idx = 2
    model.model.layers.append(layer)
    for config in (model.config, model.model.config):
        config.num_hidden_layers = 3
        if hasattr(config, "layer_types"):
            config.layer_types = ["full_attention"] * 3


def config_of_its_own(model: Any) -> None:
    attention = model.model.layers[1].self_attn
    attention.config = copy.copy(attention.config)


@pytest.mark.parametrize("first", [True, False], ids=["before prepare", "after prepare"])
@pytest.mark.parametrize("change", [upscale, config_of_its_own])
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_layers_with_a_config_of_their_own_keep_documents_apart(kind: str, change: Any, first: bool) -> None:
    stock, model = dense(kind), dense(kind)
    change(stock)
    if first:
        change(model)
    prepared = prepare(model)
    if not first:
        change(model)
    packed = model(**packed_call()).logits[0].split(LENGTHS)
    for part, doc in zip(packed, documents(LENGTHS), strict=True):
        torch.testing.assert_close(part, stock(doc[None], use_cache=False).logits[0], rtol=1e-4, atol=1e-5)
    prepared.revert()
    names = {module.config._attn_implementation for module in model.modules() if hasattr(module, "config")}
    assert names == {stock.config._attn_implementation}


def test_a_layer_beyond_those_that_the_config_lists_is_passed_over() -> None:
    model = dense("qwen2")
    layer = copy.deepcopy(model.model.layers[1])
    layer.self_attn.layer_idx = len(model.config.layer_types)
    model.model.layers.append(layer)
    stock = copy.deepcopy(model)
    prepare(model)
    packed = model(**packed_call()).logits[0].split(LENGTHS)
    for part, doc in zip(packed, documents(LENGTHS), strict=True):
        torch.testing.assert_close(part, stock(doc[None], use_cache=False).logits[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("compile", [None, CompileOptions(backend="aot_eager")], ids=["eager", "compiled"])
def test_a_stock_attention_set_in_one_layer_afterwards_is_refused(compile: CompileOptions | None) -> None:
    model = dense("llama")
    prepare(model, compile=compile)
    attention, config = model.model.layers[1].self_attn, dense("llama").config
    attention.config, ours = config, attention.config
    with pytest.raises(ValueError, match="LlamaAttention of layer 1"):
        model(**packed_call())
    attention.config = ours
    attention.register_forward_pre_hook(lambda _, a, k: (a, k | {"sequences": None}), with_kwargs=True)
    with pytest.raises((ValueError, RuntimeError), match=r"LlamaAttention .* documents begin"):
        model(**packed_call())


def test_another_attention_set_afterwards_is_refused() -> None:
    model = dense("llama")
    prepare(model)
    model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="prepare\\(model\\) again"):
        model(**packed_call())
    prepare(model)
    model(**packed_call())


def test_the_implementation_that_was_asked_for_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, free = dense("llama"), dense("qwen2")
    prepared = prepare(asked, kernels={"varlen_attention": "reference"})
    prepare(free)
    seen: list[Any] = []
    attention = ops.varlen_attention

    def watch(*args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs.get("impl"))
        return attention(*args, **kwargs)

    monkeypatch.setattr(ops, "varlen_attention", watch)
    for model in (asked, copy.deepcopy(asked), free):
        model(**packed_call())
    assert seen == ["reference"] * 4 + ["auto"] * 2
    assert {row.op: row.impl for row in prepared.report.kernels}["varlen_attention"] == "reference"
    prepared.revert()
    assert not any("_deltatune_impl" in module.__dict__ for module in asked.modules())
