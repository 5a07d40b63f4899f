"""Reward functions and reward models: what they receive, what they may return, what is refused."""

from __future__ import annotations

import asyncio
import functools
import importlib.util
import json
import sys
import threading
import time
import weakref
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from fastppo.rewards import RewardError, Rewards, load_reward_func, resolve_reward
from fastppo.rewards.model import RewardModel, _batches

PROMPTS = ["a", "b", "c", "d", "e"]
TEXTS = ["1", "22", "333", "4444", "55555"]
EXAMPLES = Path(__file__).parents[2] / "examples"


def length(completions: list[str], **_: Any) -> list[float]:
    return [float(len(text)) for text in completions]


def score(func: Callable[..., Any], **columns: list[Any]) -> np.ndarray:
    return Rewards(func)(PROMPTS, TEXTS, columns).scores


# What a function receives


def test_function_receives_prompts_completions_and_every_column() -> None:
    seen: dict[str, Any] = {}

    def func(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        seen.update(columns, prompts=prompts, completions=completions)
        return [0.0] * len(prompts)

    ids = [np.arange(n, dtype=np.int32) for n in range(5)]
    Rewards(func)(PROMPTS, TEXTS, {"answer": [1, 2, 3, 4, 5]}, ids)
    assert seen == {
        "prompts": PROMPTS,
        "completions": TEXTS,
        "answer": [1, 2, 3, 4, 5],
        "completion_ids": [list(range(n)) for n in range(5)],
    }
    assert all(type(i) is int for i in seen["completion_ids"][4])


def test_function_without_kwargs_receives_only_what_it_names() -> None:
    def func(completions: list[str], answer: list[int], bonus: list[int] | None = None) -> Any:
        assert bonus is None
        return answer

    assert score(func, answer=[1, 2, 3, 4, 5], unused=[0] * 5).tolist() == [1, 2, 3, 4, 5]


def test_completions_of_chat_prompts_are_assistant_messages() -> None:
    chat = [[{"role": "user", "content": "hi"}]]

    def func(prompts: Any, completions: Any) -> list[float]:
        assert prompts == chat
        assert completions == [[{"role": "assistant", "content": "hello"}]]
        return [1.0]

    assert Rewards(func)(chat, ["hello"]).scores.tolist() == [1.0]


def test_a_function_that_empties_its_lists_does_not_change_the_next_ones() -> None:
    def greedy(completions: list[str]) -> list[float]:
        return [float(len(completions.pop(0))) for _ in range(5)]

    assert Rewards([greedy, length])(PROMPTS, TEXTS).scores.tolist() == [2, 4, 6, 8, 10]
    assert TEXTS == ["1", "22", "333", "4444", "55555"]


def test_missing_column_is_refused_before_training_with_the_nearest_name() -> None:
    def graded(completions: list[str], anwser: list[int]) -> list[float]:
        raise AssertionError("never called")

    expected = r"'graded' requires 'anwser'.*did you mean 'answer'.*available: .*answer, source"
    with pytest.raises(ValueError, match=expected):
        Rewards(graded).check_columns(["answer", "source"])
    with pytest.raises(ValueError, match=expected):
        score(graded, answer=[1] * 5, source=[1] * 5)
    Rewards(length).check_columns([])


def test_completion_ids_are_refused_when_not_given() -> None:
    def func(completion_ids: list[list[int]]) -> list[float]:
        return [0.0] * len(completion_ids)

    Rewards(func).check_columns([])
    with pytest.raises(ValueError, match="requires 'completion_ids'"):
        Rewards(func)(PROMPTS, TEXTS)


def test_arguments_of_different_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match=r"completions must have one value .* 5 prompts, got 4"):
        Rewards(length)(PROMPTS, TEXTS[:4])
    with pytest.raises(ValueError, match=r"answer must have one value .* 5 prompts, got 2"):
        Rewards(length)(PROMPTS, TEXTS, {"answer": [1, 2]})


# What is summed


