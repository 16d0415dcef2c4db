"""Qwen3: dense decoders with normalised q and k."""

from deltatune.layers.attention import Attention
from deltatune.layers.final_norm import FinalNorm
from deltatune.models.family import SUPPORTED, Family, Swap, count_layers

FAMILY = Family(
    name="qwen3",
    model_type="qwen3",
    swaps=(Swap("Qwen3Attention", Attention, count_layers("full_attention", "sliding_attention")),),
    mask_form="mapping",
    features={"sliding_window": SUPPORTED},
    final_norm=FinalNorm,
)
