"""Rollouts: the right distribution, its log-probabilities, and flags that are never guessed."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    GPT2Config,
    LlamaConfig,
    Qwen2Config,
    Qwen3Config,
)

from fastppo import ops
from fastppo.models.packed import PackedModel
from fastppo.ppo.experience import PackedBatch
from fastppo.rollout.engine import Engine, Rollouts, Sampling
from fastppo.rollout.packed import PackedEngine
from fastppo.rollout.sampler import Sampler, uniforms

VOCAB, EOS = 53, 2
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,  # far from uniform
    "bos_token_id": 1,
    "eos_token_id": EOS,
    "pad_token_id": EOS,
}
CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=16),
    "gpt2": GPT2Config(
        vocab_size=VOCAB,
        n_embd=64,
        n_layer=2,
        n_head=4,
        n_positions=64,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=EOS,
    ),
}


def make_policy(family: str = "llama", **options: Any) -> PackedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[family])).eval()
    return PackedModel(model, **options)


def make_prompts() -> list[np.ndarray]:
    """Of mixed lengths, with the token that both pads and ends in and at the end of them."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, VOCAB, n) for n in (7, 2, 1, 12, 5, 9)]
    prompts[0][3] = EOS
    prompts[1][-1] = EOS
    return prompts


def sampling(**options: Any) -> Sampling:
    defaults: dict[str, Any] = {
        "temperature": 0.8,
        "max_new_tokens": 10,
        "eos_token_ids": (EOS, 5, 9),
        "seed": 7,
    }
    return Sampling(**(defaults | options))


def generate(policy: PackedModel, prompts: Sequence[np.ndarray], **options: Any) -> Rollouts:
    engine: Engine = PackedEngine(policy)
    return engine.generate(prompts, sampling(**options))


def trained_logprobs(
    policy: PackedModel, prompts: Sequence[np.ndarray], rollouts: Rollouts, temperature: float
) -> Tensor:
    """(N,) log-probabilities from the packed forward that training uses."""
    batch = PackedBatch.pack(prompts, rollouts.responses)
    with torch.no_grad(), policy.autocast():
        hidden, head = policy.hidden(batch)[batch.rows], policy.head
        return ops.linear_logprobs(
            hidden, head.weight, batch.targets, temperature=temperature
        ).logprobs


def next_logits(policy: PackedModel, ids: np.ndarray) -> Tensor:
    """(V,) logits after `ids`, from an ordinary forward."""
    with policy.unpacked() as model, torch.no_grad():
        logits: Tensor = model(torch.from_numpy(ids.astype(np.int64))[None]).logits[0, -1]
    return logits


def assert_same(a: Rollouts, b: Rollouts) -> None:
    assert [r.tolist() for r in a.responses] == [r.tolist() for r in b.responses]


