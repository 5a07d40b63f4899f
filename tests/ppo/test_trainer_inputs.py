"""What PPOTrainer takes: models, tokenizers, prompts, reward functions and engines of all kinds."""

from __future__ import annotations

import asyncio
import copy
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForSequenceClassification

from fastppo import PPOConfig, PPOTrainer
from fastppo.cli.demo import larger_digit
from fastppo.models.tiny import WORDS, tiny_model, word_tokenizer
from fastppo.ppo.inputs import end_tokens
from fastppo.rewards import RewardError, RewardModel
from fastppo.rollout.engine import Rollouts, Sampling
from fastppo.training.errors import StopRunError

ROWS = [{"prompt": f"{a} {b} >", "answer": str(max(a, b))} for a in range(10) for b in range(a)]
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}>{% endif %}"
)


def config(output_dir: Path | str, **options: Any) -> PPOConfig:
    defaults: dict[str, Any] = {
        "num_iterations": 2,
        "prompts_per_iteration": 16,
        "max_prompt_length": 4,
        "max_response_length": 3,
        "kl_coef": 0.0,
        "learning_rate": 1e-3,
        "num_minibatches": 2,
        "precision": "fp32",
        "device": "cpu",
    }
    return PPOConfig(output_dir=str(output_dir), **{**defaults, **options})


def train(
    folder: Path,
    rewards: Any,
    data: Any = ROWS,
    *,
    weights: Any = None,
    resume: bool = False,
    **options: Any,
) -> list[dict[str, Any]]:
    """The metrics of a run below `folder`."""
    PPOTrainer(
        tiny_model(len(WORDS), seed=0),
        rewards,
        data,
        config(folder / "run", **options),
        processing_class=word_tokenizer(),
        reward_weights=weights,
        resume_from_checkpoint=resume,
    ).train()
    return read_lines(folder / "run" / "metrics.jsonl")


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's folder with its tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    tiny_model(len(WORDS), seed=0).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def unloadable(tmp_path: Path) -> str:
    """A model's folder without its weights: whoever loads it fails with another error."""
    tiny_model(len(WORDS), seed=0).config.save_pretrained(tmp_path / "unloadable")
    word_tokenizer().save_pretrained(tmp_path / "unloadable")
    return str(tmp_path / "unloadable")


# rewards


def test_an_async_reward_is_awaited(tmp_path: Path) -> None:
    async def slowly(completions: list[str], **_: Any) -> list[float]:
        await asyncio.sleep(0.001)
        return [float(len(text.split())) for text in completions]

    rows = train(tmp_path, [slowly, larger_digit], weights=[2.0, 0.0])
    for row in rows:
        assert row["reward"] == pytest.approx(2.0 * row["reward/slowly"])


def test_a_score_of_none_is_left_out(tmp_path: Path) -> None:
    def only_even(prompts: list[str], **_: Any) -> list[float | None]:
        return [1.0 if int(p[0]) % 2 == 0 else None for p in prompts]

    rows = train(tmp_path, only_even, prompts_per_iteration=45)  # every prompt once
    share = np.mean([int(row["prompt"][0]) % 2 == 1 for row in ROWS])
    samples = read_lines(tmp_path / "run" / "samples.jsonl")
    assert [row["unscored"] for row in rows] == pytest.approx([share] * 2)
    assert [row["reward"] for row in rows] == [1.0, 1.0]
    assert {sample["reward"] for sample in samples} == {1.0, None}


def test_a_function_that_scores_nothing_beside_one_that_does(tmp_path: Path) -> None:
    def abstains(prompts: list[str], **_: Any) -> list[None]:
        return [None] * len(prompts)

    rows = train(tmp_path, [abstains, larger_digit])
    assert [row["reward/abstains"] for row in rows] == [None, None]
    assert all(row["reward"] == row["reward/larger_digit"] for row in rows)


def test_an_iteration_without_any_score_changes_nothing_and_the_run_goes_on(
    tmp_path: Path,
) -> None:
    calls: list[int] = []

    def every_other(prompts: list[str], **_: Any) -> list[float | None]:
        calls.append(len(prompts))
        return [None if len(calls) % 2 else float(i) for i in range(len(prompts))]

    rows = train(tmp_path, every_other, num_iterations=4, reward_workers=0)
    assert [row["unscored"] for row in rows] == [1, 0, 1, 0]
    assert [row["num_tokens"] > 0 for row in rows] == [False, True, False, True]
    assert [row["coverage"] for row in rows] == [0, 1, 0, 1]
    assert [row["entropy"] is None for row in rows] == [True, False, True, False]