def test_weighted_sum_leaves_out_functions_that_return_none() -> None:
    def half(completions: list[str]) -> list[float | None]:
        return [None if i % 2 else 1.0 for i in range(len(completions))]

    def none(completions: list[str]) -> list[None]:
        return [None] * len(completions)

    batch = Rewards([length, half, none], [0.5, 10.0, 3.0])(PROMPTS, TEXTS)
    assert batch.scores.dtype == np.float32
    assert batch.scores.tolist() == [10.5, 1.0, 11.5, 2.0, 12.5]
    assert batch.per_function["length"].tolist() == [1, 2, 3, 4, 5]
    assert np.isnan(batch.per_function["half"]).tolist() == [False, True, False, True, False]
    assert np.isnan(batch.per_function["none"]).all()


def test_sample_that_no_function_scores_is_nan_even_if_others_are_scored() -> None:
    def some(completions: list[str]) -> list[float | None]:
        return [None, 0.0, None, 1.0, 2.0]

    scores = Rewards([some, some], [1.0, 0.0])(PROMPTS, TEXTS).scores
    np.testing.assert_array_equal(scores, [np.nan, 0.0, np.nan, 1.0, 2.0])


@pytest.mark.parametrize(
    "values",
    [
        [True, False, True, True, False],
        [1, 0, 1, 1, 0],
        [np.float32(1), np.int64(0), np.bool_(True), Fraction(1), False],
        [torch.tensor(1.0), torch.tensor([0]), torch.tensor([[True]]), np.array([1.0]), 0],
        (1.0, 0.0, 1.0, 1.0, 0.0),
        np.array([1, 0, 1, 1, 0], dtype=np.float16),
        torch.tensor([1, 0, 1, 1, 0], dtype=torch.bfloat16),
    ],
    ids=["bool", "int", "numpy", "tensors", "tuple", "array", "tensor"],
)
def test_numbers_of_every_kind_are_scores(values: Any) -> None:
    assert score(lambda completions: values).tolist() == [1, 0, 1, 1, 0]


def test_empty_batch() -> None:
    batch = Rewards(length)([], [], {"answer": []}, [])
    assert batch.scores.shape == (0,)


# What is refused in a result


@pytest.mark.parametrize(
    ("values", "sample", "message"),
    [
        ([0.0, 1.0, "1.0", 0.0, 0.0], 2, r"number or None, got '1.0' of type str"),
        ([0.0, 1.0, 1j, 0.0, 0.0], 2, r"number or None, got 1j of type complex"),
        ([0.0, 1.0, [1.0], 0.0, 0.0], 2, r"number or None, got \[1.0\] of type list"),
        ([0.0, 1.0, torch.ones(2), 0.0, 0.0], 2, r"of type Tensor"),
        ([0.0, 1.0, 0.0, float("nan"), 0.0], 3, r"finite in float32, got nan; return None"),
        ([0.0, 1.0, 0.0, float("-inf"), 0.0], 3, r"finite in float32, got -inf"),
        ([0.0, 1.0, 0.0, 1e39, 0.0], 3, r"finite in float32, got 1e\+39"),
        ([0.0, 1.0, 0.0, 10**400, 0.0], 3, r"finite in float32, got inf"),
        ([0.0, 1.0, 0.0], 3, r"one score per sample: expected 5, got 3"),
        ([0.0] * 7, None, r"one score per sample: expected 5, got 7"),
        (0.5, None, r"a list of 5 numbers or None, got float"),
        (None, None, r"a list of 5 numbers or None, got NoneType"),
        ("00000", None, r"a list of 5 numbers or None, got str"),
        (np.zeros((5, 1)), None, r"a list of 5 numbers or None, got ndarray"),
    ],
)
def test_bad_result_names_function_sample_prompt_and_completion(
    values: Any, sample: int | None, message: str
) -> None:
    def judge(completions: list[str]) -> Any:
        return values

    with pytest.raises(RewardError, match=message) as info:
        Rewards([length, judge])(PROMPTS, TEXTS)
    assert "'judge'" in str(info.value)
    assert info.value.function == "judge"
    assert info.value.sample == sample
    if sample is not None:
        assert f"sample {sample}: " in str(info.value)
        assert f"prompt: {PROMPTS[sample]!r}, completion: {TEXTS[sample]!r}" in str(info.value)


def test_weighted_sum_beyond_float32_is_refused() -> None:
    with pytest.raises(RewardError, match=r"weighted sum.*sample 4"):
        Rewards(lambda completions: [0, 0, 0, 0, 1e38], [100.0])(PROMPTS, TEXTS)


