"""group_advantages: each kind's formula, ragged groups, groups that teach nothing."""

from __future__ import annotations

import pytest
import torch

from fastppo.ops import group_advantages, group_advantages_reference

KINDS = ["grpo", "dr_grpo", "rloo", "reinforce"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [0, 1, 2, 37, 1000])
@pytest.mark.parametrize("unscored", [0.0, 0.3])
def test_ragged_interleaved_groups(kind, size, unscored, rng):
    scores = torch.randn(size, generator=rng)
    scores[torch.rand(size, generator=rng) < unscored] = torch.nan
    ids = torch.randint(-3, max(1, size // 3), (size,), generator=rng) * 1_000_003
    result = group_advantages(scores, ids, kind=kind)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, group_advantages_reference(scores, ids, kind=kind))


def test_formulas():
    scores = torch.tensor([1.0, 0.0, 5.0, 0.0, 7.0])
    ids = torch.tensor([8, 8, 3, 8, 3], dtype=torch.int32)
    a, b = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([5.0, 7.0])
    for kind, fn in {
        "grpo": lambda r: (r - r.mean()) / (r.std() + 1e-4),
        "dr_grpo": lambda r: r - r.mean(),
        "rloo": lambda r: (r - r.mean()) * len(r) / (len(r) - 1),
    }.items():
        expected = torch.stack([fn(a)[0], fn(a)[1], fn(b)[0], fn(a)[2], fn(b)[1]])
        torch.testing.assert_close(group_advantages(scores, ids, kind=kind), expected)
    expected = scores - scores.mean()
    torch.testing.assert_close(group_advantages(scores, ids, kind="reinforce"), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_no_variance_is_exactly_zero(kind, dtype):
    """0.1 in float64 is not the rounded mean of 7 of it."""
    scores = torch.full((21,), 0.1, dtype=dtype)
    ids = torch.arange(21) // 7
    assert (group_advantages(scores, ids, kind=kind) == 0).all()


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "rloo"])
def test_group_of_one_and_unscored_groups(kind):
    scores = torch.tensor([4.0, torch.nan, 1.0, torch.nan, torch.nan, 2.0, 3.0])
    ids = torch.tensor([0, 1, 1, 2, 2, 3, 3])
    result = group_advantages(scores, ids, kind=kind)
    assert (result[:5] == 0).all()
    assert result[5] < 0 < result[6]


@pytest.mark.parametrize("kind", KINDS)
def test_advantages_of_a_group_sum_to_zero(kind, rng):
    scores = torch.rand(24, generator=rng)
    result = group_advantages(scores, torch.arange(24) % 4, kind=kind)
    assert abs(float(result.sum())) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_compiles_without_a_graph_break(kind, rng):
    """How many groups there are is data, and no shape depends on it."""
    scores = torch.randn(40, generator=rng)
    scores[3] = torch.nan
    ids = torch.randint(9, (40,), generator=rng)
    compiled = torch.compile(group_advantages, fullgraph=True, backend="aot_eager", dynamic=True)
    for n, groups in ((40, ids), (40, ids // 4), (17, ids)):
        expected = group_advantages(scores[:n], groups[:n], kind=kind)
        assert torch.equal(compiled(scores[:n], groups[:n], kind=kind), expected)


def test_does_not_depend_on_the_order_of_completions(rng):
    scores, ids = torch.randn(50, generator=rng), torch.randint(7, (50,), generator=rng)
    order = torch.randperm(50, generator=rng)
    for kind in KINDS:
        result = group_advantages(scores, ids, kind=kind)[order]
        shuffled = group_advantages(scores[order], ids[order], kind=kind)
        torch.testing.assert_close(shuffled, result, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtypes(dtype, rng):
    scores = torch.randn(30, generator=rng).to(dtype)
    ids = torch.arange(30) // 4
    for kind in KINDS:
        result = group_advantages(scores, ids, kind=kind)
        assert result.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        expected = group_advantages_reference(scores.double(), ids, kind=kind)
        torch.testing.assert_close(result.double(), expected, rtol=1e-6, atol=1e-7)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="^kind: expected"):
        group_advantages(torch.zeros(2), torch.zeros(2, dtype=torch.long), kind="ppo")
    with pytest.raises(TypeError, match="group_ids: .*int32 or int64, got float32"):
        group_advantages(torch.zeros(2), torch.zeros(2), kind="grpo")
    with pytest.raises(ValueError, match="^group_ids: .*got meta"):
        ids = torch.zeros(2, dtype=torch.long, device="meta")
        group_advantages(torch.zeros(2), ids, kind="grpo")
    with pytest.raises(TypeError, match="scores: .*got int64"):
        group_advantages(torch.zeros(2).long(), torch.zeros(2).long(), kind="grpo")
    with pytest.raises(ValueError, match=r"^group_ids: .*got \(3,\)"):
        group_advantages(torch.zeros(2), torch.zeros(3, dtype=torch.long), kind="grpo")
