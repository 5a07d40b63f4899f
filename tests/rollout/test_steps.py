"""What goes through the model in a rollout, step by step, and the cache that it leaves behind."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen3Config

from fastppo.data.sequences import PackedSequences
from fastppo.models import kv_cache
from fastppo.models.kv_cache import KVCache
from fastppo.models.packed import PackedModel
from fastppo.rollout.engine import Rollouts, Sampling
from fastppo.rollout.packed import PackedEngine
from fastppo.rollout.sampler import Sampler, uniforms

VOCAB, EOS = 53, (2, 5)
NAN = float("nan")
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,  # far from uniform
}
CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=8),
    "gpt2": GPT2Config(
        vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=256, initializer_range=0.2
    ),
}
LENGTHS = (7, 2, 1, 12, 5, 9)


def make_policy(family: str = "llama", **options: Any) -> PackedModel:
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[family]))
    return PackedModel(model, **options)


def make_prompts(lengths: tuple[int, ...] = LENGTHS) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, VOCAB, n) for n in lengths]


def sampling(**options: Any) -> Sampling:
    defaults: dict[str, Any] = {"max_new_tokens": 12, "eos_token_ids": EOS, "seed": 7}
    return Sampling(**(defaults | options))


@contextlib.contextmanager
def watched(policy: PackedModel) -> Iterator[list[Tensor]]:
    """The token ids (1, T) of each forward of the trunk inside."""
    ids: list[Tensor] = []
    embeddings = policy.model.get_input_embeddings()
    handle = embeddings.register_forward_pre_hook(lambda _, args: ids.append(args[0]))
    try:
        yield ids
    finally:
        handle.remove()


def assert_plain(
    policy: PackedModel,
    prompts: list[np.ndarray],
    rollouts: Rollouts,
    chosen: Sampling,
    atol: float,
) -> None:
    """Tokens and log-probabilities are those of the ordinary model, run over whole sequences."""
    rows = uniforms(len(prompts), chosen).to(policy.device)
    for row, (prompt, response) in enumerate(zip(prompts, rollouts.responses, strict=True)):
        ids = torch.from_numpy(np.concatenate([prompt, response]).astype(np.int64))
        with policy.unpacked() as model, torch.no_grad():
            logits = model(ids[None].to(policy.device)).logits[0, len(prompt) - 1 : -1]
        # each token of the response drawn as if it were a row at its step
        sampler = Sampler(chosen, rows[row, : len(response), None])
        tokens, logprobs = sampler(logits, torch.arange(len(response), device=policy.device), 0)
        assert tokens.tolist() == response.tolist(), row
        np.testing.assert_allclose(rollouts.logprobs[row], logprobs.cpu(), atol=atol, rtol=0)


# what is computed


@pytest.mark.parametrize("family", list(CONFIGS))
def test_no_token_is_computed_for_padding_or_after_an_end(family: str) -> None:
    """Each prompt token once, each response token but the last once, and nothing else."""
    policy, prompts = make_policy(family), make_prompts(LENGTHS * 4)
    with watched(policy) as ids:
        rollouts = PackedEngine(policy).generate(prompts, sampling())
    lengths = np.array([len(response) for response in rollouts.responses])
    assert len(set(lengths)) > 4
    assert ids[0].tolist() == [np.concatenate(prompts).tolist()]
    for step, seen in enumerate(ids[1:], 1):
        going_on = [r[step - 1] for r in rollouts.responses if len(r) > step]
        assert sorted(seen[0].tolist()) == sorted(going_on)
    assert len(ids) == lengths.max()
    assert sum(x.numel() for x in ids) == sum(LENGTHS) * 4 + (lengths - 1).sum()


@pytest.mark.parametrize(
    ("lengths", "options"),
    [
        (LENGTHS, {}),
        (LENGTHS, {"max_new_tokens": 1}),
        (LENGTHS, {"eos_token_ids": tuple(range(VOCAB))}),
        (LENGTHS, {"temperature": 0.7, "top_p": 0.9}),
        ((1, 1, 1, 1), {}),
        ((1,), {"max_new_tokens": 1}),
        ((1,), {}),
        ((9,), {"eos_token_ids": ()}),
    ],
    ids=["mixed", "one token", "ended at once", "top-p", "ones", "one row once", "one", "endless"],
)
@pytest.mark.parametrize("family", list(CONFIGS))
def test_samples_are_those_of_the_plain_model(
    family: str, lengths: tuple[int, ...], options: dict[str, Any]
) -> None:
    policy, prompts, chosen = make_policy(family), make_prompts(lengths), sampling(**options)
    rollouts = PackedEngine(policy).generate(prompts, chosen)
    assert_plain(policy, prompts, rollouts, chosen, atol=1e-5)


@pytest.mark.parametrize("dtype", [np.int32, np.uint16])
def test_ids_of_every_integer_type_are_the_same_prompts(dtype: Any) -> None:
    policy, chosen = make_policy(), sampling()
    prompts = [prompt.astype(dtype) for prompt in make_prompts()]
    rollouts = PackedEngine(policy).generate(prompts, chosen)
    assert_plain(policy, prompts, rollouts, chosen, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("family", list(CONFIGS))
def test_a_gpu_samples_what_its_plain_model_does(family: str) -> None:
    policy, prompts, chosen = make_policy(family), make_prompts(), sampling()
    policy.model.cuda()
    rollouts = PackedEngine(policy).generate(prompts, chosen)
    assert_plain(policy, prompts, rollouts, chosen, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("family", list(CONFIGS))
def test_a_gpu_decodes_in_bf16_what_it_evaluates(family: str) -> None:
    """Decoding reads a cache with one kernel, evaluation packs with another; both round."""
    policy, prompts = make_policy(family, precision="bf16"), make_prompts(LENGTHS * 4)
    policy.model.cuda()
    rollouts = PackedEngine(policy).generate(prompts, sampling(max_new_tokens=60))
    assert len({len(response) for response in rollouts.responses}) > 4
    batch = PackedSequences.pack(prompts, rollouts.responses, device="cuda")
    with torch.no_grad():
        found = batch.unpack(policy.logprobs(batch, 1.0).logprobs)
    for ours, theirs in zip(rollouts.logprobs, found, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=0.1, rtol=0)


# the cache


@pytest.mark.parametrize(
    ("room", "new", "capacities"),
    [(1, 40, 4), (64, 120, 2)],  # growing by a few positions at a time, and as it is
)
def test_a_cache_that_grows_changes_no_sample(
    room: int, new: int, capacities: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_cache, "_ROOM", room)
    policy, prompts = make_policy(), make_prompts()
    chosen, seen = sampling(max_new_tokens=new, eos_token_ids=EOS[:1]), set()
    grow = KVCache._grow

    def noted(cache: KVCache, longest: int) -> None:
        grow(cache, longest)
        seen.update((len(cache.last), store.shape[1:4:2]) for store in cache._stores)

    monkeypatch.setattr(KVCache, "_grow", noted)
    rollouts = PackedEngine(policy).generate(prompts, chosen)
    assert len(seen) >= capacities - 1
    assert all(count == rows for count, (rows, _) in seen)  # no room for those that have ended
    assert_plain(policy, prompts, rollouts, chosen, atol=1e-5)


def test_keys_are_kept_in_the_dtype_of_the_values() -> None:
    """Qwen3's norm makes fp32 of them under autocast."""
    policy, found = make_policy("qwen3", precision="bf16"), []
    attend = KVCache.attend
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            KVCache, "attend", lambda *args: found.append(args[0]._stores) or attend(*args)
        )
        PackedEngine(policy).generate(make_prompts(), sampling())
    assert {store.dtype for stores in found for store in stores} == {torch.bfloat16}


