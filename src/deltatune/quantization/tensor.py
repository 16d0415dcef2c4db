"""A frozen weight in few bits that takes part in products as the matrix it stands for."""

# N output width, K input width

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from deltatune import ops
from deltatune.ops import QuantizedWeight
from deltatune.ops._dequantize.weight import BLOCK

__all__ = ["Impls", "QuantizedTensor", "computes_in_fp8", "in_fp8", "stored_bytes"]

_aten: Final = torch.ops.aten
_INNER: Final = ("codes", "scales", "extra", "turned")


class Impls(NamedTuple):
    """The implementations of the ops that a weight in few bits calls, by the names of the ops."""

    dequantize: str = "auto"
    fp8_mm: str = "auto"


class QuantizedTensor(Tensor):
    """Matrices ``[..., N, K]`` of a ``QuantizedWeight``, or their transposes, with the shape and dtype of the values.

    Copies, moves, transposes and the matrices of a stack stay in few bits. Whatever else reads it reads its values:
    they are decoded for that call and are not kept, so what autograd saves of a product is the codes, and backward
    decodes them again, in a compiled graph too. Nothing may write to it.

    One that computes in fp8 (``in_fp8``) takes part with its codes, by ``ops.fp8_mm``, in a product of its own, a
    grouped one, or one with adapters beside it; whatever else reads it reads its values.

    Args:
        weight: the codes and their scales.
        dtype: of the values.
        transposed: whether it stands for ``[..., K, N]``.
        turned: of one that computes in fp8, the codes ``[..., K, N]`` once more, as the gradient of what it multiplies
            reads them.
        rounded: whether ``in_fp8`` rounded its values once more.

    Attributes:
        impls: what decodes and multiplies it; what is made of it has the same.
    """

    codes: Tensor
    scales: Tensor
    extra: Tensor | None
    turned: Tensor | None
    format: str
    divides: bool
    transposed: bool
    rounded: bool
    impls: Impls

    def __new__(
        cls,
        weight: QuantizedWeight,
        dtype: torch.dtype,
        *,
        transposed: bool = False,
        turned: Tensor | None = None,
        rounded: bool = False,
    ) -> QuantizedTensor:
        """See the class."""
        upright = torch.empty(weight.shape, device="meta")
        seen = upright.mT if transposed else upright
        make: Any = Tensor._make_wrapper_subclass
        made: QuantizedTensor = make(
            cls, seen.shape, strides=seen.stride(), dtype=dtype, device=weight.codes.device, requires_grad=False
        )
        made.format, made.codes, made.scales, made.extra, made.divides = weight
        made.transposed, made.turned, made.rounded, made.impls = transposed, turned, rounded, Impls()
        return made

    @property
    def stored(self) -> QuantizedWeight:
        """What it is made of, upright."""
        return QuantizedWeight(self.format, self.codes, self.scales, self.extra, self.divides)

    def decoded(self, offsets: Tensor | None = None) -> Tensor:
        """The values; with ``offsets`` those of matrices that have rows (see ``ops.dequantize``)."""
        values = ops.dequantize(self.stored, self.dtype, offsets=offsets, impl=self.impls.dequantize)
        return values.mT if self.transposed else values

    def mapped(self, change: Callable[[Tensor], Tensor], dtype: torch.dtype | None = None) -> QuantizedTensor:
        """The same with each of its tensors changed, such as moved or copied; ``dtype`` is that of the values."""
        extra, turned = (None if part is None else change(part) for part in (self.extra, self.turned))
        weight = QuantizedWeight(self.format, change(self.codes), change(self.scales), extra, self.divides)
        return self._made(weight, dtype or self.dtype, transposed=self.transposed, turned=turned)

    def turned_over(self) -> QuantizedTensor:
        """The transposes of its matrices."""
        return self._made(self.stored, self.dtype, transposed=not self.transposed, turned=self.turned)

    def _made(self, weight: QuantizedWeight, dtype: torch.dtype, **parts: Any) -> QuantizedTensor:
        made = QuantizedTensor(weight, dtype, rounded=self.rounded, **parts)
        made.impls = self.impls
        return made

    def __tensor_flatten__(self) -> tuple[list[str], tuple[Any, ...]]:
        names = [name for name in _INNER if getattr(self, name) is not None]
        return names, (self.format, self.divides, self.dtype, self.transposed, self.rounded, self.impls)

    @staticmethod
    def __tensor_unflatten__(
        inner: Mapping[str, Tensor], about: tuple[Any, ...], size: object, stride: object
    ) -> QuantizedTensor:
        format, divides, dtype, transposed, rounded, impls = about
        weight = QuantizedWeight(format, inner["codes"], inner["scales"], inner.get("extra"), divides)
        turned = inner.get("turned")
        made = QuantizedTensor(weight, dtype, transposed=transposed, turned=turned, rounded=rounded)
        made.impls = impls
        return made

    def _described(self, **_: object) -> str:
        about = f"format={self.format!r}, shape={list(self.shape)}, dtype={self.dtype}, device='{self.device}'"
        return f"QuantizedTensor({about})"

    __repr__: Any = _described

    def _stable_hash_for_caching(self) -> str:
        """What compiled graphs depend on: the parts' metadata and the format, never a value."""
        names, about = self.__tensor_flatten__()
        parts = [
            (name, part.shape, part.stride(), part.dtype, part.device)
            for name in names
            for part in [getattr(self, name)]
        ]
        return repr((type(self).__qualname__, names, parts, about))

    __torch_function__: Any = torch._C._disabled_torch_function_impl

    @classmethod
    def _dispatch(cls, func: Any, _types: object, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.is_inference_mode_enabled() and not func._schema.is_mutable:
            # it takes no composite op apart, and what it makes can be no view of a tensor from outside
            with torch.inference_mode(mode=False), torch.no_grad():
                return func(*args, **kwargs)
        handler = _HANDLERS.get(func)
        if handler is not None:
            found = handler(*args, **kwargs)
            if found is not NotImplemented:
                return found
        _refuse_writes(func, args, kwargs)
        args, kwargs = tree_map_only(QuantizedTensor, QuantizedTensor.decoded, (args, dict(kwargs)))
        return func(*args, **kwargs)

    __torch_dispatch__: Any = _dispatch


@torch.no_grad()
def in_fp8(tensor: QuantizedTensor) -> QuantizedTensor:
    """The same weight, whose products are computed in fp8; it takes twice the memory, that of 16 bits.

    Where several blocks of an output channel have a scale each, its values are rounded once more, to codes that share
    one.

    Raises:
        ValueError: it is not in fp8.
    """
    weight = tensor.stored
    if weight.format != "fp8":
        raise ValueError(f"products in fp8 take a weight in fp8, got {weight.format} {list(weight.shape)}")
    rows, (blocks, across) = weight.shape[-2], weight.scales.shape[-2:]
    if rounded := across > 1:
        weight = ops.quantize(ops.dequantize(weight, torch.float32, impl=tensor.impls.dequantize), "fp8")
    elif blocks != rows:
        weight = weight._replace(scales=weight.scales.repeat_interleave(BLOCK, -2)[..., :rows, :].contiguous())
    weight = weight._replace(scales=weight.scales.to(torch.float32))
    turned = weight.codes.view(torch.uint8).mT.contiguous().view(weight.codes.dtype)
    made = QuantizedTensor(weight, tensor.dtype, transposed=tensor.transposed, turned=turned, rounded=rounded)
    made.impls = tensor.impls
    return made


def computes_in_fp8(weight: object) -> bool:
    """Whether products with it are."""
    return isinstance(weight, QuantizedTensor) and weight.turned is not None


def stored_bytes(tensor: Tensor) -> int:
    """What a tensor takes of memory."""
    if isinstance(tensor, QuantizedTensor):
        return sum(getattr(tensor, name).nbytes for name in tensor.__tensor_flatten__()[0])
    return tensor.nbytes


def _same(x: QuantizedTensor, *_: object, **__: object) -> Tensor:
    return x.mapped(lambda part: part)


def _clone(x: QuantizedTensor, **_: object) -> Tensor:
    return x.mapped(torch.clone)


def _to_copy(x: QuantizedTensor, *, dtype: torch.dtype | None = None, **where: Any) -> Any:
    if dtype is not None and not dtype.is_floating_point:
        return NotImplemented
    where.pop("memory_format", None)
    return x.mapped(lambda part: _aten._to_copy.default(part, **where), dtype)


def _view(x: QuantizedTensor, size: Sequence[int]) -> Any:
    return _same(x) if list(size) == list(x.shape) else NotImplemented


def _transpose(x: QuantizedTensor, first: int, second: int) -> Any:
    if {first % x.ndim, second % x.ndim} != {x.ndim - 1, x.ndim - 2}:
        return NotImplemented
    return x.turned_over()


def _select(x: QuantizedTensor, dim: int, index: int) -> Any:
    return _part(x, dim, lambda part: part.select(0, index))


def _slice(x: QuantizedTensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> Any:
    return _part(x, dim, lambda part: part[start:end:step])


def _part(x: QuantizedTensor, dim: int, take: Callable[[Tensor], Tensor]) -> Any:
    """Of a stack of matrices."""
    return x.mapped(take) if x.ndim > 2 and dim % x.ndim == 0 else NotImplemented


def _copy_into(x: Any, source: Any, non_blocking: bool = False) -> Any:
    """As ``load_state_dict`` writes; only what has the same parts."""
    if not (isinstance(x, QuantizedTensor) and isinstance(source, QuantizedTensor)):
        return NotImplemented
    (names, (*about, _)), (theirs, (*about_theirs, _)) = x.__tensor_flatten__(), source.__tensor_flatten__()
    if (names, about) != (theirs, about_theirs):
        return NotImplemented
    parts = [(getattr(x, name), getattr(source, name)) for name in names]
    if any(ours.shape != other.shape for ours, other in parts):
        return NotImplemented
    for ours, other in parts:
        ours.copy_(other, non_blocking)
    return x


def _grouped_mm(x: Tensor, weight: Any, offsets: Tensor, narrow: Tensor | None, up: Tensor | None, impl: str) -> Any:
    """Matrices without rows stay as they are."""
    if not isinstance(weight, QuantizedTensor):
        return NotImplemented
    multiply = torch.ops.deltatune.grouped_mm.default
    if not computes_in_fp8(weight):
        return multiply(x, weight.decoded(offsets), offsets, narrow, up, impl)
    # [G, N, K] of a grouped product is what [K, N] is of a plain one
    y = _in_fp8(x, weight.turned_over(), offsets=offsets)
    return y if narrow is None else y + multiply(narrow, up, offsets, None, None, impl)


def _mm(x: Tensor, weight: Any) -> Any:
    return _in_fp8(x, weight) if computes_in_fp8(weight) else NotImplemented


def _in_fp8(x: Tensor, weight: QuantizedTensor, **more: Any) -> Tensor:
    """``x weight``, or of every group of rows with its matrix; ``more`` as ``ops.fp8_mm`` takes it."""
    impl = weight.impls.fp8_mm
    if weight.transposed:
        return ops.fp8_mm(x, weight.codes, weight.scales, impl=impl, **more)
    assert weight.turned is not None
    return ops.fp8_mm(x, weight.turned, of_x=weight.scales, impl=impl, **more)


def _addmm(bias: Tensor, x: Tensor, weight: Any, *, beta: float = 1, alpha: float = 1) -> Any:
    return bias + _mm(x, weight) if computes_in_fp8(weight) and beta == alpha == 1 else NotImplemented


def _lora_accumulate(narrow: Tensor, up: Tensor, inputs: Sequence[Tensor], weights: Sequence[Any]) -> Any:
    pairs = list(zip(inputs, weights, strict=True))
    eight = [pair for pair in pairs if computes_in_fp8(pair[1])]
    rest = [pair for pair in pairs if not computes_in_fp8(pair[1])]
    if not eight:
        return NotImplemented
    if not rest:
        (x, weight), *others = eight
        return sum((_in_fp8(*pair) for pair in others), _in_fp8(x, weight, beside=(narrow, up)))
    beside = torch.ops.deltatune.lora_accumulate.default(narrow, up, *map(list, zip(*rest, strict=True)))
    return sum((_in_fp8(*pair) for pair in eight), beside)


def _refuse_writes(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        value = args[place] if place < len(args) else kwargs.get(argument.name)
        written = value if isinstance(value, list | tuple) else [value]
        if any(isinstance(one, QuantizedTensor) for one in written):
            raise RuntimeError(
                f"{func} would write to a weight in {_format_of(written)}, which is frozen: train adapters beside it, "
                "and merge them into weights of 16 bits"
            )


def _format_of(tensors: Sequence[Any]) -> str:
    return next(str(one.format) for one in tensors if isinstance(one, QuantizedTensor))


_HANDLERS: Final[Mapping[Any, Callable[..., Any]]] = {
    _aten.detach.default: _same,
    _aten.alias.default: _same,
    _aten.view.default: _view,
    _aten._unsafe_view.default: _view,
    _aten.clone.default: _clone,
    _aten._to_copy.default: _to_copy,
    _aten.t.default: lambda x: _transpose(x, 0, 1) if x.ndim == 2 else NotImplemented,
    _aten.transpose.int: _transpose,
    _aten.select.int: _select,
    _aten.slice.Tensor: _slice,
    _aten.copy_.default: _copy_into,
    _aten.mm.default: _mm,
    _aten.addmm.default: _addmm,
    torch.ops.deltatune.grouped_mm.default: _grouped_mm,
    torch.ops.deltatune.lora_accumulate.default: _lora_accumulate,
}
