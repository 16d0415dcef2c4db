"""What each family declares: which stock modules become which layers, and how the rest of it differs."""

from __future__ import annotations

from deltatune.layers.attention import Attention, GatedAttention, SinkAttention
from deltatune.layers.experts import Experts
from deltatune.layers.final_norm import FinalNorm, OffsetFinalNorm
from deltatune.layers.gated_delta_net import GatedDeltaNet, InterleavedGatedDeltaNet
from deltatune.models.family import IMAGES, ROUTER_LOSS, SUPPORTED, Family, Swap, count_layers, count_sparse
from deltatune.models.refusals import delta_net_activation, unusual_attention

__all__ = ["ANY", "FAMILIES"]

_LINEAR = count_layers("linear_attention")
_FULL = count_layers("full_attention")
_FULL_OR_SLIDING = count_layers("full_attention", "sliding_attention")

FAMILIES = (
    # dense decoders with normalised q and k
    Family(
        name="qwen3",
        model_type="qwen3",
        swaps=(Swap("Qwen3Attention", Attention, _FULL_OR_SLIDING),),
        mask_form="mapping",
        features={"sliding_window": SUPPORTED},
        final_norm=FinalNorm,
    ),
    # its attention, routed experts
    Family(
        name="qwen3_moe",
        model_type="qwen3_moe",
        swaps=(Swap("Qwen3MoeAttention", Attention, _FULL_OR_SLIDING), Swap("Qwen3MoeExperts", Experts, count_sparse)),
        mask_form="4d",
        features={"router_loss": ROUTER_LOSS},
        final_norm=FinalNorm,
    ),
    # Gated DeltaNet with interleaved projections, gated attention, routed and shared experts
    Family(
        name="qwen3_next",
        model_type="qwen3_next",
        swaps=(
            Swap("Qwen3NextGatedDeltaNet", InterleavedGatedDeltaNet, _LINEAR),
            Swap("Qwen3NextAttention", GatedAttention, _FULL),
            Swap("Qwen3NextExperts", Experts, count_sparse),
        ),
        mask_form="mapping",
        features={"router_loss": ROUTER_LOSS},
        refusals=(delta_net_activation,),
        final_norm=OffsetFinalNorm,
    ),
    # Qwen3.5 and Qwen3.6: Gated DeltaNet and gated attention, dense or with experts
    Family(
        name="qwen3_5",
        model_type="qwen3_5_text",
        swaps=(Swap("Qwen3_5GatedDeltaNet", GatedDeltaNet, _LINEAR), Swap("Qwen3_5Attention", GatedAttention, _FULL)),
        mask_form="mapping",
        features={"images": IMAGES},
        refusals=(delta_net_activation,),
        final_norm=OffsetFinalNorm,
    ),
    Family(
        name="qwen3_5_moe",
        model_type="qwen3_5_moe_text",
        swaps=(
            Swap("Qwen3_5MoeGatedDeltaNet", GatedDeltaNet, _LINEAR),
            Swap("Qwen3_5MoeAttention", GatedAttention, _FULL),
            Swap("Qwen3_5MoeExperts", Experts, count_sparse),
        ),
        mask_form="mapping",
        features={"images": IMAGES, "router_loss": ROUTER_LOSS},
        refusals=(delta_net_activation,),
        final_norm=OffsetFinalNorm,
    ),
    # attention with sinks, sliding in every other layer; experts in every layer, stored transposed
    Family(
        name="gpt_oss",
        model_type="gpt_oss",
        swaps=(
            Swap("GptOssAttention", SinkAttention, _FULL_OR_SLIDING),
            Swap("GptOssExperts", Experts, _FULL_OR_SLIDING),
        ),
        mask_form="mapping",
        features={"sliding_window": SUPPORTED, "router_loss": ROUTER_LOSS},
    ),
    # the text model is Qwen3's decoder with interleaved mRoPE; images join it in the stock text model
    Family(
        name="qwen3_vl",
        model_type="qwen3_vl_text",
        swaps=(Swap("Qwen3VLTextAttention", Attention, _FULL),),
        mask_form="4d",
        features={"images": IMAGES},
        final_norm=FinalNorm,
    ),
    Family(
        name="qwen3_vl_moe",
        model_type="qwen3_vl_moe_text",
        swaps=(Swap("Qwen3VLMoeTextAttention", Attention, _FULL), Swap("Qwen3VLMoeTextExperts", Experts, count_sparse)),
        mask_form="4d",
        features={"images": IMAGES, "router_loss": ROUTER_LOSS},
        final_norm=FinalNorm,
    ),
)

#: Another dense decoder: packing through the attention interface, and compile.
ANY = Family(
    name="any",
    model_type="*",
    swaps=(),
    mask_form="4d",
    features={
        "compile": "experimental: the stock layers must trace as one graph; the first step says so if they do not"
    },
    refusals=(unusual_attention,),
)
