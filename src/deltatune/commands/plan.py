"""deltatune plan: what a run would do, from the configuration and the data alone."""

from __future__ import annotations

import argparse
import sys
from typing import Final

from torch import nn
from transformers import TrainingArguments

from deltatune.commands.quiet import quiet_libraries
from deltatune.compile.memory import MemoryEstimate, device_memory, optimizer_bytes
from deltatune.config.schema import Recipe
from deltatune.data.dataset import PackedDataset
from deltatune.data.report import counted
from deltatune.data.stream import PackStream
from deltatune.training.adapters import adapt_by_recipe
from deltatune.training.arguments import training_arguments
from deltatune.training.batches import PackOrder, count_steps
from deltatune.training.checkpoint import empty_model, load_tokenizer
from deltatune.training.continuing import load_adapter, start_lines
from deltatune.training.mesh import Mesh
from deltatune.training.optimizers import optimizer_lines
from deltatune.training.packs import load_data
from deltatune.training.run import estimate_step, prepare_by_recipe
from deltatune.training.samples import samples_lines

__all__ = ["run"]

_EIGHT_BIT: Final = "adamw_8bit"
#: Bytes worth a line.
_WEIGHS: Final = 2**28


@quiet_libraries()
def run(args: argparse.Namespace) -> int:
    """Prints every swap, kernel, trainable module, the packs, the steps and the memory; loads no weights."""
    recipe: Recipe = args.recipe
    arguments = training_arguments(recipe.training)
    model = adapt_by_recipe(empty_model(recipe.model), recipe)
    load_adapter(model, recipe.lora)
    report = prepare_by_recipe(recipe, model, device=arguments.device).report
    tokenizer = load_tokenizer(recipe.model)
    data = load_data(recipe, tokenizer)
    data.check_tokens(model, tokenizer)
    sys.stdout.writelines(f"warning: {warning}\n" for warning in args.warnings)
    lines = [f"model {recipe.model.name_or_path} on {arguments.device}", "", str(report)]
    lines += [*start_lines(recipe.lora), *optimizer_lines(model, recipe.training)]
    lines += ["", *data.lines(), *_steps(data.train, arguments), *samples_lines(recipe)]
    estimate, available = estimate_step(recipe, model, report.checkpointing), device_memory(arguments.device)
    verdict = "" if estimate.total <= available else ": more than there is"
    lines += ["", "memory estimate of a step on one device", str(estimate)]
    lines += [f"{arguments.device} has {available / 2**30:.1f} GiB{verdict}", *_smaller_state(recipe, model, estimate)]
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


def _smaller_state(recipe: Recipe, model: nn.Module, estimate: MemoryEstimate) -> list[str]:
    """The same optimizer in 8 bits, where its state weighs: of adapters on experts it often dominates."""
    if not recipe.training.optim.startswith("adamw") or "8bit" in recipe.training.optim:
        return []
    eight = sum(optimizer_bytes(p, _EIGHT_BIT) for p in model.parameters() if p.requires_grad)
    if estimate.optimizer - eight < _WEIGHS:
        return []
    return [
        f"the optimizer's state is {estimate.optimizer / 2**30:.1f} GiB of it; training.optim: {_EIGHT_BIT} keeps "
        f"{eight / 2**30:.1f} GiB (pip install bitsandbytes)"
    ]


def _steps(packs: PackedDataset | PackStream, arguments: TrainingArguments) -> list[str]:
    """What a run takes of the packs: a short last accumulation is a step as well."""
    mesh = Mesh.of(arguments)
    order = PackOrder(len(packs), mesh=mesh, drop_last=arguments.dataloader_drop_last)
    per_epoch, total = count_steps(len(order), arguments)
    per_step = mesh.data_size * arguments.gradient_accumulation_steps
    epochs = f", {counted(per_epoch, 'step')} an epoch, {total / per_epoch:.2f} epochs"
    return [
        f"{counted(total, 'step')} of {counted(per_step, 'pack')} ({per_step * packs.report.tokens_per_batch:,} tokens)"
        f"{'' if isinstance(packs, PackStream) else epochs}"
    ]
