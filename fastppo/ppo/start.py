"""What must hold before the first update: a run that starts from anything else trains on noise."""

from __future__ import annotations

from fastppo.models.weights import check_finite
from fastppo.ppo.experience import PackedBatch
from fastppo.ppo.step import PPOStep
from fastppo.training.errors import StartError

TOLERANCE = {"fp32": 1e-3, "bf16": 0.5}
"""Largest difference of a log-probability by rounding, in nats. bf16 keeps 8 bits: re-batching
alone moves a token by up to 0.4 (the mean by 0.03)."""


def check_models(step: PPOStep) -> None:
    """Refuse weights that are not finite, in whichever role.

    Raises:
        StartError: there are some.
    """
    try:
        check_finite(step.policy.named_parameters(), "the policy")
    except ValueError as error:
        raise StartError(str(error)) from error


def check_reference(step: PPOStep, batch: PackedBatch) -> None:
    """Refuse a reference that is to be the model at the start and is not: its KL must be 0.

    Raises:
        StartError: a log-probability differs by more than rounding.
    """
    old, ref = batch.old_logprobs, batch.ref_logprobs
    if old is None or ref is None or not step.policy.reference_is_start:
        return
    gap = float((old - ref).abs().nan_to_num().max())  # what is not finite is counted elsewhere
    limit = TOLERANCE[step.precision] / min(1.0, step.config.temperature)
    if gap > limit:
        raise StartError(
            f"reference: before the first update {step.policy.reference_is} differs from the "
            f"policy by up to {gap:.2g} nats a token, where rounding allows {limit:.2g}: every KL "
            "would be wrong. The model does not compute the same twice: remove hooks that add "
            "noise (NEFTune) or drop out, or pass a ref_model"
        )