@pytest.mark.parametrize("bad", range(5))
@pytest.mark.parametrize("kind", ["sync", "async"])
def test_exception_names_the_sample_and_is_chained(bad: int, kind: str) -> None:
    calls = 0

    def parse(completions: list[str]) -> list[float]:
        nonlocal calls
        calls += 1
        return [float("x" if text == TEXTS[bad] else text) for text in completions]

    async def parse_async(completions: list[str]) -> list[float]:
        return parse(completions)

    func = parse if kind == "sync" else parse_async
    with pytest.raises(RewardError, match="raised ValueError: could not convert") as info:
        score(func)
    assert info.value.sample == bad
    assert TEXTS[bad] in str(info.value)
    assert isinstance(info.value.__cause__, ValueError)
    assert calls <= 5  # one for the batch, three halvings, one to confirm


def test_exception_that_belongs_to_no_single_sample_says_so() -> None:
    def pairwise(completions: list[str]) -> list[float]:
        if len(completions) > 3:
            raise ZeroDivisionError("too many")
        return [0.0] * len(completions)

    with pytest.raises(RewardError, match=r"for the batch of 5; no single sample") as info:
        score(pairwise)
    assert info.value.sample is None


def test_long_prompts_are_shortened_in_errors() -> None:
    prompt = [{"role": "user", "content": "start " + "x" * 5000 + " end"}]
    with pytest.raises(RewardError) as info:
        Rewards(lambda completions: [float("nan")])([prompt], ["y" * 5000])
    assert len(str(info.value)) < 600
    assert "start xxx" in str(info.value) and "xxx end" in str(info.value)


def test_keyboard_interrupt_is_not_wrapped() -> None:
    def stop(completions: list[str]) -> list[float]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score(stop)


# Async


async def slow_length(completions: list[str]) -> list[float]:
    await asyncio.sleep(0.01)
    return [float(len(text)) for text in completions]


def test_async_functions_run_at_the_same_time_and_beside_sync_ones() -> None:
    first, second = threading.Event(), threading.Event()

    def sync(completions: list[str]) -> list[float]:  # listed first, and waits for both others
        assert first.wait(10) and second.wait(10)
        return [1.0] * len(completions)

    async def one(completions: list[str]) -> list[float]:
        first.set()
        while not second.is_set():
            await asyncio.sleep(0.001)
        return [2.0] * len(completions)

    async def two(completions: list[str]) -> list[float]:
        while not first.is_set():
            await asyncio.sleep(0.001)
        second.set()
        return [4.0] * len(completions)

    batch = Rewards([sync, one, two])(PROMPTS, TEXTS)
    assert list(batch.per_function) == ["sync", "one", "two"]
    assert batch.scores.tolist() == [7.0] * 5


def test_a_failing_function_cancels_the_async_ones() -> None:
    cancelled = threading.Event()

    async def forever(completions: list[str]) -> list[float]:
        try:
            await asyncio.sleep(3600)
        finally:
            cancelled.set()
        return []

    def fails(completions: list[str]) -> list[float]:
        time.sleep(0.05)  # lets the other one start
        raise OSError("lost")

    with pytest.raises(RewardError, match=r"'fails'.*raised OSError: lost"):
        Rewards([forever, fails])(PROMPTS, TEXTS)
    assert cancelled.wait(10)


def test_async_functions_meet_in_one_loop_that_lives_on() -> None:
    loops = []
    arrived = 0

    async def meet(completions: list[str]) -> list[float]:
        nonlocal arrived
        loops.append(asyncio.get_running_loop())
        arrived += 1
        while arrived % 2:  # wait for the other one: deadlocks unless both run
            await asyncio.sleep(0.001)
        return [0.0] * len(completions)

    rewards = Rewards([meet, meet])
    rewards(PROMPTS, TEXTS)
    rewards(PROMPTS, TEXTS)
    assert len(loops) == 4 and len(set(map(id, loops))) == 1
    assert not loops[0].is_closed()


def test_async_works_while_a_loop_runs_in_the_callers_thread() -> None:
    async def notebook() -> list[float]:
        return Rewards(slow_length)(PROMPTS, TEXTS).scores.tolist()

    assert asyncio.run(notebook()) == [1, 2, 3, 4, 5]


