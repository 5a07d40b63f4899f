"""Warnings about a policy that runs away, and about a run that has nothing to learn from."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from fastppo.ppo.config import PPOConfig
from fastppo.training.trainer import Notice

STREAK = 10
"""Iterations in a row after which the lack of a signal is no chance."""
MOST_DROPPED = 0.5
LEAST_EXPLAINED = -1.0


class Alarms:
    """Compares each iteration's metrics with `kl_warning` and `entropy_warning`, and with what a
    signal to learn from looks like.

    Each alarm is raised when its figure crosses the limit, or has been beyond it for `STREAK`
    iterations, and again only after it has been back.

    Attributes:
        raised: names of the figures that are beyond their limit; part of a checkpoint.
        streaks: iterations in a row, by name, in which there was no signal; likewise.
    """

    def __init__(self, config: PPOConfig) -> None:
        self._config = config
        self.raised: list[str] = []
        self.streaks: dict[str, int] = {}

    def check(self, row: Mapping[str, float], scores: np.ndarray | None = None) -> list[Notice]:
        """The alarms that an iteration's metrics raise.

        Args:
            row: the metrics.
            scores: (B,) of its responses, those of one prompt beside each other; NaN: none.
        """
        kept = self._runs_away(row)
        silent = self._without_signal(row, scores)
        self.streaks = {name: self.streaks.get(name, 0) + 1 for name in silent}
        lasting = {name: text for name, text in silent.items() if self.streaks[name] >= STREAK}
        new = [Notice(text, keep=name) for name, text in kept.items() if name not in self.raised]
        new += [Notice(text) for name, text in lasting.items() if name not in self.raised]
        self.raised = [*kept, *lasting]
        return new

    def _runs_away(self, row: Mapping[str, float]) -> dict[str, str]:
        """What is beyond its limit now, and whose batch is worth keeping."""
        config, found = self._config, {}
        # a NaN (no reference, nothing in the loss) compares false: no alarm
        figures = {name: row[name] for name in ("approx_kl", "kl") if row[name] > config.kl_warning}
        if config.kl_warning and figures:
            name, value = max(figures.items(), key=lambda item: item[1])
            found["kl"] = (
                f"{name} = {value:.3g} nats per token (kl_warning = {config.kl_warning:g}): "
                "the policy moved very far. Lower learning_rate, or set target_kl"
            )
        if config.entropy_warning and row["entropy"] < config.entropy_warning:
            found["entropy"] = (
                f"entropy = {row['entropy']:.3g} nats per token (entropy_warning = "
                f"{config.entropy_warning:g}): every sample is nearly the same. Raise "
                "ent_coef or kl_coef, or lower learning_rate"
            )
        lost = row.get("dropped", 0.0) - row.get("unscored", 0.0)
        if lost > MOST_DROPPED:
            found["dropped"] = (
                f"{lost:.0%} of the samples were left out, because a log-probability or value of "
                "theirs is not finite (dropped − unscored). Look for NaN in the model's weights, "
                "set precision = 'fp32', or lower learning_rate"
            )
        return found

    def _without_signal(
        self, row: Mapping[str, float], scores: np.ndarray | None
    ) -> dict[str, str]:
        """What an iteration lacks; any of it is no fault, until it lasts."""
        config, found = self._config, {}
        lately = f"in the last {STREAK} iterations"
        grouped = config.advantage in ("grpo", "dr_grpo", "rloo")
        if scores is not None and np.isnan(scores).all():
            found["unscored"] = f"no sample was scored {lately}: the reward functions return None"
        elif scores is not None:
            groups = scores.reshape(-1, config.n_samples if grouped else len(scores))
            if not any(len(set(group[~np.isnan(group)].tolist())) > 1 for group in groups):
                where = "for the responses to one prompt" if grouped else "within an iteration"
                found["flat"] = (
                    f"all scores {where} were equal {lately}: there is nothing to learn from "
                    "them. Look at samples.jsonl, and at what the reward functions return"
                )
        if row.get("truncated", 0.0) == 1:
            found["truncated"] = (
                f"every response was truncated {lately}: none reached an end token. Raise "
                "max_response_length, or look for the model's end token in its generation_config"
            )
        if row.get("explained_variance", 0.0) < LEAST_EXPLAINED:
            found["critic"] = (
                f"explained_variance was below {LEAST_EXPLAINED:g} {lately}: the critic is worse "
                "than a constant. Lower critic_learning_rate, set critic_warmup, or scale the "
                "rewards"
            )
        return found
