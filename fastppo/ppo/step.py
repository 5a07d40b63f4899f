"""PPOStep: the PPO update as one object that any training loop can call.

    batch = PackedBatch.pack(prompts, responses, truncated=truncated)
    batch = step.evaluate(batch)              # old and reference log-probabilities, values
    batch = step.advantages(batch, scores)    # KL, rewards, GAE
    metrics = step.update(batch)              # epochs × minibatches × micro-batches

Shapes: B sequences, T packed tokens, N response tokens, H hidden size (see experience.PackedBatch).
Nothing is read back inside the minibatch loop: all metrics come in one copy per update, and one
per epoch where `target_kl` is set. `advantages` reads, once, which tokens count and which of them
have an advantage of 0, so that no micro-batch has to ask for the number of its rows. Tokens of
advantage 0 that no KL term or entropy bonus needs never reach the head, and without a critic whole
responses of them not even the trunk. What is measured in the update, approx_kl among it, is a mean
over the tokens that did, and `coverage` says which share of all that count these are. The entropy
is that of all of them, from `evaluate`.

Faults: a pass that runs out of memory is repeated with half the token budget, which does not change
the gradient; a step whose loss or gradient is not finite changes nothing. An update that a signal
stopped (training/interrupts.py) goes on where it was when `update` is called with the same batch
again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.profiler import record_function

from fastppo import ops
from fastppo.models import setup
from fastppo.options import check_kind
from fastppo.ppo import update_metrics
from fastppo.ppo.advantages import add_advantages
from fastppo.ppo.config import PPOConfig
from fastppo.ppo.experience import PackedBatch, check_batch, need
from fastppo.ppo.gradients import accumulate
from fastppo.ppo.policy import Policy
from fastppo.ppo.update_metrics import StepStats
from fastppo.training import interrupts
from fastppo.training.device import resolve_device, resolve_precision
from fastppo.training.errors import NonFiniteError
from fastppo.training.memory import free_memory, is_out_of_memory, named, retried
from fastppo.training.optim import apply_step, check_shapes, grad_norm, make_adamw
from fastppo.training.seeding import generator

T = TypeVar("T")


@dataclass
class UpdateProgress:
    """How far an update has come."""

    epoch: int = 0
    minibatch: int = 0  # done in this epoch
    steps: list[StepStats] = field(default_factory=list)


class PPOStep:
    """Evaluate, advantages and update of PPO for one policy.

    The model is packed while the step has it. `with step.policy.unpacked() as model:` lends it as
    an ordinary one between updates, to generate with; `step.policy.restore()` gives it back for
    good, and inside `with step.policy.lent():` it is packed again. At any time
    `step.policy.save(folder)` writes it, with the adapter merged and the critic beside it.

    Args:
        model: a transformers causal language model, plain or with a PEFT adapter. It is trained
            in place.
        config: the algorithm; the fields about rollouts, data and outputs are not used here.
        ref_model: the reference policy; by default the choice of `config.reference`.
        value_model: the model that a separate critic starts from.

    Raises:
        ValueError: a model that the packed forward does not support, by name; no configuration.
    """

    def __init__(
        self, model: Any, config: PPOConfig, *, ref_model: Any = None, value_model: Any = None
    ) -> None:
        check_kind("config", config, PPOConfig)
        self.config = config
        self.device = resolve_device(config.device)
        self.precision = resolve_precision(config.precision, self.device)
        lower = "Set train_layers or lora_rank, precision = 'bf16', or take a smaller model"
        copies = "the reference" if config.critic_kind != "separate" else "reference and critic"
        unmeasured = config.reference == "auto" and config.kl_coef == 0
        with named(f"making {copies}", f"Set kl_coef = 0 or critic = 'shared'. {lower}"):
            policy = Policy(
                model,
                critic=config.critic_kind,
                value_model=value_model,
                reference="none" if unmeasured else config.reference,
                ref_model=ref_model,
                train_layers=config.train_layers,
                precision=self.precision,
                gradient_checkpointing=config.gradient_checkpointing,
            )
        with named(f"moving the models to {self.device}", lower):
            self.policy = policy.to(self.device)
        with named("making AdamW's state, of three values for each weight that trains", lower):
            self.actor_optimizer = make_adamw(self.policy.actor_parameters(), config)
            critic = self.policy.critic_parameters()
            self.critic_optimizer = make_adamw(critic, config) if critic else None
        self.iteration = 0
        """Updates done so far; schedules and minibatch orders follow it."""
        self.kl_coef = config.kl_coef
        """The KL weight in force; it moves where `kl_target` is set."""
        self.nonfinite_in_a_row = 0
        """Skipped optimiser steps at the end of the latest update."""
        self.token_budget = config.token_budget
        """Most tokens in one pass; halved where that was more than the memory holds."""
        self.progress: UpdateProgress | None = None
        """The update that was stopped in the middle, if one was."""

    def trained(self) -> list[torch.nn.Parameter]:
        """The parameters of actor and critic that the updates change."""
        return [*self.policy.actor_parameters(), *self.policy.critic_parameters()]

    # Evaluate

    def evaluate(self, batch: PackedBatch) -> PackedBatch:
        """Fill in old and reference log-probabilities, values and bootstrap values.

        Returns:
            The batch on the policy's device with `old_logprobs` and `entropy` (N,) at the sampling
            temperature, `ref_logprobs` (N,) where there is a reference, `values` (N,) and
            `bootstrap` (B,) where there is a critic; all fp32.

        Raises:
            TypeError: not a PackedBatch.
            ValueError: no sequences, or a token beyond the model's vocabulary in a batch on the
                CPU.
        """
        check_batch(batch)
        if batch.device.type == "cpu":  # on a GPU looking would mean to wait
            self._check_vocabulary(batch)
        batch = batch.to(self.device)
        return self._within_memory(batch, lambda: self._evaluate(batch))

    def _check_vocabulary(self, batch: PackedBatch) -> None:
        actor = self.policy.actor
        size = min(setup.vocabulary(actor.model), actor.head.weight.shape[0])
        last = int(batch.input_ids.numpy().max(initial=0))
        if last >= size:
            raise ValueError(
                f"batch.input_ids: expected tokens of the model's vocabulary of {size}, got "
                f"{last}. Use the model's own tokenizer, or resize the model's embeddings before "
                "PPOStep is made"
            )

    def _evaluate(self, batch: PackedBatch) -> PackedBatch:
        bins = batch.bins(self.token_budget)
        order = np.concatenate([np.asarray(b, dtype=np.int64) for b in bins])
        with torch.no_grad(), self.policy.actor.autocast():
            parts = [self._evaluate_bin(batch.select(b)) for b in bins]
        fields = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        return batch.select(order).replace(**fields).select(np.argsort(order))

    def _evaluate_bin(self, batch: PackedBatch) -> dict[str, Tensor]:
        interrupts.check()
        policy = self.policy
        scale: dict[str, Any] = {
            "temperature": self.config.temperature,
            "fp32_logits": self.config.fp32_logits,
        }
        with record_function("fastppo::old_logprobs"):
            hidden = policy.actor.hidden(batch)  # (T, H)
            found = policy.actor.logprobs(batch, hidden=hidden, **scale)
            fields = {"old_logprobs": found.logprobs, "entropy": found.entropy}
        with record_function("fastppo::ref"):
            if policy.reference is not None:
                fields["ref_logprobs"] = policy.reference.logprobs(batch, **scale).logprobs
        if policy.value_head is not None:
            with record_function("fastppo::values"):
                hidden = policy.critic_hidden(batch, hidden)
                fields["values"] = policy.values(hidden.index_select(0, batch.rows))
                after = policy.values(hidden[batch.last_rows])
                fields["bootstrap"] = torch.where(batch.truncated, after, 0.0)
        return fields

    # Advantages

    @retried
    def advantages(
        self,
        batch: PackedBatch,
        scores: Tensor | np.ndarray | Sequence[float],
        group_ids: Tensor | np.ndarray | Sequence[int] | None = None,
    ) -> PackedBatch:
        """Turn one score per response into rewards, advantages and returns.

        Args:
            batch: an evaluated batch.
            scores: (B,) rewards of whole responses; NaN drops that response from the loss. So does
                an infinite score that is on a GPU, where looking would mean to wait.
            group_ids: (B,) which responses share a prompt; needed by the group baselines.

        Returns:
            The batch with `rewards`, `advantages` (N,) fp32 and `loss_mask` (N,) bool, and with
            `returns` (N,) fp32 where there is a critic.

        Raises:
            ValueError: scores or group ids that are no numbers or of the wrong length, an infinite
                score on the CPU, no group ids where needed, or a batch that was evaluated without
                the reference or the critic that this step needs.
        """
        check_batch(batch)
        need(batch, "old_logprobs", "step.evaluate")
        with record_function("fastppo::advantages"):
            batch = add_advantages(batch, scores, group_ids, self.config, self.kl_coef)
            _ = batch.valid_lengths, batch.active_lengths  # read here, once, not in the update
            return batch

    # Update

    def update(self, batch: PackedBatch) -> dict[str, float]:
        """Train on one rollout batch: epochs × minibatches, each minibatch one optimiser step.

        Args:
            batch: a batch that went through `evaluate` and `advantages`; after an interruption the
                same one again, to go on.

        Returns:
            CleanRL's metrics, see `update_metrics.read`, and the schedules in force.

        Raises:
            ValueError: a field that this update needs is missing, or the model's parameters have
                other shapes than when this step was made; nothing changed.
            NonFiniteError: `max_nonfinite_steps` steps in a row had a loss or gradient that is not
                finite; no parameter changed in them or after them.
            Interrupted: a signal came, see training/interrupts.py. `progress` says how far the
                update is.
        """
        config = self.config
        check_batch(batch)
        need(batch, "advantages", "step.advantages")
        check_shapes(self.actor_optimizer, self.critic_optimizer)
        factor = config.lr_factor(self.iteration)
        _set_lr(self.actor_optimizer, config.learning_rate * factor)
        if self.critic_optimizer is not None:
            critic_lr = config.critic_learning_rate or config.learning_rate
            _set_lr(self.critic_optimizer, critic_lr * factor)
        progress = self.progress = self.progress or UpdateProgress()
        try:
            self._train(batch, progress)
            metrics, skipped = self._read_metrics(batch, progress)
            self._count_nonfinite(
                skipped, progress, min(config.num_minibatches, batch.num_sequences)
            )
        except interrupts.Interrupted:
            raise
        except BaseException:
            self.progress = None
            raise
        metrics |= {
            "update_epochs": float(progress.epoch),
            "learning_rate": config.learning_rate * factor,
            "kl_coef": self.kl_coef,
            "token_budget": float(self.token_budget),
        }
        self._adapt_kl(metrics["kl_sequence"], batch.num_sequences)
        self.iteration += 1
        self.progress = None
        return metrics

    def _train(self, batch: PackedBatch, progress: UpdateProgress) -> None:
        """What is left of the update, one optimiser step at a time."""
        config = self.config
        while progress.epoch < config.update_epochs:
            minibatches = self._minibatches(batch, progress.epoch)
            if progress.epoch and not progress.minibatch and config.target_kl is not None:
                latest = [step.policy for step in progress.steps[-len(minibatches) :]]
                if float(ops.reduce_ppo_metrics(latest)["approx_kl"]) > config.target_kl:
                    break
            for minibatch in minibatches[progress.minibatch :]:
                progress.steps.append(self._train_minibatch(minibatch))
                progress.minibatch += 1
            progress.epoch, progress.minibatch = progress.epoch + 1, 0

    @retried
    def _read_metrics(
        self, batch: PackedBatch, progress: UpdateProgress
    ) -> tuple[dict[str, float], list[int]]:
        has_critic = self.critic_optimizer is not None
        return update_metrics.read(
            batch, progress.steps, epochs=progress.epoch, has_critic=has_critic
        )

    @retried
    def _minibatches(self, batch: PackedBatch, epoch: int) -> list[PackedBatch]:
        """A fresh permutation in every epoch, cut into `num_minibatches` parts of whole sequences.

        One minibatch needs no permutation: its gradient does not depend on the order, and the
        bins of `evaluate` are then repeated exactly, so that the first ratio is exactly 1.
        """
        size, parts = batch.num_sequences, self.config.num_minibatches
        if parts == 1:
            return [batch]
        rng = generator(self.config.seed, self.iteration, f"minibatches/{epoch}")
        order = torch.randperm(size, generator=rng).numpy()
        return [batch.select(part) for part in np.array_split(order, min(parts, size))]

    def _train_minibatch(self, batch: PackedBatch) -> StepStats:
        """One optimiser step of actor and critic, or of neither."""
        policy, value_loss, norms = self._within_memory(batch, lambda: self.gradients(batch))
        with record_function("fastppo::optimiser"):
            empty = not batch.valid_lengths.any()
            lost = need(batch, "advantages", "step.advantages").isnan().any() if empty else empty
            return self._apply(policy, value_loss, norms, empty, lost)

    @retried
    def _apply(
        self,
        policy: Tensor,
        value_loss: Tensor,
        norms: list[Tensor],
        empty: bool,
        lost: Tensor | bool,
    ) -> StepStats:
        """Step with the gradients, unless something is not finite or no token counts (`empty`);
        where that is because no sample of the batch is finite (`lost`), the step is not either.

        A step is also skipped once `max_nonfinite_steps` in a row were. Their count is on the
        device, so that the steps after the last one that was allowed change nothing even though
        nobody has read it yet.
        """
        losses = policy[ops.PPO_METRIC_NAMES.index("policy_loss")] + value_loss
        bad = ~torch.stack([losses, *norms]).isfinite().all() | lost
        before = self._skipped_before()
        stopped = before >= self.config.max_nonfinite_steps
        skipped = torch.where(stopped, before, (before + 1) * bad)
        stats = self.stats(policy, value_loss, norms, skipped)
        apply_step(self._stepped(), norms, self.config.max_grad_norm, (skipped > 0) | empty)
        return stats

    def _skipped_before(self) -> Tensor:
        """() fp32, how many of the latest optimiser steps, in a row, were skipped."""
        if self.progress and self.progress.steps:
            return self.progress.steps[-1].skipped
        return torch.full((), float(self.nonfinite_in_a_row), device=self.device)

    def stats(
        self, policy: Tensor, value_loss: Tensor, norms: list[Tensor], skipped: Tensor
    ) -> StepStats:
        """What `gradients` returned, and how many steps in a row were skipped, by name."""
        zero = torch.zeros((), device=self.device)
        both = norms if self._trains_actor else [zero, *norms]
        return StepStats(policy, value_loss, both[0], (*both[1:], zero)[0], skipped)

    @property
    def _trains_actor(self) -> bool:
        return self.iteration >= self.config.critic_warmup

    @property
    def _loss(self) -> ops.PPOLossConfig:
        """The policy loss with the KL weight in force."""
        kl_coef = self.kl_coef if self.config.kl_in == "loss" else 0.0
        return replace(self.config.loss, kl_coef=kl_coef)

    def _stepped(self) -> list[torch.optim.Optimizer]:
        """The optimisers that take a step in this iteration."""
        actor = self.actor_optimizer if self._trains_actor else None
        return [adamw for adamw in (actor, self.critic_optimizer) if adamw is not None]

    def next_minibatch(self, batch: PackedBatch) -> PackedBatch:
        """The minibatch of the optimiser step at which `progress` stands."""
        progress = self.progress or UpdateProgress()
        return self._minibatches(batch, progress.epoch)[progress.minibatch]

    def gradients(self, batch: PackedBatch) -> tuple[Tensor, Tensor, list[Tensor]]:
        """`accumulate_gradients` from nothing, whatever another `backward` left on the model, and
        the gradient norm () fp32 of each optimiser that steps.
        """
        self.drop_gradients()
        losses = self.accumulate_gradients(batch, train_actor=self._trains_actor)
        return (*losses, [grad_norm(optimizer) for optimizer in self._stepped()])

    def drop_gradients(self) -> None:
        """Forget what `accumulate_gradients` added up."""
        for optimizer in (self.actor_optimizer, self.critic_optimizer):
            if optimizer is not None:
                optimizer.zero_grad(set_to_none=True)

    def _within_memory(self, batch: PackedBatch, work: Callable[[], T]) -> T:
        """What `work` returns, which is repeated with half the token budget if memory runs out.

        Whatever stops it, no gradient is left behind.
        """
        while True:
            try:
                return work()
            except BaseException as error:
                self.drop_gradients()
                if not is_out_of_memory(error) or self.token_budget <= batch.max_seqlen:
                    raise
            self.token_budget = max(batch.max_seqlen, self.token_budget // 2)
            free_memory(self.device)

    def accumulate_gradients(
        self, batch: PackedBatch, *, train_actor: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Add the gradient of one minibatch, in micro-batches of `token_budget` tokens.

        The normaliser is the whole minibatch's, so the gradient does not depend on how it is split.

        Returns:
            The metric vector of `ops.PPO_METRIC_NAMES` (M,) and the value loss (), both fp32.
        """
        return accumulate(
            self.policy,
            batch,
            self.config,
            self._loss,
            token_budget=self.token_budget,
            train_actor=train_actor,
        )

    def _count_nonfinite(
        self, skipped: list[int], progress: UpdateProgress, num_minibatches: int
    ) -> None:
        limit = self.config.max_nonfinite_steps
        if max(skipped) >= limit:
            index = next(i for i, count in enumerate(skipped) if count >= limit)
            raise NonFiniteError(
                f"{limit} optimiser steps in a row had a loss or a gradient that is not finite, or "
                f"nothing but samples that are not (max_nonfinite_steps = {limit}); they changed "
                "no parameter. Lower learning_rate, set precision = 'fp32', or look for NaN in "
                "the model's weights",
                UpdateProgress(*divmod(index, num_minibatches), progress.steps[:index]),
                progress.steps[index],
            )
        self.nonfinite_in_a_row = skipped[-1]

    def _adapt_kl(self, kl_sequence: float, episodes: int) -> None:
        """Ziegler et al. 2019 (https://arxiv.org/abs/1909.08593), §2.2: KL summed per sequence."""
        if self.config.kl_target is not None and math.isfinite(kl_sequence):
            error = min(0.2, max(-0.2, kl_sequence / self.config.kl_target - 1.0))
            self.kl_coef *= 1.0 + error * episodes / self.config.kl_horizon


def _set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