def test_ten_iterations_without_any_score_are_passed_over_and_said_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[int] = []

    def once(prompts: list[str], **_: Any) -> list[float | None]:
        calls.append(len(prompts))
        return [float(i) if len(calls) == 2 else None for i in range(len(prompts))]

    rows = train(tmp_path, once, num_iterations=14, reward_workers=0)
    assert [row["unscored"] for row in rows] == [1, 0] + [1] * 12
    shown = " ".join(capsys.readouterr().out.split())
    assert shown.count("no sample was scored in the last 10 iterations") == 1


def test_a_function_that_never_scores_ends_the_run_which_can_go_on(tmp_path: Path) -> None:
    """Rows without a score may come first: a continuation gets ten more iterations."""
    calls: list[int] = []

    def late(prompts: list[str], **_: Any) -> list[float | None]:
        calls.append(len(prompts))
        return [float(i) if len(calls) > 12 else None for i in range(len(prompts))]

    with pytest.raises(RewardError, match="'late'.*first 10 iterations.*--resume goes on"):
        train(tmp_path, late, num_iterations=14, reward_workers=0)
    assert len(calls) == 10
    rows = train(tmp_path, late, num_iterations=14, reward_workers=0, resume=True)
    assert [row["unscored"] for row in rows] == [1] * 11 + [0] * 3


def test_a_run_without_one_optimiser_step_is_not_finished(tmp_path: Path) -> None:
    def nothing(prompts: list[str], **_: Any) -> list[None]:
        return [None] * len(prompts)

    with pytest.raises(StopRunError, match="nothing was learned: .* in 3 iterations, got none"):
        train(tmp_path, nothing, num_iterations=3, reward_workers=0)
    assert not (tmp_path / "run" / "model").exists()


def test_a_token_beyond_the_vocabulary_is_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="processing_class: .*'9' with id 12 .* of 13"):
        PPOTrainer(
            tiny_model(12, seed=0),
            larger_digit,
            ROWS,
            config(tmp_path / "run"),
            processing_class=word_tokenizer(),
        )
    assert not (tmp_path / "run").exists()


