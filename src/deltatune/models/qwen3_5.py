"""Qwen3.5 and Qwen3.6: Gated DeltaNet and gated attention, dense or with experts."""

from deltatune.layers.attention import GatedAttention
from deltatune.layers.experts import Experts
from deltatune.layers.final_norm import OffsetFinalNorm
from deltatune.layers.gated_delta_net import GatedDeltaNet
from deltatune.models.family import IMAGES, ROUTER_LOSS, Family, Swap, count_layers, count_sparse
from deltatune.models.refusals import delta_net_activation

DENSE = Family(
    name="qwen3_5",
    model_type="qwen3_5_text",
    swaps=(
        Swap("Qwen3_5GatedDeltaNet", GatedDeltaNet, count_layers("linear_attention")),
        Swap("Qwen3_5Attention", GatedAttention, count_layers("full_attention")),
    ),
    mask_form="mapping",
    features={"images": IMAGES},
    refusals=(delta_net_activation,),
    final_norm=OffsetFinalNorm,
)

MOE = Family(
    name="qwen3_5_moe",
    model_type="qwen3_5_moe_text",
    swaps=(
        Swap("Qwen3_5MoeGatedDeltaNet", GatedDeltaNet, count_layers("linear_attention")),
        Swap("Qwen3_5MoeAttention", GatedAttention, count_layers("full_attention")),
        Swap("Qwen3_5MoeExperts", Experts, count_sparse),
    ),
    mask_form="mapping",
    features={"images": IMAGES, "router_loss": ROUTER_LOSS},
    refusals=(delta_net_activation,),
    final_norm=OffsetFinalNorm,
)
