"""What is probed: the decoder layers as the text model feeds them, and the whole model with its loss."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from deltatune.hf import model as hf_model
from deltatune.packing.sequences import Sequences
from deltatune.state import State
from deltatune.verification.measure import Pack, Subject
from deltatune.verification.untouched import compiled_as

__all__ = ["Probed", "layer_subjects", "model_subject"]

_SEED = 20


class _Call(NamedTuple):
    """How the text model called one decoder layer."""

    hidden: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Probed:
    """A model with the batch it is probed with.

    Attributes:
        model: the outermost module, called for the whole-model row.
        text_model: the module that holds the decoder layers.
        state: what ``prepare`` shares among the layers; None for a stock model.
        compiled: whether packed calls run the compiled graphs; documents alone run eagerly either way.
        refused: why the model refused what stock collators emit, where it did.
    """

    def __init__(self, model: nn.Module, text_model: nn.Module, documents: Pack, *, compiled: bool) -> None:
        self.model, self.text_model, self.documents, self.compiled = model, text_model, documents, compiled
        self.state: State | None = text_model.__dict__.get("_deltatune")
        self.refused: str | None = None
        self._embedding: Any = text_model.get_input_embeddings()  # type: ignore[operator]
        self.device: torch.device = self._embedding.weight.device
        self.has_head = hf_model.head_of(model) is not None
        ids, embedded = self.random(2, documents.total)
        self.inputs, self.others = embedded[:1], embedded[1:]
        self.labels = ids[:1].clone()
        if self.state is None:
            # as collators that flatten do; a prepared model keeps a document's first token from being a target itself
            self.labels[0, [place.start for place in documents.slices]] = -100
        # a cache would switch packing off, and the router's loss couples documents by definition
        self.switches = {"use_cache": False}
        if hasattr(text_model.config, "output_router_logits"):
            self.switches["output_router_logits"] = False

    def random(self, rows: int, tokens: int) -> tuple[Tensor, Tensor]:
        """Random tokens ``[B, T]`` and their embeddings ``[B, T, E]``."""
        config: Any = self.text_model.config
        ids = torch.randint(0, config.vocab_size, (rows, tokens), generator=torch.Generator().manual_seed(_SEED))
        with torch.no_grad():
            embedded: Tensor = self._embedding(ids.to(self.device)).detach()
        return ids.to(self.device), embedded

    def metadata(self, documents: Pack) -> dict[str, Any]:
        """What describes the documents of a pack to this model, as it was found to take it."""
        sequences = Sequences.from_lengths(documents.lengths, total=documents.total, device=self.device)
        found: dict[str, Any] = {"position_ids": sequences.positions.view(1, -1).long()}
        if self.state is not None:
            found["sequences"] = sequences
        elif self.refused is None:
            # as collators that flatten emit
            boundaries = sequences.cu_seqlens[: sequences.num_sequences + 1]
            found |= dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), boundaries)
            found |= dict.fromkeys(("max_length_q", "max_length_k"), sequences.max_length)
        return found

    def packed_calls(self, inputs: Tensor, layers: Mapping[str, nn.Module]) -> dict[str, _Call]:
        """How the text model calls these layers for the pack; settles which metadata a stock model takes."""
        try:
            return self.calls(inputs, layers, self.metadata(self.documents))
        except ValueError as error:
            if self.state is not None or self.refused is not None:
                raise
            self.refused = str(error).partition("\n")[0]
        return self.calls(inputs, layers, self.metadata(self.documents))

    def calls(self, inputs: Tensor, layers: Mapping[str, nn.Module], metadata: dict[str, Any]) -> dict[str, _Call]:
        """How the text model calls these layers, by their names."""
        calls: dict[str, _Call] = {}

        def record(name: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            rest = dict(kwargs)
            hidden = args[0] if args else rest.pop("hidden_states")
            calls[name] = _Call(hidden.detach(), args[1:], rest)

        with ExitStack() as hooks:
            for name, layer in layers.items():
                hook = partial(record, name)
                hooks.enter_context(layer.register_forward_pre_hook(hook, with_kwargs=True))
            self.hidden(inputs, metadata)
        return calls

    def hidden(self, inputs: Tensor, metadata: dict[str, Any]) -> Tensor:
        """The last hidden state, without compile and gradients."""
        with torch.no_grad(), compiled_as(self.state, compiled=False):
            output: Tensor = self.text_model(inputs_embeds=inputs, **self.switches, **metadata)[0]
        return output


def layer_subjects(probed: Probed, types: Mapping[str, tuple[nn.Module, int]]) -> list[Subject]:
    """One subject for each type of layer: name -> (layer, how many)."""
    layers = {name: layer for name, (layer, _) in types.items()}
    packed = probed.packed_calls(probed.inputs, layers)
    others = probed.packed_calls(probed.others, layers)
    places = probed.documents.places
    alone = [probed.calls(probed.inputs[:, place], layers, {}) for place in places]
    options = None if probed.state is None else probed.state.options.compile
    compiled = probed.compiled and options is not None and options.scope == "layer"
    generator = torch.Generator().manual_seed(_SEED)
    subjects = []
    for name, (layer, count) in types.items():
        weights = torch.randn(packed[name].hidden.shape, generator=generator).to(packed[name].hidden)
        subjects.append(
            Subject(
                name=name,
                layers=count,
                inputs=packed[name].hidden,
                others=others[name].hidden,
                parameters=_parameters(layer, trained_only=compiled),
                packed=partial(_run_layer, probed, layer, packed[name], weights, compiled=compiled),
                alone=[
                    partial(_run_layer, probed, layer, calls[name], weights[:, place], compiled=False)
                    for calls, place in zip(alone, places, strict=True)
                ],
            )
        )
    return subjects


def model_subject(probed: Probed, fallback: Mapping[str, nn.Parameter]) -> Subject:
    """The whole model: logits, and the loss of ``labels=`` where it has a head.

    ``fallback`` is differentiated where no parameter is trained.
    """
    trained = {name: p for name, p in probed.model.named_parameters() if p.requires_grad and p.is_floating_point()}
    return Subject(
        name="model",
        layers=len(probed.text_model.layers),  # type: ignore[arg-type]
        inputs=probed.inputs,
        others=probed.others,
        parameters=trained or fallback,
        packed=partial(_run_model, probed, probed.metadata(probed.documents), probed.labels, compiled=probed.compiled),
        alone=[
            partial(_run_model, probed, {}, probed.labels[:, place], compiled=False)
            for place in probed.documents.places
        ],
        has_loss=probed.has_head,
    )


def _run_layer(
    probed: Probed, layer: nn.Module, call: _Call, weights: Tensor, inputs: Tensor, trained: Tensor, *, compiled: bool
) -> tuple[Tensor, Tensor]:
    """The layer, and a random linear function of its output."""
    with compiled_as(probed.state, compiled=compiled):
        output = layer(inputs, *call.args, **call.kwargs)
    output = output[0] if isinstance(output, tuple) else output
    return output, (output * weights.masked_fill(~trained[:, None], 0)).sum()


def _run_model(
    probed: Probed, metadata: dict[str, Any], labels: Tensor, inputs: Tensor, trained: Tensor, *, compiled: bool
) -> tuple[Tensor, Tensor]:
    """Logits and the summed loss; without a head, hidden states and a fixed function of them."""
    call = {"inputs_embeds": inputs, **metadata, **probed.switches, "return_dict": True}
    if probed.has_head:
        # one item: the loss comes out as a sum, whatever the number of targets
        call |= {"labels": labels.masked_fill(~trained, -100), "num_items_in_batch": 1}
        call |= {} if probed.state is None else {"output_logits": True}
    with compiled_as(probed.state, compiled=compiled):
        output = probed.model(**call)
    if probed.has_head:
        return output.logits, output.loss
    hidden = output.last_hidden_state
    return hidden, hidden.square().sum(-1).masked_fill(~trained, 0).sum()


def _parameters(layer: nn.Module, *, trained_only: bool) -> dict[str, nn.Parameter]:
    """A compiled layer keeps what it trains: another ``requires_grad`` is another graph."""
    return {
        name: p
        for name, p in layer.named_parameters()
        if p.is_floating_point() and (p.requires_grad or not trained_only)
    }
