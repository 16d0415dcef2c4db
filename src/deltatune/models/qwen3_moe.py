"""Qwen3-MoE: Qwen3 attention, routed experts."""

from deltatune.layers.attention import Attention
from deltatune.layers.experts import Experts
from deltatune.layers.final_norm import FinalNorm
from deltatune.models.family import Experimental, Family, Supported, Swap, count_layers, count_sparse
from deltatune.models.refusals import attention_dropout

#: The router's auxiliary loss couples documents by definition, and its logits cannot leave a compiled layer.
ROUTER_LOSS = Experimental("output_router_logits works without compile; with compile it is refused")

FAMILY = Family(
    name="qwen3_moe",
    model_type="qwen3_moe",
    module="transformers.models.qwen3_moe.modeling_qwen3_moe",
    swaps=(
        Swap("Qwen3MoeAttention", Attention, count_layers("full_attention", "sliding_attention")),
        Swap("Qwen3MoeExperts", Experts, count_sparse),
    ),
    ops=("rms_norm_rope", "varlen_attention", "grouped_mm", "linear_cross_entropy"),
    mask_form="4d",
    features={"packing": Supported(), "compile": Supported(), "router_loss": ROUTER_LOSS},
    refusals=(attention_dropout,),
    final_norm=FinalNorm,
)
