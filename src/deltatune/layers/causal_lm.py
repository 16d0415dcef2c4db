"""The model with its head: one loss that never builds the whole logits."""

# B rows, T tokens a row, N = B * T, E hidden size

from __future__ import annotations

import inspect
from collections.abc import Callable
from threading import get_ident
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.checkpoint import checkpoint

from deltatune import ops
from deltatune.compile.auto import deciding
from deltatune.hf.cached import is_cached_call, packed_call, stock_path
from deltatune.hf.forwards import named
from deltatune.hf.hooks import is_hooked
from deltatune.hf.peft import head_weight, trained_copy
from deltatune.layers.decoder import catch_hidden, resolved_call
from deltatune.layers.exchange import from_every_rank, sum_over_ranks
from deltatune.layers.head_loss import own_loss
from deltatune.layers.router_loss import coefficient, router_loss
from deltatune.ops import Spec
from deltatune.packing.group import SequenceGroup
from deltatune.packing.metadata import METADATA
from deltatune.subclass import Swapped

__all__ = ["CausalLM", "without_crossing_labels"]

#: With images or videos the stock model makes the positions.
_MEDIA = ("pixel_values", "pixel_values_videos", "mm_encoder_outputs")

#: Tokens whose logits exist at a time where the head is not a plain linear layer.
_HEAD_CHUNK = 1024


