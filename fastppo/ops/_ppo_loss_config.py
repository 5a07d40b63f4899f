"""The knobs of the PPO policy loss in one frozen dataclass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from fastppo.ops._checks import check_choice
from fastppo.ops.kl_penalty import KL_ESTIMATORS


@dataclass(frozen=True, kw_only=True, slots=True)
class PPOLossConfig:
    """What `ppo_loss` and `linear_ppo_loss` compute. Ratios and caps are plain numbers."""

    clip_coef_low: float = 0.2
    """Lower clip: ratios below 1 − clip_coef_low no longer fall further. In [0, 1]."""
    clip_coef_high: float = 0.2
    """Upper clip: ratios above 1 + clip_coef_high no longer rise further. Larger explores more."""
    dual_clip: float | None = None
    """Bound c > 1 on −A·r for negative advantages (arXiv 1912.09729), 3 is usual; None: no
    bound."""
    kl_coef: float = 0.0
    """Weight of the KL estimate to the reference inside the loss; needs ref_logprobs when not 0."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """Which estimate enters the loss. k1 has zero expected gradient: use it in the reward."""
    ent_coef: float = 0.0
    """Weight of the entropy bonus; needs entropy when not 0."""
    ratio_level: Literal["token", "sequence"] = "token"
    """"sequence": one ratio per sequence, exp of the mean log-ratio (GSPO, arXiv 2507.18071)."""
    is_correction: Literal["tis", "icepop"] | None = None
    """Weight on the policy term for rollouts sampled by another engine, w = exp(old − rollout):
    "tis" min(w, is_cap); "icepop" w inside [is_low, is_high], else 0. Needs rollout_logprobs."""
    is_cap: float = 2.0
    """TIS: the largest weight."""
    is_low: float = 0.5
    """IcePop: tokens with a smaller weight are dropped from the policy term."""
    is_high: float = 5.0
    """IcePop: tokens with a larger weight are dropped from the policy term."""

    @property
    def zero_advantages_change_nothing(self) -> bool:
        """Whether a token of advantage 0 adds nothing to the loss or to any gradient."""
        return self.kl_coef == 0 and self.ent_coef == 0 and self.ratio_level == "token"

    def __post_init__(self) -> None:
        if not 0.0 <= self.clip_coef_low <= 1.0:
            raise ValueError(f"clip_coef_low: expected 0 <= x <= 1, got {self.clip_coef_low}")
        if not self.clip_coef_high >= 0.0:
            raise ValueError(f"clip_coef_high: expected x >= 0, got {self.clip_coef_high}")
        if self.dual_clip is not None and not self.dual_clip > 1.0:
            raise ValueError(f"dual_clip: expected None or x > 1, got {self.dual_clip}")
        check_choice("kl_estimator", self.kl_estimator, KL_ESTIMATORS)
        check_choice("ratio_level", self.ratio_level, ("token", "sequence"))
        if self.is_correction is not None:
            check_choice("is_correction", self.is_correction, ("tis", "icepop"))
        if not self.is_cap > 0.0:
            raise ValueError(f"is_cap: expected x > 0, got {self.is_cap}")
        if not 0.0 <= self.is_low <= self.is_high:
            raise ValueError(
                "is_low, is_high: expected 0 <= is_low <= is_high, "
                f"got {self.is_low}, {self.is_high}"
            )


CONFIG_SCHEMA = (
    "float clip_coef_low, float clip_coef_high, float? dual_clip, float kl_coef, "
    "str kl_estimator, float ent_coef, str ratio_level, str? is_correction, float is_cap, "
    "float is_low, float is_high"
)
"""A config as arguments of a custom op."""
_FIELDS = tuple(field.name for field in fields(PPOLossConfig))
NUM_CONFIG_ARGUMENTS = len(_FIELDS)


def config_arguments(config: PPOLossConfig) -> tuple[Any, ...]:
    """The arguments of CONFIG_SCHEMA."""
    return tuple(getattr(config, name) for name in _FIELDS)


def config_of(arguments: Sequence[Any]) -> PPOLossConfig:
    """The inverse of `config_arguments`."""
    return PPOLossConfig(**dict(zip(_FIELDS, arguments, strict=True)))