def test_an_exception_names_function_and_sample(tmp_path: Path) -> None:
    calls = []

    def fragile(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        calls.append(len(prompts))
        if len(calls) > 1 and any(p.startswith("9 3") for p in prompts):
            raise KeyError("nine and three")
        return [0.0] * len(prompts)

    with pytest.raises(RewardError, match=r"'fragile', sample \d+: raised KeyError.*'9 3 >'") as e:
        train(tmp_path, fragile, prompts_per_iteration=45, reward_max_failure_rate=0.0)
    assert e.value.function == "fragile" and isinstance(e.value.sample, int)
    assert len(read_lines(tmp_path / "run" / "metrics.jsonl")) == 1  # what was done is kept


@pytest.mark.parametrize(
    ("returned", "words"),
    [([0.0], "16.*got 1"), ([float("nan")] * 16, "sample 0"), (["x"] * 16, "sample 0")],
    ids=["length", "nan", "type"],
)
def test_what_is_not_a_score_is_refused(tmp_path: Path, returned: list[Any], words: str) -> None:
    def wrong(prompts: list[str], **_: Any) -> list[Any]:
        return returned

    with pytest.raises(RewardError, match=f"'wrong'.*{words}"):
        train(tmp_path, wrong)


def test_a_missing_column_is_refused_before_the_model_loads(
    unloadable: str, tmp_path: Path
) -> None:
    def needs(completions: list[str], anser: list[str]) -> list[float]:
        raise AssertionError("never called")

    with pytest.raises(ValueError, match="'needs' requires 'anser'.*did you mean 'answer'"):
        PPOTrainer(unloadable, needs, ROWS, config(tmp_path / "run"))
    with pytest.raises(ValueError, match="no file named"):  # the model would not have loaded
        PPOTrainer(unloadable, larger_digit, ROWS, config(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


# prompts


def test_chat_prompts_go_through_the_template(tmp_path: Path) -> None:
    seen: list[tuple[Any, Any]] = []

    def chat_reward(prompts: list[Any], completions: list[Any], **_: Any) -> list[float]:
        seen.extend(zip(prompts, completions, strict=True))
        return [float(len(c[0]["content"].split())) for c in completions]

    tokenizer = word_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    data = [{"prompt": [{"role": "user", "content": f"{a} {9 - a}"}]} for a in range(10)]
    trainer = PPOTrainer(
        tiny_model(len(WORDS), seed=0),
        chat_reward,
        data,
        config(tmp_path / "run", reward_workers=0),  # `seen` is in this process
        processing_class=tokenizer,
    )
    assert tokenizer.decode(trainer.train_data.ids[3]) == "3 6 >"
    trainer.train()
    assert len(seen) == 32
    assert all(p[0]["role"] == "user" and c[0]["role"] == "assistant" for p, c in seen)
    samples = read_lines(tmp_path / "run" / "samples.jsonl")
    assert samples[0]["prompt"] == seen[0][0]
    assert samples[0]["response"] == seen[0][1][0]["content"]


def test_responses_end_where_the_template_ends_answers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also that a special token which a reward wants is in `completion_ids`."""
    seen: list[tuple[str, list[int]]] = []

    def reward(completions: list[Any], completion_ids: list[list[int]]) -> list[float]:
        texts = [completion[0]["content"] for completion in completions]
        seen.extend(zip(texts, completion_ids, strict=True))
        return [float(len(text)) for text in texts]

    tokenizer = word_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["8", "9"]})
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} 9 {% endfor %}"
    trainer = PPOTrainer(
        tiny_model(len(WORDS), seed=0),
        reward,
        [{"prompt": [{"role": "user", "content": f"{a}"}]} for a in range(8)],
        config(tmp_path / "run", reward_workers=0, max_response_length=8),
        processing_class=tokenizer,
    )
    end, other = WORDS.index("9"), WORDS.index("8")
    assert trainer.eos_token_ids == (1, end)
    older = end_tokens(trainer.policy.actor.model, tokenizer, trainer.train_data, {})
    assert older == ((1,), [])  # a run that was started without it goes on without it
    trainer.train()
    assert "the chat template ends answers with '9'" in capsys.readouterr().out.replace("\n", "")
    assert any(ids[-1] == end for _, ids in seen)
    assert all(end not in ids[:-1] and "9" not in text for text, ids in seen)
    assert any(other in ids and "8" not in text for text, ids in seen)


def test_plain_completions_keep_the_space_in_front(tmp_path: Path) -> None:
    from tokenizers import decoders

    seen: list[tuple[str, list[int]]] = []

    def reward(completions: list[str], completion_ids: list[list[int]]) -> list[float]:
        seen.extend(zip(completions, completion_ids, strict=True))
        return [float(len(text)) for text in completions]

    tokenizer = word_tokenizer()
    core = json.loads(tokenizer.backend_tokenizer.to_str())
    core["model"]["vocab"] = {
        f"▁{word}" if word.isdigit() else word: i for word, i in core["model"]["vocab"].items()
    }
    spaced = type(tokenizer)(
        tokenizer_object=type(tokenizer.backend_tokenizer).from_str(json.dumps(core)),
        pad_token="<pad>",
        eos_token="<eos>",
    )
    spaced.backend_tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    PPOTrainer(
        tiny_model(len(WORDS), seed=0),
        reward,
        [{"prompt": ">"}],
        config(tmp_path / "run", reward_workers=0),
        processing_class=spaced,
    ).train()
    started = [(text, ids) for text, ids in seen if WORDS[ids[0]].isdigit()]
    assert started and all(text.startswith(f" {WORDS[ids[0]]}") for text, ids in started)


def test_half_a_surrogate_pair_in_a_column_and_an_error_is_survived(tmp_path: Path) -> None:
    def cut(prompts: list[str], answer: list[str]) -> list[float]:
        assert all(a == "half \ud83d" for a in answer)
        if any(prompt.startswith("1 0") for prompt in prompts):
            raise ValueError("no score for \ud83d")
        return [float(len(prompt)) for prompt in prompts]

    rows = [{**row, "answer": "half \ud83d"} for row in ROWS]
    done = train(tmp_path, cut, rows, prompts_per_iteration=45, save_interval=1)
    assert [row["reward_failures"] for row in done] == [1, 1]
    samples = read_lines(tmp_path / "run" / "samples.jsonl")
    (failure,) = {sample["failure"] for sample in samples if sample.get("failure")}
    assert "no score for \ud83d" in failure


def test_chat_prompts_without_a_template_are_refused(tmp_path: Path) -> None:
    data = [{"prompt": [{"role": "user", "content": "3 5"}]}]
    with pytest.raises(ValueError, match="no chat template"):
        train(tmp_path, larger_digit, data)


def test_long_prompts_are_refused_or_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = [*ROWS, {"prompt": "1 2 3 4 5 >", "answer": "5"}, {"prompt": "1 2 3 4 >", "answer": "4"}]
    with pytest.raises(ValueError, match="4 tokens but 2 of 47 prompts are longer"):
        train(tmp_path, larger_digit, data)
    train(tmp_path, larger_digit, data, overlong_prompts="filter", prompts_per_iteration=45)
    assert "2 prompts over the limit left out" in capsys.readouterr().out
    samples = read_lines(tmp_path / "run" / "samples.jsonl")
    assert {sample["prompt"] for sample in samples} == {row["prompt"] for row in ROWS}


def test_a_file_and_a_datasets_dataset_are_the_same_as_a_list(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    samples = []
    for index, data in enumerate((ROWS, str(file), datasets.Dataset.from_list(ROWS))):
        train(tmp_path / str(index), larger_digit, data)
        samples.append((tmp_path / str(index) / "run" / "samples.jsonl").read_bytes())
    assert samples[0] == samples[1] == samples[2]


def test_an_evaluation_without_prompts_is_refused(unloadable: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="eval_interval = 1 needs an eval_dataset"):
        PPOTrainer(unloadable, larger_digit, ROWS, config(tmp_path / "run", eval_interval=1))


# models and engines


def test_the_tokenizer_is_by_default_the_models_own(saved: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    for name, model in (("a", str(saved)), ("b", AutoModelForCausalLM.from_pretrained(saved))):
        trainer = PPOTrainer(model, larger_digit, ROWS, config(tmp_path / name))
        assert trainer.train_data.ids[0].tolist() == word_tokenizer()("1 0 >")["input_ids"]
        assert trainer.eos_token_ids == (1,)
        trainer.train()
    first, second = ((tmp_path / n / "samples.jsonl").read_bytes() for n in "ab")
    assert first == second


def test_a_nameless_model_needs_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="^processing_class: expected"):
        PPOTrainer(tiny_model(len(WORDS), 0), larger_digit, ROWS, config(tmp_path / "run"))


class UniformEngine:
    """Draws every token uniformly, whatever the policy is: a sampler that fastppo knows nothing of.

    Wrong on purpose as a sampler, and honest about it in its log-probabilities.
    """

    def __init__(self) -> None:
        self.seeds: list[int] = []

    def generate(self, prompts: Sequence[np.ndarray], sampling: Sampling) -> Rollouts:
        self.seeds.append(sampling.seed)
        rng = np.random.default_rng(sampling.seed)
        responses = []
        for _ in prompts:
            tokens = rng.integers(1, len(WORDS), sampling.max_new_tokens).astype(np.int32)
            ends = np.flatnonzero(np.isin(tokens, sampling.eos_token_ids))
            responses.append(tokens[: ends[0] + 1] if ends.size else tokens)
        finished = np.array([r[-1] in sampling.eos_token_ids for r in responses])
        logprobs = [np.full(len(r), -np.log(len(WORDS) - 1), np.float32) for r in responses]
        return Rollouts(responses, logprobs, finished, np.logical_not(finished))


def in_turn(completions: list[str]) -> list[float]:
    """Different scores: responses that are all as good leave nothing to learn or to measure."""
    return [float(i) for i in range(len(completions))]


def test_any_engine_can_sample(tmp_path: Path) -> None:
    engine = UniformEngine()
    trainer = PPOTrainer(
        tiny_model(len(WORDS), seed=0),
        in_turn,
        ROWS,
        config(tmp_path / "run", is_correction="tis", num_iterations=3),
        processing_class=word_tokenizer(),
        engine=engine,
    )
    trainer.train()
    assert len(set(engine.seeds)) == 3
    rows = read_lines(tmp_path / "run" / "metrics.jsonl")
    # ln 12 for what has a probability of about 1/13 in the new policy
    assert rows[0]["is_weight"] == pytest.approx(12 / 13, abs=0.05)
    assert rows[0]["logprob_diff"] == pytest.approx(np.log(13 / 12), abs=0.15)
    response = read_lines(tmp_path / "run" / "samples.jsonl")[0]["response"]
    first = np.random.default_rng(engine.seeds[0]).integers(1, len(WORDS), 3)
    assert response.split() == [WORDS[i] for i in first[: 3 if 1 not in first else 0]]


def test_responses_past_the_models_positions_are_refused(unloadable: str, tmp_path: Path) -> None:
    options = {"max_response_length": 254}  # prompts have 3 tokens, the model 256 positions
    with pytest.raises(
        ValueError, match=r"max_response_length = 254: .*3 tokens.*256 positions of model"
    ):
        PPOTrainer(unloadable, larger_digit, ROWS, config(tmp_path / "run", **options))


def test_a_reward_that_would_be_trained_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tiny = tiny_model(len(WORDS), seed=0).config
    tiny.num_labels = 1
    judge = LlamaForSequenceClassification(tiny)
    for value_model, refused in ((judge, True), (copy.deepcopy(judge), False)):
        arguments: dict[str, Any] = {"value_model": value_model}
        make = functools.partial(
            PPOTrainer,
            tiny_model(len(WORDS), seed=0),
            RewardModel(judge, word_tokenizer()),
            ROWS,
            config(tmp_path / str(refused), critic="separate"),
            processing_class=word_tokenizer(),
            **arguments,
        )
        if refused:
            with pytest.raises(ValueError, match="reward_funcs: .* shares weights"):
                make()
        else:
            make()


def test_models_and_rewards_may_be_paths(saved: Path, tmp_path: Path) -> None:
    classifier = LlamaForSequenceClassification(tiny_model(len(WORDS), seed=0).config)
    classifier.config.num_labels = 1
    classifier.score = torch.nn.Linear(classifier.config.hidden_size, 1, bias=False)
    classifier.save_pretrained(tmp_path / "reward")
    word_tokenizer().save_pretrained(tmp_path / "reward")
    options: dict[str, Any] = {"critic": "separate", "kl_coef": 0.1, "num_iterations": 1}
    PPOTrainer(
        saved,
        str(tmp_path / "reward"),  # a name, not a list of letters
        ROWS,
        config(tmp_path / "run", **options),
        ref_model=saved,
        value_model=tmp_path / "reward",
    ).train()
    [row] = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert row["reward/reward"] == row["reward"]  # by the name of its folder


@pytest.mark.parametrize("rewards", ["no-such-folder", ["no-such-folder"]])
def test_a_reward_of_no_such_name_is_named(rewards: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'no-such-folder' must be .*reward model"):
        train(tmp_path, rewards)


@pytest.mark.parametrize("rewards", [None, 3])
def test_what_is_no_reward_is_named(rewards: Any, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=f"^reward_funcs: expected .*, got {rewards}"):
        train(tmp_path, rewards)


@pytest.mark.parametrize("other", [None, 3, torch.nn.Linear(2, 2)])
def test_what_is_no_model_is_named(other: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="^model: expected a transformers model, got "):
        PPOTrainer(other, larger_digit, ROWS, config(tmp_path / "run"))


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("processing_class", "tokenizer"),
        ("peft_config", {"r": 8}),
        ("engine", PPOConfig),
        ("reward_weights", "1"),
        ("reward_weights", 1.0),
        ("ref_model", 3),
        ("value_model", {}),
    ],
)
def test_an_argument_of_another_kind_is_named(argument: str, value: Any, tmp_path: Path) -> None:
    given = {"processing_class": word_tokenizer(), argument: value}
    options = config(tmp_path / "run", critic="separate", kl_coef=0.1)
    with pytest.raises((TypeError, ValueError), match=f"^{argument}: expected .*, got ") as error:
        PPOTrainer(tiny_model(len(WORDS), seed=0), larger_digit, ROWS, options, **given)
    assert repr(value)[:10] in str(error.value)


def test_a_run_to_resume_is_a_path(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="^resume: expected a path, True or False, got 3"):
        PPOTrainer(
            tiny_model(len(WORDS), seed=0),
            larger_digit,
            ROWS,
            config(tmp_path / "run"),
            processing_class=word_tokenizer(),
            resume_from_checkpoint=3,  # type: ignore[arg-type]
        )
