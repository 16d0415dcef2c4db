"""Writes adapters of experts with the PEFT and transformers on the path, and what they add, for ``test_old_peft.py``.

The files here were made so, by the versions in their names, with torch 2.13.0 (``pip install --no-deps --target``)::

    PYTHONPATH=peft-0.17.1:transformers-4.57.1 python make.py gpt_oss
    PYTHONPATH=peft-0.18.1 python make.py qwen3_moe gpt_oss      # transformers 5.23.0
    PYTHONPATH=peft-0.19.0 python make.py qwen3_moe gpt_oss
    PYTHONPATH=peft-0.19.1 python make.py qwen3_moe

PEFT 0.17 does not import with transformers 5, and before it the experts of Qwen3-MoE were single linear layers.
"""

import sys
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from safetensors.torch import save_file

VALUES = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 6, "moe_intermediate_size": 6, "head_dim": 4,
          "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "num_experts": 3,
          "num_local_experts": 3, "num_experts_per_tok": 2, "pad_token_id": 0}  # fmt: skip


def model(family: str) -> Any:
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(family, **VALUES))


def main(family: str, targets: list[str]) -> None:
    base = model(family)
    torch.manual_seed(1)
    names = [f"mlp.experts.{target}" for target in targets]
    config = peft.LoraConfig(
        r=2, lora_alpha=6, target_modules=["q_proj"], target_parameters=names, init_lora_weights=False
    )
    adapted = peft.get_peft_model(base, config)
    suffix = "" if len(targets) == 2 else f"-{targets[0]}"
    folder = Path(__file__).parent / f"{family}-peft-{peft.__version__}-transformers-{transformers.__version__}{suffix}"
    adapted.save_pretrained(str(folder))
    (folder / "README.md").unlink(missing_ok=True)
    added = {module.parameter_name: module.get_delta_weight("default").detach().contiguous()
             for module in adapted.modules() if hasattr(module, "parameter_name")}  # fmt: skip
    save_file(added, folder / "added.safetensors")


if __name__ == "__main__":
    for family in sys.argv[1:]:
        main(family, ["gate_up_proj", "down_proj"])
        main(family, ["gate_up_proj"])
