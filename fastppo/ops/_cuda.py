"""The CUDA side of the ops: `_rows` and the sweep of `linear_ppo_loss` through Triton kernels.

Same signatures as their torch counterparts, float16, bfloat16 and float32 only. Imported when an op
first meets a CUDA tensor, because Triton does not exist everywhere.
"""

from __future__ import annotations

from fastppo_kernels import custom_ops as kernels
from torch import Tensor

from fastppo.ops._rows import RowStats


def _temperature(temperature: float | Tensor) -> tuple[float, Tensor | None]:
    if isinstance(temperature, Tensor):
        return 1.0, temperature.contiguous()
    return float(temperature), None


def row_stats(
    logits: Tensor, targets: Tensor, temperature: float | Tensor, softcap: float | None
) -> RowStats:
    """As `_rows.row_stats`, except that `max` is before the temperature."""
    tau = _temperature(temperature)
    return RowStats(*kernels.token_logprobs_fwd_op(logits, targets.contiguous(), *tau, softcap))


def row_gradient(
    logits: Tensor,
    targets: Tensor,
    stats: RowStats,
    logprob_grad: Tensor,
    entropy_grad: Tensor | None,
    temperature: float | Tensor,
    softcap: float | None,
    out: Tensor,
) -> None:
    """As `_rows.row_gradient`, for statistics of the `row_stats` above."""
    rows = (
        targets.contiguous(),
        *stats[1:],
        logprob_grad.contiguous(),
        None if entropy_grad is None else entropy_grad.contiguous(),
        *_temperature(temperature),
        softcap,
    )
    if out is logits:
        kernels.token_logprobs_bwd_op_(logits, *rows)
    else:
        kernels.token_logprobs_bwd_out_op(logits, *rows, out)
