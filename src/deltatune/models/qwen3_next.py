"""Qwen3-Next: Gated DeltaNet with interleaved projections, gated attention, routed and shared experts."""

from deltatune.layers.attention import GatedAttention
from deltatune.layers.experts import Experts
from deltatune.layers.final_norm import OffsetFinalNorm
from deltatune.layers.gated_delta_net import InterleavedGatedDeltaNet
from deltatune.models.family import ROUTER_LOSS, Family, Swap, count_layers, count_sparse
from deltatune.models.refusals import delta_net_activation

FAMILY = Family(
    name="qwen3_next",
    model_type="qwen3_next",
    swaps=(
        Swap("Qwen3NextGatedDeltaNet", InterleavedGatedDeltaNet, count_layers("linear_attention")),
        Swap("Qwen3NextAttention", GatedAttention, count_layers("full_attention")),
        Swap("Qwen3NextExperts", Experts, count_sparse),
    ),
    mask_form="mapping",
    features={"router_loss": ROUTER_LOSS},
    refusals=(delta_net_activation,),
    final_norm=OffsetFinalNorm,
)
