"""The convolution and the delta rule of one pack on ranks that pass states on, against one process."""

# P ranks, T tokens, H key heads, G value heads, K key dim, V value dim, D channels, W width

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from sequence_cases import join
from torch import Tensor

from deltatune import ops
from deltatune.layers.state_passing import delta_rule_over_ranks, state_before, tokens_before, with_tokens_before
from deltatune.packing.group import SequenceGroup
from deltatune.packing.sequences import Sequences
from forked import free_port, run_ranks

RANKS, H, G, K, V, D, W = 4, 2, 4, 8, 12, 6, 4
PACKS = {
    "over several ranks": [37, 51, 40],
    "over all ranks": [400],
    "all but the first rank": [101, 299],
    "ends with its rank": [128, 64, 64],
    "parts shorter than the window": [5, 2, 1],
    "one token on each rank": [4],
    "wider keys": [70, 26],
}
#: a document of NaN: between others, and one behind which a rank begins anew
SPOILED = {"over several ranks": slice(37, 88), "ends with its rank": slice(0, 128)}
NAMES = ("out", "q", "k", "v", "g", "beta", "convolved", "x", "weight")


def inputs(name: str) -> list[Tensor]:
    """q, k, v, g, beta, x and the convolution's weight, in fp64."""
    generator = torch.Generator().manual_seed(0)
    tokens, value_dim = sum(PACKS[name]), 5 if name == "wider keys" else V
    shapes = [(1, tokens, *more) for more in ((H, K), (H, K), (G, value_dim), (G,), (G,), (D,))]
    q, k, v, g, beta, x = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    q, k = (torch.nn.functional.normalize(one, dim=-1) for one in (q, k))
    weight = torch.randn(D, W, generator=generator, dtype=torch.float64)
    return [q, k, v, -0.05 * g.sigmoid(), beta.sigmoid(), x, weight]


def differentiated(given: list[Tensor], out: Tensor, convolved: Tensor, part: slice, tokens: int) -> list[Tensor]:
    """Both results, and the gradients of a sum over the pack that weighs every token otherwise."""
    weights = torch.linspace(-1, 1, tokens, dtype=torch.float64)[part]
    (out.sin() * weights[:, None, None]).sum().backward()
    (convolved.sin() * weights[:, None]).sum().backward()
    return [out.detach(), *(x.grad for x in given[:5]), convolved.detach(), *(x.grad for x in given[5:])]  # type: ignore[misc]


def alone(name: str) -> list[Tensor]:
    *rule, x, weight = given = [one.requires_grad_() for one in inputs(name)]
    sequences = Sequences.from_lengths(PACKS[name])
    out = ops.gated_delta_rule(*rule, sequences=sequences, qk_l2norm=False)
    convolved = ops.causal_conv(x, weight, sequences=sequences)
    return differentiated(given, out, convolved, slice(None), x.shape[1])


