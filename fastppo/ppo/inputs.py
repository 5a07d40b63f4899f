"""What a run trains on: prompts and rewards, checked against each other and the model.

Everything here happens before a weight is read, so that a mistake costs seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from fastppo.data.prompts import PromptDataset
from fastppo.models.attention import check_supported
from fastppo.models.loading import eos_token_ids, max_positions
from fastppo.options import shown
from fastppo.ppo.config import PPOConfig
from fastppo.rewards import RewardLimits, Rewards


class Inputs(NamedTuple):
    """Prompts, held-out prompts and the reward."""

    train: PromptDataset
    held_out: PromptDataset | None
    rewards: Rewards


def make_inputs(
    args: PPOConfig,
    model_config: Any,
    tokenizer: Any,
    train_dataset: Any,
    eval_dataset: Any,
    reward_funcs: Callable[..., Any] | str | Sequence[Callable[..., Any] | str],
    reward_weights: Sequence[float] | None,
    companions: Mapping[str, Any] | None = None,
) -> Inputs:
    """Read and tokenise the prompts, and check that a run with them can work.

    Args:
        args: the run's configuration.
        model_config: the model's transformers configuration.
        tokenizer: the model's tokenizer.
        train_dataset: anything `load_records` reads.
        eval_dataset: likewise, or None.
        reward_funcs: what scores a completion, or its name.
        reward_weights: weight of each, or None for 1 each.
        companions: the configurations of other models that read the same tokens, by their roles.

    Raises:
        ValueError: a model that packed attention does not support, no tokenizer, prompts that do
            not fit, a reward function that needs a column which the data does not have.
    """
    check_supported(model_config)
    if not callable(tokenizer):
        raise ValueError(f"processing_class: expected a tokenizer, got {shown(tokenizer)}")
    train, held_out = (
        None
        if source is None
        else PromptDataset(
            source,
            tokenizer,
            max_prompt_length=args.max_prompt_length,
            overlong_prompts=args.overlong_prompts,
        )
        for source in (train_dataset, eval_dataset)
    )
    if train is None:
        raise ValueError("train_dataset: expected prompts, got None")
    if args.eval_interval and held_out is None:
        raise ValueError(f"eval_interval = {args.eval_interval} needs an eval_dataset")
    limits = RewardLimits(
        workers=args.reward_workers,
        timeout=args.reward_timeout,
        memory_gb=args.reward_memory_gb,
        max_failure_rate=args.reward_max_failure_rate,
    )
    rewards = Rewards(reward_funcs, reward_weights, limits)
    for data in filter(None, (train, held_out)):
        rewards.check_columns(data.columns)
        _check_vocabulary(data, model_config, tokenizer)
        for role, config in {"model": model_config, **(companions or {})}.items():
            _check_positions(data, args.max_response_length, role, config)
    for role, config in (companions or {}).items():
        size, own = (getattr(c, "vocab_size", None) for c in (config, model_config))
        if size is not None and own is not None and size < own:
            raise ValueError(
                f"{role}: expected the vocabulary of model, {own} tokens, got {size}. Both must "
                "use the same tokenizer"
            )
    return Inputs(train, held_out, rewards)


def end_tokens(
    model: Any, tokenizer: Any, data: PromptDataset, resumed: Mapping[str, Any] | None
) -> tuple[tuple[int, ...], list[str]]:
    """The tokens that end a response, the one that the chat template ends an answer with among
    them, and notes for a person.

    Args:
        model, tokenizer: see `eos_token_ids`.
        data: the training prompts.
        resumed: the state of a checkpoint. One that does not have them is of a run that did not
            look at the template, and goes on so.
    """
    ends, end = eos_token_ids(model, tokenizer), data.turn_end
    if end is None or end in ends or not (resumed is None or "eos_token_ids" in resumed):
        return ends, []
    token = tokenizer.convert_ids_to_tokens(end)
    return (*ends, end), [f"the chat template ends answers with {token!r}: it ends responses too"]


def _check_positions(data: PromptDataset, response: int, role: str, config: Any) -> None:
    limit = max_positions(config)
    longest = max(len(ids) for ids in data.ids)
    if limit is not None and longest + response > limit:
        raise ValueError(
            f"max_response_length = {response}: with the longest prompt of {longest} tokens that "
            f"is more than the {limit} positions of {role}. Shorten it, or lower max_prompt_length "
            "with overlong_prompts = 'filter'"
        )


def _check_vocabulary(data: PromptDataset, model_config: Any, tokenizer: Any) -> None:
    size = getattr(model_config, "vocab_size", None)
    last = max(int(ids.max()) for ids in data.ids)
    where = "in a prompt" if last >= (size or 0) else "as its eos_token"
    last = max(last, tokenizer.eos_token_id or 0)
    if size is not None and last >= size:
        raise ValueError(
            f"processing_class: expected tokens of the model's vocabulary of {size}, got "
            f"{tokenizer.convert_ids_to_tokens(last)!r} with id {last} {where}, of "
            f"{len(tokenizer)} in the tokenizer. Use the model's own tokenizer, or call "
            f"model.resize_token_embeddings({len(tokenizer)}) and train the new rows first"
        )