class CausalLM(Swapped):
    """A causal language model whose ``labels=`` loss never crosses a document boundary.

    The loss is the stock model's, ``sum_i -log p(label_{i+1} | tokens <= i) / n`` with ``n`` the number of trained
    targets or ``num_items_in_batch``, except that the first token of a document is never a target of the document
    before it. The auxiliary loss of a router is that of each row, with the row's share of the targets, ``targets / n``:
    over rows, micro-batches and ranks that share ``num_items_in_batch``, it adds up to its mean weighted by targets.

    In a sequence group a call holds one rank's part of a pack, and the losses of the ranks add up to the pack's: n
    counts the targets of all ranks, and the router's is the pack's auxiliary loss with the share of the rank's targets.

    The loss is computed from chunks of logits. In training, ``.logits`` with ``labels`` is None unless
    ``output_logits=True`` or ``logits_to_keep`` asks for it; in evaluation it is the stock model's, for metrics, and
    takes memory for N times the vocabulary (8 GiB in bf16 for 16384 tokens and 248320 words), unless
    ``output_logits=False``, also out of a collator. Without ``labels`` the stock forward answers.

    ``loss_reduction="none"`` gives each token's own loss, fp32 ``[B, T]``, in place of their sum over n: at i it is
    ``-log p(label_{i+1} | tokens <= i)``, and 0 where nothing is predicted. The router's share is left to the caller,
    who knows what the tokens count.
    """

    ops = ("linear_cross_entropy",)
    whole_model = True
    extra_arguments = ("sequences", "output_logits", "loss_reduction")

    get_output_embeddings: Callable[[], nn.Module]
    loss_function: Callable[..., Tensor]

    @classmethod
    def op_specs(cls, module: Any, device: torch.device, dtype: torch.dtype) -> tuple[Spec, ...]:
        """Of the loss."""
        return (
            ops.LinearCrossEntropySpec(
                device, dtype, width=getattr(module.get_output_embeddings(), "in_features", None)
            ),
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """A forward that another tool put on the instance sees no target across a document's start either."""
        if "forward" in self.__dict__:
            args, kwargs = (), self._without_crossing_targets(args, kwargs)
        return super().__call__(*args, **kwargs)

    def _without_crossing_targets(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        there, ours = inspect.signature(self.forward), inspect.signature(type(self).forward.__get__(self))
        # functools.wraps copies the signature that our own forward says, with self, and its wrapper has none
        named_there = "labels" in there.parameters and "self" not in there.parameters
        call = dict((there if named_there else ours).bind_partial(*args).arguments) | kwargs
        if call.get("labels") is None and call.get("shift_labels") is None:
            return call
        group = self._deltatune.sequence
        described = {**call, "sequences": resolved_call(call, group).sequences}
        if group is not None:
            return own_targets(described, group)[0]
        masked, _ = without_crossing_labels(described)
        return {name: masked[name] for name in call}

    def _forward(self, call: dict[str, Any]) -> Any:
        wants_logits = call.pop("output_logits", None)
        by_token = self._wants_token_losses(call)
        if is_cached_call(self, call, with_head=True):
            if by_token:
                raise ValueError("loss_reduction='none' is for calls without a cache; leave use_cache and its like out")
            with stock_path(self):
                return super().forward(**call)
        resolved = resolved_call(call, self._deltatune.sequence)
        if self._deltatune.sequence is not None and (media := [name for name in _MEDIA if call.get(name) is not None]):
            raise ValueError(f"a sequence group of ranks holds text alone; leave {', '.join(media)} out")
        for name in METADATA:
            call.pop(name, None)
        call["sequences"], call["use_cache"] = resolved.sequences, False
        if call.get("attention_mask") is not None:
            call["attention_mask"] = resolved.padding_mask
        if all(call.get(name) is None for name in ("position_ids", *_MEDIA)):
            call["position_ids"] = resolved.position_ids
        decoder = cast("Any", self).get_decoder()
        expected = {self._deltatune: f"the text model: it was replaced after prepare, by {named(decoder.forward)}"}
        with deciding(self, resolved.tokens), packed_call(self._deltatune, resolved.sequences, expected):
            if call.get("labels") is None and call.get("shift_labels") is None:
                return super().forward(**call)
            return self._with_loss(call, wants_logits, by_token)

    def _wants_token_losses(self, call: dict[str, Any]) -> bool:
        reduction = call.pop("loss_reduction", None)
        if reduction is None:
            return False
        if reduction != "none":
            raise ValueError(f"loss_reduction must be 'none', or left out for the mean, got {reduction!r}")
        if call.get("num_items_in_batch") is not None:
            raise ValueError("loss_reduction='none' divides by nothing; leave num_items_in_batch out")
        if call.get("labels") is None and call.get("shift_labels") is None:
            raise ValueError("loss_reduction='none' needs labels; pass them, or leave it out")
        if not self._has_stock_loss(call):
            raise ValueError(
                f"loss_reduction='none' knows the cross-entropy of transformers alone, and {type(self).__name__} has a "
                "loss of its own; compute it from the logits of a call without labels"
            )
        return True

    def _with_loss(self, call: dict[str, Any], wants_logits: bool | None, by_token: bool) -> Any:
        as_tuple = call.pop("return_dict", None) is False
        stock = self._has_stock_loss(call)
        output = self._own_loss(call, wants_logits, by_token) if stock else self._custom_loss(call)
        return output.to_tuple() if as_tuple else output

    def _own_loss(self, call: dict[str, Any], wants_logits: bool | None, by_token: bool) -> Any:
        group = self._deltatune.sequence
        call, counts = without_crossing_labels(call) if group is None else own_targets(call, group)
        labels, targets = call.pop("labels", None), call.pop("shift_labels", None)
        if targets is None:
            targets = F.pad(labels.reshape(-1), (0, 1), value=-100)[1:].view(labels.shape)
        num_items, keep = call.pop("num_items_in_batch", None), call.get("logits_to_keep", 0)
        asked = not isinstance(keep, int) or keep != 0 or (not self.training if wants_logits is None else wants_logits)
        called = self._calls_head()
        needs_all = called or self._deltatune.facts.head != "linear"
        if needs_all:
            call.pop("logits_to_keep", None)
        output, hidden = self._stock_output(call, whole=asked or called)
        linear = self._deltatune.facts.head == "linear" and not called
        reduction = "none" if by_token else "sum"
        loss = self._loss(hidden, targets, reduction) if linear else _loss_of_logits(output.logits, targets, reduction)
        if by_token:
            loss = loss.view(targets.shape)
        else:
            if num_items is None:
                num_items = counts.sum() if group is None else sum_over_ranks(counts.sum(), group)
            loss = _divided(loss, num_items)
            shares = _divided(counts, num_items)
            of_router = router_loss(self, output, call.get("attention_mask"), shares, group)
            if of_router is not None:
                loss = loss + of_router.to(loss.device)
        fields = {name: value for name, value in output.items() if name != "loss"}
        if not asked:
            del fields["logits"]
        elif needs_all:
            fields["logits"] = fields["logits"][:, slice(-keep, None) if isinstance(keep, int) else keep]
        return type(output)(loss=loss, **fields)

    def _calls_head(self) -> bool:
        """Whether the loss takes the logits of the stock forward, whole, since something is hung on what makes them.

        On the head or in it, or on what stands between the text model and this one; FSDP2's own hooks are no reason.
        """
        head, between = self.get_output_embeddings(), cast("Any", self).base_model
        if isinstance(head, FSDPModule):
            return False
        return any(map(is_hooked, head.modules())) or (not isinstance(between, Swapped) and is_hooked(between))

    def _custom_loss(self, call: dict[str, Any]) -> Any:
        """The stock forward with its own loss and logits; the router's share of that loss as in ours."""
        if self._deltatune.sequence is not None:
            raise ValueError(
                f"{type(self).__name__} has a loss of its own, and a rank's part of a pack lacks the target of its "
                "last token; call it without labels, and compute the loss from its logits"
            )
        call, counts = without_crossing_labels(call)
        output = super().forward(**call)
        whole, num_items = getattr(output, "aux_loss", None), call.get("num_items_in_batch")
        if output.loss is not None and isinstance(whole, Tensor) and num_items is not None:
            counted = router_loss(self, output, call.get("attention_mask"), _divided(counts, num_items))
            # the stock forward has added it whole
            surplus = coefficient(self) * whole - cast("Tensor", counted)
            output.loss = output.loss - surplus.to(output.loss.device)
        return output

    def _has_stock_loss(self, call: dict[str, Any]) -> bool:
        from transformers.loss.loss_utils import ForCausalLMLoss

        return self.loss_function is ForCausalLMLoss and "ignore_index" not in call

    def _stock_output(self, call: dict[str, Any], *, whole: bool) -> tuple[Any, Tensor]:
        """The stock forward without labels: with the whole logits where they are needed, else with none.

        Whether a head is followed by something else, which scales or caps its output, is told by the first call: what
        becomes of its first token's logits, and of large numbers in place of a second copy of them.
        """
        facts, device = self._deltatune.facts, call["sequences"].cu_seqlens.device
        if whole or facts.head == "transformed":
            return self._caught(call)
        kept = [] if facts.head == "linear" else [0, 0]
        short = {**call, "logits_to_keep": torch.tensor(kept, dtype=torch.long, device=device)}
        if facts.head == "linear":
            return self._caught(short)
        thread, expected = get_ident(), list[Tensor]()

        def exchanged(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], logits: Tensor) -> Tensor | None:
            (x, *_rest) = (*args, *kwargs.values())
            # whatever else calls the head meanwhile gets what it computes
            if get_ident() != thread or not hidden or not torch.equal(x, hidden[-1][:, kept].to(x)):
                return None
            numbers = torch.linspace(-1e4, 1e4, logits[:, :1].numel(), device=logits.device)
            changed = torch.cat([logits[:, :1], numbers.to(logits).view_as(logits[:, :1])], dim=1)
            expected[:] = [changed.clone()]
            return changed

        head = self.get_output_embeddings()
        with catch_hidden() as hidden, head.register_forward_hook(exchanged, with_kwargs=True):
            output = super().forward(**short)
        plain = len(expected) > 0 and torch.equal(output.logits.to(expected[0]), expected[0])
        facts.head = "linear" if plain else "transformed"
        return (output, hidden[-1]) if plain else self._caught(call)

    def _caught(self, call: dict[str, Any]) -> tuple[Any, Tensor]:
        with catch_hidden() as hidden:
            output = super().forward(**call)
        assert hidden, "the text model was not prepared"
        return output, hidden[-1]

    def _loss(self, hidden: Tensor, targets: Tensor, reduction: str) -> Tensor:
        head, state, flat = self.get_output_embeddings(), hidden.flatten(0, -2), targets.flatten()
        impl = self._deltatune.options.kernels["linear_cross_entropy"]
        sharded = own_loss(head, state, flat, reduction=reduction, impl=impl)
        if sharded is not None:
            return sharded
        weight = head_weight(head)
        if weight is None:
            return _chunked_loss(trained_copy(head), state, flat, reduction)
        return ops.linear_cross_entropy(state, weight, flat, reduction=reduction, impl=impl)


def without_crossing_labels(call: dict[str, Any]) -> tuple[dict[str, Any], Tensor]:
    """The call without a target across a document's start, and how many targets are left in each row ``[B]``.

    ``labels`` are aligned with the tokens, ``shift_labels`` with the positions that predict them; the one at a row's
    end is the caller's own. Where both are given, losses read the latter.
    """
    ignored, first = call.get("ignore_index", -100), call["sequences"].positions == 0
    masked, counts = dict(call), torch.zeros(1, device="cpu")
    for name in ("labels", "shift_labels"):
        if (given := call.get(name)) is not None:
            outside = first.view(given.shape).to(given.device)
            if name == "shift_labels":
                outside = F.pad(outside[..., 1:], (0, 1))
            masked[name] = given.masked_fill(outside, ignored)
            counts = (masked[name] != ignored).sum(-1)
    return masked, counts


def own_targets(call: dict[str, Any], group: SequenceGroup) -> tuple[dict[str, Any], Tensor]:
    """The same of a rank's part of a pack, with ``shift_labels`` in place of ``labels``.

    The target of the part's last token is the next rank's first label.
    """
    call, sequences = dict(call), call["sequences"]
    labels, targets = call.pop("labels", None), call.get("shift_labels")
    if targets is None:
        labels = labels.to(sequences.cu_seqlens.device)
        behind = F.pad(from_every_rank(labels[:, 0], group), (0, 0, 0, 1), value=-100)[group.rank + 1]
        targets = torch.cat([labels[:, 1:], behind[:, None]], dim=1)
    last = group.cut(F.pad(sequences.positions[1:] == 0, (0, 1)))
    call["shift_labels"] = targets.masked_fill(last.view(targets.shape).to(targets.device), -100)
    return call, (call["shift_labels"] != -100).sum(-1)


def _divided(value: Tensor, count: Tensor | float) -> Tensor:
    return value / (count.to(value.device) if isinstance(count, Tensor) else count)


def _loss_of_logits(logits: Tensor, targets: Tensor, reduction: str) -> Tensor:
    return F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten(), ignore_index=-100, reduction=reduction)


def _chunked_loss(head: nn.Module, hidden: Tensor, targets: Tensor, reduction: str) -> Tensor:
    """Cross-entropy through a head that is not a plain linear layer, one chunk's logits at a time."""

    def chunk_loss(state: Tensor, target: Tensor) -> Tensor:
        return _loss_of_logits(head(state), target, reduction)

    chunks = zip(torch.split(hidden, _HEAD_CHUNK), torch.split(targets, _HEAD_CHUNK), strict=True)
    losses = [checkpoint(chunk_loss, state, target, use_reentrant=False) for state, target in chunks]
    if reduction == "none":
        return torch.cat(losses)
    total = hidden.new_zeros((), dtype=torch.float32)
    for loss in losses:
        total = total + loss
    return total