def of_rank(name: str, group: SequenceGroup, given: list[Tensor] | None = None) -> list[Tensor]:
    """As ``alone``, of a rank's tokens; the weight's gradient is its part of a sum."""
    whole = inputs(name) if given is None else given
    tokens = whole[0].shape[1]
    part = slice(group.rank * tokens // group.size, (group.rank + 1) * tokens // group.size)
    *rule, x, weight = cut = [one[:, part].clone().requires_grad_() for one in whole[:-1]] + [
        whole[-1].clone().requires_grad_()
    ]
    sequences = Sequences.from_lengths(PACKS[name])
    sequences = replace(sequences, part=group.part(sequences)).static()
    q, k, v, g, beta = rule
    out = delta_rule_over_ranks(q, k, v, g, beta, sequences=sequences, group=group, impl="reference")
    stream, places = with_tokens_before(x, W, sequences, group)
    convolved = ops.causal_conv(stream, weight, sequences=places)[:, W - 1 :]
    return differentiated(cut, out, convolved, part, tokens)


def rank_main(rank: int, port: int, path: str) -> None:
    join(port, rank, RANKS)
    assert dist.group.WORLD is not None
    group = SequenceGroup(dist.group.WORLD.group_name, RANKS, rank, "state")
    made: dict[str, Any] = {name: whole(of_rank(name, group)) for name in PACKS}
    for name, part in SPOILED.items():
        spoiled = inputs(name)
        for one in spoiled[:-1]:
            one[:, part] = torch.nan
        made[f"{name}, spoiled"] = whole(of_rank(name, group, spoiled))
    check_ops(group)
    if rank == 0:
        torch.save(made, Path(path) / "found.pt")


def whole(parts: list[Tensor]) -> list[Tensor]:
    """Tokens of all ranks side by side; gradients of the weight summed."""
    *by_token, weight = parts
    gathered: list[list[Tensor]] = [[torch.empty_like(x) for _ in range(RANKS)] for x in by_token]
    for x, into in zip(by_token, gathered, strict=True):
        dist.all_gather(into, x.contiguous())
    dist.all_reduce(weight)
    return [*(torch.cat(one, dim=1) for one in gathered), weight]


def check_ops(group: SequenceGroup) -> None:
    yes, no = torch.ones(RANKS, dtype=torch.bool), torch.zeros(RANKS, dtype=torch.bool)
    written, transition = torch.randn(G, K, V, requires_grad=True), torch.randn(G, K, K, requires_grad=True)
    for holds_all in (yes, no):
        torch.library.opcheck(state_before, (written, transition, holds_all, group.rank, group.name))
    tail = torch.randn(2, D, requires_grad=True)
    torch.library.opcheck(tokens_before, (tail, W - 1, group.size, group.rank, group.name))


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Tensor]]:
    path = tmp_path_factory.mktemp("ranks")
    run_ranks(rank_main, free_port(), str(path), count=RANKS)
    made: dict[str, list[Tensor]] = torch.load(path / "found.pt", weights_only=True)
    return made


@pytest.mark.parametrize("name", PACKS)
def test_results_and_gradients_are_those_of_one_process(name: str, found: dict[str, list[Tensor]]) -> None:
    for what, ours, theirs in zip(NAMES, found[name], alone(name), strict=True):
        # rounding of fp64 grows with the chunks it passes through, of which there are a few
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-13, msg=lambda text, what=what: f"{what}: {text}")


@pytest.mark.parametrize("name", SPOILED)
def test_nan_stays_in_its_document(name: str, found: dict[str, list[Tensor]]) -> None:
    spoiled = SPOILED[name]
    for what, ours, theirs in zip(NAMES[:-1], found[f"{name}, spoiled"], alone(name), strict=False):
        for part in (slice(0, spoiled.start), slice(spoiled.stop, None)):
            torch.testing.assert_close(
                ours[:, part], theirs[:, part], rtol=1e-11, atol=1e-13, msg=lambda text, what=what: f"{what}: {text}"
            )
        assert ours[:, spoiled].isnan().any(), what


def test_the_table_of_bytes_is_the_formula_s() -> None:
    text = (Path(__file__).parents[2] / "docs/parallelism.md").read_text()
    rows = re.findall(r"^\| \w+, (\d+) / (\d+) \| (\d) \| (\d+) \| (\d+) \| ([\d.]+) \| (\d+) \|$", text, re.MULTILINE)
    assert len(rows) == 9
    for heads, key_heads, ranks, short, long, states, equal in rows:
        G, H, P = int(heads), int(key_heads), int(ranks)
        by_heads = (P - 1) / P * (2 * H + 2 * G + 2 * G / 128) * 128 * 2
        by_states = (P - 1) * (G * 128 * 256 * 4 + 3 * (2 * H + G) * 128 * 2)
        assert [short, long] == [f"{by_heads * tokens / P / 2**20:.0f}" for tokens in (32768, 131072)]
        assert [states, equal] == [f"{by_states / 2**20:.1f}", f"{by_states / by_heads:.0f}"]
