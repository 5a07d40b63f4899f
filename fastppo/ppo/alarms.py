"""Warnings about a policy that runs away: its KL blows up, or its entropy collapses."""

from __future__ import annotations

from collections.abc import Mapping

from fastppo.ppo.config import UpdateConfig
from fastppo.training.trainer import Notice


class Alarms:
    """Compares each iteration's metrics with `kl_warning` and `entropy_warning`.

    Each alarm is raised when its figure crosses the limit, and again only after it has been back.

    Attributes:
        raised: names of the figures that are beyond their limit; part of a checkpoint.
    """

    def __init__(self, config: UpdateConfig) -> None:
        self._config = config
        self.raised: list[str] = []

    def check(self, row: Mapping[str, float]) -> list[Notice]:
        """The alarms that an iteration's metrics raise."""
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
        new = [Notice(text, keep=name) for name, text in found.items() if name not in self.raised]
        self.raised = list(found)
        return new
