"""The independence probe: runs a model packed and document by document, and compares everything."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from deltatune.hf import model as hf_model
from deltatune.verification.against_stock import compare_beyond_bounds, compare_with_stock
from deltatune.verification.measure import Pack, measure
from deltatune.verification.report import VerifyReport
from deltatune.verification.subjects import Probed, layer_subjects, model_subject
from deltatune.verification.untouched import SLOW_DECAY, requiring_grad, untouched

__all__ = ["verify"]

#: Shorter than the convolution, a single token, and around the 64-token chunk of the delta rule.
_LENGTHS = (3, 1, 63, 64, 65, 17)
_PADDING = 11

# Sums taken in another order differ by some ten units in the last place; a leak is larger by orders of magnitude.
# Norms and losses compute in float32 under float64 too.
_TOLERANCES = {torch.bfloat16: 2e-2, torch.float16: 1e-2}
_TOLERANCE = 1e-5


def verify(
    model: nn.Module,
    *,
    lengths: Sequence[int] = _LENGTHS,
    tolerance: float | None = None,
    tokens: int | None = None,
    compiled: bool = False,
) -> VerifyReport:
    """Measures, on this very model, whether packed documents are as independent as if each were alone.

    One decoder layer of each type, fed as the text model feeds it, and then the whole model with its loss run on a
    pack of random documents and on every document alone. Compared are outputs, gradients of inputs and of parameters;
    the gradient of documents with respect to others' inputs must be exactly zero, and other values in other documents
    must change nothing. Recurrent layers run with slow decay so that a leak cannot hide. The model comes back as it
    was found: weights bit for bit, ``.grad``, training mode, random number generators.

    A prepared model is then held against the stock class's own forward on one document, with gradients (of 16-bit
    models in float32, by the first layers, as many as hold one of every type); and documents longer than a length that
    the config names (original positions, windows, sparse attention's top-k) run packed and alone, forward only, up to
    1024 tokens on the CPU and 8192 elsewhere. What is longer is told in the notes.

    A stock model is fed what stock collators emit for a pack: restarting positions, and ``cu_seq_lens_*`` where the
    model takes them. A leak is a finding, never an exception. With 16-bit weights the routing of a mixture of experts
    may differ between packed and alone where two experts tie within rounding; such a model is best probed in float32.

    Args:
        model: a transformers model, prepared or not, with adapters or without; before ``fully_shard``.
        lengths: tokens of each document, at least two documents of one token or more.
        tolerance: limit of the relative differences; by default 1e-5 (norms compute in float32 under float64 too), 2e-2
            for bfloat16, 1e-2 for float16. Where it is exceeded and no gradient crosses documents, the model's own
            rounding is measured and taken into account; see ``VerifyRow.limits``.
        tokens: length of the pack, filled with padding; by default a few more than the documents hold.
        compiled: run the pack through the compiled graphs of a prepared model. By default the same layers run eagerly:
            the pack's shape is rarely the training's, and compiling for it costs far more than the probe. With
            ``tokens`` as in training the graphs are the training's own.

    Raises:
        ValueError: not a transformers decoder, a model without weights or already sharded, lengths that cannot be
            packed, or ``compiled`` on a model that is not compiled.
    """
    text_model = hf_model.text_model(model)
    state = text_model.__dict__.get("_deltatune")
    documents = _documents(lengths, tokens, prepared=state is not None)
    _check_weights(model)
    if compiled and (state is None or state.options.compile is None):
        raise ValueError("compiled=True needs a model prepared with compile=CompileOptions()")
    device = hf_model.device_of(text_model)
    autocast = torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type) if autocast else hf_model.compute_dtype(text_model)
    limit = _TOLERANCES.get(dtype, _TOLERANCE) if tolerance is None else tolerance
    if limit <= 0:
        raise ValueError(f"tolerance must be positive, got {limit}; leave it out for the dtype's own")
    exact = device.type == "cpu" or torch.are_deterministic_algorithms_enabled()
    rows = []
    with untouched(model, training=compiled):
        probed = Probed(model, text_model, documents, compiled=compiled)
        types = _layer_types(text_model)
        subjects = layer_subjects(probed, types)
        every = {f"{s.name}.{name}": p for s in subjects for name, p in s.parameters.items()}
        whole = model_subject(probed, every)
        for subject in (*subjects, whole):
            with requiring_grad(subject.parameters.values()):
                rows.append(measure(subject, documents, tolerance=limit, exact=exact))
        compared = list(compare_beyond_bounds(probed, limit))
        if state is not None:
            last, _ = list(types.values())[-1]
            with requiring_grad(whole.parameters.values()):
                compared[:0] = compare_with_stock(probed, whole, limit, last if dtype in _TOLERANCES else None)
    return VerifyReport(
        rows=tuple(rows),
        tolerance=limit,
        exact=exact,
        lengths=documents.lengths,
        padding=documents.padding,
        dtype=str(dtype).removeprefix("torch."),
        device=str(device),
        prepared=state is not None,
        compiled=compiled,
        notes=(*_notes(probed), *(one for one in compared if isinstance(one, str))),
        checks=tuple(one for one in compared if not isinstance(one, str)),
    )


def _documents(lengths: Sequence[int], tokens: int | None, *, prepared: bool) -> Pack:
    counts = tuple(int(n) for n in lengths)
    if len(counts) < 2 or min(counts) < 1:
        raise ValueError(f"lengths must be two or more documents of at least one token, got {list(counts)}")
    if max(counts) < 2:
        raise ValueError(
            f"lengths must hold a document of two tokens or more, got {list(counts)}: one alone has no past"
        )
    if tokens is None:
        # stock collators that flatten add no padding
        return Pack(counts, _PADDING if prepared else 0)
    if tokens < sum(counts):
        raise ValueError(f"tokens={tokens} cannot hold documents of {sum(counts)} tokens; raise it or shorten them")
    return Pack(counts, tokens - sum(counts))


def _check_weights(model: nn.Module) -> None:
    if any(parameter.device.type == "meta" for parameter in model.parameters()):
        raise ValueError(
            "verify needs the model's weights, but some parameters are on the meta device; load them first"
        )
    if hf_model.is_sharded(model):
        raise ValueError(
            "verify(model) comes before fully_shard(model) and parallelize(): afterwards no layer can be run on its own"
        )


def _layer_types(text_model: nn.Module) -> dict[str, tuple[nn.Module, int]]:
    """Type of layer -> (its first layer, how many there are)."""
    config: Any = text_model.config
    kinds = getattr(config, "layer_types", None) or []
    found: dict[str, tuple[nn.Module, int]] = {}
    for index, layer in enumerate(text_model.layers):  # type: ignore[arg-type]
        name = kinds[index] if index < len(kinds) else "full_attention"
        if any(path.rpartition(".")[2] == "experts" for path, _ in layer.named_modules()):
            name += ", experts"
        first, count = found.get(name, (layer, 0))
        found[name] = (first, count + 1)
    return found


def _notes(probed: Probed) -> list[str]:
    notes = []
    if any(name.endswith("A_log") for name, _ in probed.model.named_parameters()):
        notes.append(f"probed with slow decay (A = {SLOW_DECAY}), so that no leak dies out; restored bit for bit")
    if probed.state is None and probed.refused is None:
        notes.append("fed as by transformers.Trainer and its flattening collator; use_cache=True or a mask can undo it")
    if probed.refused is not None:
        notes.append(f"fed with position_ids alone: the model refuses cu_seq_lens_q ({probed.refused})")
    if probed.state is not None and probed.state.options.compile is not None and not probed.compiled:
        notes.append("probed without the graphs that training runs; verify(model, compiled=True) probes them")
    return notes