def test_async_callables_of_every_kind() -> None:
    class Judge:
        async def __call__(self, completions: list[str]) -> list[float]:
            return [1.0] * len(completions)

    async def scaled(completions: list[str], scale: float) -> list[float]:
        return [scale] * len(completions)

    rewards = Rewards([Judge(), functools.partial(scaled, scale=2.0), lambda completions: inner()])

    async def inner() -> list[float]:
        return [4.0] * 5

    batch = rewards(PROMPTS, TEXTS)
    assert list(batch.per_function) == ["Judge", "scaled", "lambda"]
    assert batch.scores.tolist() == [7.0] * 5


def test_threads_do_not_pile_up() -> None:
    Rewards(slow_length)(PROMPTS, TEXTS)
    before = threading.active_count()
    for _ in range(3):
        Rewards(slow_length)(PROMPTS, TEXTS)
    assert threading.active_count() == before


# Names, weights, callables


def test_names_are_unique() -> None:
    def length_2(completions: list[str]) -> list[float]:
        return [0.0] * len(completions)

    names = Rewards([length_2, length, length, length, lambda completions: []]).names
    assert names == ["length_2", "length", "length_3", "length_4", "lambda"]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0], "expected 2, got 1"),
        ([1.0, 2.0, 3.0], "expected 2, got 3"),
        ([1.0, float("nan")], r"finite, got reward_weights\[1\] = nan"),
        ([float("inf"), 1.0], r"finite, got reward_weights\[0\] = inf"),
    ],
)
def test_bad_weights_are_refused(weights: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Rewards([length, length], weights)


def test_what_is_not_a_reward_function_is_refused() -> None:
    def positional(completions: list[str], /) -> list[float]:
        return [0.0] * len(completions)

    with pytest.raises(ValueError, match="at least one function"):
        Rewards([])
    with pytest.raises(TypeError, match=r"reward_funcs\[1\] must be a callable"):
        Rewards([length, 3])  # type: ignore[list-item]  # the wrong type is the test
    with pytest.raises(TypeError, match=r"reward_funcs\[0\] must be a callable"):
        Rewards([Rewards])
    with pytest.raises(TypeError, match=r"Linear.*RewardModel\(model, tokenizer\)"):
        Rewards(torch.nn.Linear(1, 1))
    with pytest.raises(TypeError, match="positional-only"):
        Rewards(positional)


# Loading by name


@pytest.fixture
def reward_file(tmp_path: Path) -> Path:
    file = tmp_path / "my_rewards.py"
    file.write_text(
        "from dataclasses import dataclass\n"
        "@dataclass\n"
        "class Config:\n"
        "    x: int = 1\n"
        "count = 0\n"
        "def exact(completions, **kwargs):\n"
        "    return [1.0] * len(completions)\n"
        "def brevity(completions, **kwargs):\n"
        "    return [0.0] * len(completions)\n"
        "def _hidden(completions):\n"
        "    return []\n"
    )
    return file


def test_function_from_a_file(reward_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(reward_file.parent)
    func = load_reward_func("my_rewards.py:exact")
    assert score(func).tolist() == [1.0] * 5
    assert Rewards(func).names == ["exact"]
    other = resolve_reward(f"{reward_file}:brevity")
    assert func.__globals__ is other.__globals__  # type: ignore[attr-defined]  # one module
    reward_file.write_text("def exact(completions):\n    return [2.0] * len(completions)\n")
    assert score(load_reward_func("my_rewards.py:exact")).tolist() == [2.0] * 5


def test_function_from_a_module(monkeypatch: pytest.MonkeyPatch, reward_file: Path) -> None:
    monkeypatch.syspath_prepend(reward_file.parent)
    assert score(resolve_reward("my_rewards:exact")).tolist() == [1.0] * 5
    sys.modules.pop("my_rewards")


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        (
            "my_rewards.py:exakt",
            ValueError,
            r"no 'exakt'; did you mean 'exact'\? .*: brevity, exact$",
        ),
        ("my_reward.py:exact", ValueError, r"no file .*did you mean 'my_rewards.py'"),
        ("my_rewards.py:count", TypeError, r"'count' must be a function, got int"),
        ("my_rewards.py", ValueError, r"name the function too: 'my_rewards.py:function'"),
        ("broken.py:f", ValueError, r"running .*broken.py failed: ZeroDivisionError"),
        ("no_such_module_here:f", ValueError, r"importing module .*ModuleNotFoundError"),
        ("json:dump_s", ValueError, r"json has no 'dump_s'; did you mean 'dumps'"),
        ("my_rewards.py:", ValueError, r"'file.py:function' or 'module:function'"),
        ("no_such_folder", ValueError, r"no folder .*no_such_folder"),
    ],
)
def test_bad_names_say_what_exists(
    reward_file: Path,
    spec: str,
    error: type[Exception],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(reward_file.parent)
    (reward_file.parent / "broken.py").write_text("1 / 0\n")
    with pytest.raises(error, match=message):
        resolve_reward(spec)


def test_resolve_returns_functions_and_refuses_other_objects() -> None:
    assert resolve_reward(length) is length
    with pytest.raises(TypeError, match="got 3"):
        resolve_reward(3)  # type: ignore[arg-type]  # the wrong type is the test


# Reward models

CHAT = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


def make_tokenizer(template: str | None = CHAT) -> PreTrainedTokenizerFast:
    special = ["<pad>", "<end>", "<unk>", "<user>", "<assistant>"]
    words = [*special, *(f"w{i}" for i in range(30))]
    core = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<end>", unk_token="<unk>"
    )
    tokenizer.chat_template = template
    return tokenizer


