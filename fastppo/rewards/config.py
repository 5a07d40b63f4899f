"""What configures the rewards."""

from __future__ import annotations

from dataclasses import dataclass

from fastppo.options import Options, option


@dataclass(frozen=True, kw_only=True)
class RewardConfig(Options):
    """How reward functions run, and how much may go wrong."""

    reward_workers: int = option(1, "≥ 0", may_differ=True)
    """Processes for each reward function; 0: call it in this process, without limits."""
    reward_timeout: float = option(60.0, "> 0", only_if="reward_workers ≥ 1", may_differ=True)
    """Seconds for one call of a reward function; a worker that takes longer is killed."""
    reward_memory_gb: float = option(4.0, "> 0", only_if="reward_workers ≥ 1", may_differ=True)
    """Memory that a reward worker may take, in GiB."""
    reward_max_failure_rate: float = option(0.1, "[0, 1]", may_differ=True)
    """Share of samples, over 10 iterations, that rewards may lose before the run stops."""
    reward_hosts: tuple[str, ...] = option((), may_differ=True)
    """Hosts that https rewards may be asked from."""


@dataclass(frozen=True, kw_only=True)
class NamedRewardConfig(RewardConfig):
    """The same for the command line, where the rewards are named."""

    reward: tuple[str, ...] = option((), required=True)
    """Rewards, each file.py:function, module:function, a reward model's folder or an https URL."""
    reward_weights: tuple[float, ...] = option((), "(-∞, ∞)")
    """Weight of each reward; empty: 1 each."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reward_weights and len(self.reward_weights) != len(self.reward):
            raise ValueError(
                f"reward_weights: expected one for each of the {len(self.reward)} rewards, "
                f"got {len(self.reward_weights)}"
            )
