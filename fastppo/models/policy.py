"""The policy: a transformers model with a value head and a reference, run on packed batches.

    hidden = policy.trunk(batch)                 # (T, H), every token once, no padding
    rows = hidden[batch.rows]                    # (N, H), only what predicts a response token
    head = policy.head                           # rows @ head.weight.T are the logits
    values = policy.values(policy.critic_trunk(batch, hidden)[batch.rows])

Trunk and head are apart so that prompt tokens never reach the head, whose logits would be most of
the memory of a step. The packed forward is exactly the unpacked one (attention.py).

The value head starts at zero (with rewards in [0, 1] a random head starts out wrong by more than
the reward) or at a reward model's score head, as in InstructGPT (https://arxiv.org/abs/2203.02155).
It is fp32 in every precision. Dropout is off in every mode.

Shapes: T packed tokens, N response tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from fastppo.models import setup as prep
from fastppo.models.attention import Kernel, attention_kwargs, check_supported, select_kernel
from fastppo.models.saving import load_critic, save_policy

if TYPE_CHECKING:
    from fastppo.data.sequences import PackedBatch
    from fastppo.models.kv_cache import KVCache


class Head(NamedTuple):
    """What turns hidden states into logits: hidden @ weight.T + bias."""

    weight: Tensor  # (V, H)
    bias: Tensor | None = None  # (V,)


class Policy(nn.Module):
    """Actor, critic and reference of PPO.

    The models given are changed in place: their attention, dropout, trainable parameters and
    dtypes. `restore_attention` makes an ordinary model of them again.

    Args:
        model: a transformers causal language model (Llama, Qwen2, Qwen3 or GPT-2 family) or a
            `peft.PeftModel` around one. It is trained as it comes: parameters frozen by the
            caller stay frozen.
        critic: "shared" puts the value head on the actor's trunk, "separate" on a trunk of its
            own, "none" has no values.
        value_model: the separate critic's model: a base model, a causal language model, or a
            sequence classification model with one label, whose score starts the value head. By
            default a copy of the actor's trunk as it is now.
        reference: "copy" is the actor as it is now (frozen parameters are shared, not copied),
            "adapter" a PEFT model with the adapter off, "model" is `ref_model`, "none" has none.
        ref_model: the reference policy for reference = "model".
        train_layers: train only the last so many decoder layers and the final norm.
        precision: "bf16" is autocast with fp32 masters of everything that trains.
        gradient_checkpointing: recompute activations in the backward pass.

    Raises:
        ValueError: a model that packed attention does not support, by name, or arguments that
            contradict each other.
    """

    def __init__(
        self,
        model: Any,
        *,
        critic: Literal["shared", "separate", "none"] = "shared",
        value_model: Any = None,
        reference: Literal["copy", "adapter", "model", "none"] = "copy",
        ref_model: Any = None,
        train_layers: int | None = None,
        precision: prep.Precision = "fp32",
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        prep.check_roles(critic, value_model, reference, ref_model, precision, model)
        self.precision = precision
        self.reference_kind = reference
        self._rounded = prep.Rounded()

        actor = prep.unwrap(model, "model")
        check_supported(actor.config)
        head = prep.output_head(actor, "model")
        for name, other in (("ref_model", ref_model), ("value_model", value_model)):
            if other is not None:
                prep.check_companion(name, other, model, head.out_features)
        if train_layers is not None:
            prep.train_last_layers(model, train_layers, "model")
            if value_model is not None:
                prep.train_last_layers(value_model, train_layers, "value_model")
        if not prep.trainable(model):
            raise ValueError("model: expected parameters to train, got a model that is all frozen")
        prep.set_precision(model, precision)

        self.model = model
        self.reference: Any = ref_model
        if reference == "copy":
            self.reference = prep.copy_trainable(model)
        if self.reference is not None:
            self.reference.requires_grad_(False)
            prep.set_precision(self.reference, precision)
        self.critic: Any = value_model
        self.value_head: Any = None
        if critic == "separate":
            if value_model is None:
                whole = model if prep.is_peft(model) else actor.base_model
                self.critic = prep.copy_trainable(whole)
            prep.freeze_outside_trunk(self.critic)
            prep.set_precision(self.critic, precision)
        if critic != "none":
            self.value_head = prep.make_value_head(self.critic or model, self.device)

        prep.disable_dropout(self)
        self._attention = prep.AttentionSwitch(self._models())
        self._attention.set(packed=True)
        if gradient_checkpointing:
            prep.enable_checkpointing(actor)
            if self.critic is not None:
                prep.enable_checkpointing(prep.unwrap(self.critic, "value_model"))
        self.train()

    # forward

    def trunk(self, batch: PackedBatch) -> Tensor:
        """Final hidden states (T, H), after the final norm, of every token of a packed batch."""
        with self.autocast():
            return self._hidden(self.model, batch)

    @contextlib.contextmanager
    def decoding(self) -> Iterator[None]:
        """What `next_logits` is called in: no gradients, nothing recomputed, one autocast, so that
        trained weights are rounded to bf16 once and not for every token."""
        training = self.model.training
        self.model.eval()  # gradient checkpointing is for training
        try:
            with torch.no_grad(), self.autocast():
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
        hidden = self._forward(self.model, input_ids, cache.positions, attention)  # (T, H)
        weight, bias = self.head
        return F.linear(hidden.index_select(0, cache.last), weight, bias).float()

    @property
    def head(self) -> Head:
        """The output head; a frozen one comes in the dtype of the autocast."""
        return self._head(self.model)

    @property
    def has_critic(self) -> bool:
        """Whether there are values."""
        return self.value_head is not None

    def critic_trunk(self, batch: PackedBatch, hidden: Tensor) -> Tensor:
        """The critic's hidden states (T, H): `hidden` itself where it shares the actor's trunk."""
        if self.critic is None:
            return hidden
        with self.autocast():
            return self._hidden(self.critic, batch)

    def values(self, hidden: Tensor) -> Tensor:
        """Values (n,) fp32 of hidden states (n, H), computed in fp32.

        Raises:
            ValueError: the policy has no critic.
        """
        if self.value_head is None:
            raise ValueError("critic: expected 'shared' or 'separate' for values, got 'none'")
        with torch.autocast(hidden.device.type, enabled=False):
            values: Tensor = self.value_head(hidden.float()).squeeze(-1)
        return values

    def ref_logprobs(
        self, batch: PackedBatch, temperature: float, *, fp32_logits: bool = False
    ) -> Tensor | None:
        """The reference's log-probabilities (N,) fp32, in nats, of the response tokens.

        Args:
            batch: the packed batch.
            temperature: what the logits are divided by, as in the actor's log-probabilities.
            fp32_logits: keep them in fp32, as there.

        Returns:
            None without a reference.
        """
        from fastppo import ops

        if self.reference_kind == "none":
            return None
        adapter = self.reference_kind == "adapter"
        model = self.model if adapter else self.reference
        off = self.model.disable_adapter() if adapter else contextlib.nullcontext()
        with torch.no_grad(), off, self.autocast():
            hidden = self._hidden(model, batch).index_select(0, batch.rows)  # (N, H)
            head = self._head(model)
            return ops.linear_logprobs(
                hidden,
                head.weight,
                batch.targets,
                bias=head.bias,
                temperature=temperature,
                fp32_logits=fp32_logits,
            ).logprobs

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The compute precision: bf16 autocast, or nothing for fp32."""
        if self.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    @contextlib.contextmanager
    def unpacked(self) -> Iterator[Any]:
        """The actor as an ordinary transformers model in eval mode.

        Yields:
            The transformers model (a PEFT model's base with the adapters in it) in the attention
            implementation it came with. The policy must not be called inside.
        """
        model = prep.unwrap(self.model, "model")
        training = model.training
        self._attention.set(packed=False)
        model.eval()
        try:
            yield model
        finally:
            model.train(training)
            self._attention.set(packed=True)

    # parameters

    @property
    def device(self) -> torch.device:
        """Where the actor's parameters are."""
        device: torch.device = next(self.model.parameters()).device
        return device

    @property
    def attention_kernel(self) -> Kernel:
        """What computes the packed attention; see attention.py."""
        return self._kernel(self.model)

    def actor_parameters(self) -> list[nn.Parameter]:
        """What the actor's optimiser trains; disjoint from the critic's."""
        return prep.trainable(self.model)

    def critic_parameters(self) -> list[nn.Parameter]:
        """What the critic's optimiser trains: the value head and, if separate, its trunk."""
        if self.value_head is None:
            return []
        trunk = [] if self.critic is None else prep.trainable(self.critic)
        return trunk + list(self.value_head.parameters())

    def num_parameters(self) -> dict[str, int]:
        """Numbers: `trainable` and `total` of actor and critic, `reference` what it adds."""
        own = [m for m in (self.model, self.critic, self.value_head) if m is not None]
        return prep.count_parameters(own, self.reference)

    def train(self, mode: bool = True) -> Policy:
        """nn.Module.train, which the frozen reference does not follow."""
        super().train(mode)
        if self.reference is not None:
            self.reference.eval()
        return self

    # on disk

    def save(self, folder: str | Path) -> None:
        """Write a folder that AutoModelForCausalLM.from_pretrained loads; see saving.py."""
        save_policy(self, Path(folder))

    def load_critic(self, folder: str | Path) -> None:
        """Load the critic that `save` wrote to `folder`; see saving.py."""
        load_critic(self, Path(folder))

    def restore_attention(self) -> None:
        """Make ordinary models of the models again: their own attention, one dtype (fp32)."""
        self._attention.set(packed=False)
        for module in self._models():
            prep.set_precision(module, "fp32")

    # internals

    def _models(self) -> list[Any]:
        return [m for m in (self.model, self.reference, self.critic) if m is not None]

    def _hidden(self, model: Any, batch: PackedBatch) -> Tensor:
        boundaries = attention_kwargs(batch, self._kernel(model))
        return self._forward(model, batch.input_ids, batch.position_ids, boundaries)

    def _forward(
        self, model: Any, input_ids: Tensor, position_ids: Tensor, attention: dict[str, Any]
    ) -> Tensor:
        trunk = prep.trunk_of(model)
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

    def _kernel(self, model: Any) -> Kernel:
        dtype = torch.bfloat16 if self.precision == "bf16" else torch.float32
        return select_kernel(self.device, dtype, prep.head_dim(model))

    def _head(self, model: Any) -> Head:
        output = prep.unwrap(model, "model").get_output_embeddings()
        weight, bias = output.weight, output.bias
        if self.precision == "bf16" and not weight.requires_grad and weight.dtype == torch.float32:
            weight = self._rounded(weight)
        return Head(weight, bias)
