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
from fastppo.data.text import TEMPLATE_ARGUMENTS, encode_chat, encode_plain, turn_end

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
            assistant's, left open to be continued) and the arguments of `TEMPLATE_ARGUMENTS`.
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
        if self.conversational:
            arguments = [record.get(TEMPLATE_ARGUMENTS) for record in records]
            encoded = encode_chat(tokenizer, prompts, arguments)
        else:
            encoded = encode_plain(tokenizer, prompts)
        ids = [np.asarray(row, dtype=np.int32) for row in encoded]
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

    @property
    def turn_end(self) -> int | None:
        """The special token that the chat template writes after an answer; None where the prompts
        are not of that template.
        """
        end = turn_end(self._tokenizer)
        return end if self.conversational or end in self.ids[0] else None

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
