"""A transformers model run on packed sequences: trunk, head and log-probabilities.

    hidden = model.hidden(batch)                 # (T, H), every token once, no padding
    rows = hidden[batch.rows]                    # (N, H), only what predicts a response token
    head = model.head                            # rows @ head.weight.T are the logits
    found = model.logprobs(batch, 1.0)           # (N,) each, of the response tokens

Whatever role a model has (actor, reference, critic, reward model, the model of SFT or DPO), it runs
through here, and nothing else calls a transformers model. Trunk and head are apart so that prompt
tokens never reach the head, whose logits would be most of the memory of a step. The packed forward
is exactly the unpacked one (attention.py). Decoding is the same forward with a cache (kv_cache.py).

Shapes: T packed tokens, N response tokens, S sequences that are decoded, H hidden size,
V vocabulary.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from fastppo import ops
from fastppo.data.sequences import PackedSequences
from fastppo.models import setup
from fastppo.models.attention import (
    Kernel,
    any_shape_attention,
    attention_kwargs,
    check_supported,
    select_kernel,
)
from fastppo.models.kv_cache import KVCache
from fastppo.models.saving import save_pretrained


class OutputHead(NamedTuple):
    """What turns hidden states into logits: hidden @ weight.T + bias."""

    weight: Tensor  # (V, H)
    bias: Tensor | None = None  # (V,)


class PackedModel:
    """A model, changed in place: its attention, dropout, trainable parameters and dtypes.

    `restore` makes an ordinary model of it again. Dropout is off in every mode; a model whose
    weights are left as they are (precision None) is put in eval mode instead.

    Args:
        model: a transformers model (Llama, Qwen2, Qwen3 or GPT-2 family) or a `peft.PeftModel`
            around one. Parameters that the caller froze stay frozen.
        name: what errors call it.
        train_layers: train only the last so many decoder layers and the final norm.
        precision: "fp32"; "bf16" is autocast with fp32 masters of everything that trains; None
            leaves the weights as they are.
        gradient_checkpointing: recompute activations in the backward pass.

    Raises:
        ValueError: a model that packed attention does not support, by name.
    """

    def __init__(
        self,
        model: Any,
        *,
        name: str = "model",
        train_layers: int | None = None,
        precision: setup.Precision | None = "fp32",
        gradient_checkpointing: bool = False,
    ) -> None:
        check_supported(setup.unwrap(model, name).config)
        if train_layers is not None:
            setup.train_last_layers(model, train_layers, name)
        if precision is not None:
            setup.disable_dropout(model)
        self.model = model
        self.name = name
        self.precision = precision
        self._rounded = setup.Rounded()
        self._adapter_off = False
        self._training = model.training
        self._attention = setup.AttentionSwitch(model)
        if gradient_checkpointing:
            setup.enable_checkpointing(setup.unwrap(model, name))
        self._pack()

    # other models from this one

    def copied(self, *, trunk_only: bool = False) -> Any:
        """A copy of the transformers model with trainable parameters of its own, which shares the
        frozen ones; without the head if `trunk_only`, but a PEFT model is copied whole."""
        whole = setup.is_peft(self.model) or not trunk_only
        self._attention.set(packed=False)  # the copy is to know the attention it came with
        copied = setup.copy_trainable(self.model if whole else self.model.base_model)
        self._attention.set(packed=True)
        return copied

    def frozen_copy(self, name: str) -> PackedModel:
        """A model that stays as this one is now."""
        frozen = PackedModel(
            self.copied().requires_grad_(False), name=name, precision=self.precision
        )
        frozen._rounded = self._rounded  # of frozen weights, which both have
        return frozen

    def without_adapter(self) -> PackedModel:
        """The same PEFT model with its adapter off."""
        off = copy.copy(self)
        off._adapter_off = True
        return off

    # forward

    def hidden(self, batch: PackedSequences) -> Tensor:
        """Final hidden states (T, H), after the final norm, of every token."""
        with self._adapter(), self.autocast():
            boundaries = attention_kwargs(batch, self.attention_kernel)
            return self._forward(batch.input_ids, batch.position_ids, boundaries)

    def logprobs(
        self,
        batch: PackedSequences,
        temperature: float,
        *,
        hidden: Tensor | None = None,
        fp32_logits: bool = False,
    ) -> ops.LogProbs:
        """Log-probabilities of the response tokens, and the entropy of the distributions that they
        were drawn from: (N,) fp32 each, in nats.

        Args:
            batch: the sequences.
            temperature: what the logits are divided by.
            hidden: of these sequences, where they have been computed already.
            fp32_logits: keep the logits in fp32 under bf16.
        """
        if hidden is None:
            hidden = self.hidden(batch)
        with self._adapter(), self.autocast():
            weight, bias = self.head
            return ops.linear_logprobs(
                hidden.index_select(0, batch.rows),  # (N, H)
                weight,
                batch.targets,
                bias=bias,
                temperature=temperature,
                fp32_logits=fp32_logits,
            )

    @property
    def head(self) -> OutputHead:
        """The output head; a frozen one comes in the dtype of the autocast."""
        output = setup.unwrap(self.model, self.name).get_output_embeddings()
        weight, bias = output.weight, output.bias
        if self.precision == "bf16" and not weight.requires_grad and weight.dtype == torch.float32:
            weight = self._rounded(weight)
        return OutputHead(weight, bias)

    @contextlib.contextmanager
    def decoding(self) -> Iterator[None]:
        """What `next_logits` is called in: no gradients, nothing recomputed, attention kernels that
        need no plan for a shape, and one autocast, so that trained weights are rounded to bf16 once
        and not for every token."""
        training = self.model.training
        self.model.eval()  # gradient checkpointing is for training
        try:
            with torch.no_grad(), self._adapter(), self.autocast(), any_shape_attention():
                yield
        finally:
            self.model.train(training)

    def next_logits(self, input_ids: Tensor, cache: KVCache, **boundaries: Any) -> Tensor:
        """Logits (S, V) fp32 of the token after each of S sequences; call it in `decoding`.

        Args:
            input_ids: (T,) tokens: whole prompts back to back, or the next token of each sequence.
            cache: of these sequences, in the pass that the tokens belong to.
            boundaries: those of the prompts, as `packed_attention` takes them.
        """
        attention = {"kv_cache": cache, **boundaries}
        hidden = self._forward(input_ids, cache.positions, attention)  # (T, H)
        weight, bias = self.head
        return F.linear(hidden.index_select(0, cache.last), weight, bias).float()

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The compute precision: bf16 autocast, or nothing."""
        if self.precision != "bf16":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    @contextlib.contextmanager
    def unpacked(self) -> Iterator[Any]:
        """The model as an ordinary transformers model in eval mode.

        Yields:
            The transformers model (a PEFT model's base with the adapters in it) in the attention
            implementation it came with. `hidden` must not be called inside.
        """
        model = setup.unwrap(self.model, self.name)
        training = model.training
        self._attention.set(packed=False)
        model.eval()
        try:
            yield model
        finally:
            model.train(training)
            self._attention.set(packed=True)

    def restore(self) -> None:
        """Make an ordinary model of it again: its own attention, the mode (train or eval) that it
        came in, and one dtype (fp32) if it was given a precision. It can be used as a packed one
        inside `lent`."""
        self._attention.set(packed=False)
        if self.precision is not None:
            setup.set_precision(self.model, "fp32")
        self.model.train(self._training)

    @contextlib.contextmanager
    def lent(self) -> Iterator[None]:
        """Inside, `hidden` may be called although `restore` was: for a model that others call."""
        restored = not self._attention.packed
        if restored:
            self._pack()
        try:
            yield
        finally:
            if restored:
                self.restore()

    def _pack(self) -> None:
        if self.precision is not None:
            setup.set_precision(self.model, self.precision)
        self._attention.set(packed=True)
        # gradient checkpointing looks at it
        self.model.train(self.precision is not None and bool(self.trained()))

    # what it is made of

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        device: torch.device = next(self.model.parameters()).device
        return device

    @property
    def attention_kernel(self) -> Kernel:
        """What computes the packed attention; see attention.py."""
        dtype = torch.bfloat16 if self.precision == "bf16" else torch.float32
        if self.precision is None:
            dtype = next(self.model.parameters()).dtype
        return select_kernel(self.device, dtype, setup.head_dim(self.model))

    def trained(self) -> list[nn.Parameter]:
        """The parameters that train."""
        return setup.trainable(self.model)

    def save(self, folder: Path) -> None:
        """Write a folder that `from_pretrained` loads; see saving.py.

        Raises:
            ValueError: loaded again, it is not the model that was trained.
        """
        save_pretrained(self.model, folder)

    def _adapter(self) -> contextlib.AbstractContextManager[Any]:
        return self.model.disable_adapter() if self._adapter_off else contextlib.nullcontext()

    def _forward(
        self, input_ids: Tensor, position_ids: Tensor, attention: dict[str, Any]
    ) -> Tensor:
        if not self._attention.packed:
            raise ValueError(
                f"{self.name}: expected a packed model, got one that `restore` made ordinary. Call "
                "this inside `with policy.lent()`, or PackedModel.lent()"
            )
        trunk = setup.trunk_of(self.model)
        # embeddings, not ids: given ids without a mask, transformers reads them back from the
        # device to look for padding
        out = trunk(
            inputs_embeds=trunk.get_input_embeddings()(input_ids[None]),
            position_ids=position_ids[None],
            attention_mask=None,
            use_cache=False,
            **attention,
        )
        hidden: Tensor = out[0][0]
        return hidden