@pytest.fixture(params=list(CONFIGS))
def family(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


# log-probabilities


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_rollout_and_training_logprobs_agree(family: str, temperature: float) -> None:
    policy, prompts = make_policy(family), make_prompts() * 8
    rollouts = generate(policy, prompts, temperature=temperature)
    trained = trained_logprobs(policy, prompts, rollouts, temperature)
    np.testing.assert_allclose(np.concatenate(rollouts.logprobs), trained, atol=1e-4, rtol=0)
    for response, logprobs in zip(rollouts.responses, rollouts.logprobs, strict=True):
        assert (response.dtype, logprobs.dtype) == (np.int32, np.float32)
        assert len(response) == len(logprobs) and (logprobs <= 0).all()
    assert len({len(r) for r in rollouts.responses}) > 1  # some rows ran on after others ended


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("train_layers", [None, 1])
def test_bf16_logprobs_agree_to_rounding(family: str, train_layers: int | None) -> None:
    policy = make_policy(family, precision="bf16", train_layers=train_layers)
    prompts = make_prompts()
    rollouts = generate(policy, prompts)
    trained = trained_logprobs(policy, prompts, rollouts, 0.8)
    assert np.abs(np.concatenate(rollouts.logprobs) - trained.numpy()).mean() < 0.05


FILTERS = [{"top_k": 3}, {"top_p": 0.6}, {"min_p": 0.2}, {"top_k": 5, "top_p": 0.7, "min_p": 0.1}]


def filtered(p: Tensor, filters: dict[str, Any]) -> Tensor:
    """Probabilities (V,) after top-k, top-p and min-p, each renormalised before the next."""
    p, order = p.sort(descending=True)
    keep = torch.ones(VOCAB, dtype=torch.bool)
    if "top_k" in filters:
        keep[filters["top_k"] :] = False
        p = torch.where(keep, p, 0.0) / p[keep].sum()
    if "top_p" in filters:
        keep &= p.cumsum(0) - p < filters["top_p"]
        p = torch.where(keep, p, 0.0) / p[keep].sum()
    if "min_p" in filters:
        keep &= p >= filters["min_p"] * p[0]
        p = torch.where(keep, p, 0.0) / p[keep].sum()
    return torch.zeros(VOCAB).scatter(0, order, p)


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_filtered_logprobs_are_those_of_the_filtered_distribution(filters: dict[str, Any]) -> None:
    policy, prompts = make_policy(), make_prompts()
    rollouts = generate(policy, prompts, **filters, max_new_tokens=3)
    for prompt, response, logprobs in zip(
        prompts, rollouts.responses, rollouts.logprobs, strict=True
    ):
        for t, token in enumerate(response):
            before = np.concatenate([prompt, response[:t]])
            p = filtered((next_logits(policy, before) / 0.8).softmax(-1), filters)
            assert float(p[token].log()) == pytest.approx(float(logprobs[t]), abs=1e-4)


@pytest.mark.parametrize("filters", [{}, *FILTERS], ids=str)
def test_frequencies_follow_the_distribution(filters: dict[str, Any]) -> None:
    policy, prompt = make_policy(), make_prompts()[0]
    rollouts = generate(policy, [prompt] * 4000, temperature=1.5, max_new_tokens=1, **filters)
    tokens = np.concatenate(rollouts.responses)
    p = filtered((next_logits(policy, prompt) / 1.5).softmax(-1), filters).double().numpy()
    expected, observed = 4000 * p, np.bincount(tokens, minlength=VOCAB)
    kept = expected > 0
    assert observed[~kept].sum() == 0
    chi_square = ((observed[kept] - expected[kept]) ** 2 / expected[kept]).sum()
    freedom = kept.sum() - 1
    assert chi_square < freedom + 3.0 * np.sqrt(2.0 * freedom)  # mean and deviation of chi-square


def test_no_token_is_filtered_by_default() -> None:
    rollouts = generate(
        make_policy(), make_prompts()[:1] * 2000, temperature=100.0, max_new_tokens=1
    )
    assert set(np.concatenate(rollouts.responses).tolist()) == set(range(VOCAB))


# greedy


def test_greedy_equals_transformers_greedy_without_padding(family: str) -> None:
    policy, prompts = make_policy(family), make_prompts()
    rollouts = generate(policy, prompts, temperature=0.0)
    for prompt, response in zip(prompts, rollouts.responses, strict=True):
        with policy.unpacked() as model:
            ids = torch.from_numpy(prompt)[None]
            alone = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                generation_config=GenerationConfig(
                    max_new_tokens=10, do_sample=False, eos_token_id=[EOS, 5, 9], pad_token_id=EOS
                ),
            )
        assert response.tolist() == alone[0, len(prompt) :].tolist()
    trained = trained_logprobs(policy, prompts, rollouts, 1.0)
    np.testing.assert_allclose(np.concatenate(rollouts.logprobs), trained, atol=1e-4, rtol=0)


# ends


def test_end_at_the_first_token_when_it_is_also_the_padding() -> None:
    policy, prompts = make_policy(), make_prompts()
    first = int(generate(policy, prompts, temperature=0.0, eos_token_ids=()).responses[3][0])
    policy.model.config.pad_token_id = first
    rollouts = generate(policy, prompts, temperature=0.0, eos_token_ids=(first,))
    assert rollouts.responses[3].tolist() == [first]
    assert rollouts.finished[3] and not rollouts.truncated[3]
    assert len(rollouts.logprobs[3]) == 1