def make_classifier(labels: int = 1, pad: int | None = 0) -> LlamaForSequenceClassification:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=35,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        num_labels=labels,
        pad_token_id=pad,
    )
    return LlamaForSequenceClassification(config)


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "judge"
    make_classifier().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def words(rng: np.random.Generator, low: int, high: int) -> str:
    return " ".join(f"w{i}" for i in rng.integers(0, 30, rng.integers(low, high)))


def one_by_one(
    model: LlamaForSequenceClassification | BertForSequenceClassification,
    prompts: list[Any],
    texts: list[str],
) -> list[float]:
    """The definition: the logit of each text alone, without padding."""
    tokenizer = make_tokenizer()
    scores = []
    for prompt, text in zip(prompts, texts, strict=True):
        if isinstance(prompt, str):
            full = prompt + text
        else:
            full = "".join(f"<{m['role']}> {m['content']} <end> " for m in prompt)
            full += f"<assistant> {text} <end> "
        ids = torch.tensor([tokenizer(full)["input_ids"]])
        with torch.no_grad():
            scores.append(model(input_ids=ids).logits.item())
    return scores


@pytest.mark.parametrize("chat", [False, True], ids=["plain", "chat"])
@pytest.mark.parametrize("budget", [1, 40, 16_384])
def test_reward_model_scores_equal_one_by_one(model_folder: Path, chat: bool, budget: int) -> None:
    rng = np.random.default_rng(0)
    plain = [words(rng, 1, 12) for _ in range(13)]
    texts = [words(rng, 1, 9) for _ in range(13)]
    prompts: list[Any] = [[{"role": "user", "content": p}] for p in plain] if chat else plain
    if not chat:
        texts = [" " + text for text in texts]
    model = LlamaForSequenceClassification.from_pretrained(model_folder).eval()
    expected = one_by_one(model, prompts, texts)
    reward = RewardModel(model_folder, device="cpu", token_budget=budget)
    batch = Rewards(reward)(prompts, texts)
    np.testing.assert_allclose(batch.scores, expected, rtol=0, atol=1e-6)
    assert np.ptp(batch.scores) > 0.01  # the model tells the samples apart
    assert list(batch.per_function) == ["judge"]


def test_reward_model_without_pad_id_and_with_pad_equal_to_eos() -> None:
    prompts, texts = ["w1 w2", "w3", "w4 w5 w6"], [" w7", " w8 w9 <end>", " w1 <end>"]
    for pad in (None, 1):
        model = make_classifier(pad=pad).eval()
        expected = one_by_one(model, prompts, texts)
        reward = RewardModel(model, make_tokenizer())
        np.testing.assert_allclose(reward(prompts, texts), expected, rtol=0, atol=1e-6)


