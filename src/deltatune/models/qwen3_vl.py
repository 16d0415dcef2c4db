"""Qwen3-VL: the text model is Qwen3's decoder with interleaved mRoPE; images join it in the stock text model."""

from deltatune.layers.attention import Attention
from deltatune.layers.experts import Experts
from deltatune.layers.final_norm import FinalNorm
from deltatune.models.family import IMAGES, ROUTER_LOSS, Family, Swap, count_layers, count_sparse

DENSE = Family(
    name="qwen3_vl",
    model_type="qwen3_vl_text",
    swaps=(Swap("Qwen3VLTextAttention", Attention, count_layers("full_attention")),),
    mask_form="4d",
    features={"images": IMAGES},
    final_norm=FinalNorm,
)

MOE = Family(
    name="qwen3_vl_moe",
    model_type="qwen3_vl_moe_text",
    swaps=(
        Swap("Qwen3VLMoeTextAttention", Attention, count_layers("full_attention")),
        Swap("Qwen3VLMoeTextExperts", Experts, count_sparse),
    ),
    mask_form="4d",
    features={"images": IMAGES, "router_loss": ROUTER_LOSS},
    final_norm=FinalNorm,
)
