"""Configuration: flat for who sets it, narrow for what reads it, checked before anything is loaded.

`PPOConfig` is the algorithm and the loop, what `PPOStep` and `PPOTrainer` take; `TrainConfig` adds
what only the command line needs. Both are the union of small classes, one for each part of a run;
those of the algorithm are here, in CleanRL's words (https://docs.cleanrl.dev/rl-algorithms/ppo/). A
combination in which an option would have no effect is an error, not a silent no-op.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from fastppo.data.config import DataConfig, NamedDataConfig
from fastppo.models.config import ModelConfig, NamedModelConfig
from fastppo.options import Options, option
from fastppo.rewards.config import NamedRewardConfig, RewardConfig
from fastppo.rollout.config import RolloutConfig
from fastppo.training.config import ScheduleConfig

if TYPE_CHECKING:
    from fastppo.ops import PPOLossConfig

Advantage = Literal["gae", "grpo", "dr_grpo", "rloo", "reinforce"]
Critic = Literal["shared", "separate", "none"]

GAE = 'advantage = "gae"'


@dataclass(frozen=True, kw_only=True)
class KLConfig(Options):
    """The KL to the reference policy."""

    reference: Literal["auto", "copy", "adapter", "none"] = "auto"
    """auto: none without a KL, else the model at the start: the LoRA base, or a frozen copy."""
    kl_coef: float = option(0.05, "≥ 0")
    """Weight of the KL to the reference policy; 0 is off."""
    kl_in: Literal["reward", "loss"] = option("reward", only_if="kl_coef > 0")
    """Whether the KL is a per-token reward or a term of the loss."""
    kl_estimator: Literal["k1", "k2", "k3"] = option("k1", only_if="kl_coef > 0")
    """http://joschu.net/blog/kl-approx.html; k1 has no gradient in expectation: not in the loss."""
    kl_target: float | None = option(None, "> 0", only_if="kl_coef > 0")
    """Adapt `kl_coef` to this KL per sequence, in nats (https://arxiv.org/abs/1909.08593, §2.2)."""
    kl_horizon: int = option(10_000, "≥ 1", only_if="kl_target ≠ None")
    """Number of episodes over which `kl_coef` adapts."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kl_coef > 0 and self.reference == "none":
            raise ValueError(
                f"kl_coef = {self.kl_coef} with reference = 'none': there is nothing to measure "
                "the KL against. Set kl_coef = 0, or reference = 'copy'"
            )
        if self.kl_in == "loss" and self.kl_coef > 0 and self.kl_estimator == "k1":
            raise ValueError(
                "kl_estimator = 'k1' with kl_in = 'loss': its gradient is zero in expectation. "
                "Use 'k3' or 'k2', or kl_in = 'reward'"
            )


@dataclass(frozen=True, kw_only=True)
class NamedKLConfig(KLConfig):
    """The same for the command line, where models are named."""

    ref_model: str = option("", only_if='reference = "auto"', may_differ=True)
    """Reference policy; empty: see `reference`."""


@dataclass(frozen=True, kw_only=True)
class AdvantageConfig(KLConfig):
    """From scores, and a KL in the reward, to advantages."""

    missing_eos_penalty: float = option(0.0, "≥ 0")
    """Subtracted from the score of a response that did not end with an end token."""
    missing_eos_score: float | None = option(None, "(-∞, ∞)")
    """Replaces the score of a response that did not end with an end token."""
    advantage: Advantage = "gae"
    """gae uses the critic; grpo, dr_grpo and rloo use the group's scores; reinforce the batch's."""
    gamma: float = option(1.0, "[0, 1]", only_if=GAE)
    """Discount per token."""
    gae_lambda: float = option(0.95, "[0, 1]", only_if=GAE)
    """GAE's λ for the policy (https://arxiv.org/abs/1506.02438)."""
    critic_lambda: float | None = option(None, "[0, 1]", only_if=GAE)
    """λ of the critic's returns (https://arxiv.org/abs/2503.01491); unset: `gae_lambda`."""
    bootstrap_truncated: bool = option(False, only_if=GAE)
    """Bootstrap truncated responses with the value of their last state instead of 0."""
    norm_adv: bool = option(True, only_if=GAE)
    """Whiten GAE advantages over the whole rollout batch."""
    whiten_rewards: bool = option(False, only_if=GAE)
    """Scale rewards to unit variance, keeping their mean, before GAE."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.missing_eos_penalty > 0 and self.missing_eos_score is not None:
            raise ValueError(
                "missing_eos_penalty and missing_eos_score: the score that is replaced would be "
                "penalised too. Set one of them"
            )


@dataclass(frozen=True, kw_only=True)
class CriticConfig(AdvantageConfig):
    """The critic, which GAE needs and nothing else reads."""

    critic: Critic | None = None
    """A value head on the shared trunk, or a separate model. Unset: shared for gae, else none."""
    critic_learning_rate: float | None = option(None, "> 0", only_if=GAE)
    """Learning rate of the critic; unset: `learning_rate`."""
    vf_coef: float = option(0.1, "≥ 0", only_if=GAE)
    """Weight of the value loss."""
    clip_vloss: float = option(0.0, "≥ 0", only_if=GAE)
    """Clip range of the value function, in units of reward; 0 is off."""
    critic_warmup: int = option(0, "≥ 0", only_if=GAE)
    """Iterations at the start in which only the critic learns."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.advantage == "gae" and self.critic == "none":
            raise ValueError(
                "critic = 'none' with advantage = 'gae': GAE needs values. Use 'shared'"
            )
        if self.advantage == "gae" and self.vf_coef == 0:
            raise ValueError("vf_coef = 0 with advantage = 'gae': the critic would never learn")
        if self.advantage != "gae" and self.critic in ("shared", "separate"):
            raise ValueError(
                f"critic = {self.critic!r} with advantage = {self.advantage!r} would train a "
                "critic that nothing reads. Remove critic, or set advantage = 'gae'"
            )

    @property
    def critic_kind(self) -> Critic:
        """`critic` with its default filled in."""
        return self.critic or ("shared" if self.advantage == "gae" else "none")