def test_padding_does_not_end_a_response_it_does_not_finish() -> None:
    """The model's padding token may be in a prompt and be generated like any other."""
    policy, prompts = make_policy(), make_prompts()
    free = generate(policy, prompts, eos_token_ids=())
    policy.model.config.pad_token_id = int(free.responses[0][2])
    prompts[4][2] = policy.model.config.pad_token_id
    again = generate(policy, prompts, eos_token_ids=())
    assert_same(again, generate(make_policy(), prompts, eos_token_ids=()))
    assert again.responses[0].tolist() == free.responses[0].tolist()
    trained = trained_logprobs(policy, prompts, again, 0.8)
    np.testing.assert_allclose(np.concatenate(again.logprobs), trained, atol=1e-4, rtol=0)


def test_no_end_is_truncated_at_the_limit() -> None:
    rollouts = generate(make_policy(), make_prompts(), eos_token_ids=())
    assert [len(r) for r in rollouts.responses] == [10] * 6
    assert rollouts.truncated.all() and not rollouts.finished.any()


def test_end_on_the_last_allowed_token_is_finished() -> None:
    policy, prompts = make_policy(), make_prompts()
    free = generate(policy, prompts, temperature=0.0, eos_token_ids=())
    response = free.responses[3]
    last = next(t for t in range(10) if response[t] not in response[:t] and t > 0)
    rollouts = generate(
        policy,
        prompts,
        temperature=0.0,
        eos_token_ids=(int(response[last]),),
        max_new_tokens=last + 1,
    )
    assert rollouts.responses[3].tolist() == response[: last + 1].tolist()
    assert rollouts.finished[3] and not rollouts.truncated[3]


def test_responses_stop_at_their_first_end() -> None:
    rollouts = generate(make_policy(), make_prompts() * 8)
    ends = {EOS, 5, 9}
    assert rollouts.finished.any() and rollouts.truncated.any()
    assert (rollouts.finished != rollouts.truncated).all()
    for response, finished in zip(rollouts.responses, rollouts.finished, strict=True):
        assert not ends & set(response[:-1].tolist())
        assert (response[-1] in ends) == finished
        assert finished or len(response) == 10


# randomness


def test_same_seed_same_responses_and_the_global_generator_stays() -> None:
    policy, prompts = make_policy(), make_prompts()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = generate(policy, prompts, seed=11)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(4)
    again = generate(policy, prompts, seed=11)
    assert_same(first, again)
    np.testing.assert_array_equal(np.concatenate(first.logprobs), np.concatenate(again.logprobs))
    other = generate(policy, prompts, seed=12)
    assert [r.tolist() for r in other.responses] != [r.tolist() for r in first.responses]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("max_rows", [1, 2, 5, 6, 100])
