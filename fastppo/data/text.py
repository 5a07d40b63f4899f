"""The border between text and tokens: prompts are encoded once, responses decoded for reading."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fastppo.data.sources import check_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEMPLATE_ARGUMENTS = "chat_template_kwargs"
"""Column with arguments of the chat template, such as {"enable_thinking": false}; TRL's name."""


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Token ids by the tokenizer's defaults; see `begun_once`.

    Raises:
        ValueError: the tokenizer cannot.
    """
    try:
        encoded: list[list[int]] = tokenizer(list(texts))["input_ids"]
    except Exception as error:  # a damaged one raises whatever it likes
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(
            f"processing_class: the tokenizer {tokenizer.name_or_path!r} cannot encode the prompts "
            f"({reason}). Its tokenizer.json may be damaged"
        ) from error
    return [begun_once(tokenizer, ids, text) for ids, text in zip(encoded, texts, strict=True)]


def begun_once(tokenizer: Any, ids: list[int], text: str) -> list[int]:
    """The ids of a text, which has no second beginning-of-text token where it begins with one, such
    as a text that the chat template has rendered."""
    bos = getattr(tokenizer, "bos_token", None)
    doubled = isinstance(bos, str) and text.startswith(bos) and len(ids) > 1
    return ids[1:] if doubled and ids[0] == ids[1] == tokenizer.bos_token_id else ids


def encode_plain(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]
) -> Sequence[Sequence[int]]:
    """Token ids of prompts, refused where the tokenizer ends them."""
    encoded = encode(tokenizer, prompts)
    eos, eos_id = tokenizer.eos_token, tokenizer.eos_token_id
    for row, (ids, prompt) in enumerate(zip(encoded, prompts, strict=True)):
        if ids and ids[-1] == eos_id and not (isinstance(eos, str) and prompt.endswith(eos)):
            raise ValueError(
                f"the tokenizer ends prompts with its end-of-text token {eos!r} (first row {row}); "
                "after it a policy has nothing to say; set tokenizer.add_eos_token = False"
            )
    return encoded


def encode_chat(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[dict[str, Any]]],
    arguments: Sequence[Any],
) -> Sequence[Sequence[int]]:
    """Token ids of chat messages by the chat template, with `arguments` of it for each prompt."""
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
            given = {} if arguments[row] is None else arguments[row]
            if not isinstance(given, Mapping):
                raise TypeError(
                    f"row {row}: {TEMPLATE_ARGUMENTS} must be a dict of arguments of the chat "
                    f"template, got {type(given).__name__}"
                )
            try:
                text = tokenizer.apply_chat_template(
                    prompts[row],
                    tokenize=False,
                    add_generation_prompt=not continued,
                    continue_final_message=continued,
                    **given,
                )
            except Exception as error:
                raise ValueError(
                    f"the chat template of tokenizer {tokenizer.name_or_path!r} refuses the prompt "
                    f"of row {row}: {error}; the messages: {prompts[row]!r}"
                ) from error
            check_text(f"row {row}", "the prompt, rendered by the chat template,", str(text))
            texts.append(str(text))
        if texts:  # the template writes the special tokens itself
            ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
            for row, row_ids in zip(rows, ids, strict=True):
                encoded[row] = row_ids
    return encoded


def turn_end(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The special token right after an answer in the chat template, if it writes one."""
    if tokenizer.chat_template is None:
        return None
    said = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "fastppo"}]
    try:
        text = str(tokenizer.apply_chat_template(said, tokenize=False))
    except Exception:  # whatever a template raises: some take no such conversation
        return None
    after = tokenizer(text.rpartition("fastppo")[2].strip(), add_special_tokens=False)["input_ids"]
    first = next((i for i in after if str(tokenizer.decode([i])).strip()), None)
    if first is None or first == tokenizer.bos_token_id:
        return None
    added = tokenizer.added_tokens_decoder.get(first)
    special = first in tokenizer.all_special_ids or (added is not None and added.special)
    return int(first) if special else None


def decode(
    tokenizer: PreTrainedTokenizerBase,
    ids: Sequence[int] | np.ndarray,
    *,
    continues: bool = False,
) -> str:
    """The text of generated tokens, for reading and scoring only: it is never tokenised back.

    Args:
        tokenizer: the policy's tokenizer.
        ids: (length,) token ids; special tokens (the end-of-text token) are left out of the text.
        continues: it goes on from a text, and keeps the space in front, which decoders of
            SentencePiece drop.
    """

    def text(of: list[int]) -> str:
        return str(
            tokenizer.decode(of, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        )

    listed = [int(i) for i in ids]
    first = listed[:1]
    if continues and first and tokenizer.convert_ids_to_tokens(first)[0].startswith("▁"):
        return text(first + listed).removeprefix(text(first))
    return text(listed)
