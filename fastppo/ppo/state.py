"""The state of a run as tensors and JSON: all that a checkpoint needs for an exact continuation.

    policy      every parameter that trains
    optimizer   AdamW's moments and step counts of actor and critic
    iteration   what the iteration under way has so far: rollouts, scores, batch, finished steps

The JSON half has the counters and the KL coefficient. There is no generator and no data loader to
save: random numbers and the order of the prompts are functions of (seed, iteration). What does not
train (frozen layers, the reference) is not saved but recognised by its digest.

B sequences, N response tokens, S finished optimiser steps, M metrics of a step.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastppo.checkpoint import Checkpoint
from fastppo.ppo.experience import PackedBatch
from fastppo.ppo.step import PPOStep, UpdateProgress
from fastppo.ppo.update_metrics import StepStats
from fastppo.rewards import RewardBatch, RewardFailure
from fastppo.rollout.engine import Rollouts
from fastppo.training.errors import ForeignStateError
from fastppo.training.metrics import from_json, to_json, whole
from fastppo.training.trainer import State

Tensors = dict[str, Tensor]

_COUNTERS = ("iteration", "kl_coef", "nonfinite_in_a_row", "token_budget")


@dataclass
class Iteration:
    """What an iteration has so far; each field is filled in by a phase, in this order."""

    rollouts: Rollouts | None = None
    scored: RewardBatch | None = None
    batch: PackedBatch | None = None
    """With advantages."""
    row: dict[str, float] | None = None
    """The metrics, after the update."""


def place(current: Iteration, progress: UpdateProgress | None) -> str:
    """Where in an iteration, by its finished optimiser steps; sorts as time passes."""
    if current.row is not None:
        return "-updated"
    if progress is not None:
        return f"-{len(progress.steps):04d}"
    return "-0000" if current.rollouts is not None else ""


def trainer_state(step: PPOStep, current: Iteration) -> State:
    """All tensors by group, and their JSON half."""
    tensors, under_way = iteration_state(current, step.progress)
    counters = {name: getattr(step, name) for name in _COUNTERS}
    return {**step_tensors(step), "iteration": tensors}, {"step": counters, "iteration": under_way}


def load_trainer_state(checkpoint: Checkpoint, step: PPOStep) -> Iteration:
    """Put a step where a verified checkpoint is.

    Args:
        checkpoint: a verified one.
        step: is changed.

    Returns:
        The iteration under way.

    Raises:
        ForeignStateError: see `load_step`. Nothing has been changed then.
    """
    state = checkpoint.state
    policy, optimizer = checkpoint.tensors("policy"), checkpoint.tensors("optimizer")
    load_step(step, state["step"], policy, optimizer)
    tensors = checkpoint.tensors("iteration")
    current, step.progress = load_iteration(tensors, state["iteration"], step.device)
    return current


# The step


def step_tensors(step: PPOStep) -> dict[str, Tensors]:
    """The `policy` and the `optimizer` tensors of a step."""
    names = {id(p): name for name, p in _trained(step).items()}
    optimizer = {
        f"{role}/{names[id(p)]}/{key}": value
        for role, adamw in _optimizers(step).items()
        for p, state in adamw.state.items()
        for key, value in state.items()
    }
    return {"policy": dict(_trained(step)), "optimizer": optimizer}


def load_step(
    step: PPOStep, counters: Mapping[str, Any], policy: Tensors, optimizer: Tensors
) -> None:
    """Put a step where another one was.

    Raises:
        ForeignStateError: a tensor that this step does not have, lacks, or has in another shape;
            nothing has been changed then.
    """
    current = step_tensors(step)
    saved, own = policy | optimizer, current["policy"] | current["optimizer"]
    for name in saved | own:
        if name not in saved or name not in own:
            where = "only in the checkpoint" if name in saved else "not in the checkpoint"
            raise ForeignStateError(f"the trained parameters differ: {name} is {where}")
    for name, value in own.items():
        got = saved[name]
        if got.shape != value.shape or got.dtype != value.dtype:
            raise ForeignStateError(
                f"{name} is {tuple(got.shape)} {got.dtype}, expected {tuple(value.shape)} "
                f"{value.dtype}"
            )
    with torch.no_grad():
        for name, value in own.items():
            value.copy_(saved[name])
    for name in _COUNTERS:
        coef = name == "kl_coef"
        setattr(step, name, float(counters[name]) if coef else whole(counters, name))
    step.progress = None


def frozen_digest(step: PPOStep) -> str:
    """SHA-256 of everything that a checkpoint leaves out: parameters that do not train."""
    digest = hashlib.sha256()
    for name, p in sorted(step.policy.named_parameters()):
        if not p.requires_grad:
            digest.update(f"{name} {p.dtype} {tuple(p.shape)}\n".encode())
            data = p.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
            digest.update(data.data)
    return digest.hexdigest()


def _trained(step: PPOStep) -> Tensors:
    return {name: p for name, p in step.policy.named_parameters() if p.requires_grad}


def _optimizers(step: PPOStep) -> dict[str, torch.optim.Optimizer]:
    both = {"actor": step.actor_optimizer, "critic": step.critic_optimizer}
    return {role: adamw for role, adamw in both.items() if adamw is not None}


# The iteration under way


def iteration_state(
    current: Iteration, progress: UpdateProgress | None
) -> tuple[Tensors, dict[str, Any]]:
    """Tensors and JSON of an unfinished iteration."""
    tensors: Tensors = {}
    state: dict[str, Any] = {"rollouts": current.rollouts is not None}
    if (rollouts := current.rollouts) is not None:
        lengths = [len(ids) for ids in rollouts.responses]
        arrays = {
            "lengths": np.asarray(lengths, np.int32),
            "responses": np.concatenate(rollouts.responses),
            "logprobs": np.concatenate(rollouts.logprobs),
            "finished": rollouts.finished,
            "truncated": rollouts.truncated,
        }
        tensors |= {f"rollouts/{name}": torch.from_numpy(x) for name, x in arrays.items()}
    if (scored := current.scored) is not None:
        tensors["scores"] = torch.from_numpy(scored.scores)
        for name, x in scored.per_function.items():
            tensors[f"scores/{name}"] = torch.from_numpy(x)
        state["scores"] = list(scored.per_function)
        state["failures"] = [dataclasses.asdict(failure) for failure in scored.failures]
        state["lost"] = scored.lost
    if (batch := current.batch) is not None:
        for name in _batch_fields():
            if (value := getattr(batch, name)) is not None:
                tensors[f"batch/{name}"] = value
        state["batch"] = batch.max_seqlen
    if current.row is not None:
        state["row"] = to_json(current.row)
    if progress is not None:
        state["progress"] = [progress.epoch, progress.minibatch]
        for name in StepStats._fields if progress.steps else ():
            stats = [getattr(stats, name) for stats in progress.steps]
            tensors[f"steps/{name}"] = torch.stack(stats)  # (S,), and (S, M) for `policy`
    return tensors, state


def load_iteration(
    tensors: Tensors, state: Mapping[str, Any], device: torch.device
) -> tuple[Iteration, UpdateProgress | None]:
    """What `iteration_state` saved, on a device."""
    current, progress = Iteration(), None
    if state["rollouts"]:
        arrays = {name: tensors[f"rollouts/{name}"].numpy() for name in _ROLLOUTS}
        cuts = np.cumsum(arrays["lengths"])[:-1]
        current.rollouts = Rollouts(
            np.split(arrays["responses"], cuts),
            np.split(arrays["logprobs"], cuts),
            arrays["finished"],
            arrays["truncated"],
        )
    if "scores" in state:
        current.scored = RewardBatch(
            tensors["scores"].numpy(),
            {name: tensors[f"scores/{name}"].numpy() for name in state["scores"]},
            tuple(RewardFailure(**failure) for failure in state["failures"]),
            whole(state, "lost"),
        )
    if "batch" in state:
        fields: dict[str, Any] = {
            name: tensors[f"batch/{name}"].to(device)
            for name in _batch_fields()
            if f"batch/{name}" in tensors
        }
        for name in ("cu_seqlens", "cu_responses"):
            fields[f"{name}_host"] = tensors[f"batch/{name}"].numpy()
        current.batch = PackedBatch(**fields, max_seqlen=whole(state, "batch"))
    if "row" in state:
        current.row = from_json(state["row"])
    if "progress" in state:
        names = StepStats._fields if "steps/policy" in tensors else ()
        stacked = [tensors[f"steps/{name}"].to(device) for name in names]
        steps = [StepStats(*row) for row in zip(*stacked, strict=True)]
        epoch, minibatch = state["progress"]
        progress = UpdateProgress(epoch, minibatch, steps)
    return current, progress


_ROLLOUTS = ("lengths", "responses", "logprobs", "finished", "truncated")


def _batch_fields() -> list[str]:
    """The tensors of a PackedBatch; `arena` is only where they lie."""
    names = [field.name for field in dataclasses.fields(PackedBatch)]
    return [n for n in names if n not in ("arena", "max_seqlen") and not n.endswith("_host")]
