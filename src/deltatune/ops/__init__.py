"""The ops: each validates its inputs, chooses an implementation and calls it.

Every op has a folder of its own: ``api.py`` holds the documentation, the validation and the choice, ``reference.py``
the specification, ``op.py`` the ``torch.library`` registration where the implementation is opaque to the compiler.
``choose_<op>(device, dtype)`` says which implementation ``impl="auto"`` takes and why.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from deltatune.ops._causal_conv.api import causal_conv, choose_causal_conv
    from deltatune.ops._choice import Choice
    from deltatune.ops._gated_delta_rule.api import choose_gated_delta_rule, gated_delta_rule
    from deltatune.ops._gated_rms_norm.api import choose_gated_rms_norm, gated_rms_norm
    from deltatune.ops._grouped_mm.api import choose_grouped_mm, grouped_mm
    from deltatune.ops._grouped_mm.experts import moe_experts
    from deltatune.ops._linear_cross_entropy.api import choose_linear_cross_entropy, linear_cross_entropy
    from deltatune.ops._rms_norm_rope.api import choose_rms_norm_rope, rms_norm_rope, rms_norm_rope_pair
    from deltatune.ops._varlen_attention.api import choose_varlen_attention, varlen_attention

__all__ = [
    "Choice",
    "causal_conv",
    "choose_causal_conv",
    "choose_gated_delta_rule",
    "choose_gated_rms_norm",
    "choose_grouped_mm",
    "choose_linear_cross_entropy",
    "choose_rms_norm_rope",
    "choose_varlen_attention",
    "gated_delta_rule",
    "gated_rms_norm",
    "grouped_mm",
    "linear_cross_entropy",
    "moe_experts",
    "rms_norm_rope",
    "rms_norm_rope_pair",
    "varlen_attention",
]

_OPS = (
    "causal_conv",
    "gated_delta_rule",
    "gated_rms_norm",
    "grouped_mm",
    "linear_cross_entropy",
    "rms_norm_rope",
    "varlen_attention",
)


def __getattr__(name: str) -> object:
    op = name.removeprefix("choose_")
    if name == "Choice":
        home = "deltatune.ops._choice"
    elif name == "moe_experts":
        home = "deltatune.ops._grouped_mm.experts"
    elif name == "rms_norm_rope_pair":
        home = "deltatune.ops._rms_norm_rope.api"
    elif op in _OPS:
        home = f"deltatune.ops._{op}.api"
    else:
        raise AttributeError(f"module 'deltatune.ops' has no attribute {name!r}")
    value: object = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
