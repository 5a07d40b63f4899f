"""loss_weights: each aggregation equals the mean it names, and splits exactly."""

from __future__ import annotations

import pytest
import torch

from fastppo.ops import loss_weights, loss_weights_reference

LENGTHS = [4, 0, 1, 7, 3]
CU = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)], dtype=torch.int32)
AGGREGATIONS = ["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "constant"]


@pytest.fixture
def mask(rng):
    mask = torch.rand(sum(LENGTHS), generator=rng) < 0.6
    mask[0], mask[-3:] = True, False  # the last sequence has no valid token
    return mask


def parts_of(x):
    return list(x.split(LENGTHS))


def total_of(aggregation, mask):
    sequences = sum(bool(m.any()) for m in parts_of(mask))
    return {"token-mean": int(mask.sum()), "constant": 5 * 7}.get(aggregation, sequences)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_named_mean(aggregation, mask, rng):
    losses = torch.randn(sum(LENGTHS), generator=rng)
    kept = [x[m] for x, m in zip(parts_of(losses), parts_of(mask), strict=True) if m.any()]
    expected = {
        "token-mean": losses[mask].mean(),
        "seq-mean-token-sum": torch.stack([x.sum() for x in kept]).mean(),
        "seq-mean-token-mean": torch.stack([x.mean() for x in kept]).mean(),
        "constant": losses[mask].sum() / 35,
    }[aggregation]
    total = total_of(aggregation, mask)
    w = loss_weights(CU, mask, aggregation=aggregation, total=total)
    torch.testing.assert_close((w * losses).sum(), expected)
    assert (w[~mask] == 0).all()
    torch.testing.assert_close(
        w, loss_weights_reference(CU, mask, aggregation=aggregation, total=total)
    )


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_splitting_whole_sequences_changes_no_weight(aggregation, mask):
    total = total_of(aggregation, mask)
    whole = loss_weights(CU, mask, aggregation=aggregation, total=total)
    first = loss_weights(CU[:3], mask[:4], aggregation=aggregation, total=torch.tensor(total))
    rest = loss_weights(CU[2:] - CU[2], mask[4:], aggregation=aggregation, total=total)
    assert torch.equal(torch.cat([first, rest]), whole)


def test_nothing_valid_and_nothing_at_all():
    mask = torch.zeros(15, dtype=torch.bool)
    for aggregation in AGGREGATIONS:
        w = loss_weights(CU, mask, aggregation=aggregation, total=0)
        assert (w == 0).all()
        empty = loss_weights(torch.tensor([0]), mask[:0], aggregation=aggregation, total=0)
        assert empty.shape == (0,)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_compiles_without_a_graph_break(aggregation, mask):
    compiled = torch.compile(loss_weights, fullgraph=True, backend="aot_eager", dynamic=True)
    for cu, m in ((CU, mask), (CU[:5], mask[:12])):
        for total in (7.0, torch.tensor(5)):
            expected = loss_weights(cu, m, aggregation=aggregation, total=total)
            result = compiled(cu, m, aggregation=aggregation, total=total)
            assert torch.equal(result, expected)


def test_bad_arguments_are_named(mask):
    with pytest.raises(ValueError, match="^aggregation: expected"):
        loss_weights(CU, mask, aggregation="mean", total=1)
    with pytest.raises(ValueError, match="^total: .*got -1"):
        loss_weights(CU, mask, aggregation="token-mean", total=-1)
    with pytest.raises(ValueError, match=r"total: .* got shape \(1,\)"):
        loss_weights(CU, mask, aggregation="token-mean", total=torch.ones(1))
    with pytest.raises(TypeError, match="^mask: expected"):
        loss_weights(CU, mask.float(), aggregation="token-mean", total=1)
    with pytest.raises(ValueError, match="^cu_seqlens: .*got meta"):
        loss_weights(CU.to("meta"), mask, aggregation="token-mean", total=1)
    with pytest.raises(ValueError, match="cu_seqlens: .*rows 15, got 5"):
        loss_weights(CU[:4], mask, aggregation="token-mean", total=1)
