"""A reward model: a transformers sequence classifier with one label, scoring prompt + completion.

The score of a sample is the classifier's only logit on the text of prompt and completion: through
the reward model's own chat template when the prompt is conversational, else on the two strings
joined. The reward model has its own tokenizer, so here (and only here) text is tokenised again; the
policy's tokens are never replaced by it. A model that packed attention supports reads the samples
packed; others, such as encoders, in padded batches.

B samples, S_i tokens of sample i under the reward model's tokenizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastppo.data.sequences import PackedSequences
from fastppo.data.text import begun_once
from fastppo.models.attention import any_shape_attention, is_supported
from fastppo.models.loading import DATA_ONLY, load_whole, max_positions
from fastppo.models.packed import PackedModel
from fastppo.models.setup import check_model
from fastppo.models.weights import check_finite
from fastppo.training.memory import free_memory, is_out_of_memory


class RewardModel:
    """A reward function made of a `AutoModelForSequenceClassification` with one label.

    A folder's configuration and tokenizer are read and checked at once; its weights are read by
    `load()` or on the first call, so a run refused for another reason never pays for them. It only
    ever runs in evaluation mode and without gradients.

    Args:
        model: a local folder written by `save_pretrained`, or the model itself.
        tokenizer: the reward model's tokenizer; read from the folder when None.
        device: where it runs; CUDA when there is one and the model comes from a folder, else where
            the given model already is.
        dtype: of the weights; bfloat16 on CUDA and float32 on CPU when None (a folder), untouched
            when None (a model).
        token_budget: tokens per forward pass (rows times the longest row). Lowered where memory
            runs out, for the calls to come too.

    Raises:
        ValueError: no such folder, not a sequence classifier, more than one label, no tokenizer.
    """

    def __init__(
        self,
        model: str | Path | Any,
        tokenizer: Any = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        token_budget: int = 16_384,
    ) -> None:
        if token_budget < 1:
            raise ValueError(
                f"token_budget must be a positive number of tokens, got {token_budget}"
            )
        self.token_budget = token_budget
        self.tokenizer = tokenizer
        self._model: Any = None
        self._packed: PackedModel | None = None
        self._folder: Path | None = None
        if isinstance(model, (str, Path)):
            self._folder = Path(model)
            self.__name__ = self._folder.resolve().name
            self.config = self._open(self._folder)
            default = "cuda" if torch.cuda.is_available() else "cpu"
            self.device = torch.device(device if device is not None else default)
            self.dtype = dtype or (torch.bfloat16 if self.device.type == "cuda" else torch.float32)
        else:
            check_model(model, "model")
            if tokenizer is None:
                raise ValueError(
                    "tokenizer must be given with a model that is already loaded: "
                    "RewardModel(model, tokenizer)"
                )
            self.__name__ = type(model).__name__
            self.config = model.config
            self.device = torch.device(device) if device is not None else model.device
            self.dtype = dtype or model.dtype
            self._model = model.to(device=self.device, dtype=self.dtype).eval()
        if (labels := getattr(self.config, "num_labels", None)) != 1:
            raise ValueError(
                f"reward model {self.__name__!r} must have exactly one label (its score), got "
                f"num_labels = {labels}; train or convert it with num_labels=1"
            )

    def _open(self, folder: Path) -> Any:
        """Reads the folder's configuration, and its tokenizer unless one was given."""
        from transformers import AutoConfig, AutoTokenizer

        if not (folder / "config.json").is_file():
            raise ValueError(
                f"reward model {str(folder)!r} must be a local folder with a config.json, as "
                "save_pretrained writes it; nothing is downloaded"
            )
        if self.tokenizer is None:
            try:
                self.tokenizer = AutoTokenizer.from_pretrained(
                    folder, local_files_only=True, **DATA_ONLY
                )
            except (OSError, ValueError, TypeError, KeyError) as error:
                raise ValueError(
                    f"reward model {str(folder)!r} has no usable tokenizer ({error}); save its "
                    "tokenizer into the same folder"
                ) from error
        config = AutoConfig.from_pretrained(folder, local_files_only=True, **DATA_ONLY)
        if "/" in (kernel := str(config._attn_implementation)):
            raise ValueError(
                f"reward model {str(folder)!r}: attn_implementation = {kernel!r} in its "
                "config.json is code on a hub, which is not run. Remove it"
            )
        return config

    def load(self) -> Any:
        """The model on its device; reads the weights the first time.

        Raises:
            ValueError: see `load_whole`: weights that are missing, left over or not finite.
        """
        if self._model is None:
            from transformers import AutoModelForSequenceClassification

            model = load_whole(
                str(self._folder),
                "reward model",
                AutoModelForSequenceClassification,
                dtype=self.dtype,
                attn_implementation=None,  # its own: encoders may have no other
                local_files_only=True,
            )
            check_finite(model.state_dict().items(), f"reward model {str(self._folder)!r}")
            self._model = model.to(self.device).eval().requires_grad_(False)
        if self._packed is None and is_supported(self.config) and hasattr(self._model, "score"):
            self._packed = PackedModel(self._model, name="reward model", precision=None)
            self._packed.restore()
        return self._model

    def encode(self, prompts: Sequence[Any], completions: Sequence[Any]) -> list[list[int]]:
        """Token ids of every sample under the reward model's tokenizer, B lists of S_i ids."""
        encoded: list[list[int]] = []
        for prompt, completion in zip(prompts, completions, strict=True):
            if isinstance(prompt, str):
                text = prompt + completion
                ids = begun_once(self.tokenizer, self.tokenizer(text)["input_ids"], text)
            elif self.tokenizer.chat_template is None:
                raise ValueError(
                    f"the tokenizer of reward model {self.__name__!r} has no chat template but the "
                    "prompts are messages; set tokenizer.chat_template or use plain string prompts"
                )
            else:
                messages = [*prompt, *completion]
                ids = self.tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)[
                    "input_ids"
                ]
            encoded.append(list(ids))
        return encoded

    @torch.no_grad()
    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any]) -> list[float]:
        """The score of each sample.

        Args:
            prompts: B strings or B lists of chat messages.
            completions: B strings, or B lists of one assistant message for chat prompts.

        Returns:
            B scores (the logit, in float32).

        Raises:
            ValueError: a sample is empty or longer than the reward model's positions.
        """
        self.load()
        encoded = self.encode(prompts, completions)
        longest = max_positions(self.config)
        size = getattr(self.config, "vocab_size", None)
        for sample, ids in enumerate(encoded):
            if not ids or (longest and len(ids) > longest):
                raise ValueError(
                    f"sample {sample} has {len(ids)} tokens for reward model {self.__name__!r}, "
                    f"which reads 1 to {longest or 'any number'}; shorten max_prompt_length or "
                    "max_response_length"
                )
            if size is not None and max(ids) >= size:
                raise ValueError(
                    f"sample {sample} has token {max(ids)} for reward model {self.__name__!r}, "
                    f"whose vocabulary is {size}: its tokenizer is another model's"
                )
        lengths = [len(ids) for ids in encoded]
        scores = [0.0] * len(encoded)
        # Without a pad id transformers accepts one sequence at a time only, and inventing an id
        # would move what is read.
        batched = self._packed or getattr(self.config, "pad_token_id", None) is not None
        pending = _batches(lengths, self.token_budget if batched else 1)
        while pending:
            rows = pending[0]
            try:
                found = self._forward([encoded[row] for row in rows])
            except Exception as error:
                if len(rows) == 1 or not is_out_of_memory(error):
                    raise
                found = []
            if found:
                for row, score in zip(pending.pop(0), found, strict=True):
                    scores[row] = score
            else:  # the error, gone by now, kept the tensors of its pass alive
                free_memory(self.device)
                self.token_budget = len(rows) * lengths[rows[0]] // 2
                left = [row for batch in pending for row in batch]
                again = _batches([lengths[row] for row in left], self.token_budget)
                pending = [[left[i] for i in batch] for batch in again]
        return scores

    def _forward(self, encoded: Sequence[list[int]]) -> list[float]:
        """The scores of samples (token ids, the longest first) in one pass of the model."""
        packed = self._packed
        logits = self._padded(encoded) if packed is None else self._unpadded(packed, encoded)
        scores: list[float] = logits.float().squeeze(-1).tolist()
        return scores

    def _padded(self, encoded: Sequence[list[int]]) -> Tensor:
        """Logits (samples, 1) of padded rows."""
        input_ids = torch.full(
            (len(encoded), len(encoded[0])), getattr(self.config, "pad_token_id", None) or 0
        )  # (rows, longest) int64
        mask = torch.zeros_like(input_ids)
        for i, ids in enumerate(encoded):
            input_ids[i, : len(ids)] = torch.tensor(ids)
            mask[i, : len(ids)] = 1
        with any_shape_attention():
            logits: Tensor = self._model(
                input_ids=input_ids.to(self.device), attention_mask=mask.to(self.device)
            ).logits
        return logits

    def _unpadded(self, packed: PackedModel, encoded: Sequence[list[int]]) -> Tensor:
        """Logits (samples, 1) without padding.

        A classifier on a causal model reads the last token that is not `pad`, which may be the end
        of the text's own.
        """
        pad = getattr(self.config, "pad_token_id", None)
        batch = PackedSequences.pack(encoded, [[]] * len(encoded), device=self.device)
        last = [
            max((i for i, token in enumerate(ids) if token != pad), default=0) for ids in encoded
        ]
        rows = torch.from_numpy(batch.cu_seqlens_host[:-1] + np.array(last)).to(self.device)
        with packed.lent():
            hidden = packed.hidden(batch)[rows]  # (samples, H)
        logits: Tensor = self._model.score(hidden)
        return logits


def _batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices, longest first, cut so that rows times the longest row stays within `budget` tokens.

    A sequence longer than the budget forms a batch of its own.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= budget:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches
