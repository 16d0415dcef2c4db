"""Models over one set of weights, and forwards bound to other functions."""

import torch
from torch import Tensor, nn

from deltatune.bench.models import adapters, copy_of, storage_bytes, with_functions, with_lora
from deltatune.bench.shapes import SHAPES, build_model

CPU = torch.device("cpu")


def tiny():
    return build_model(SHAPES["tiny"], CPU, dtype=torch.float32)


def test_a_copy_shares_weights_and_nothing_else() -> None:
    base = tiny()
    copy = copy_of(base)
    assert all(a is b for a, b in zip(base.parameters(), copy.parameters(), strict=True))
    assert not {id(module) for module in base.modules()} & {id(module) for module in copy.modules()}
    assert copy.config is not base.config
    own = copy_of(base, own_weights=True)
    assert not {p.data_ptr() for p in base.parameters()} & {p.data_ptr() for p in own.parameters()}


def test_adapters_hold_the_same_values_in_every_copy() -> None:
    base = tiny()
    first, second = (with_lora(copy_of(base), "qkvo", rank=4, alpha=8, seed=1) for _ in range(2))
    found = dict(adapters(first))
    assert len(found) == 8
    assert all(torch.equal(found[name], value) for name, value in adapters(second))
    assert all(bool(value.any()) for value in found.values())
    assert torch.equal(*(p.detach() for _, p in (adapters(first)[0], adapters(second)[0])))


def test_shared_storage_is_counted_once() -> None:
    x = torch.zeros(10)
    assert storage_bytes(iter([x, x[2:], torch.zeros(3)])) == 52


def double(x: Tensor) -> Tensor:
    return 2 * x


class Doubles(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return double(x)


class Keeps(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


def test_only_instances_that_call_the_function_are_bound_anew() -> None:
    model, other = nn.Sequential(Doubles(), Keeps(), Doubles()), Doubles()
    assert with_functions(model, {"double": lambda x: 3 * x}) == 2
    assert float(model(torch.ones(()))) == 9
    assert float(other(torch.ones(()))) == 2
    assert isinstance(model[0], Doubles)
    assert type(model[0]) is type(model[2])
    assert type(model[1]) is Keeps


def test_a_compiled_forward_calls_the_bound_function() -> None:
    model = Doubles()
    with_functions(model, {"double": lambda x: 3 * x})
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert float(compiled(torch.ones(()))) == 3
