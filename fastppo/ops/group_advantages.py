"""Advantages of whole completions from their scores, without a critic.

With r_i the score of completion i, mean and std over the scored completions of its group (same id):

    grpo       (r − mean) / (std + 1e-4)    std unbiased; arXiv 2402.03300, 1e-4 as in TRL
    dr_grpo    r − mean                     arXiv 2503.20783
    rloo       r − mean of the others = (r − mean)·n / (n − 1)    arXiv 2402.14740
    reinforce  r − mean over the whole batch; groups are ignored

Groups may be ragged and interleaved. A group (for reinforce: a batch) whose scores are all equal,
or that has one score, gives exactly 0. A NaN score means "not scored": it counts nowhere and gets
0.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fastppo.ops._checks import INTS, check_choice, check_tensor
from fastppo.ops._precision import compute_dtype

Kind = Literal["grpo", "dr_grpo", "rloo", "reinforce"]
KINDS = ("grpo", "dr_grpo", "rloo", "reinforce")
STD_EPS = 1e-4


def group_advantages_reference(scores: Tensor, group_ids: Tensor, *, kind: Kind) -> Tensor:
    """One group at a time."""
    out = torch.zeros(scores.shape, dtype=torch.float64)
    ids = torch.zeros_like(group_ids) if kind == "reinforce" else group_ids
    for group in set(ids.tolist()):
        member = (ids == group) & ~scores.isnan()
        r = scores[member].double()
        if r.numel() < 2 or bool((r == r[0]).all()):
            continue
        if kind == "rloo":
            out[member] = torch.stack(
                [r[i] - (r.sum() - r[i]) / (len(r) - 1) for i in range(len(r))]
            )
        else:
            out[member] = (r - r.mean()) / (r.std() + STD_EPS if kind == "grpo" else 1.0)
    return out.to(compute_dtype(scores))


def group_advantages_torch(scores: Tensor, group_ids: Tensor, kind: str) -> Tensor:
    """Sorted by group, then one segmented reduction each; deterministic, without host syncs."""
    if scores.numel() == 0:
        return scores.to(compute_dtype(scores))
    ids = torch.zeros_like(group_ids) if kind == "reinforce" else group_ids
    sorted_ids, order = torch.sort(ids, stable=True)
    starts = torch.cat([sorted_ids.new_zeros(1), sorted_ids.diff() != 0])
    sorted_group = starts.cumsum(0)  # (B,) 0, 0, 1, 2, ...
    group = torch.empty_like(order).index_copy_(0, order, sorted_group)
    # How many groups there are is known to the device only: every completion could be its own.
    numbers = torch.arange(len(ids), device=ids.device)
    ends = torch.searchsorted(sorted_group, numbers, right=True)
    offsets = torch.cat([ends.new_zeros(1), ends])
    scored = ~scores.isnan()

    def reduce(x: Tensor, how: str) -> Tensor:
        return torch.segment_reduce(x[order], how, offsets=offsets, unsafe=True)[group]

    r = torch.where(scored, scores.double(), 0.0)
    n = reduce(scored.double(), "sum")
    centred = r - reduce(r, "sum") / n.clamp(min=1.0)
    highest = reduce(torch.where(scored, r, -torch.inf), "max")
    lowest = reduce(torch.where(scored, r, torch.inf), "min")
    if kind == "grpo":
        squares = reduce(torch.where(scored, centred.square(), 0.0), "sum")
        centred = centred / ((squares / (n - 1).clamp(min=1.0)).sqrt() + STD_EPS)
    elif kind == "rloo":
        centred = centred * (n / (n - 1).clamp(min=1.0))
    return torch.where(scored & (highest > lowest), centred, 0.0).to(compute_dtype(scores))


def group_advantages(scores: Tensor, group_ids: Tensor, *, kind: Kind) -> Tensor:
    """One advantage per completion.

    Args:
        scores: (B,) floating, one per completion; NaN: not scored.
        group_ids: (B,) int32 or int64, equal for completions of the same prompt; any values.
        kind: "grpo", "dr_grpo", "rloo" or "reinforce".

    Returns:
        (B,) float32, not differentiable.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device or kind.
    """
    check_tensor("scores", scores, ("B",))
    check_tensor("group_ids", group_ids, (scores.shape[0],), INTS, scores.device)
    check_choice("kind", kind, KINDS)
    return group_advantages_torch(scores.detach(), group_ids, kind)