def test_reward_model_reads_a_rendered_prompt_with_one_beginning() -> None:
    tokenizer = make_tokenizer()
    tokenizer.bos_token = "w1"
    beginning = ("w1", tokenizer.convert_tokens_to_ids("w1"))
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="w1 $A", special_tokens=[beginning]
    )
    reward = RewardModel(make_classifier(), tokenizer)
    rendered, plain = reward.encode(["w1 w2", "w2"], [" w3", " w3"])
    assert rendered == plain == tokenizer.convert_tokens_to_ids(["w1", "w2", "w3"])


def test_reward_model_that_reads_both_ways_does_not_see_padding_or_drop_out() -> None:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=35,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_labels=1,
    )
    model = BertForSequenceClassification(config).eval()
    prompts, texts = ["w1 w2", "w3", "w4 w5 w6"], [" w7", " w8 w9 w1 w2", " w1"]
    expected = one_by_one(model, prompts, texts)
    reward = RewardModel(model.train(), make_tokenizer())
    np.testing.assert_allclose(reward(prompts, texts), expected, rtol=0, atol=1e-6)


def test_reward_model_has_no_dropout_no_gradient_and_the_asked_dtype(model_folder: Path) -> None:
    reward = resolve_reward(model_folder)
    assert isinstance(reward, RewardModel)
    model = RewardModel(model_folder, device="cpu", dtype=torch.bfloat16).load()
    assert model.dtype is torch.bfloat16
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    rewards = Rewards(reward)
    rewards.load_models()
    assert reward._model is not None


def test_reward_model_reads_its_weights_only_when_used(model_folder: Path) -> None:
    (model_folder / "model.safetensors").unlink()
    reward = RewardModel(model_folder)  # configuration and tokenizer are enough
    with pytest.raises(ValueError, match="no file named model.safetensors"):
        reward.load()


def test_folder_that_is_no_reward_model_is_refused(tmp_path: Path) -> None:
    make_tokenizer().save_pretrained(tmp_path / "language")
    config = make_classifier().config
    LlamaForCausalLM(config).save_pretrained(tmp_path / "language")
    with pytest.raises(ValueError, match=r"lacks weights for score\.weight"):
        RewardModel(tmp_path / "language").load()
    make_classifier(labels=3).save_pretrained(tmp_path / "three")
    make_tokenizer().save_pretrained(tmp_path / "three")
    with pytest.raises(ValueError, match=r"'three' must have exactly one label.*num_labels = 3"):
        RewardModel(tmp_path / "three")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"config.json"):
        RewardModel(tmp_path / "empty")
    make_classifier().save_pretrained(tmp_path / "untold")
    with pytest.raises(ValueError, match="no usable tokenizer"):
        RewardModel(tmp_path / "untold")
    with pytest.raises(ValueError, match="tokenizer must be given"):
        RewardModel(make_classifier())


def test_reward_model_refuses_chat_without_template_and_too_long_samples() -> None:
    reward = RewardModel(make_classifier(), make_tokenizer(template=None))
    with pytest.raises(RewardError, match="no chat template"):
        Rewards(reward)([[{"role": "user", "content": "w1"}]], ["w2"])
    with pytest.raises(RewardError, match=r"sample 1 has 70 tokens.*reads 1 to 64") as info:
        Rewards(reward)(["w1", "w1 " * 69, "w1"], ["w2"] * 3)
    assert info.value.sample == 1


def test_batches_keep_the_padded_budget_and_every_index_once() -> None:
    rng = np.random.default_rng(1)
    lengths = rng.integers(1, 50, 200).tolist()
    batches = _batches(lengths, 128)
    assert sorted(i for rows in batches for i in rows) == list(range(200))
    assert all(len(rows) * max(lengths[i] for i in rows) <= 128 for rows in batches)
    assert [len(rows) for rows in _batches([300, 5, 5], 128)] == [1, 2]


