"""What configures the rollouts of an iteration."""

from __future__ import annotations

from dataclasses import dataclass

from fastppo.options import Options, option


@dataclass(frozen=True, kw_only=True)
class RolloutConfig(Options):
    """How many responses are sampled, and how."""

    prompts_per_iteration: int = option(32, "≥ 1")
    """Prompts drawn in each iteration."""
    n_samples: int = option(1, "≥ 1")
    """Responses sampled for each prompt; group baselines need at least 2."""
    max_response_length: int = option(128, "≥ 1")
    """Longest response, in tokens; a response that reaches it without an end token is truncated."""
    temperature: float = option(1.0, "> 0")
    """Sampling temperature, also applied to every log-probability in training."""
    top_p: float = option(1.0, "(0, 1]")
    """Nucleus sampling; below 1 the sampling distribution changes and needs `is_correction`."""
    top_k: int = option(0, "≥ 0")
    """Sample among the k most likely tokens; 0 is off, anything else needs `is_correction`."""
    min_p: float = option(0.0, "[0, 1)")
    """Drop tokens below this share of the top probability; 0 is off, else needs `is_correction`."""

    @property
    def num_sequences(self) -> int:
        """Responses per iteration."""
        return self.prompts_per_iteration * self.n_samples
