"""What ops declare to hold in addition to their arguments and results, against the allocator."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from deltatune.ops import GatedDeltaRuleSpec, choose, gated_delta_rule, varlen_attention
from deltatune.ops._opaque import workspace_bytes
from deltatune.packing.sequences import Sequences

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

TOKENS, DIM = 8192, 128


class Watch(TorchDispatchMode):
    """Declared and measured bytes of every call of an op that declares some."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[int, int]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        result = func(*args, **kwargs or {})
        torch.cuda.synchronize()
        declared = workspace_bytes(func, args)
        if declared:
            self.found.append((declared, torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()))
        return result


def declared_and_measured(output: Callable[[], Tensor]) -> tuple[int, int]:
    for _ in range(2):  # the first may compile, and allocate what stays
        y, watch = output(), Watch()
        with watch:
            y.backward(torch.ones_like(y))
    (found,) = watch.found
    return found


def leaf(*shape: int) -> Tensor:
    return torch.randn(1, TOKENS, *shape, device="cuda", dtype=torch.bfloat16).requires_grad_()


@pytest.mark.parametrize("heads", [(8, 2), (8, 8)])
def test_attention(heads: tuple[int, int]) -> None:
    sequences = Sequences.from_lengths([3000, TOKENS - 3000]).to("cuda")
    q, k, v = (leaf(n, DIM) for n in (heads[0], heads[1], heads[1]))
    declared, measured = declared_and_measured(lambda: varlen_attention(q, k, v, sequences=sequences, impl="torch"))
    assert declared == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("value_heads", [16, 32])
@pytest.mark.parametrize("impl", ["fla", "flash_qla"])
def test_gated_delta_rule(impl: str, value_heads: int) -> None:
    try:
        choose(GatedDeltaRuleSpec(torch.device("cuda"), torch.bfloat16, head_dims=(DIM, DIM)), impl)
    except ValueError as error:
        pytest.skip(str(error))
    sequences = Sequences.from_lengths([3000, TOKENS - 3000]).to("cuda")
    q, k, v = leaf(16, DIM), leaf(16, DIM), leaf(value_heads, DIM)
    g, beta = (torch.rand(1, TOKENS, value_heads, device="cuda").requires_grad_() for _ in range(2))
    declared, measured = declared_and_measured(
        lambda: gated_delta_rule(q, k, v, -g, beta.bfloat16(), qk_l2norm=True, sequences=sequences, impl=impl)
    )
    assert declared == pytest.approx(measured, rel=0.1)
