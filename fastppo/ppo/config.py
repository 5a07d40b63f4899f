"""Configuration: one flat frozen dataclass per command, checked before anything heavy is loaded.

`PPOConfig` is the algorithm and the loop, what `PPOStep` and `PPOTrainer` take. `TrainConfig` adds
what only the command line needs: where the model, the prompts and the reward come from. The words
are CleanRL's (https://docs.cleanrl.dev/rl-algorithms/ppo/). A combination in which an option would
have no effect is an error, not a silent no-op.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from fastppo.ops import PPOLossConfig

Advantage = Literal["gae", "grpo", "dr_grpo", "rloo", "reinforce"]
Critic = Literal["shared", "separate", "none"]
Tracker = Literal["tensorboard", "wandb", "trackio"]

_GROUPED = ("grpo", "dr_grpo", "rloo")


@dataclass(frozen=True, kw_only=True)
class PPOConfig:
    """Proximal policy optimisation of a language model (https://arxiv.org/abs/1707.06347)."""

    # The run

    output_dir: str = ""
    """Folder of the run, new or empty. Not set: runs/<date>-<time>."""
    seed: int = 1
    """Every random choice is derived from (seed, iteration, purpose)."""
    num_iterations: int = 100
    """Number of generate → score → update rounds."""
    prompts_per_iteration: int = 32
    """Prompts drawn in each iteration."""
    n_samples: int = 1
    """Responses sampled for each prompt; group baselines need at least 2."""

    # Rollouts

    max_prompt_length: int = 512
    """Longest prompt, in tokens. Prompts are never cut: see `overlong_prompts`."""
    overlong_prompts: Literal["error", "filter"] = "error"
    """Prompts over the limit are refused, or filtered out with a count."""
    max_response_length: int = 128
    """Longest response, in tokens; a response that reaches it without an end token is truncated."""
    temperature: float = 1.0
    """Sampling temperature, also applied to every log-probability in training."""
    top_p: float = 1.0
    """Nucleus sampling; below 1 the sampling distribution changes and needs `is_correction`."""
    top_k: int = 0
    """Sample among the k most likely tokens; 0 is off, anything else needs `is_correction`."""
    min_p: float = 0.0
    """Drop tokens below this share of the top probability; 0 is off, else needs `is_correction`."""

    # Rewards

    reward_workers: int = 1
    """Processes for each reward function; 0: call it in this process, without limits."""
    reward_timeout: float = 60.0
    """Seconds for one call of a reward function; a worker that takes longer is killed."""
    reward_memory_gb: float = 4.0
    """Memory that a reward worker may take, in GiB."""
    reward_max_failure_rate: float = 0.1
    """Share of samples, over 10 iterations, that rewards may lose before the run stops."""
    reward_hosts: tuple[str, ...] = ()
    """Hosts that https rewards may be asked from."""

    # Scores

    missing_eos_penalty: float = 0.0
    """Subtracted from the score of a response that did not end with an end token."""
    missing_eos_score: float | None = None
    """Replaces the score of a response that did not end with an end token."""
    bootstrap_truncated: bool = False
    """Bootstrap truncated responses with the value of their last state instead of 0."""

    # Advantages

    advantage: Advantage = "gae"
    """gae uses the critic; grpo, dr_grpo and rloo use the group's scores; reinforce the batch's."""
    gamma: float = 1.0
    """Discount per token."""
    gae_lambda: float = 0.95
    """GAE's λ for the policy (https://arxiv.org/abs/1506.02438)."""
    critic_lambda: float | None = None
    """λ of the critic's returns (https://arxiv.org/abs/2503.01491); unset: `gae_lambda`."""
    norm_adv: bool = True
    """Whiten GAE advantages over the whole rollout batch."""
    whiten_rewards: bool = False
    """Scale rewards to unit variance, keeping their mean, before GAE."""

    # KL to the reference policy

    reference: Literal["auto", "copy", "adapter", "none"] = "auto"
    """auto: none without a KL, the LoRA base where there is an adapter, else a frozen copy."""
    kl_coef: float = 0.05
    """Weight of the KL to the reference policy; 0 is off."""
    kl_in: Literal["reward", "loss"] = "reward"
    """Whether the KL is a per-token reward or a term of the loss."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    """http://joschu.net/blog/kl-approx.html; k1 has no gradient in expectation: not in the loss."""
    kl_target: float | None = None
    """Adapt `kl_coef` to this KL per sequence, in nats (https://arxiv.org/abs/1909.08593, §2.2)."""
    kl_horizon: int = 10_000
    """Number of episodes over which `kl_coef` adapts."""

    # Policy loss

    clip_coef: float = 0.2
    """The ratio is clipped to [1 − clip_coef, 1 + clip_coef_high]."""
    clip_coef_high: float | None = None
    """Upper clip range; unset: `clip_coef`."""
    dual_clip: float | None = None
    """Bound c > 1 on the loss of negative advantages (https://arxiv.org/abs/1912.09729)."""
    ent_coef: float = 0.0
    """Weight of the entropy bonus."""
    ratio_level: Literal["token", "sequence"] = "token"
    """Importance ratio per token (PPO) or per sequence (GSPO, https://arxiv.org/abs/2507.18071)."""
    is_correction: Literal["none", "tis", "icepop"] = "none"
    """Correct for the sampler's distribution: cap (tis) or drop (icepop) importance weights."""
    is_cap: float = 2.0
    """tis truncates importance weights at this."""
    is_low: float = 0.5
    """icepop drops tokens whose importance weight is below this."""
    is_high: float = 5.0
    """icepop drops tokens whose importance weight is above this."""
    loss_aggregation: Literal[
        "token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "constant"
    ] = "token-mean"
    """How token losses are averaged; the normaliser is that of the whole minibatch."""

    # Critic

    critic: Critic | None = None
    """A value head on the shared trunk, or a separate model. Unset: shared for gae, else none."""
    vf_coef: float = 0.1
    """Weight of the value loss."""
    clip_vloss: float = 0.0
    """Clip range of the value function, in units of reward; 0 is off."""
    critic_warmup: int = 0
    """Iterations at the start in which only the critic learns."""

    # Optimisation

    update_epochs: int = 1
    """Passes over the rollout batch."""
    num_minibatches: int = 4
    """Optimiser steps per pass."""
    token_budget: int = 8192
    """Most tokens (prompt and response) in one forward pass; does not change the gradient."""
    learning_rate: float = 1e-6
    """AdamW's learning rate for the policy."""
    critic_learning_rate: float | None = None
    """Learning rate of the critic; unset: `learning_rate`."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "linear"
    """Shape of the decay to 0 over the run, one step per iteration."""
    warmup_iterations: int = 0
    """Iterations over which the learning rates rise from 0."""
    adam_betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's β₁ and β₂."""
    adam_eps: float = 1e-5
    """AdamW's ε; 1e-5 as in the PPO references (https://arxiv.org/abs/2005.12729)."""
    weight_decay: float = 0.0
    """AdamW's weight decay on matrices; norms, biases and the value head have none."""
    max_grad_norm: float = 1.0
    """Largest gradient norm, clipped separately for actor and critic; 0 is off."""
    target_kl: float | None = None
    """Stop the epochs of an iteration once approx_kl exceeds this, in nats per token."""
    max_nonfinite_steps: int = 5
    """Steps in a row with a non-finite loss or gradient, each skipped, before `on_nonfinite`."""
    on_nonfinite: Literal["stop", "rollback"] = "stop"
    """stop; or go back to the last checkpoint and sample anew, at most 3 times in a row."""
    kl_warning: float = 1.0
    """Warn, and keep the batch, where approx_kl or kl exceeds this, in nats per token; 0: never."""
    entropy_warning: float = 0.01
    """Warn, and keep the batch, where the entropy falls below this, in nats per token."""

    # Model

    train_layers: int | None = None
    """Train only the last k transformer layers (and the final norm); unset: every parameter."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """bf16: fp32 masters of what trains, under bf16 autocast. auto: bf16 where it is fast."""
    fp32_logits: bool = False
    """Keep the head's logits in fp32 under bf16 (https://arxiv.org/abs/2506.13585)."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    device: str = "auto"
    """cuda, cuda:1, cpu; auto: cuda where there is one."""

    # Outputs

    eval_interval: int = 0
    """Iterations between greedy evaluations; 0: only before and after training."""
    sample_interval: int = 5
    """Iterations between printed tables of samples; 0 is off."""
    save_interval: int = 10
    """Iterations between checkpoints, for an exact `--resume`; 0: one at a signal only."""
    keep_checkpoints: int = 2
    """Newest checkpoints that are kept."""
    keep_best: int = 0
    """Checkpoints with the highest reward (the held-out one where measured) that are kept too."""
    report_to: tuple[Tracker, ...] = ()
    """Trackers besides metrics.jsonl."""

    def __post_init__(self) -> None:
        for check in (self._check_ranges, self._check_inert, self._check_combinations):
            check()

    # Derived values

    @property
    def num_sequences(self) -> int:
        """Responses per iteration."""
        return self.prompts_per_iteration * self.n_samples

    @property
    def critic_kind(self) -> Critic:
        """`critic` with its default filled in."""
        return self.critic or ("shared" if self.advantage == "gae" else "none")

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

    def lr_factor(self, iteration: int) -> float:
        """Share of the learning rate in force at an iteration, counted from 0."""
        if iteration < self.warmup_iterations:
            return (iteration + 1) / (self.warmup_iterations + 1)
        span = max(1, self.num_iterations - self.warmup_iterations)
        done = min(1.0, (iteration - self.warmup_iterations) / span)
        if self.lr_schedule == "linear":
            return 1.0 - done
        return 0.5 * (1.0 + math.cos(math.pi * done)) if self.lr_schedule == "cosine" else 1.0

    # Checks

    def _check_ranges(self) -> None:
        for name in (
            *("num_iterations", "prompts_per_iteration", "n_samples", "max_prompt_length"),
            *("max_response_length", "update_epochs", "num_minibatches", "token_budget"),
            *("kl_horizon", "max_nonfinite_steps", "keep_checkpoints"),
        ):
            self._require(name, getattr(self, name) >= 1, "an integer ≥ 1")
        for name in ("top_k", "critic_warmup", "warmup_iterations", "eval_interval"):
            self._require(name, getattr(self, name) >= 0, "an integer ≥ 0")
        for name in ("sample_interval", "save_interval", "seed", "keep_best", "reward_workers"):
            self._require(name, getattr(self, name) >= 0, "an integer ≥ 0")
        for name in ("gamma", "gae_lambda", "min_p", "reward_max_failure_rate"):
            self._require(name, 0.0 <= getattr(self, name) <= 1.0, "a number in [0, 1]")
        for name in (
            *("kl_coef", "ent_coef", "clip_vloss", "weight_decay", "max_grad_norm"),
            *("missing_eos_penalty", "adam_eps", "vf_coef", "kl_warning", "entropy_warning"),
        ):
            value = getattr(self, name)
            self._require(name, 0.0 <= value < math.inf, "a finite number ≥ 0")
        for name in (
            *("temperature", "learning_rate", "clip_coef", "is_cap"),
            *("reward_timeout", "reward_memory_gb"),
        ):
            self._require(name, 0.0 < getattr(self, name) < math.inf, "a finite number > 0")
        for name in ("critic_learning_rate", "clip_coef_high", "kl_target", "target_kl"):
            value = getattr(self, name)
            self._require(name, value is None or 0.0 < value < math.inf, "a finite number > 0")
        self._require("top_p", 0.0 < self.top_p <= 1.0, "a number in (0, 1]")
        self._require("clip_coef", self.clip_coef < 1.0, "a number in (0, 1)")
        lam = self.critic_lambda
        self._require("critic_lambda", lam is None or 0.0 <= lam <= 1.0, "a number in [0, 1]")
        self._require("dual_clip", self.dual_clip is None or self.dual_clip > 1.0, "a number > 1")
        k = self.train_layers
        self._require("train_layers", k is None or k >= 1, "an integer ≥ 1")
        self._require("is_low", 0.0 <= self.is_low < self.is_high, "a number in [0, is_high)")
        betas_ok = all(0.0 <= beta < 1.0 for beta in self.adam_betas)
        self._require("adam_betas", betas_ok, "two numbers in [0, 1)")

    def _require(self, name: str, ok: bool, expected: str) -> None:
        if not ok:
            raise ValueError(f"{name}: expected {expected}, got {getattr(self, name)!r}")

    def _check_inert(self) -> None:
        defaults = {field.name: field.default for field in dataclasses.fields(PPOConfig)}
        for applies, names, need in (
            (
                self.advantage == "gae",
                (
                    *("gamma", "gae_lambda", "critic_lambda", "whiten_rewards", "critic_warmup"),
                    *("vf_coef", "clip_vloss", "critic_learning_rate", "bootstrap_truncated"),
                    "norm_adv",
                ),
                'advantage = "gae"',
            ),
            (self.kl_coef > 0, ("kl_in", "kl_estimator", "kl_target"), "kl_coef > 0"),
            (self.kl_target is not None, ("kl_horizon",), "kl_target"),
            (self.reward_workers > 0, ("reward_timeout", "reward_memory_gb"), "reward_workers ≥ 1"),
            (self.save_interval > 0, ("keep_checkpoints", "keep_best"), "save_interval ≥ 1"),
            (self.is_correction == "tis", ("is_cap",), 'is_correction = "tis"'),
            (self.is_correction == "icepop", ("is_low", "is_high"), 'is_correction = "icepop"'),
            (self.update_epochs > 1, ("target_kl",), "update_epochs ≥ 2"),
            (self.precision != "fp32", ("fp32_logits",), 'precision = "bf16" or "auto"'),
        ):
            for name in names:
                if not applies and getattr(self, name) != defaults[name]:
                    raise ValueError(
                        f"{name} = {getattr(self, name)!r} would have no effect: "
                        f"it needs {need}. Remove it or set {need}"
                    )

    def _check_combinations(self) -> None:
        def refuse(text: str) -> None:
            raise ValueError(text)

        if self.advantage in _GROUPED and self.n_samples == 1:
            refuse(
                f"n_samples = 1 with advantage = {self.advantage!r}: a group of one has no "
                "baseline and every advantage would be 0. Set n_samples ≥ 2, or advantage = 'gae'"
            )
        if self.advantage == "gae" and self.critic == "none":
            refuse("critic = 'none' with advantage = 'gae': GAE needs values. Use 'shared'")
        if self.advantage == "gae" and self.vf_coef == 0:
            refuse("vf_coef = 0 with advantage = 'gae': the critic would never learn")
        if self.advantage != "gae" and self.critic in ("shared", "separate"):
            refuse(
                f"critic = {self.critic!r} with advantage = {self.advantage!r} would train a "
                "critic that nothing reads. Remove critic, or set advantage = 'gae'"
            )
        if self.kl_coef > 0 and self.reference == "none":
            refuse(
                f"kl_coef = {self.kl_coef} with reference = 'none': there is nothing to measure "
                "the KL against. Set kl_coef = 0, or reference = 'copy'"
            )
        if self.kl_in == "loss" and self.kl_coef > 0 and self.kl_estimator == "k1":
            refuse(
                "kl_estimator = 'k1' with kl_in = 'loss': its gradient is zero in expectation. "
                "Use 'k3' or 'k2', or kl_in = 'reward'"
            )
        if self.kl_target is not None and self.num_sequences >= 5 * self.kl_horizon:
            refuse(
                f"kl_horizon = {self.kl_horizon} with {self.num_sequences} sequences an iteration: "
                "expected more than a fifth of them, since kl_coef is multiplied by 1 ± 0.2 × "
                "sequences / kl_horizon and must stay above 0"
            )
        if self.missing_eos_penalty > 0 and self.missing_eos_score is not None:
            refuse(
                "missing_eos_penalty and missing_eos_score: the score that is replaced would be "
                "penalised too. Set one of them"
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
        if self.warmup_iterations >= self.num_iterations and self.warmup_iterations > 0:
            refuse(
                f"warmup_iterations = {self.warmup_iterations} with num_iterations = "
                f"{self.num_iterations}: the learning rate would never be reached"
            )
        longest = self.max_prompt_length + self.max_response_length
        if self.token_budget < longest:
            refuse(
                f"token_budget = {self.token_budget}: expected at least max_prompt_length + "
                f"max_response_length = {longest}, so that every sequence fits in one pass"
            )


@dataclass(frozen=True, kw_only=True)
class TrainConfig(PPOConfig):
    """`fastppo train`: PPO on a transformers model from a file of prompts and a reward."""

    model: str = ""
    """Folder, GGUF file or hub name of a causal language model, or smollm2-135m-instruct."""
    dataset: str = ""
    """Prompts with a `prompt` column: .jsonl, .csv, .parquet, or a datasets folder#split."""
    eval_dataset: str = ""
    """Held-out prompts for the greedy evaluation before and after training."""
    reward: tuple[str, ...] = ()
    """Rewards, each file.py:function, module:function, a reward model's folder or an https URL."""
    reward_weights: tuple[float, ...] = ()
    """Weight of each reward; empty: 1 each."""
    ref_model: str = ""
    """Reference policy; empty: see `reference`."""
    value_model: str = ""
    """Model the separate critic starts from, for example the reward model; empty: the policy."""
    lora_rank: int = 0
    """Train a LoRA adapter of this rank on every linear layer instead of the weights; 0 is off."""
    lora_alpha: int = 32
    """LoRA's scale: the update is multiplied by lora_alpha / lora_rank."""

    def __post_init__(self) -> None:
        for name in ("model", "dataset", "reward"):
            if not getattr(self, name):
                raise ValueError(f"{name}: expected a value, got none. Set it in the config file")
        super().__post_init__()
        if self.reward_weights and len(self.reward_weights) != len(self.reward):
            raise ValueError(
                f"reward_weights: expected one for each of the {len(self.reward)} rewards, "
                f"got {len(self.reward_weights)}"
            )
        if self.value_model and self.critic_kind != "separate":
            raise ValueError(f"value_model = {self.value_model!r} needs critic = 'separate'")
        if self.eval_interval and not self.eval_dataset:
            raise ValueError(f"eval_interval = {self.eval_interval} needs an eval_dataset")
        if self.lora_rank < 0:
            raise ValueError(f"lora_rank: expected an integer ≥ 0, got {self.lora_rank}")
        if self.lora_alpha != 32 and not self.lora_rank:
            raise ValueError(f"lora_alpha = {self.lora_alpha} would have no effect: set lora_rank")
        if self.lora_rank and self.train_layers:
            raise ValueError("lora_rank and train_layers: LoRA freezes every layer. Set only one")
        if self.reference == "adapter" and not self.lora_rank:
            raise ValueError("reference = 'adapter': there is no adapter. Set lora_rank")
        if self.ref_model and self.reference not in ("auto",):
            raise ValueError(f"ref_model with reference = {self.reference!r}: set one of them")
