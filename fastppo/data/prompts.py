"""Prompts: read records, tokenise them once, hand them out in a reproducible order.

A record is a dict with a `prompt` (a string, or a list of chat messages) and any other columns,
which travel to the reward functions untouched. Prompts that are too long are refused or left out
and counted, never cut. The order of the prompts is a pure function of (seed, iteration): nothing
has to be saved to continue it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from fastppo.data.identity import differences, digests, earlier_digest
from fastppo.data.sources import load_records

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_RESERVED = ("prompts", "completions", "completion_ids")


class PromptBatch(NamedTuple):
    """Some prompts of a dataset, in the order asked for."""

    ids: list[np.ndarray]  # B arrays of token ids, int32
    prompts: list[Any]  # B strings or B lists of messages, as in the source
    columns: dict[str, list[Any]]  # every other column, B values each


class PromptDataset:
    """Prompts, tokenised once.

    Attributes:
        ids: one (length,) int32 array per prompt.
        prompts: the prompts as they were given.
        columns: name → values of every column other than `prompt`.
        conversational: whether prompts are chat messages (all are, or none).
        num_filtered: prompts left out because they were longer than `max_prompt_length`.

    Args:
        source: anything `load_records` reads.
        tokenizer: the policy's tokenizer. Plain prompts are encoded with its defaults, chat prompts
            by its chat template with the generation prompt added (or, when the last message is the
            assistant's, left open to be continued).
        max_prompt_length: in tokens, ≥ 1; None for no limit.
        overlong_prompts: what to do with longer ones: "error" refuses the dataset, "filter" leaves
            them out and counts them.

    Raises:
        ValueError: see `load_records`; also a reserved column name, chat prompts mixed with plain
            ones, a tokenizer without a chat template, a prompt without tokens or over the limit.
        TypeError: a prompt of the wrong type.
    """

    def __init__(
        self,
        source: Any,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_prompt_length: int | None = None,
        overlong_prompts: Literal["error", "filter"] = "error",
    ) -> None:
        records = load_records(source)
        kinds = ["plain" if isinstance(record["prompt"], str) else "chat" for record in records]
        other = next((i for i, kind in enumerate(kinds) if kind != kinds[0]), None)
        if other is not None:
            raise ValueError(
                f"prompts must be all plain strings or all chat messages: row 0 is {kinds[0]}, row "
                f"{other} is {kinds[other]}; convert one kind into the other"
            )
        self.conversational = kinds[0] == "chat"
        for name in records[0]:
            if name in _RESERVED:
                raise ValueError(
                    f"column {name!r} has a name that reward functions receive from fastppo "
                    f"({', '.join(_RESERVED)}); rename the column"
                )
        prompts = [record["prompt"] for record in records]
        encode = _encode_chat if self.conversational else _encode_plain
        ids = [np.asarray(row, dtype=np.int32) for row in encode(tokenizer, prompts)]
        if (empty := next((i for i, row in enumerate(ids) if row.size == 0), None)) is not None:
            raise ValueError(
                f"prompt of row {empty} has no tokens ({prompts[empty]!r}); remove the row"
            )
        kept = _within_limit(ids, max_prompt_length, overlong_prompts)
        self.num_filtered = len(ids) - len(kept)
        self.ids = [ids[i] for i in kept]
        self.prompts = [prompts[i] for i in kept]
        names = [name for name in records[0] if name != "prompt"]
        self.columns = {name: [records[i][name] for i in kept] for name in names}
        self._tokenizer = tokenizer

    def __len__(self) -> int:
        return len(self.ids)

    @functools.cached_property
    def identity(self) -> dict[str, Any]:
        """JSON by which a continuation knows the prompts again, see `changed`.

        What was given and what encodes it, apart from the tokens that this came to: a template may
        write today's date.
        """
        template = self._tokenizer.chat_template if self.conversational else None
        return {
            "rows": len(self),
            "conversational": self.conversational,
            "columns": {
                name: digests(values)
                for name, values in ({"prompt": self.prompts} | self.columns).items()
            },
            "tokenizer": digests([[self._tokenizer.get_vocab(), template]]),
            "tokens": digests([row.tobytes() for row in self.ids]),
        }

    def changed(
        self, saved: Mapping[str, Any] | str, read: Callable[[str], bool]
    ) -> tuple[str, str]:
        """What differs from the data of a run that is continued.

        Args:
            saved: the run's `identity`, or the one digest that older checkpoints have.
            read: whether a reward function reads a column.

        Returns:
            What makes it another training, and what only should be known; empty where nothing does.
        """
        if not isinstance(saved, str):
            return differences(saved, self.identity, read)
        if saved == earlier_digest(self.ids, self.columns):
            return "", ""
        return "their digest is another (a checkpoint as old as this one says no more)", ""

    def select(self, indices: Sequence[int] | np.ndarray) -> PromptBatch:
        """The prompts at `indices`, repeats allowed, in that order."""
        return PromptBatch(
            [self.ids[i] for i in indices],
            [self.prompts[i] for i in indices],
            {name: [values[i] for i in indices] for name, values in self.columns.items()},
        )


def _within_limit(
    ids: Sequence[np.ndarray], limit: int | None, overlong: Literal["error", "filter"]
) -> list[int]:
    """Indices of the prompts to keep."""
    if limit is None:
        return list(range(len(ids)))
    kept = [i for i, row in enumerate(ids) if row.size <= limit]
    count = len(ids) - len(kept)
    if count and overlong == "error":
        first = next(i for i, row in enumerate(ids) if row.size > limit)
        raise ValueError(
            f"max_prompt_length is {limit} tokens but {count} of {len(ids)} prompts are longer, "
            f"first row {first} with {ids[first].size} (longest: {max(r.size for r in ids)}); "
            "raise max_prompt_length or leave them out with overlong_prompts = 'filter'"
        )
    if not kept:
        raise ValueError(
            f"max_prompt_length of {limit} tokens leaves none of the {len(ids)} prompts (shortest: "
            f"{min(row.size for row in ids)}); raise it"
        )
    return kept


def _encode_plain(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]
) -> Sequence[Sequence[int]]:
    encoded: list[list[int]] = tokenizer(list(prompts))["input_ids"]
    eos, eos_id = tokenizer.eos_token, tokenizer.eos_token_id
    for row, (ids, prompt) in enumerate(zip(encoded, prompts, strict=True)):
        if ids and ids[-1] == eos_id and not (isinstance(eos, str) and prompt.endswith(eos)):
            raise ValueError(
                f"the tokenizer ends prompts with its end-of-text token {eos!r} (first row {row}); "
                "after it a policy has nothing to say; set tokenizer.add_eos_token = False"
            )
    return encoded


def _encode_chat(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[list[dict[str, Any]]]
) -> Sequence[Sequence[int]]:
    if tokenizer.chat_template is None:
        raise ValueError(
            f"prompts are chat messages but tokenizer {tokenizer.name_or_path!r} has no chat "
            "template; use the instruction-tuned model's tokenizer, set its chat_template, or "
            "give the prompts as plain strings"
        )
    encoded: list[Sequence[int]] = [()] * len(prompts)
    for continued in (False, True):
        rows = [i for i, p in enumerate(prompts) if (p[-1]["role"] == "assistant") is continued]
        texts = []
        for row in rows:
            try:
                text = tokenizer.apply_chat_template(
                    prompts[row],
                    tokenize=False,
                    add_generation_prompt=not continued,
                    continue_final_message=continued,
                )
            except Exception as error:
                raise ValueError(
                    f"the chat template of tokenizer {tokenizer.name_or_path!r} refuses the prompt "
                    f"of row {row}: {error}; the messages: {prompts[row]!r}"
                ) from error
            texts.append(str(text))
        if texts:  # the template writes the special tokens itself
            ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
            for row, row_ids in zip(rows, ids, strict=True):
                encoded[row] = row_ids
    return encoded


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int] | np.ndarray) -> str:
    """The text of generated tokens, for reading and scoring only: it is never tokenised back.

    Args:
        tokenizer: the policy's tokenizer.
        ids: (length,) token ids; special tokens (the end-of-text token) are left out of the text.
    """
    text = tokenizer.decode(
        [int(i) for i in ids], skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    assert isinstance(text, str)  # a list only comes back for a list of lists
    return text
