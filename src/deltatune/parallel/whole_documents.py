"""When whole documents should go to the ranks of a sequence group, by what a model's layers exchange and attend."""

# P ranks

from __future__ import annotations

from typing import Final

from torch import nn

from deltatune.hf import model as hf_model
from deltatune.packing.by_rank import WholeDocuments
from deltatune.parallel.mesh import Mesh
from deltatune.subclass import Swapped

__all__ = ["whole_documents"]

_SENT: Final = 350e9  # bytes a second from a GPU to the others of its machine
_ATTENTION: Final = 260e12  # FLOP a second of attention
_WIDTH: Final = 2  # bytes of what is exchanged, bfloat16
_PASSES: Final = (
    4.5  # of attention's FLOPs: forward, forward again where layers are recomputed, two and a half backward
)


def whole_documents(model: nn.Module, mesh: Mesh) -> WholeDocuments | None:
    """How ``PackedCollator`` should lay packs out for the ranks of ``mesh`` that share them; None where none do.

    A layer that needs no exchange saves ``2 (P - 1) / P`` times what it exchanges, forward and backward, and costs the
    attention by which the rank with most of it is above the mean. Rates are those that docs/parallelism.md computes
    with; over slower links an exchange is worth more. Where recurrent layers pass states on, the same is taken.

    None also where padding counts, in a router's auxiliary loss: it would be other documents.

    Args:
        model: prepared.
        mesh: the ranks.
    """
    ranks = mesh.sequence_size
    if ranks == 1 or getattr(hf_model.text_config(model), "output_router_logits", False):
        return None
    layers = hf_model.text_model(model).layers
    parts = [part for layer in layers for part in layer.modules() if isinstance(part, Swapped)]
    sent = sum(part.exchanged(ranks) for part in parts) * _WIDTH * 2 * (ranks - 1) / ranks
    squares = sum(part.cost(0, 1).flops for part in parts) * _PASSES
    return WholeDocuments(ranks, (sent / _SENT) / (squares / _ATTENTION) if squares else float("inf"))
