"""The border between text and tokens: tokenizers like those of Llama 2 and 3, in small."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from fastppo.data.prompts import PromptDataset
from fastppo.data.text import decode, encode

SPECIAL = ("<bos>", "<eos>", "<|im_start|>", "<|im_end|>", "<think>")
CHATML = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m['role'] + '\\n' + m['content'] }}"
    "<|im_end|>\\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>{% endif %}{% endif %}"
)
MESSAGES = [{"role": "user", "content": "hi"}]


def byte_tokenizer(template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """One token a byte and the special ones; it puts <bos> in front, as Llama 3's does."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in SPECIAL])
    bos = ("<bos>", core.token_to_id("<bos>"))
    core.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[bos])
    made = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<bos>", eos_token="<eos>")
    made.chat_template = template
    return made


def sentencepiece_tokenizer() -> PreTrainedTokenizerFast:
    """Words with their space in front, decoded as Llama 2's: the first space goes."""
    pieces = ["<eos>", "▁", "▁the", "▁cat", "s", "7", "▁▁"]
    core = Tokenizer(models.WordLevel({p: i for i, p in enumerate(pieces)}, unk_token="<eos>"))
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>")


def ids_of(prompt: Any, tokenizer: Any, **columns: Any) -> list[int]:
    ids: list[int] = PromptDataset([{"prompt": prompt, **columns}], tokenizer).ids[0].tolist()
    return ids


def test_a_prompt_that_is_rendered_already_has_one_beginning() -> None:
    tokenizer = byte_tokenizer()
    rendered = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    assert ids_of(rendered, tokenizer) == ids_of(MESSAGES, tokenizer)
    assert ids_of("hi", tokenizer) == [tokenizer.bos_token_id, *tokenizer("hi")["input_ids"][1:]]
    assert encode(tokenizer, [f"{rendered}yes"]) == [
        tokenizer(f"{rendered}yes", add_special_tokens=False)["input_ids"]
    ]


@pytest.mark.parametrize(
    "message",
    [
        {"role": "us\ud83d", "content": "hi"},
        {"role": "user", "content": "hi", "name": "\ud83d"},
        {"role": "assistant", "content": "", "tool_calls": [{"name": "f\ud83d"}]},
    ],
    ids=["role", "name", "tool"],
)
def test_half_a_surrogate_pair_anywhere_in_a_chat_names_the_row(message: dict[str, Any]) -> None:
    tokenizer = byte_tokenizer("{% for m in messages %}{{ m | tojson }}{% endfor %}")
    rows = [{"prompt": MESSAGES}, {"prompt": [message, MESSAGES[0]]}]
    with pytest.raises(ValueError, match=r"row 1: the prompt, .*half of a surrogate pair"):
        PromptDataset(rows, tokenizer)


def test_a_column_has_the_arguments_of_the_template() -> None:
    tokenizer = byte_tokenizer()
    plain, think = ids_of(MESSAGES, tokenizer), tokenizer.convert_tokens_to_ids("<think>")
    off = {"chat_template_kwargs": {"enable_thinking": False}}
    assert ids_of(MESSAGES, tokenizer, **off) == [*plain, think]
    assert ids_of(MESSAGES, tokenizer, chat_template_kwargs=None) == plain
    with pytest.raises(TypeError, match="row 0: chat_template_kwargs must be a dict .* got str"):
        ids_of(MESSAGES, tokenizer, chat_template_kwargs="enable_thinking=False")
    saved = PromptDataset([{"prompt": MESSAGES, "chat_template_kwargs": {}}], tokenizer).identity
    refused, _ = PromptDataset([{"prompt": MESSAGES, **off}], tokenizer).changed(
        saved, lambda name: False
    )
    assert refused == "'chat_template_kwargs' of row 0 differs"


@pytest.mark.parametrize(
    ("template", "prompt", "end"),
    [
        (CHATML, MESSAGES, "<|im_end|>"),
        (CHATML, "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>"),
        (CHATML, "1 + 1 =", None),
        ("{% for m in messages %}{{ m.content }}\n\n{% endfor %}", MESSAGES, None),
        ("{% for m in messages %}{{ m.content }}\n### End{% endfor %}", MESSAGES, None),
        ("{% for m in messages %}{{ m.content }} <eos>{% endfor %}", MESSAGES, "<eos>"),
        ("{% for m in messages %}{{ m.content }}<bos>{% endfor %}", MESSAGES, None),
        ("{{ raise_exception('no') if messages[-1].role != 'user' }}hi", MESSAGES, None),
        (None, "hi", None),
    ],
)
def test_the_token_that_ends_an_answer_is_read_from_the_template(
    template: str | None, prompt: Any, end: str | None
) -> None:
    tokenizer = byte_tokenizer(template)
    data = PromptDataset([{"prompt": prompt}], tokenizer)
    assert data.turn_end == (end and tokenizer.convert_tokens_to_ids(end))


def test_a_continuation_keeps_the_space_in_front() -> None:
    tokenizer = sentencepiece_tokenizer()

    def text(*pieces: str) -> str:
        return decode(tokenizer, tokenizer.convert_tokens_to_ids(list(pieces)), continues=True)

    assert decode(tokenizer, tokenizer.convert_tokens_to_ids(["▁cat", "s"])) == "cats"
    assert text("▁cat", "s", "<eos>") == " cats"
    assert text("s", "▁the", "▁cat") == "s the cat"
    assert text("▁", "7") == " 7"
    assert text("▁▁", "7") == "  7"
    assert text("▁", "▁cat") == "  cat"
    assert text("▁the", "▁the") == " the the"
    assert text("<eos>") == text() == ""


def test_byte_level_text_is_the_same_as_a_continuation() -> None:
    tokenizer = byte_tokenizer()
    for words in (" a b", "a", "▁x", "  ", "é", "<think>a<|im_end|>"):
        ids = tokenizer(words, add_special_tokens=False)["input_ids"]
        assert decode(tokenizer, ids, continues=True) == decode(tokenizer, ids)
