"""On a GPU nothing after the rollout makes the host wait: torch raises where it would."""

from __future__ import annotations

import pytest
import torch

from fastppo import ops

pytestmark = pytest.mark.gpu


@pytest.fixture
def no_sync():
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def test_advantages_and_losses_without_host_syncs(request):
    device = torch.device("cuda")
    n, cu = 5000, torch.tensor([0, 0, 1, 3000, 5000], device=device, dtype=torch.int32)
    rewards, values, logprobs, old = torch.randn(4, n, device=device)
    mask, scores = rewards > -1.0, torch.randn(4, device=device)
    groups = torch.tensor([3, 3, 7, 7], device=device)
    total = mask.sum()
    config = ops.PPOLossConfig(kl_coef=0.1)
    request.getfixturevalue("no_sync")
    for mode in ("carry", "dense-zero", "none"):
        options = {"mask": mask, "mask_mode": mode, "scores": scores, "norm_adv": True}
        ops.gae(rewards, values, cu, gamma=0.99, gae_lambda=0.95, **options)
    for kind in ("grpo", "dr_grpo", "rloo", "reinforce"):
        ops.group_advantages(scores, groups, kind=kind)
    for aggregation in ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "constant"):
        for count in (total, 100.0):
            weights = ops.loss_weights(cu, mask, aggregation=aggregation, total=count)
    advantages = ops.whiten(rewards, mask)
    values.requires_grad_()
    logprobs.requires_grad_()
    ops.value_loss(values, old, rewards, weights).loss.backward()
    ops.ppo_loss(logprobs, old, advantages, weights, config, ref_logprobs=old).loss.backward()


def test_the_loss_from_hidden_states_without_host_syncs(request):
    device, n = torch.device("cuda"), 300
    hidden = torch.randn(n, 64, device=device, requires_grad=True)
    weight = torch.randn(1003, 64, device=device, requires_grad=True)
    targets = torch.randint(1003, (n,), device=device)
    old, advantages = torch.randn(2, n, device=device)
    weights = (torch.arange(n, device=device) < 200) / 200.0
    request.getfixturevalue("no_sync")
    arguments = (hidden, weight, targets, old, advantages, weights, ops.PPOLossConfig())
    ops.linear_ppo_loss(*arguments, num_live=200).loss.backward()
