"""Detail 30: what an iteration logs."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastppo.ppo.experience import PackedBatch
from fastppo.ppo.step import PPOStep
from fastppo.ppo.trainer import PPOTrainer

KEYS = {
    *("iteration", "reward", "reward/length", "score_std", "kl", "kl_sequence", "entropy"),
    *("policy_loss", "value_loss", "approx_kl", "old_approx_kl", "clipfrac", "clipfrac_low"),
    *("clipfrac_high", "ratio", "ratio_max", "explained_variance", "response_length"),
    *("truncated", "eos_rate", "learning_rate", "kl_coef", "actor_grad_norm"),
    *("critic_grad_norm", "nonfinite_steps", "update_epochs", "tokens_per_second"),
    *("seconds_rollout", "seconds_reward", "seconds_pack", "seconds_evaluate"),
    *("seconds_advantages", "seconds_update", "seconds_total", "logprob_diff", "rollout_kl"),
}


def length(completion_ids: list[list[int]]) -> list[float]:
    return [float(len(ids)) for ids in completion_ids]


def test_30_logged_metrics(
    make_trainer: Callable[..., PPOTrainer],
    spy: Callable[[Any, str], list[tuple[Any, Any]]],
) -> None:
    """Every iteration logs raw score, KL, entropy, losses, lengths, truncation and phase times."""
    trainer = make_trainer(length, kl_coef=0.1, missing_eos_penalty=2.0)
    generated, trained = spy(trainer.engine, "generate"), spy(trainer.step, "update")
    summary = trainer.train()
    lines = (Path(summary["run_dir"]) / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["iteration"] for row in rows] == [1, 2]
    for row, (_, rollouts), ((batch,), _) in zip(rows, generated, trained, strict=True):
        assert row.keys() >= KEYS
        assert all(row[key] is not None for key in KEYS)
        lengths = [len(ids) for ids in rollouts.responses]
        assert row["reward"] == row["response_length"] == pytest.approx(np.mean(lengths))
        assert row["score_std"] == pytest.approx(np.std(lengths), rel=1e-5)
        ended = [1 in ids for ids in rollouts.responses]  # 1 is the end token
        assert row["truncated"] == pytest.approx(1 - np.mean(ended))
        phases = [row[key] for key in KEYS if key.startswith("seconds_") and "total" not in key]
        assert 0 < sum(phases) <= row["seconds_total"]
        per_second = batch.num_tokens / row["seconds_total"]
        assert row["tokens_per_second"] == pytest.approx(per_second, rel=0.05)


@pytest.mark.parametrize("ratio_level", ["token", "sequence"])
def test_30_statistics_are_masked(
    ratio_level: str,
    make_model: Callable[..., Any],
    make_step: Callable[..., PPOStep],
    make_batch: Callable[..., PackedBatch],
) -> None:
    """Entropy, approx_kl, clipfrac and ratio average over the tokens that count and no others."""
    plain = make_model()
    step = make_step(copy.deepcopy(plain), ratio_level=ratio_level)
    keep = torch.arange(29) % 3 != 0
    batch = step.evaluate(make_batch().replace(loss_mask=keep))
    found = []
    for i in range(batch.num_sequences):
        one = batch.select([i])
        logits = plain(input_ids=one.input_ids.long()[None]).logits[0][one.rows.long()].detach()
        log_p = logits.log_softmax(-1)
        found.append(-(log_p.exp() * log_p).sum(-1))
    entropy = torch.cat(found)
    batch = step.advantages(batch, np.arange(5.0))
    log_ratio = torch.where(keep, torch.linspace(-0.5, 0.5, 29), 3.0)
    lengths = batch.response_lengths.tolist()
    metrics = step.update(batch.replace(old_logprobs=batch.old_logprobs - log_ratio))
    x, a, r = log_ratio[keep], batch.advantages[keep], log_ratio.exp()
    if ratio_level == "sequence":
        parts = zip(log_ratio.split(lengths), keep.split(lengths), strict=True)
        r = torch.cat([torch.full(k.shape, y[k].mean().exp().item()) for y, k in parts])
    r = r[keep]
    assert abs(entropy.mean() - entropy[keep].mean()) > 1e-2
    expected = {
        "num_tokens": 19.0,
        "entropy": entropy[keep].mean().item(),
        "approx_kl": (x.expm1() - x).mean().item(),
        "old_approx_kl": -x.mean().item(),
        "clipfrac": ((r - 1).abs() > 0.2).float().mean().item(),
        "clipfrac_low": ((r < 0.8) & (a < 0)).float().mean().item(),
        "clipfrac_high": ((r > 1.2) & (a > 0)).float().mean().item(),
        "ratio": r.mean().item(),
        "ratio_max": r.max().item(),
    }
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=1e-3, abs=1e-5)
