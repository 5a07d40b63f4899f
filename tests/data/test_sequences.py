"""PackedBatch: pack, select, bins, to, unpack against plain per-sequence Python."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fastppo.data.ragged import offsets, ragged_arange
from fastppo.data.sequences import PackedSequences, partition
from fastppo.ppo.experience import PackedBatch

TOKENS = st.integers(0, 50_000)
PAIRS = st.lists(
    st.tuples(st.lists(TOKENS, min_size=1, max_size=7), st.lists(TOKENS, max_size=7)), max_size=7
)
FLOATS = (
    "rollout_logprobs",
    "old_logprobs",
    "ref_logprobs",
    "values",
    "rewards",
    "advantages",
    "returns",
    "weights",
)
INT32 = ("input_ids", "position_ids", "cu_seqlens", "targets", "rows", "cu_responses")


def full_batch(pairs: list[tuple[list[int], list[int]]]) -> PackedBatch:
    """A batch with every optional field, each entry telling its field and place."""
    batch = PackedBatch.pack(
        [p for p, _ in pairs],
        [np.array(r, np.int64) for _, r in pairs],
        rollout_logprobs=[np.zeros(len(r), np.float32) for _, r in pairs],
        loss_mask=[[t % 2 == 0 for t in r] for _, r in pairs],
        truncated=[len(r) % 2 == 1 for _, r in pairs],
    )
    place = torch.arange(batch.num_responses, dtype=torch.float32)
    fields = {name: place + 1000 * i for i, name in enumerate(FLOATS)}
    bootstrap = torch.arange(batch.num_sequences, dtype=torch.float32)
    return batch.replace(**fields, bootstrap=bootstrap)


def same(a: PackedBatch, b: PackedBatch) -> None:
    for name in (*INT32, *FLOATS, "truncated", "loss_mask", "bootstrap"):
        x, y = getattr(a, name), getattr(b, name)
        assert (x is None) == (y is None), name
        if x is not None:
            assert x.dtype == y.dtype and torch.equal(x, y), name
    assert a.cu_seqlens_host.tolist() == b.cu_seqlens_host.tolist() == a.cu_seqlens.tolist()
    assert a.cu_responses_host.tolist() == b.cu_responses_host.tolist() == a.cu_responses.tolist()
    assert a.max_seqlen == b.max_seqlen


@given(PAIRS)
def test_pack_and_unpack_are_inverse(pairs: list[tuple[list[int], list[int]]]) -> None:
    batch = full_batch(pairs)
    responses = [r for _, r in pairs]
    assert [x.tolist() for x in batch.unpack(batch.targets)] == responses
    assert batch.num_sequences == len(pairs)
    assert batch.response_lengths.tolist() == [len(r) for r in responses]
    assert batch.sequence_lengths.tolist() == [len(p) + len(r) for p, r in pairs]
    assert batch.max_seqlen == max((len(p) + len(r) for p, r in pairs), default=0)
    assert batch.truncated.tolist() == [len(r) % 2 == 1 for r in responses]
    # A target is the token after its row; the last row of a sequence predicts nothing.
    assert torch.equal(batch.input_ids[batch.rows.long() + 1], batch.targets)
    assert batch.input_ids[batch.last_rows.long()].tolist() == [(p + r)[-1] for p, r in pairs]
    assert not set(batch.last_rows.tolist()) & set(batch.rows.tolist())


@given(PAIRS, st.data())
def test_select_is_packing_the_chosen_sequences(
    pairs: list[tuple[list[int], list[int]]], data: st.DataObject
) -> None:
    batch = full_batch(pairs)
    indices = data.draw(
        st.lists(st.integers(0, len(pairs) - 1), max_size=9) if pairs else st.just([])
    )
    places = batch.unpack(np.arange(batch.num_responses))
    picked = [places[i] for i in indices]
    gather = torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *picked]))
    expected = full_batch([pairs[i] for i in indices]).replace(
        bootstrap=torch.tensor(indices, dtype=torch.float32),
        **{name: getattr(batch, name)[gather] for name in FLOATS},
    )
    same(batch.select(indices), expected)
    same(batch.select(np.array(indices, np.int64)), expected)
    same(batch.select(torch.tensor(indices, dtype=torch.int64)), expected)


def test_select_keeps_missing_fields_missing_and_gradients() -> None:
    values = torch.ones(3, requires_grad=True)
    batch = PackedBatch.pack([[1], [2]], [[3, 4], [5]]).replace(values=values)
    chosen = batch.select([1, 1])
    assert chosen.advantages is None and chosen.loss_mask is None and chosen.bootstrap is None
    assert chosen.values is not None
    chosen.values.sum().backward()
    assert values.grad is not None and values.grad.tolist() == [0, 0, 2]


@given(PAIRS)
def test_valid_lengths_count_the_mask_and_follow_a_selection(
    pairs: list[tuple[list[int], list[int]]],
) -> None:
    batch = full_batch(pairs)
    expected = [sum(t % 2 == 0 for t in response) for _, response in pairs]
    order = np.arange(len(pairs))[::-1]
    before = batch.select(order).valid_lengths  # reads its own mask
    assert batch.valid_lengths.tolist() == expected
    for lengths in (before, batch.select(order).valid_lengths):  # the second is handed on
        assert lengths.dtype == np.int32 and lengths.tolist() == expected[::-1]
    assert batch.replace(loss_mask=None).valid_lengths.tolist() == [len(r) for _, r in pairs]


@given(PAIRS)
def test_bins_cover_the_batch_and_select_takes_them(
    pairs: list[tuple[list[int], list[int]]],
) -> None:
    batch = full_batch(pairs)
    bins = batch.bins(14)
    assert sorted(sum(bins, [])) == list(range(len(pairs)))
    parts = [batch.select(indices) for indices in bins]
    assert all(part.num_tokens <= 14 for part in parts)
    assert sum(part.num_responses for part in parts) == batch.num_responses


def test_partition_balances_ranks() -> None:
    lengths = np.random.default_rng(0).integers(100, 2000, 256)
    parts = partition(lengths, 8)
    loads = [int(lengths[part].sum()) for part in parts]
    assert sorted(sum(parts, [])) == list(range(256))
    assert max(loads) - min(loads) <= 0.001 * max(loads)


def test_dtypes_and_views_of_one_arena() -> None:
    batch = PackedBatch.pack([[1, 2]], [[3]], rollout_logprobs=[[-1.0]], loss_mask=[[True]])
    assert all(getattr(batch, name).dtype == torch.int32 for name in INT32)
    assert batch.rollout_logprobs is not None and batch.rollout_logprobs.dtype == torch.float32
    assert batch.arena is not None
    storage = batch.arena.untyped_storage().data_ptr()
    for name in (*INT32, "truncated", "rollout_logprobs", "loss_mask"):
        assert getattr(batch, name).untyped_storage().data_ptr() == storage
        assert getattr(batch, name).data_ptr() % 128 == 0
    with pytest.raises(ValueError, match="read-only"):
        batch.cu_seqlens_host[0] = 1


def test_the_batch_outlives_what_it_was_packed_from() -> None:
    batch = PackedBatch.pack([np.arange(500)], [np.arange(500, 600)])
    ids = batch.input_ids
    del batch
    junk = [torch.full((600,), 7, dtype=torch.int32) for _ in range(50)]
    assert ids.tolist() == list(range(600)) and len(junk) == 50


def test_to_moves_the_arena_in_one_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = full_batch([([1, 2], [3, 4]), ([5], [6])])
    assert batch.to("cpu") is batch
    copies = []
    original = torch.Tensor.to

    def counted(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        copies.append(self)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", counted)
    moved = batch.to("meta")
    # Once for the arena, once for each field that was computed later and lives elsewhere.
    assert [x is batch.arena for x in copies] == [True] + [False] * (len(FLOATS) + 1)
    assert moved.device.type == "meta" and moved.arena is not None
    assert moved.input_ids.dtype == torch.int32 and moved.truncated.dtype == torch.bool
    assert moved.cu_seqlens_host.tolist() == [0, 4, 6]
    assert moved.values is not None and moved.values.shape == (3,)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_packing_for_a_gpu_equals_packing_and_moving() -> None:
    generator = np.random.default_rng(0)
    sizes = generator.integers(1, 300, (64, 2))
    prompts, responses = ([generator.integers(0, 50_000, n) for n in column] for column in sizes.T)
    logprobs = [np.full(len(r), -0.5, np.float32) for r in responses]
    host = PackedBatch.pack(prompts, responses, rollout_logprobs=logprobs)
    device = PackedBatch.pack(prompts, responses, rollout_logprobs=logprobs, device="cuda")
    for batch in (device, host.to("cuda")):
        assert batch.device.type == "cuda"
        same(batch.to("cpu"), host)
        same(batch.select([5, 0, 63]).to("cpu"), host.select([5, 0, 63]))


def test_empty_batch() -> None:
    batch = PackedBatch.pack([], [])
    assert (batch.num_sequences, batch.num_tokens, batch.num_responses) == (0, 0, 0)
    assert batch.max_seqlen == 0 and batch.bins(1) == [] and batch.unpack(batch.targets) == []
    same(batch, PackedBatch.pack([[1]], [[2]]).select([]))


def test_flat_arrays_pack_like_ragged_ones() -> None:
    flat = PackedBatch.pack(
        torch.tensor([1, 2, 3]),
        np.array([4, 5, 6], np.uint16),
        prompt_lengths=[1, 2],
        response_lengths=torch.tensor([3, 0]),
        rollout_logprobs=torch.tensor([-1.0, -2.0, -3.0], dtype=torch.float64),
        loss_mask=np.array([True, False, True]),
    )
    ragged = PackedBatch.pack(
        [[1], [2, 3]],
        [[4, 5, 6], []],
        rollout_logprobs=[[-1.0, -2.0, -3.0], []],
        loss_mask=[[True, False, True], []],
    )
    same(flat, ragged)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"values": torch.zeros(2)}, ValueError, r"values: .*got \(2,\)"),
        ({"advantages": torch.zeros(3, 1)}, ValueError, r"advantages: expected"),
        ({"bootstrap": torch.zeros(3)}, ValueError, r"bootstrap: expected"),
        ({"rewards": torch.zeros(3, dtype=torch.int64)}, TypeError, "rewards: .*got torch.int64"),
        ({"loss_mask": torch.ones(3)}, TypeError, "loss_mask: expected"),
        ({"targets": torch.ones(3).long()}, TypeError, "targets: expected"),
        ({"values": torch.zeros(3, device="meta")}, ValueError, "values: .*on cpu, got meta"),
        ({"cu_responses_host": np.zeros(2, np.int32)}, ValueError, "cu_responses_host: expected"),
    ],
)
def test_fields_that_do_not_fit_are_refused(
    fields: dict[str, Any], error: type[Exception], message: str
) -> None:
    batch = PackedBatch.pack([[1], [2]], [[3, 4], [5]])
    with pytest.raises(error, match=message):
        batch.replace(**fields)


@pytest.mark.parametrize(
    ("indices", "error", "message"),
    [
        ([0, 2], ValueError, r"indices\[1\]: .*got 2"),
        ([-1], ValueError, r"indices\[0\]: .*got -1"),
        ([0.0], TypeError, "indices: .*got float64"),
        ([True, False], TypeError, "indices: .*got bool"),
        ([[0]], TypeError, "indices: .*shape"),
        (torch.tensor(1), TypeError, "indices: .*shape"),
    ],
)
def test_select_refuses(indices: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        PackedBatch.pack([[1], [2]], [[3, 4], [5]]).select(indices)


def test_unpack_refuses_other_lengths() -> None:
    batch = PackedBatch.pack([[1], [2]], [[3, 4], [5]])
    with pytest.raises(ValueError, match=r"^x: .*got \(2,\)"):
        batch.unpack(torch.zeros(2))
    with pytest.raises(ValueError, match=r"^x: .*got \(2,\)"):
        batch.unpack(np.zeros(2))


def test_ragged_arithmetic() -> None:
    lengths = np.array([2, 0, 3], np.int32)
    assert offsets(lengths).tolist() == [0, 2, 2, 5]
    assert ragged_arange(np.array([10, 5, 0], np.int32), lengths).tolist() == [10, 11, 0, 1, 2]
    with pytest.raises(ValueError, match=r"^lengths: .*got 4294967294"):
        offsets(np.full(2, 2**31 - 1, np.int32))


# The border to padded tensors

IDS = torch.tensor([[0, 0, 5, 6, 7, 8], [3, 0, 4, 9, 0, 2], [1, 2, 3, 4, 5, 6]])
# left-padded; holes in the middle and between; full
PROMPT = torch.tensor([[0, 0, 1, 1, 0, 0], [1, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 0]])
RESPONSE = torch.tensor([[0, 0, 0, 0, 1, 1], [0, 0, 1, 1, 0, 1], [0, 0, 0, 0, 0, 1]])
TOOL = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 1, 1], [1, 1, 1, 1, 1, 1]])


@pytest.mark.parametrize("kind", [PackedBatch, PackedSequences])
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32, torch.bfloat16])
def test_padded_sequences_are_those_packed_by_hand(kind: Any, dtype: torch.dtype) -> None:
    masks = (mask.to(dtype) for mask in (PROMPT, RESPONSE, TOOL))
    batch = kind.from_padded(IDS, *masks)
    expected = kind.pack(
        [[5, 6], [3], [1, 2, 3, 4, 5]],
        [[7, 8], [4, 9, 2], [6]],
        loss_mask=[[True, True], [True, False, True], [True]],
    )
    for name in ("input_ids", "position_ids", "cu_seqlens", "targets", "rows", "loss_mask"):
        assert torch.equal(getattr(batch, name), getattr(expected, name)), name
    assert batch.valid_lengths.tolist() == [2, 2, 1]  # the tool's token is context without a loss


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("seed", range(3))
def test_padding_and_back(side: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    lengths = [(int(p), int(r)) for p, r in rng.integers([1, 0], [6, 6], (5, 2))]
    width = 12
    ids = torch.from_numpy(rng.integers(1, 50, (5, width)))
    prompt, response = torch.zeros(2, 5, width, dtype=torch.bool)
    for row, (p, r) in enumerate(lengths):
        start = width - p - r if side == "left" else 0
        prompt[row, start : start + p] = True
        response[row, start + p : start + p + r] = True
    logprobs = torch.from_numpy(rng.standard_normal((5, width)))
    batch = PackedBatch.from_padded(ids, prompt, response, rollout_logprobs=logprobs)
    assert batch.response_lengths.tolist() == [r for _, r in lengths]
    assert batch.rollout_logprobs is not None
    back = batch.to_padded(batch.rollout_logprobs, response, fill=-1.0)
    assert back.dtype == torch.float32
    assert torch.equal(back, torch.where(response, logprobs.float(), -1.0))
    targets = batch.to_padded(batch.targets, response)
    assert torch.equal(targets.long(), torch.where(response, ids, 0))


@pytest.mark.parametrize(
    ("masks", "name"),
    [
        ((PROMPT, RESPONSE[:, :5]), "response_mask: expected shape"),
        ((PROMPT, RESPONSE, TOOL[:2]), "loss_mask: expected shape"),
        ((PROMPT, RESPONSE | PROMPT), r"response_mask: .* got one at \[0, 2\]"),
        ((RESPONSE, PROMPT), r"prompt_mask: .* got one after it at \[0, 4\]"),
        ((PROMPT * 0, RESPONSE), "prompt_mask: .* row 0"),
        ((None, RESPONSE), "prompt_mask: expected .* got None"),
        ((PROMPT, None), "response_mask: expected .* got None"),
    ],
    ids=["shape", "loss-shape", "overlap", "order", "no-prompt", "no-mask", "no-response-mask"],
)
def test_masks_that_make_no_sense_are_refused(masks: tuple[Tensor, ...], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        PackedSequences.from_padded(IDS, *masks)


def test_arrays_are_as_good_as_tensors() -> None:
    arrays = (x.numpy() for x in (IDS, PROMPT, RESPONSE))
    same(PackedBatch.from_padded(*arrays), PackedBatch.from_padded(IDS, PROMPT, RESPONSE))
    lists: Any = [x.tolist() for x in (IDS, PROMPT, RESPONSE)]
    same(PackedBatch.from_padded(*lists), PackedBatch.from_padded(IDS, PROMPT, RESPONSE))


def test_log_probabilities_and_flags_may_be_arrays_and_lists() -> None:
    masks, logprobs = (IDS, PROMPT, RESPONSE), torch.arange(18.0).reshape(3, 6)
    cut = torch.tensor([True, False, True])
    expected = PackedBatch.from_padded(*masks, rollout_logprobs=logprobs, truncated=cut)
    frozen = logprobs.double().numpy()
    frozen.flags.writeable = False
    flat = logprobs[RESPONSE > 0]
    for array in (logprobs.numpy(), frozen, logprobs.tolist(), list(logprobs), flat, flat.tolist()):
        for flags in (cut.numpy(), cut.tolist()):
            found = PackedBatch.from_padded(*masks, rollout_logprobs=array, truncated=flags)
            same(found, expected)
            assert torch.equal(found.rollout_logprobs, expected.rollout_logprobs)
            assert torch.equal(found.truncated, expected.truncated)
    for wrong in (logprobs[:, :2].tolist(), logprobs[:, :2].numpy()):
        with pytest.raises(ValueError, match=r"^rollout_logprobs: expected shape \(3, 6\), as ids"):
            PackedBatch.from_padded(*masks, rollout_logprobs=wrong)
    for wrong in ([[1.0, 2.0], [3.0], [4.0]], [["a"] * 6] * 3):  # as pack sees them
        with pytest.raises((TypeError, ValueError), match=r"^rollout_logprobs\[0\]: expected"):
            PackedBatch.from_padded(*masks, rollout_logprobs=wrong)


def test_a_mask_of_any_kind_leads_back() -> None:
    batch = PackedBatch.from_padded(IDS, PROMPT, RESPONSE)
    x = torch.arange(1.0, 7.0)
    for mask in (RESPONSE.numpy(), RESPONSE.tolist(), RESPONSE.bool().numpy()):
        assert torch.equal(batch.to_padded(x, mask), batch.to_padded(x, RESPONSE))


def test_ids_are_named_when_they_are_not_padded_rows() -> None:
    for ids in (IDS[None], IDS[0]):
        with pytest.raises(ValueError, match=r"^ids: expected shape \(B, L\), got"):
            PackedBatch.from_padded(ids, ids, ids)


def test_a_field_that_is_no_tensor_is_named() -> None:
    batch = PackedBatch.from_padded(IDS, PROMPT, RESPONSE)
    for value in (np.zeros(6, np.float32), [0.0] * 6):
        with pytest.raises(TypeError, match="^advantages: expected a tensor, got (ndarray|list)"):
            batch.replace(advantages=value)


def test_to_padded_refuses_other_shapes() -> None:
    batch = PackedBatch.from_padded(IDS, PROMPT, RESPONSE)
    with pytest.raises(ValueError, match="^x: expected"):
        batch.to_padded(torch.zeros(5), RESPONSE)
    with pytest.raises(ValueError, match="^response_mask: expected"):
        batch.to_padded(torch.zeros(6), RESPONSE[:2])
    with pytest.raises(ValueError, match="^response_mask: expected 3 tokens in row 1, got 2"):
        batch.to_padded(torch.zeros(6), RESPONSE & TOOL)
    with pytest.raises(ValueError, match="^response_mask: expected 2 tokens in row 0, got 3"):
        batch.to_padded(torch.zeros(6), RESPONSE[[1, 0, 2]])  # as many in all
    with pytest.raises(ValueError, match="^rollout_logprobs: expected"):
        PackedBatch.from_padded(IDS, PROMPT, RESPONSE, rollout_logprobs=torch.zeros(3, 2))
