"""The names of the families, for what has to know them without torch."""

from __future__ import annotations

from typing import Final

__all__ = ["FAMILY_NAMES"]

#: Those of ``FAMILIES``, by the ``model_type`` of their text models.
FAMILY_NAMES: Final = {
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3_moe",
    "qwen3_next": "qwen3_next",
    "qwen3_5_text": "qwen3_5",
    "qwen3_5_moe_text": "qwen3_5_moe",
    "gpt_oss": "gpt_oss",
    "qwen3_vl_text": "qwen3_vl",
    "qwen3_vl_moe_text": "qwen3_vl_moe",
}
