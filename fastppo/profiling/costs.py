"""Bytes and operations of an operator's call, from the shapes in the trace.

Bytes: every tensor read or written once, with the elements it has in memory (an expanded dimension
counts once). Operations: 2 per multiply-add of a product; pointwise operators and reductions 1 per
element, softmax 5, norms 8; copies none. fastppo's own ops have formulas of their own
(work.py). What cannot be known from shapes (lists of indices, varlen attention) has no cost.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastppo.profiling.meta import Cost
from fastppo.profiling.trace import Span
from fastppo.profiling.work import WORK, Work, evaluate

ITEM_SIZES = {
    **{"double": 8, "long int": 8, "long": 8, "float": 4, "int": 4, "c10::BFloat16": 2},
    **{"c10::Half": 2, "short": 2, "short int": 2, "bool": 1, "signed char": 1},
    **{"unsigned char": 1, "c10::Float8_e4m3fn": 1, "c10::Float8_e5m2": 1},
}
_HALF = frozenset({"c10::BFloat16", "c10::Half"})


@dataclass(frozen=True, slots=True)
class _Tensor:
    dims: tuple[int, ...]
    stored: int  # elements in memory
    item: int  # bytes of one
    dtype: str

    @property
    def numel(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        return self.stored * self.item


_Arguments = list[Any]  # a _Tensor, a list of them, or None for what is not a tensor
_Rule = Callable[[_Arguments, Sequence[Any]], Cost]


def operator_cost(span: Span, list_dtype: str = "float") -> Cost | None:
    """What one call of an operator costs at least; None where it is not known.

    Args:
        span: a cpu_op recorded with shapes.
        list_dtype: type of the tensors in lists, which is not in the trace: the parameters'.
    """
    rule = RULES.get(span.name)
    if rule is None or "Input Dims" not in span.args:
        return None
    try:
        return rule(_arguments(span.args, list_dtype), span.args.get("Concrete Inputs") or ())
    except (IndexError, AttributeError, TypeError, ValueError, KeyError):
        return None  # another signature than the one the rule was written for


def repeats_inner(name: str) -> bool:
    """Whether the operator may do its work by calling another one that has the cost already."""
    return name in _REPEATING


def _arguments(args: Mapping[str, Any], list_dtype: str) -> _Arguments:
    dims, types = args["Input Dims"], args["Input type"]
    strides = args.get("Input Strides") or [None] * len(dims)
    if types[0] == "TensorList" and not dims[0]:
        raise ValueError("torch records a list of more than 30 tensors as an empty one")
    out: _Arguments = []
    for shape, dtype, steps in zip(dims, types, strides, strict=True):
        if dtype == "TensorList":
            each = zip(shape, steps or [None] * len(shape), strict=True)
            out.append([_tensor(s, list_dtype, step) for s, step in each])
        elif dtype in ITEM_SIZES:
            out.append(_tensor(shape, dtype, steps))
        else:
            out.append(None)
    return out


def _tensor(dims: Sequence[int], dtype: str, strides: Sequence[int] | None) -> _Tensor:
    stored = math.prod(dims)
    if strides and len(strides) == len(dims) and stored:
        stored = math.prod(n for n, stride in zip(dims, strides, strict=True) if stride != 0)
    return _Tensor(tuple(dims), stored, ITEM_SIZES[dtype], dtype)


def _cost(flops: float, *tensors: _Tensor, written: float = 0.0, half: bool = False) -> Cost:
    """Cost of reading `tensors` and writing `written` bytes."""
    return Cost(float(written + sum(t.bytes for t in tensors)), float(flops), half)


def _present(arguments: _Arguments) -> list[_Tensor]:
    return [a for a in arguments if isinstance(a, _Tensor)]


def _product(first: int) -> _Rule:
    """[..., m, k] by [..., k, n] at position `first`, onto what stands before it."""

    def rule(arguments: _Arguments, _: Sequence[Any]) -> Cost:
        a, b = arguments[first], arguments[first + 1]
        *batch, m, k = a.dims
        n = b.dims[-1]
        if b.dims[-2] != k:
            raise ValueError("not a product")
        out = math.prod(batch) * m * n
        tensors = (a, b, *arguments[:first])
        return _cost(2 * out * k, *tensors, written=out * a.item, half=a.dtype in _HALF)

    return rule


def _attention(backward: bool, causal: int) -> _Rule:
    """Scaled dot product attention of q, k, v: [B, H, L, E], [B, Hkv, S, E], [B, Hkv, S, D].

    Args:
        backward: q is the second argument; two products become five.
        causal: position of `is_causal`, which halves the work.
    """

    def rule(arguments: _Arguments, concrete: Sequence[Any]) -> Cost:
        first = 1 if backward else 0
        q, k, v = arguments[first : first + 3]
        batch, heads, length, width = q.dims
        flops = batch * heads * length * k.dims[2] * 2 * (width + v.dims[3])
        if str(concrete[causal]) == "True":
            flops //= 2
        out = batch * heads * length * v.dims[3] * q.item
        half = q.dtype in _HALF
        if not backward:
            return _cost(flops, q, k, v, written=out, half=half)
        # reads the result and its gradient too, and writes three gradients
        return _cost(2.5 * flops, q, q, k, k, v, v, written=2 * out, half=half)

    return rule


def _pointwise(item: int | None = None) -> _Rule:
    """Reads its tensors, writes the shape they broadcast to, in the widest type or `item` bytes."""

    def rule(arguments: _Arguments, _: Sequence[Any]) -> Cost:
        tensors = _present(arguments)
        rank = max(len(t.dims) for t in tensors)
        shapes = [(1,) * (rank - len(t.dims)) + t.dims for t in tensors]
        out = math.prod(max(sizes) if 0 not in sizes else 0 for sizes in zip(*shapes, strict=True))
        full = [t for t in tensors if len(t.dims) == rank]  # scalars do not widen the type
        size = item or max(t.item for t in full)
        return _cost(out, *tensors, written=out * size)

    return rule


def _copy(arguments: _Arguments, _: Sequence[Any]) -> Cost:
    target, source = arguments[0], arguments[1]
    return _cost(0, source, written=target.bytes)


def _fill(arguments: _Arguments, _: Sequence[Any]) -> Cost:
    return Cost(float(arguments[0].bytes), 0.0)


def _reduce(arguments: _Arguments, _: Sequence[Any]) -> Cost:
    """The result is not counted."""
    return _cost(arguments[0].numel, arguments[0])


def _rows(flops: int) -> _Rule:
    """Reads its tensors and writes one as large as the first."""

    def rule(arguments: _Arguments, _: Sequence[Any]) -> Cost:
        x = arguments[0]
        return _cost(flops * x.numel, *_present(arguments), written=x.numel * x.item)

    return rule


def _gather(arguments: _Arguments, _: Sequence[Any]) -> Cost:
    source, index = arguments[0], arguments[2]
    return _cost(0, index, written=2 * index.numel * source.item)


def _embedding(arguments: _Arguments, _: Sequence[Any]) -> Cost:
    weight, index = arguments[0], arguments[1]
    return _cost(0, index, written=2 * index.numel * weight.dims[1] * weight.item)


def _embedding_backward(arguments: _Arguments, concrete: Sequence[Any]) -> Cost:
    grad, index = arguments[0], arguments[1]
    width = grad.dims[-1]
    return _cost(grad.numel, grad, index, written=int(concrete[2]) * width * grad.item)


def _foreach(arguments: _Arguments, _: Sequence[Any]) -> Cost:
    lists = [a for a in arguments if isinstance(a, list)]
    tensors = [t for each in lists for t in each]
    written = sum(t.bytes for t in lists[0])
    return _cost(sum(t.numel for t in lists[0]), *tensors, written=written)


def _foreach_norm(arguments: _Arguments, _: Sequence[Any]) -> Cost:
    return _cost(sum(t.numel for t in arguments[0]), *arguments[0])


def _adamw(arguments: _Arguments, _: Sequence[Any]) -> Cost:
    """Reads parameter, gradient and two moments, writes all but the gradient."""
    params, grads, first, second = arguments[:4]
    tensors = [*params, *grads, *first, *second]
    written = sum(t.bytes for t in (*params, *first, *second))
    return _cost(15 * sum(t.numel for t in params), *tensors, written=written)


def _op(name: str, letters: str, part: str = "forward", inputs: int | None = None) -> _Rule:
    """One of fastppo's, by its formulas; the tensors that it reads are in the trace.

    Args:
        name: of the op.
        letters: of the dimensions of its first tensor; tokens in B sequences are those of one.
        part: forward or backward.
        inputs: how many arguments are; None: all.
    """
    work: Work = getattr(WORK[name], part)

    def rule(arguments: _Arguments, _: Sequence[Any]) -> Cost:
        x = arguments[0]
        size = {"B": 1, "itemsize": x.item, **dict(zip(letters, x.dims, strict=True))}
        written, flops = (evaluate(formula, size) for formula in (work.writes, work.operations))
        return _cost(flops, *_present(arguments[:inputs]), written=written)

    return rule


def _operators(names: str) -> list[str]:
    """The operators of these names, and those that work in place."""
    return [f"aten::{name}{end}" for name in names.split() for end in ("", "_")]


_POINTWISE = _operators(
    "add sub rsub mul div neg exp exp2 log log2 sqrt rsqrt reciprocal pow tanh sigmoid silu gelu "
    "relu clamp clamp_min clamp_max minimum maximum where abs lerp addcmul addcdiv masked_fill sin "
    "cos square sign floor round threshold_backward silu_backward gelu_backward tanh_backward "
    "sigmoid_backward cumsum"
)
_COMPARISONS = _operators(
    "eq ne lt le gt ge logical_and logical_or logical_not bitwise_and bitwise_or bitwise_not isnan"
)
_REDUCTIONS = [
    f"aten::{name}"
    for name in (
        *("sum", "mean", "max", "min", "amax", "amin", "argmax", "argmin", "logsumexp", "norm"),
        *("linalg_vector_norm", "any", "all", "nonzero"),
    )
]
_FOREACH = _operators(
    "_foreach_add _foreach_sub _foreach_mul _foreach_div _foreach_sqrt _foreach_lerp "
    "_foreach_addcmul _foreach_addcdiv"
)
_REPEATING = frozenset((*_POINTWISE, *_COMPARISONS, *_FOREACH, "aten::copy_", "aten::zero_"))
_SDPA = "aten::_scaled_dot_product_"

RULES: Mapping[str, _Rule] = {
    **dict.fromkeys(_POINTWISE, _pointwise()),
    **dict.fromkeys(_COMPARISONS, _pointwise(item=1)),
    **dict.fromkeys(_REDUCTIONS, _reduce),
    **dict.fromkeys(_FOREACH, _foreach),
    "aten::_foreach_norm": _foreach_norm,
    "aten::_fused_adamw_": _adamw,
    **dict.fromkeys(("aten::mm", "aten::bmm"), _product(0)),
    **dict.fromkeys(("aten::addmm", "aten::baddbmm", "aten::_addmm_activation"), _product(1)),
    f"{_SDPA}flash_attention": _attention(False, 4),
    f"{_SDPA}flash_attention_for_cpu": _attention(False, 4),
    f"{_SDPA}efficient_attention": _attention(False, 6),
    f"{_SDPA}cudnn_attention": _attention(False, 6),
    f"{_SDPA}flash_attention_backward": _attention(True, 11),
    f"{_SDPA}flash_attention_for_cpu_backward": _attention(True, 7),
    f"{_SDPA}efficient_attention_backward": _attention(True, 11),
    f"{_SDPA}cudnn_attention_backward": _attention(True, 14),
    "aten::copy_": _copy,
    **dict.fromkeys(("aten::fill_", "aten::zero_"), _fill),
    **dict.fromkeys(("aten::_softmax", "aten::_log_softmax"), _rows(5)),
    **{f"aten::_{name}_backward_data": _rows(8) for name in ("softmax", "log_softmax")},
    **{
        f"aten::{name}{end}": _rows(8)
        for name in ("native_layer_norm", "_fused_rms_norm")
        for end in ("", "_backward")
    },
    "aten::gather": _gather,
    "aten::embedding": _embedding,
    "aten::embedding_dense_backward": _embedding_backward,
    "fastppo::token_logprobs_fwd": _op("token_logprobs", "NV"),
    "fastppo::token_logprobs_bwd_out": _op("token_logprobs", "NV", "backward", 7),
    "fastppo::token_logprobs_bwd_": _op("token_logprobs", "NV", "backward", 7),
    "fastppo::gae": _op("gae", "T"),
    "fastppo::gae_classic": _op("gae_classic", "TE"),
    **{f"fastppo::{name}": _op(name, "N") for name in ("ppo_loss", "value_loss", "whiten")},
}
