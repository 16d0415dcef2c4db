"""Qwen3: dense decoders with normalised q and k."""

from deltatune.layers.attention import Attention
from deltatune.layers.final_norm import FinalNorm
from deltatune.models.family import Family, Supported, Swap, count_layers

FAMILY = Family(
    name="qwen3",
    model_type="qwen3",
    module="transformers.models.qwen3.modeling_qwen3",
    swaps=(Swap("Qwen3Attention", Attention, count_layers("full_attention", "sliding_attention")),),
    mask_form="mapping",
    features={"packing": Supported(), "compile": Supported(), "sliding_window": Supported()},
    final_norm=FinalNorm,
)