def test_passes_of_fewer_rows_change_no_sample(
    family: str, temperature: float, max_rows: int
) -> None:
    policy, prompts = make_policy(family), make_prompts() * 2
    whole = generate(policy, prompts, temperature=temperature)
    engine = PackedEngine(policy, max_rows)
    seen: list[int] = []  # rows of each pass over prompts

    def count(_: Any, __: Any, options: dict[str, Any]) -> None:
        if not options["kv_cache"].decoding:
            seen.append(len(options["kv_cache"].last))

    hook = policy.model.base_model.register_forward_pre_hook(count, with_kwargs=True)
    split = engine.generate(prompts, sampling(temperature=temperature))
    hook.remove()
    assert seen == [max_rows] * (12 // max_rows) + [12 % max_rows] * (12 % max_rows > 0)
    assert_same(whole, split)
    np.testing.assert_array_equal(whole.finished, split.finished)
    np.testing.assert_array_equal(whole.truncated, split.truncated)
    np.testing.assert_allclose(
        np.concatenate(whole.logprobs), np.concatenate(split.logprobs), atol=1e-5, rtol=0
    )
    assert engine.max_rows == max_rows


def test_samples_of_one_prompt_differ() -> None:
    rollouts = generate(make_policy(), make_prompts()[:1] * 20, eos_token_ids=())
    assert len({tuple(r.tolist()) for r in rollouts.responses}) == 20
    assert len({int(token) for token in rollouts.responses[0]}) > 3


# what generation must not inherit or leave behind


@pytest.mark.parametrize(
    "shipped",
    [
        {"do_sample": True, "top_k": 1},
        {"do_sample": True, "temperature": 0.01, "top_p": 0.1},
        {"repetition_penalty": 5.0},
        {"no_repeat_ngram_size": 1},
        {"min_new_tokens": 10},
        {"suppress_tokens": list(range(0, VOCAB, 2))},
        {"max_length": 3},
        {"num_beams": 3},
        {"eos_token_id": 11},
    ],
    ids=str,
)
def test_the_checkpoint_generation_config_changes_nothing(shipped: dict[str, Any]) -> None:
    policy, prompts = make_policy(), make_prompts()
    expected = generate(policy, prompts)
    own = GenerationConfig(**shipped)
    policy.model.generation_config = own
    assert_same(generate(policy, prompts), expected)
    assert policy.model.generation_config is own


def test_training_works_after_generation() -> None:
    policy, prompts = make_policy(precision="bf16"), make_prompts()
    rollouts = generate(policy, prompts)
    batch = PackedBatch.pack(prompts, rollouts.responses)
    policy.hidden(batch).sum().backward()
    assert all(p.grad is not None for p in policy.trained())


def test_decoding_uses_the_cache_even_with_gradient_checkpointing() -> None:
    policy, prompts = make_policy(gradient_checkpointing=True), make_prompts()
    expected = generate(make_policy(), prompts, eos_token_ids=())
    widths = []
    layer = policy.model.model.layers[0]

    def note(module: Any, args: Any) -> None:
        assert not module.training and not torch.is_grad_enabled()
        widths.append(args[0].shape[:2])

    hook = layer.register_forward_pre_hook(note)
    assert_same(generate(policy, prompts, eos_token_ids=()), expected)
    hook.remove()
    assert policy.model.training
    assert widths == [(1, sum(map(len, prompts)))] + [(1, len(prompts))] * 9


def test_no_array_of_scores_is_kept() -> None:
    chosen = sampling(temperature=1.0)
    sampler = Sampler(chosen, uniforms(4, chosen))
    alive = []
    for step in range(5):
        scores = torch.zeros(4, VOCAB)
        alive.append(weakref.ref(scores))
        tokens, logprobs = sampler(scores, torch.arange(4), step)
        assert tokens.shape == logprobs.shape == (4,)
        assert {x.untyped_storage().nbytes() for x in (tokens, logprobs)} <= {32, 16}
        del scores
    assert [ref() for ref in alive] == [None] * 5


def test_the_engine_keeps_one_array_of_logits_at_a_time() -> None:
    policy = make_policy()
    next_logits, alive = policy.next_logits, []

    def watch(*args: Any, **kwargs: Any) -> Tensor:
        assert all(ref() is None for ref in alive)
        logits = next_logits(*args, **kwargs)
        alive.append(weakref.ref(logits))
        return logits

    policy.next_logits = watch  # type: ignore[method-assign]
    rollouts = generate(policy, make_prompts(), eos_token_ids=())
    assert len(alive) == len(rollouts.responses[0]) == 10
    assert all(ref() is None for ref in alive)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_lora_policy_samples_from_the_adapter() -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS["llama"])).eval()
    config = LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj", "down_proj"])
    policy = PackedModel(get_peft_model(base, config))
    prompts = make_prompts()
    rollouts = generate(policy, prompts)
    trained = trained_logprobs(policy, prompts, rollouts, 0.8)
    np.testing.assert_allclose(np.concatenate(rollouts.logprobs), trained, atol=1e-4, rtol=0)


# refusals


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "prompts: .*got none"),
        ([[4], []], r"got an empty prompts\[1\]"),
        ([[4] * 60], "expected at most 54 tokens, so that 10 new ones fit"),
    ],
    ids=["none", "empty", "long"],
)
def test_unusable_prompts_are_refused(prompts: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(make_policy(), [np.asarray(p, dtype=np.int64) for p in prompts])


def test_no_rows_at_all_are_refused() -> None:
    with pytest.raises(ValueError, match="^max_rows: .*got 0"):
        PackedEngine(make_policy(), max_rows=0).generate(make_prompts(), sampling())


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1.0},
        {"max_new_tokens": 0},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"top_k": -1},
        {"min_p": 1.0},
        {"eos_token_ids": (-1,)},
        {"seed": 2**63},
    ],
    ids=str,
)
def test_sampling_out_of_range_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}: expected"):
        sampling(**wrong)
