"""The models of PPO in their roles: actor, reference, critic, value head.

    hidden = policy.actor.hidden(batch)                       # (T, H)
    values = policy.values(policy.critic_hidden(batch, hidden)[batch.rows])
    ref = policy.reference.logprobs(batch, temperature)       # None without a reference

Shapes: T packed tokens, H hidden size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastppo.data.sequences import PackedSequences
from fastppo.models import setup
from fastppo.models.attention import check_supported
from fastppo.models.packed import PackedModel
from fastppo.models.rehearsal import rehearse
from fastppo.models.saving import load_critic, save_critic
from fastppo.models.value_head import ValueHead, score_head


class Policy:
    """Actor, critic and reference of PPO; the models given are changed in place (PackedModel).

    Args:
        model: a transformers causal language model or a `peft.PeftModel` around one. It is trained
            as it comes: parameters frozen by the caller stay frozen.
        critic: "shared" puts the value head on the actor's trunk, "separate" on a trunk of its
            own, "none" has no values.
        value_model: the separate critic's model: a base model, a causal language model, or a
            sequence classification model with one label, whose score starts the value head. By
            default a copy of the actor's trunk as it is now.
        reference: "copy" is the actor as it is now (frozen parameters are shared, not copied),
            "adapter" a PEFT model with the adapter off, "none" has none. "auto" is the actor as it
            is now in the cheapest way: "adapter" under a LoRA that adds nothing yet, else "copy".
        ref_model: a reference policy in place of that.
        train_layers, precision, gradient_checkpointing: see `PackedModel`.

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
        reference: Literal["auto", "copy", "adapter", "none"] = "copy",
        ref_model: Any = None,
        train_layers: int | None = None,
        precision: setup.Precision = "fp32",
        gradient_checkpointing: bool = False,
    ) -> None:
        if value_model is not None and critic != "separate":
            raise ValueError(
                f"value_model: expected None with critic = {critic!r}, got a model. Use 'separate'"
            )
        if reference == "adapter" and ref_model is None and not setup.is_peft(model):
            raise ValueError("reference: 'adapter' needs a PEFT model, got a plain one. Use 'copy'")
        head = setup.output_head(setup.unwrap(model, "model"), "model")
        fresh = setup.is_base_with_fresh_lora(model)
        if reference == "auto":
            reference = "adapter" if fresh else "copy"
        moving = setup.outside_adapter(model) if reference == "adapter" else []
        if moving and ref_model is None:
            raise ValueError(
                "reference: 'adapter' is the model with its adapter off, but weights outside the "
                f"adapter train too and would move it: {moving[0]}. Use 'auto' or 'copy'"
            )
        given = {"model": model, "ref_model": ref_model, "value_model": value_model}
        given = {name: other for name, other in given.items() if other is not None}
        _check_apart(given)
        for name, other in given.items():
            if name != "model":
                _check_companion(name, other, head.out_features)
            if name != "ref_model" and train_layers is not None:
                setup.last_layers(other, train_layers, name)
        options: dict[str, Any] = {
            "precision": precision,
            "gradient_checkpointing": gradient_checkpointing,
        }
        if train_layers is None and not setup.trainable(model):
            raise ValueError("model: expected parameters to train, got a model that is all frozen")
        # what is refused has been: from here on the models are changed
        self.actor = PackedModel(model, train_layers=train_layers, **options)
        self.reference: PackedModel | None = None
        self.reference_is = ""
        """What the reference is, for a person."""
        self.reference_is_start = ref_model is None and (reference == "copy" or fresh)
        """Whether its KL must be 0 before the first update."""
        if ref_model is not None:
            self.reference = PackedModel(
                ref_model.requires_grad_(False), name="ref_model", precision=precision
            )
            self.reference_is = "the ref_model that was given"
        elif reference == "copy":
            self.reference = self.actor.frozen_copy("reference")
            self.reference_is = "a frozen copy of the model as it starts"
        elif reference == "adapter":
            self.reference = self.actor.without_adapter()
            self.reference_is = (
                "the model as it starts, which is the base without the adapter"
                if fresh
                else "the base without the adapter, which need not be the model as it starts"
            )
        self.critic: PackedModel | None = None
        """Of a trunk of its own."""
        self.value_head: ValueHead | None = None
        if critic == "separate":
            trunk = value_model
            if trunk is None:
                trunk, train_layers = self.actor.copied(trunk_only=True), None  # frozen as it is
            setup.freeze_outside_trunk(trunk)
            self.value_head = ValueHead(trunk, self.device)  # from the score before it is rounded
            self.critic = PackedModel(
                trunk, name="value_model", train_layers=train_layers, **options
            )
        elif critic == "shared":
            self.value_head = ValueHead(self.actor.model, self.device)

    # forward

    def critic_hidden(self, batch: PackedSequences, hidden: Tensor) -> Tensor:
        """The critic's hidden states (T, H): `hidden`, the actor's, where it shares the trunk."""
        return hidden if self.critic is None else self.critic.hidden(batch)

    def values(self, hidden: Tensor) -> Tensor:
        """Values (n,) fp32 of the critic's hidden states (n, H).

        Raises:
            ValueError: the policy has no critic.
        """
        if self.value_head is None:
            raise ValueError("critic: expected 'shared' or 'separate' for values, got 'none'")
        values: Tensor = self.value_head(hidden)
        return values

    def unpacked(self) -> contextlib.AbstractContextManager[Any]:
        """The actor as an ordinary transformers model; see `PackedModel.unpacked`."""
        return self.actor.unpacked()

    # parameters

    @property
    def device(self) -> torch.device:
        """Where the actor's parameters are."""
        return self.actor.device

    def modules(self) -> dict[str, nn.Module]:
        """The modules by role, each once: `model`, `reference`, `critic`, `value_head`."""
        reference = self.reference
        if reference is not None and reference.model is self.actor.model:
            reference = None
        found = {
            "model": self.actor.model,
            "reference": reference and reference.model,
            "critic": self.critic and self.critic.model,
            "value_head": self.value_head,
        }
        return {role: module for role, module in found.items() if module is not None}

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Every parameter once, as `role.name`, by the first role that has it."""
        seen: set[int] = set()
        for role, module in self.modules().items():
            for name, p in module.named_parameters():
                if id(p) not in seen:
                    seen.add(id(p))
                    yield f"{role}.{name}", p

    def parameters(self) -> list[nn.Parameter]:
        """Every parameter once."""
        return [p for _, p in self.named_parameters()]

    def actor_parameters(self) -> list[nn.Parameter]:
        """What the actor's optimiser trains; disjoint from the critic's."""
        return self.actor.trained()

    def critic_parameters(self) -> list[nn.Parameter]:
        """What the critic's optimiser trains: the value head and, if separate, its trunk."""
        if self.value_head is None:
            return []
        trunk = [] if self.critic is None else self.critic.trained()
        return trunk + list(self.value_head.parameters())

    def num_parameters(self) -> dict[str, int]:
        """Numbers: `trainable` and `total` of actor and critic, `reference` what it adds."""
        counts = {"trainable": 0, "total": 0, "reference": 0}
        own = {
            id(p)
            for role, m in self.modules().items()
            if role != "reference"
            for p in m.parameters()
        }
        for _, p in self.named_parameters():
            counts["total" if id(p) in own else "reference"] += p.numel()
            counts["trainable"] += p.numel() if p.requires_grad else 0
        return counts

    def to(self, device: torch.device) -> Policy:
        """Move every model; returns the policy itself."""
        for module in self.modules().values():
            module.to(device)
        return self

    # on disk

    def save(self, folder: str | Path) -> None:
        """Write a folder that AutoModelForCausalLM.from_pretrained loads; see models/saving.py.

        Raises:
            ValueError: loaded again, it is not the model that was trained.
        """
        self.actor.save(Path(folder))
        if self.value_head is not None:
            save_critic(self.critic and self.critic.model, self.value_head, Path(folder))

    def rehearse(self, folder: Path) -> None:
        """Write all that `save` writes but the weights."""
        rehearse(self.actor.model, folder)

    def load_critic(self, folder: str | Path) -> None:
        """Load the critic that `save` wrote to `folder`.

        Raises:
            ValueError: no critic here or there, or one inside a PEFT model.
        """
        if self.value_head is None:
            raise ValueError("folder: expected a policy with a critic, got critic = 'none'")
        load_critic(self.critic and self.critic.model, self.value_head, Path(folder))

    def restore(self) -> None:
        """Make ordinary models of the models again; see `PackedModel.restore`."""
        for model in self._packed():
            model.restore()

    @contextlib.contextmanager
    def lent(self) -> Iterator[None]:
        """Inside, everything works although `restore` was called; see `PackedModel.lent`."""
        with contextlib.ExitStack() as stack:
            for model in self._packed():
                stack.enter_context(model.lent())
            yield

    def _packed(self) -> list[PackedModel]:
        return [m for m in (self.actor, self.reference, self.critic) if m is not None]


def _check_apart(models: dict[str, Any]) -> None:
    """Refuse models that would train, or freeze, each other.

    Raises:
        ValueError: two of them share weights, or one is no model.
    """
    owners: dict[int, str] = {}
    for name, model in models.items():
        setup.check_model(model, name)
        for p in model.parameters():
            if (owner := owners.setdefault(id(p), name)) != name:
                raise ValueError(
                    f"{name}: expected a model of its own, got one sharing weights with {owner}. "
                    "Load it again, or pass copy.deepcopy(...)"
                )


def _check_companion(name: str, companion: Any, vocabulary: int) -> None:
    """Check a reference or value model against the model it accompanies.

    Raises:
        ValueError: unsupported, or with a smaller vocabulary.
    """
    check_supported(setup.unwrap(companion, name).config)
    if name == "value_model":
        score_head(companion)
    size = setup.vocabulary(companion)
    if size < vocabulary:
        raise ValueError(
            f"{name}: expected the vocabulary of model, {vocabulary} tokens, got {size}. Both must "
            "use the same tokenizer"
        )