def attended(query: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
    """(Hq, D) for a query (Hq, D) and keys and values (Hkv, D) of each position, scale 0.3."""
    k, v = (torch.stack(x).repeat_interleave(2, 1).double() for x in (keys, values))
    weights = (torch.einsum("hd,lhd->hl", query.double(), k) * 0.3).softmax(1)
    return torch.einsum("hl,lhd->hd", weights, v).float()


@pytest.mark.parametrize("seed", range(12))
def test_the_cache_is_a_list_of_tokens_for_each_sequence(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random steps, ends and growth against one list per sequence; one sequence is all NaN."""
    monkeypatch.setattr(kv_cache, "_ROOM", 3)
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    lengths = rng.integers(1, 12, 8)
    spoiled = int(rng.integers(8))
    kept: dict[int, list[list[tuple[Tensor, Tensor]]]] = {row: [[], []] for row in range(8)}
    cache, alive = KVCache(lengths, torch.device("cpu")), list(range(8))
    given = lengths.copy()

    def write(rows: list[int]) -> None:
        for layer in range(2):
            key, value = torch.randn(2, 1, 2, len(rows), 4, generator=generator)
            for t, row in enumerate(rows):
                if row == spoiled:
                    key[:, :, t] = value[:, :, t] = NAN
                kept[row][layer].append((key[0, :, t], value[0, :, t]))
            cache.write(layer, key, value)

    rows = [row for row in range(8) for _ in range(lengths[row])]
    assert cache.positions.tolist() == [i for n in lengths for i in range(n)]
    assert [rows[t] for t in cache.last.tolist()] == alive
    write(rows)
    for _ in range(30):
        finished = rng.random(len(alive)) < 0.1
        if finished.any() and not finished.all():
            order = cache.drop(finished)
            alive = [alive[i] for i in order]
            assert len(alive) == (~finished).sum()
        cache.advance()
        assert cache.positions.tolist() == [len(kept[row][0]) for row in alive]
        assert cache.last.tolist() == list(range(len(alive)))
        write(alive)
        for layer in range(2):
            query = torch.randn(1, 4, len(alive), 4, generator=generator)
            out = cache.attend(layer, query, 0.3)
            for t, row in enumerate(alive):
                expected = attended(query[0, :, t], *map(list, zip(*kept[row][layer], strict=True)))
                torch.testing.assert_close(out[0, t], expected, atol=1e-5, rtol=0, equal_nan=True)
    assert (lengths == given).all() and len(alive) < 8


def test_what_is_read_ends_with_the_longest_sequence_alive() -> None:
    cache = KVCache(np.array([3, 200, 5]), torch.device("cpu"))
    cache.write(0, torch.randn(1, 1, 208, 4), torch.randn(1, 1, 208, 4))
    assert cache.drop(np.array([False, True, False])).tolist() == [0, 2]
    cache.advance()
    assert cache._mask is not None and cache._mask.shape == (2, 8)
