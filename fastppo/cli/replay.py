"""`fastppo replay`: a saved step on its own, without prompts and rewards.

Only data is read: the configuration in a checkpoint names a model to load and options of the
algorithm; no reward function, dataset or other code that it may name is touched.
"""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from torch import Tensor

from fastppo import ops
from fastppo.checkpoint import Checkpoint, CheckpointError, verify
from fastppo.cli.output import out
from fastppo.data.text import decode
from fastppo.models.loading import load_tokenizer
from fastppo.ppo.config import PPOConfig, TrainConfig
from fastppo.ppo.experience import PackedBatch
from fastppo.ppo.identity import check_identity
from fastppo.ppo.models import load_models, named_models
from fastppo.ppo.state import Iteration, frozen_digest, load_trainer_state
from fastppo.ppo.step import PPOStep


def replay(dump: Annotated[Path, tyro.conf.Positional], model: str = "") -> int:
    """Run the optimiser step of a dump or an interrupted checkpoint, with anomaly detection.

    Args:
        dump: the folder, RUN/dumps/NAME or RUN/checkpoints/NAME.
        model: the model the run started from, where its configuration does not name one.

    Returns:
        0, or 1 where the numbers are not, bit by bit, those that were recorded.

    Raises:
        CheckpointError: it is damaged, or holds no step.
        ValueError: no model is named.
    """
    checkpoint = verify(dump)
    step, current, name = load_step(checkpoint, model)
    batch, progress = current.batch, step.progress
    if batch is None or progress is None:
        raise CheckpointError(
            f"{dump}: expected a step in the middle of an update, got a checkpoint between two "
            "iterations. Continue it with fastppo train --resume"
        )
    minibatch = step.next_minibatch(batch)
    out(
        f"{dump.name}: iteration {step.iteration + 1}, epoch {progress.epoch + 1}, minibatch "
        f"{progress.minibatch + 1}: {minibatch.num_sequences} sequences, "
        f"{minibatch.num_responses} response tokens"
    )
    same = _compare(step, minibatch, checkpoint)
    bad = [name for name, p in step.policy.named_parameters() if _is_bad(p.grad)]
    step.drop_gradients()
    if not bad:
        print("every gradient is finite")
        return 0 if same else 1
    out(f"gradients that are not finite: {len(bad)} parameters, the first is {bad[0]}")
    out(_anomaly(step, minibatch))
    _show_sequences(step, minibatch, load_tokenizer(name))
    return 0 if same else 1


def load_step(checkpoint: Checkpoint, model: str) -> tuple[PPOStep, Iteration, str]:
    """The step and the unfinished iteration of a checkpoint, and the name of its model."""
    with checkpoint.understood():
        saved = checkpoint.state["config"]
        kind = TrainConfig if "model" in saved else PPOConfig
        known = {field.name for field in dataclasses.fields(kind)}
        fields: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in saved.items() if k in known
        }
        config = kind(**fields)
        name = model or saved.get("model", "")
    if not name:
        raise ValueError(
            f"model: {checkpoint.path} does not name the model its run started from. Name it: "
            "--model NAME"
        )
    named = named_models(config) if isinstance(config, TrainConfig) else {}
    loaded, others = load_models(config.seed, name, **named)
    step = PPOStep(loaded, config, **others)
    if "policy" not in checkpoint.groups:
        raise CheckpointError(
            f"{checkpoint.path}: expected the parameters before the step, got a batch that was "
            "kept for reading. Its samples are in state.json"
        )
    with checkpoint.understood():
        check_identity(checkpoint.state["run"], {"frozen": frozen_digest(step)})
        return step, load_trainer_state(checkpoint, step), name


def _compare(step: PPOStep, minibatch: PackedBatch, checkpoint: Checkpoint) -> bool:
    """Leave the gradients; print losses and norms, and whether they are the recorded ones."""
    stats = step.stats(*step.gradients(minibatch), torch.zeros((), device=step.device))
    losses = dict(zip(ops.PPO_METRIC_NAMES, stats.policy.tolist(), strict=True))
    print(
        f"policy_loss {losses['policy_loss']:g}  value_loss {stats.value_loss:g}  "
        f"actor_grad_norm {stats.actor_norm:g}  critic_grad_norm {stats.critic_norm:g}"
    )
    if "recorded" not in checkpoint.groups:
        return True
    recorded = checkpoint.tensors("recorded")
    same = all(_bits(getattr(stats, name)) == _bits(value) for name, value in recorded.items())
    print("as recorded, bit by bit" if same else "NOT the recorded numbers: other versions?")
    return same


def _bits(x: Tensor) -> bytes:
    return x.detach().cpu().contiguous().numpy().tobytes()


def _is_bad(grad: Tensor | None) -> bool:
    return grad is not None and not bool(grad.isfinite().all())


def _anomaly(step: PPOStep, minibatch: PackedBatch) -> str:
    """What torch's anomaly detection says, with the place in the forward pass."""
    with warnings.catch_warnings(record=True) as caught, torch.autograd.set_detect_anomaly(True):
        warnings.simplefilter("always")
        try:
            step.gradients(minibatch)
        except RuntimeError as error:
            forward = "\n".join(str(w.message) for w in caught if "Traceback" in str(w.message))
            return f"{forward}\n{error}".strip()
        finally:
            step.drop_gradients()
    return "anomaly detection finds no operation that made a NaN: the gradient overflows in a sum"


def _show_sequences(step: PPOStep, minibatch: PackedBatch, tokenizer: Any) -> None:
    """The sequences whose gradient alone is not finite."""
    responses = minibatch.unpack(minibatch.targets)
    for i in range(minibatch.num_sequences):
        _, _, norms = step.gradients(minibatch.select([i]))
        step.drop_gradients()
        if not all(bool(norm.isfinite()) for norm in norms):
            print(f"sequence {i}: {decode(tokenizer, responses[i])!r}")
