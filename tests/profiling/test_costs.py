"""Bytes and operations from shapes, and the roofline of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fastppo.ops  # noqa: F401  # registers torch.ops.fastppo
from fastppo.profiling.costs import RULES, operator_cost
from fastppo.profiling.meta import Ceilings, Cost
from fastppo.profiling.roofline import attainable_tflops, floor_us, ridge
from fastppo.profiling.trace import Span

CEILINGS = Ceilings(copy_gb_s=1000.0, bf16_tflops=100.0, fp32_tflops=10.0)
F, H, L = "float", "c10::BFloat16", "long int"


def cost(
    name: str,
    dims: list[Any],
    types: list[str],
    concrete: tuple[str, ...] = (),
    strides: list[Any] | None = None,
    **options: str,
) -> Cost | None:
    args = {"Input Dims": dims, "Input type": types, "Concrete Inputs": list(concrete)}
    if strides:
        args["Input Strides"] = strides
    return operator_cost(Span(name, "cpu_op", 0, 1, 0, 0, args), **options)


def attention(*before: str) -> tuple[str, ...]:
    return (*before, "True")


@pytest.mark.parametrize(
    ("name", "dims", "types", "concrete", "num_bytes", "flops"),
    [
        ("aten::mm", [[2, 3], [3, 5]], [F, F], (), 4 * (6 + 15 + 10), 2 * 2 * 3 * 5),
        ("aten::bmm", [[7, 2, 3], [7, 3, 5]], [H, H], (), 2 * 7 * (6 + 15 + 10), 7 * 60),
        ("aten::addmm", [[5], [2, 3], [3, 5]], [F] * 3, (), 4 * (5 + 6 + 15 + 10), 60),
        # 2 products of 2·4·(6x8 by 8x8): half of them where causal
        (
            "aten::_scaled_dot_product_flash_attention",
            [[2, 4, 6, 8], [2, 2, 6, 8], [2, 2, 6, 8], [], []],
            [H, H, H, "Scalar", "Scalar"],
            ("", "", "", "0.", "False"),
            2 * (2 * 4 * 6 * 8 * 2 + 2 * 2 * 6 * 8 * 2),
            2 * 4 * 2 * (2 * 6 * 6 * 8),
        ),
        (
            "aten::_scaled_dot_product_flash_attention_for_cpu",
            [[1, 1, 6, 8]] * 3 + [[], []],
            [F, F, F, "Scalar", "Scalar"],
            ("", "", "", "0.", "True"),
            4 * 4 * 48,
            2 * 6 * 6 * 8,
        ),
        # five products instead of two; reads grad, q, k, v, out and writes three gradients
        (
            "aten::_scaled_dot_product_flash_attention_for_cpu_backward",
            [[1, 1, 6, 8]] * 5 + [[1, 1, 6], [], []],
            [F] * 6 + ["Scalar", "Scalar"],
            (*[""] * 6, "0.", "False"),
            8 * 4 * 48,
            5 * 2 * 6 * 6 * 8,
        ),
        ("aten::add", [[4, 8], [8], []], [F, F, "Scalar"], (), 4 * (32 + 8 + 32), 32),
        ("aten::mul", [[], [4, 8]], ["double", H], (), 8 + 2 * 64, 32),  # a scalar widens nothing
        ("aten::mul", [[4, 1], [1, 8]], [F, H], (), 16 + 16 + 4 * 32, 32),
        ("aten::gt", [[4, 8], []], [F, "Scalar"], (), 4 * 32 + 32, 32),
        ("aten::where", [[3], [3], []], ["bool", F, F], (), 3 + 12 + 4 + 12, 3),
        ("aten::copy_", [[4, 8], [4, 8], []], [F, H, "Scalar"], (), 2 * 32 + 4 * 32, 0),
        ("aten::fill_", [[4, 8], []], [H, "Scalar"], (), 64, 0),
        ("aten::sum", [[4, 8], [], []], [F, "ScalarList", ""], (), 128, 32),
        ("aten::_log_softmax", [[4, 8], [], []], [F, "Scalar", "Scalar"], (), 256, 5 * 32),
        ("aten::_softmax_backward_data", [[4, 8], [4, 8]], [F, F], (), 3 * 128, 8 * 32),
        ("aten::gather", [[4, 100], [], [4, 1]], [F, "Scalar", L], (), 4 * 8 + 2 * 4 * 4, 0),
        ("aten::embedding", [[100, 16], [5]], [H, L], (), 5 * 8 + 2 * 5 * 16 * 2, 0),
        (
            "aten::embedding_dense_backward",
            [[5, 16], [5], []],
            [F, L, "Scalar"],
            ("", "", "100"),
            4 * 80 + 40 + 4 * 1600,
            80,
        ),
        # lists, fp32 where nothing else is said: 24 elements read of each, written of the first
        ("aten::_foreach_mul_", [[[4, 5], [4]], []], ["TensorList", "Scalar"], (), 2 * 96, 24),
        ("aten::_foreach_lerp_", [[[24]], [[24]]], ["TensorList"] * 2, (), 3 * 96, 24),
        ("aten::_foreach_norm", [[[4, 5], [4]]], ["TensorList"], (), 96, 24),
        ("aten::_fused_adamw_", [[[24]]] * 4, ["TensorList"] * 4, (), 7 * 96, 15 * 24),
        ("fastppo::token_logprobs_fwd", [[2, 50], [2]], [H, L], ("", ""), 200 + 16 + 16, 800),
        ("fastppo::gae", [[9], [3], [9], [9]], [F, "int", F, "bool"], (), 36 * 4 + 12 + 9, 6 * 9),
    ],
)
def test_costs(
    name: str,
    dims: list[Any],
    types: list[str],
    concrete: tuple[str, ...],
    num_bytes: int,
    flops: int,
) -> None:
    found = cost(name, dims, types, concrete)
    assert found is not None
    assert (found.bytes, found.flops) == (num_bytes, flops)
    assert found.half == (types[0] == H and ("mm" in name or "dot_product" in name))


def test_an_expanded_dimension_is_in_memory_once() -> None:
    found = cost("aten::mul", [[4, 8], [4, 8]], [F, F], strides=[[8, 1], [0, 1]])
    assert found == Cost(4 * (32 + 8 + 32), 32)


def test_lists_have_the_type_they_are_said_to_have() -> None:
    found = cost("aten::_foreach_norm", [[[24]]], ["TensorList"], list_dtype=H)
    assert found == Cost(48, 24)


@pytest.mark.parametrize(
    ("name", "dims", "types"),
    [
        ("aten::view", [[2, 3]], [F]),  # moves nothing
        ("aten::index", [[2, 3], []], [F, ""]),  # a list of indices has no shapes
        ("aten::mm", [[2, 3]], [F]),
        ("aten::mm", [[2, 3], [4, 5]], [F, F]),
        ("aten::mm", [[], []], ["", ""]),
        ("aten::add", [[], []], ["Scalar", ""]),
        ("aten::add", [[2]], ["c10::quint8"]),
        ("aten::_fused_adamw_", [[]] * 4, ["TensorList"] * 4),  # of more than 30 tensors
    ],
)
def test_what_is_not_known_has_no_cost(name: str, dims: list[Any], types: list[str]) -> None:
    assert cost(name, dims, types) is None
    assert operator_cost(Span("aten::mm", "cpu_op", 0, 1, 0, 0, {})) is None  # without shapes


@pytest.mark.parametrize("name", RULES)
def test_rules_are_for_operators_that_exist(name: str) -> None:
    namespace, _, operator = name.partition("::")

    operators = getattr(torch.ops, namespace)
    found = hasattr(operators, operator) or hasattr(operators, operator.removesuffix("_"))
    assert found


@pytest.mark.parametrize("name", [name for name in RULES if "dot_product" in name])
def test_the_causal_flag_is_where_torch_has_it(name: str) -> None:
    schema = getattr(torch.ops.aten, name.removeprefix("aten::")).default._schema
    names = [argument.name for argument in schema.arguments]
    first = 1 if name.endswith("backward") else 0
    assert names[first : first + 3] == ["query", "key", "value"]
    dims = [[]] * first + [[1, 1, 6, 8]] * 3 + [[]] * (len(names) - first - 3)
    types = [""] * first + [F] * 3 + [""] * (len(names) - first - 3)

    def flops(flag: str) -> float:
        concrete = tuple(flag if each == "is_causal" else "" for each in names)
        found = cost(name, dims, types, concrete)
        assert found is not None
        return found.flops

    assert flops("True") == flops("False") / 2


def test_the_floor_is_the_slower_of_moving_and_computing() -> None:
    assert floor_us(Cost(bytes=2e6, flops=1e6), CEILINGS) == pytest.approx(2.0)  # 1e6 B a µs
    assert floor_us(Cost(bytes=1, flops=5e7), CEILINGS) == pytest.approx(5.0)  # fp32, 1e7 a µs
    assert floor_us(Cost(bytes=1, flops=5e8, half=True), CEILINGS) == pytest.approx(5.0)


def test_the_roof_rises_to_the_ridge_and_is_flat_after_it() -> None:
    assert ridge(CEILINGS, half=True) == 100
    assert attainable_tflops(10, CEILINGS, half=True) == 10
    assert attainable_tflops(100, CEILINGS, half=True) == 100
    assert attainable_tflops(1000, CEILINGS, half=True) == 100
    assert attainable_tflops(1000, CEILINGS, half=False) == 10