class Memory:
    """A hook before a trunk that has room for so many tokens, packed."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.passes: list[int] = []  # tokens of each
        self.failed: weakref.ref[Any] | None = None

    def __call__(self, _: Any, __: Any, options: dict[str, Any]) -> None:
        embedded = options["inputs_embeds"]  # (1, T, H)
        assert self.failed is None or self.failed() is None, "a failed pass is still in memory"
        self.passes.append(embedded.shape[1])
        if self.passes[-1] > self.room:
            self.failed = weakref.ref(embedded)
            raise torch.OutOfMemoryError(f"no memory for {self.passes[-1]} tokens")


# all fit, one halving, two, single rows of the longest sample (10 tokens) only
@pytest.mark.parametrize(("room", "halvings"), [(60, 0), (30, 1), (15, 2), (10, 3)])
def test_reward_model_out_of_memory_lowers_the_budget(room: int, halvings: int) -> None:
    texts = [" w1" * n for n in (3, 9, 2, 5, 9, 1, 4, 8, 7, 6, 1)]
    prompts = ["w2"] * len(texts)
    model, memory = make_classifier().eval(), Memory(room)
    reward = RewardModel(model, make_tokenizer(), token_budget=60)
    expected = one_by_one(model, prompts, texts)
    hook = model.model.register_forward_pre_hook(memory, with_kwargs=True)
    np.testing.assert_allclose(reward(prompts, texts), expected, rtol=0, atol=1e-6)
    failed = [tokens for tokens in memory.passes if tokens > room]
    assert len(failed) == halvings and reward.token_budget == 60 // 2**halvings
    memory.passes.clear()
    np.testing.assert_allclose(reward(prompts, texts), expected, rtol=0, atol=1e-6)
    assert all(tokens <= room for tokens in memory.passes)  # the limit is kept
    hook.remove()


def test_reward_model_without_memory_for_one_sample_raises_what_was_raised() -> None:
    model, memory = make_classifier().eval(), Memory(5)
    model.model.register_forward_pre_hook(memory, with_kwargs=True)
    reward = RewardModel(model, make_tokenizer())
    with pytest.raises(torch.OutOfMemoryError, match="no memory for 6 tokens"):
        reward(["w2"] * 4, [" w1" * 5] * 4)
    assert memory.passes == [24, 12, 6]


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_reward_models_budget_is_part_of_the_state(wrapped: bool) -> None:
    """Other passes round otherwise: a continuation must not start with the first budget."""
    models = [RewardModel(make_classifier(), make_tokenizer()) for _ in range(2)]
    first, second = (Rewards(functools.partial(m) if wrapped else m) for m in models)
    models[0].token_budget = 77
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert models[1].token_budget == 77


# The example's functions


def example(name: str) -> Callable[..., Any]:
    return load_reward_func(f"{EXAMPLES}/rewards.py:{name}")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("7", 1.0),
        ("3 + 4 = 7.", 1.0),
        ("The answer is 7", 1.0),
        ("7 is 3 + 4", 0.0),
        ("-7", 0.0),
        ("10-7", 1.0),
        ("17", 0.0),
        ("seven", 0.0),
        ("", 0.0),
    ],
)
def test_exact_number_reads_the_last_integer(text: str, expected: float) -> None:
    plain = Rewards(example("exact_number"))(["p"], [text], {"answer": [7]})
    chat = Rewards(example("exact_number"))(
        [[{"role": "user", "content": "p"}]], [text], {"answer": ["7"]}
    )
    assert plain.scores.tolist() == chat.scores.tolist() == [expected]


def test_only_number() -> None:
    scores = Rewards(example("only_number"))(["p"] * 3, [" 7\n", "7.", "-12"]).scores
    assert scores.tolist() == [1.0, 0.0, 1.0]


def test_arithmetic_data_is_what_the_script_writes(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location(
        "make_arithmetic", EXAMPLES / "make_arithmetic.py"
    )
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main(tmp_path)
    for name in ("arithmetic_train.jsonl", "arithmetic_eval.jsonl"):
        assert (tmp_path / name).read_bytes() == (EXAMPLES / name).read_bytes()
    train, held_out = module.split()
    assert (len(train), len(held_out)) == (65, 16)
    questions = [record["prompt"][-1]["content"] for record in [*train, *held_out]]
    assert len(set(questions)) == 81


def test_what_is_no_reward_model_is_named() -> None:
    with pytest.raises(ValueError, match=r"^model: expected a transformers model, got 3 \(int\)"):
        RewardModel(3)  # type: ignore[arg-type]
