"""What the ranks of a launch do, as their file says it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["CHECK", "Item", "Spec"]

#: The number of GPUs of an item that is the check of its system in the ranks of this launch.
CHECK = 0


@dataclass(frozen=True)
class Item:
    """One line of a record.

    Attributes:
        system: a name of ``benchmarks.parallel.systems``.
        tokens: of a rank's pack; of the one document where ranks share a pack.
        gpus: ranks that the step is divided among: 1, or all of the launch; ``CHECK`` for the check.
    """

    system: str
    tokens: int
    gpus: int

    @property
    def name(self) -> str:
        """Unique among the results of a configuration, but for first steps."""
        if self.gpus == CHECK:
            return f"{self.system} check"
        return f"{self.system} {self.tokens} on {self.gpus}"

    def to_dict(self) -> dict[str, Any]:
        """As a record carries it."""
        return {"name": self.name, **asdict(self)}


@dataclass(frozen=True)
class Spec:
    """What a launch does.

    Attributes:
        model: a name of ``benchmarks.shapes``.
        layers: its depth; None for the model's own.
        items: in order.
        packs: of how many the one process tells loss and gradient norm; as many as there are GPUs at most.
        checkpointing: as ``prepare`` takes it; None for the system's own.
        check_tokens: of a rank in the check.
        rank: of the adapters, scaled by ``2 * rank``.
        dtype: of activations, and of weights that do not train.
        device: ``"cuda"`` or ``"cpu"``.
        backend: ``"inductor"``, ``"aot_eager"``, or ``"none"`` for no compile.
        warmup: steps before timing, without the first.
        steps: samples; 0 takes the first step alone.
        seconds: of the samples together, of which long steps have fewer.
        seed: of weights, adapters and tokens.
        started: ``time.time()`` when the ranks were started.
    """

    model: str
    layers: int | None
    items: tuple[Item, ...] = ()
    packs: int = 1
    checkpointing: str | float | None = None
    check_tokens: int = 1024
    rank: int = 16
    dtype: str = "bfloat16"
    device: str = "cuda"
    backend: str = "inductor"
    warmup: int = 2
    steps: int = 8
    seconds: float = 15.0
    seed: int = 0
    started: float = 0.0

    def to_json(self) -> str:
        """As ranks read it."""
        return json.dumps(asdict(self))

    @classmethod
    def of_json(cls, text: str) -> Spec:
        """The other way."""
        plain = json.loads(text)
        return cls(**{**plain, "items": tuple(Item(**item) for item in plain["items"])})
