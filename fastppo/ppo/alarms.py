"""Warnings about a policy that runs away: its KL blows up, or its entropy collapses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from fastppo.ppo.config import UpdateConfig


class Alarm(NamedTuple):
    """Something a person should see."""

    name: str  # "kl" or "entropy"
    message: str


class Alarms:
    """Compares each iteration's metrics with `kl_warning` and `entropy_warning`.

    Each alarm is raised when its figure crosses the limit, and again only after it has been back.

    Attributes:
        raised: names of the figures that are beyond their limit; part of a checkpoint.
    """

    def __init__(self, config: UpdateConfig) -> None:
        self._config = config
        self.raised: list[str] = []

    def check(self, row: Mapping[str, float]) -> list[Alarm]:
        """The alarms that an iteration's metrics raise."""
        config, found = self._config, []
        # a NaN (no reference, nothing in the loss) compares false: no alarm
        figures = {name: row[name] for name in ("approx_kl", "kl") if row[name] > config.kl_warning}
        if config.kl_warning and figures:
            name, value = max(figures.items(), key=lambda item: item[1])
            found.append(
                Alarm(
                    "kl",
                    f"{name} = {value:.3g} nats per token (kl_warning = {config.kl_warning:g}): "
                    "the policy moved very far. Lower learning_rate, or set target_kl",
                )
            )
        if config.entropy_warning and row["entropy"] < config.entropy_warning:
            found.append(
                Alarm(
                    "entropy",
                    f"entropy = {row['entropy']:.3g} nats per token (entropy_warning = "
                    f"{config.entropy_warning:g}): every sample is nearly the same. Raise "
                    "ent_coef or kl_coef, or lower learning_rate",
                )
            )
        new = [alarm for alarm in found if alarm.name not in self.raised]
        self.raised = [alarm.name for alarm in found]
        return new