@dataclass(frozen=True, kw_only=True)
class NamedCriticConfig(CriticConfig):
    """The same for the command line, where models are named."""

    value_model: str = option("", only_if='critic = "separate"', may_differ=True)
    """Model the separate critic starts from, for example the reward model; empty: the policy."""


@dataclass(frozen=True, kw_only=True)
class PolicyLossConfig(KLConfig):
    """The policy loss, and a KL in the loss."""

    clip_coef: float = option(0.2, "(0, 1)")
    """The ratio is clipped to [1 − clip_coef, 1 + clip_coef_high]."""
    clip_coef_high: float | None = option(None, "> 0")
    """Upper clip range; unset: `clip_coef`."""
    dual_clip: float | None = option(None, "(1, ∞]")
    """Bound c > 1 on the loss of negative advantages (https://arxiv.org/abs/1912.09729)."""
    ent_coef: float = option(0.0, "≥ 0")
    """Weight of the entropy bonus."""
    ratio_level: Literal["token", "sequence"] = "token"
    """Importance ratio per token (PPO) or per sequence (GSPO, https://arxiv.org/abs/2507.18071)."""
    is_correction: Literal["none", "tis", "icepop"] = "none"
    """Correct for the sampler's distribution: cap (tis) or drop (icepop) importance weights."""
    is_cap: float = option(2.0, "> 0", only_if='is_correction = "tis"')
    """tis truncates importance weights at this."""
    is_low: float = option(0.5, "≥ 0", only_if='is_correction = "icepop"')
    """icepop drops tokens whose importance weight is below this."""
    is_high: float = option(5.0, "(0, ∞]", only_if='is_correction = "icepop"')
    """icepop drops tokens whose importance weight is above this."""
    loss_aggregation: Literal[
        "token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "constant"
    ] = "token-mean"
    """How token losses are averaged; the normaliser is that of the whole minibatch."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.is_low >= self.is_high:
            raise ValueError(
                f"is_low: expected a number in [0, is_high = {self.is_high}), got {self.is_low}"
            )

    @property
    def loss(self) -> PPOLossConfig:
        """The policy loss, with the KL term where it belongs in the loss."""
        from fastppo.ops import PPOLossConfig  # torch is not needed to check a configuration

        return PPOLossConfig(
            clip_coef_low=self.clip_coef,
            clip_coef_high=self.clip_coef if self.clip_coef_high is None else self.clip_coef_high,
            dual_clip=self.dual_clip,
            kl_coef=self.kl_coef if self.kl_in == "loss" else 0.0,
            kl_estimator=self.kl_estimator,
            ent_coef=self.ent_coef,
            ratio_level=self.ratio_level,
            is_correction=None if self.is_correction == "none" else self.is_correction,
            is_cap=self.is_cap,
            is_low=self.is_low,
            is_high=self.is_high,
        )


@dataclass(frozen=True, kw_only=True)
class UpdateConfig(Options):
    """How often a batch is used, and what is said when the policy runs away."""

    update_epochs: int = option(1, "≥ 1")
    """Passes over the rollout batch."""
    num_minibatches: int = option(4, "≥ 1")
    """Optimiser steps per pass."""
    target_kl: float | None = option(None, "> 0", only_if="update_epochs ≥ 2")
    """Stop the epochs of an iteration once approx_kl exceeds this, in nats per token that was
    computed (see `coverage`)."""
    kl_warning: float = option(1.0, "≥ 0", may_differ=True)
    """Warn, and keep the batch, where approx_kl or kl exceeds this, in nats per token; 0: never."""
    entropy_warning: float = option(0.01, "≥ 0", may_differ=True)
    """Warn, and keep the batch, where the entropy falls below this, in nats per token."""


@dataclass(frozen=True, kw_only=True)
class PPOConfig(
    UpdateConfig,
    PolicyLossConfig,
    CriticConfig,
    RewardConfig,
    RolloutConfig,
    DataConfig,
    ModelConfig,
    ScheduleConfig,
):
    """Proximal policy optimisation of a language model (https://arxiv.org/abs/1707.06347)."""

    def __post_init__(self) -> None:
        super().__post_init__()

        def refuse(text: str) -> None:
            raise ValueError(text)

        if self.advantage in ("grpo", "dr_grpo", "rloo") and self.n_samples == 1:
            refuse(
                f"n_samples = 1 with advantage = {self.advantage!r}: a group of one has no "
                "baseline and every advantage would be 0. Set n_samples ≥ 2, or advantage = 'gae'"
            )
        if self.kl_target is not None and self.num_sequences >= 5 * self.kl_horizon:
            refuse(
                f"kl_horizon = {self.kl_horizon} with {self.num_sequences} sequences an iteration: "
                "expected more than a fifth of them, since kl_coef is multiplied by 1 ± 0.2 × "
                "sequences / kl_horizon and must stay above 0"
            )
        filters = {"top_p": self.top_p != 1, "top_k": self.top_k != 0, "min_p": self.min_p != 0}
        on = [f"{name} = {getattr(self, name)}" for name, active in filters.items() if active]
        if on and self.is_correction == "none":
            refuse(
                f"{', '.join(on)}: the sampler's distribution is then renormalised over fewer "
                "tokens than the trainer's, which biases every importance ratio. Turn it off, or "
                "set is_correction = 'tis'"
            )
        if self.num_minibatches > self.num_sequences:
            refuse(
                f"num_minibatches = {self.num_minibatches}: expected at most the "
                f"{self.num_sequences} sequences of an iteration "
                "(prompts_per_iteration × n_samples)"
            )
        if self.critic_warmup >= self.num_iterations and self.critic_warmup > 0:
            refuse(
                f"critic_warmup = {self.critic_warmup} with num_iterations = "
                f"{self.num_iterations}: the policy would never be trained"
            )
        longest = self.max_prompt_length + self.max_response_length
        if self.token_budget < longest:
            refuse(
                f"token_budget = {self.token_budget}: expected at least max_prompt_length + "
                f"max_response_length = {longest}, so that every sequence fits in one pass"
            )


@dataclass(frozen=True, kw_only=True)
class TrainConfig(
    PPOConfig,
    NamedCriticConfig,
    NamedKLConfig,
    NamedRewardConfig,
    NamedDataConfig,
    NamedModelConfig,
):
    """`fastppo train`: PPO on a transformers model from a file of prompts and a reward."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.eval_interval and not self.eval_dataset:
            raise ValueError(f"eval_interval = {self.eval_interval} needs an eval_dataset")
        if self.reference == "adapter" and not self.lora_rank:
            raise ValueError("reference = 'adapter': there is no adapter. Set lora_rank")
