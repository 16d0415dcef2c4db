"""Qwen3-MoE: Qwen3 attention, routed experts."""

from deltatune.layers.attention import Attention
from deltatune.layers.experts import Experts
from deltatune.layers.final_norm import FinalNorm
from deltatune.models.family import ROUTER_LOSS, Family, Swap, count_layers, count_sparse

FAMILY = Family(
    name="qwen3_moe",
    model_type="qwen3_moe",
    swaps=(
        Swap("Qwen3MoeAttention", Attention, count_layers("full_attention", "sliding_attention")),
        Swap("Qwen3MoeExperts", Experts, count_sparse),
    ),
    mask_form="4d",
    features={"router_loss": ROUTER_LOSS},
    final_norm=FinalNorm,
)
