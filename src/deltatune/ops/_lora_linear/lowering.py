"""How Inductor lowers ``deltatune::lora_in_own_buffer``."""

from __future__ import annotations

import functools
from typing import Any

from deltatune.ops._lora_linear.op import IN_OWN_BUFFER

__all__ = ["register"]


@functools.cache
def register() -> None:
    """Makes it known to Inductor; once, before a graph that holds it is lowered.

    ``cat`` of elementwise work and a border becomes a kernel over all of the columns, unless the work follows a
    reduction that the kernel would be apart from. A norm is that, but where its reduction is kept for a backward
    Inductor does not see it, and reads the norm's input twice. What has a buffer of its own is computed in place,
    reduction and all, and that place may be a part of another buffer.
    """
    from torch._inductor.lowering import register_lowering

    def lower(x: Any) -> Any:
        x.realize()
        return x

    register_lowering(IN_OWN_BUFFER, type_promotion_kind=None)(lower)
