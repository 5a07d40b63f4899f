"""AdamW with clipping and the non-finite check inside, against torch's own in separate passes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from fastppo.models.tiny import tiny_model
from fastppo.ppo.config import PPOConfig
from fastppo.training.optim import apply_step, grad_norm, make_adamw

CONFIG = PPOConfig(learning_rate=1e-2, weight_decay=0.1, adam_betas=(0.8, 0.95))


def make_parameters(seed: int = 0) -> list[nn.Parameter]:
    """A matrix and a norm's weight (decayed and not), large enough to fill a vector register."""
    rng = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(*shape, generator=rng)) for shape in ((5, 7), (9,))]


def give_gradients(parameters: list[nn.Parameter], seed: int, scale: float) -> None:
    rng = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.grad = scale * torch.randn(parameter.shape, generator=rng)


def clipped_step(optimizer: torch.optim.Optimizer, limit: float) -> tuple[Tensor, Tensor]:
    """The norm, and 1.0 where the step was skipped because the norm is not finite."""
    norm = grad_norm(optimizer)
    skipped = norm.isfinite().logical_not()
    apply_step([optimizer], [norm], limit, skipped)
    return norm, skipped.float()


def state_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Copies of parameters, moments and step counts."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    states = [optimizer.state[p] for p in parameters]
    moments = [s[name] for s in states for name in ("exp_avg", "exp_avg_sq", "step")]
    return [x.detach().clone() for x in (*parameters, *moments)]


# norms: of about 6.6 · scale, so that the limit binds never, always, and in some of the steps
@pytest.mark.parametrize("scales", [(0.01, 0.02, 0.03), (10.0, 20.0, 30.0), (0.01, 10.0, 0.1)])
@pytest.mark.parametrize("limit", [1.0, 0.3, 0.0], ids=["clip1", "clip0.3", "off"])
def test_a_clipped_step_is_clip_grad_norm_then_adamw(
    scales: tuple[float, ...], limit: float
) -> None:
    ours, theirs = make_parameters(), make_parameters()
    optimizer = make_adamw(ours, CONFIG)
    reference = torch.optim.AdamW(
        [
            {"params": theirs[:1], "weight_decay": CONFIG.weight_decay},
            {"params": theirs[1:], "weight_decay": 0.0},
        ],
        lr=CONFIG.learning_rate,
        betas=CONFIG.adam_betas,
        eps=CONFIG.adam_eps,
        foreach=False,
    )
    for step, scale in enumerate(scales):
        for parameters in (ours, theirs):
            give_gradients(parameters, step, scale)
        norm, skipped = clipped_step(optimizer, limit)
        expected = nn.utils.clip_grad_norm_(theirs, limit or math.inf)
        reference.step()
        torch.testing.assert_close(norm, expected)
        assert skipped.item() == 0.0
        assert all(p.grad is None for p in ours)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_clipping_does_not_leak_into_the_next_step() -> None:
    """The scale of a clipped step must be gone in the step after it, which is not clipped."""
    clipped, plain = make_parameters(), make_parameters()
    for parameters, limit in ((clipped, 1.0), (plain, 0.0)):
        optimizer = make_adamw(parameters, CONFIG)
        for scale in (100.0, 0.01):
            give_gradients(parameters, 0, scale)
            if scale == 100.0 and not limit:
                nn.utils.clip_grad_norm_(parameters, 1.0)
            clipped_step(optimizer, limit)
    for a, b in zip(clipped, plain, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("limit", [1.0, 0.0], ids=["clip", "off"])
@pytest.mark.parametrize("where", [0, 1], ids=["decayed", "plain"])
def test_a_non_finite_gradient_changes_nothing(bad: float, limit: float, where: int) -> None:
    parameters = make_parameters()
    optimizer = make_adamw(parameters, CONFIG)
    give_gradients(parameters, 0, 1.0)
    clipped_step(optimizer, limit)
    before = state_of(optimizer)

    give_gradients(parameters, 1, 1.0)
    grad = parameters[where].grad
    assert grad is not None
    grad.view(-1)[3] = bad
    norm, skipped = clipped_step(optimizer, limit)

    assert skipped.item() == 1.0
    assert not norm.isfinite()
    assert all(p.grad is None for p in parameters)
    for a, b in zip(state_of(optimizer), before, strict=True):
        assert torch.equal(a, b)

    # and the step after it is the one that would have come anyway
    give_gradients(parameters, 2, 1.0)
    assert clipped_step(optimizer, limit)[1].item() == 0.0
    undisturbed = make_parameters()
    other = make_adamw(undisturbed, CONFIG)
    for seed in (0, 2):
        give_gradients(undisturbed, seed, 1.0)
        clipped_step(other, limit)
    for a, b in zip(parameters, undisturbed, strict=True):
        assert torch.equal(a, b)


def test_a_first_step_that_is_not_finite_changes_nothing() -> None:
    parameters = make_parameters()
    before = [p.detach().clone() for p in parameters]
    optimizer = make_adamw(parameters, CONFIG)
    give_gradients(parameters, 0, math.nan)
    assert clipped_step(optimizer, 1.0)[1].item() == 1.0
    assert all(torch.equal(a, b) for a, b in zip(parameters, before, strict=True))
    assert all(state["step"].item() == 0 for state in optimizer.state.values())


def test_parameters_without_a_gradient_are_left_alone() -> None:
    parameters = make_parameters()
    before = parameters[1].detach().clone()
    optimizer = make_adamw(parameters, CONFIG)
    give_gradients(parameters[:1], 0, 1.0)
    norm, skipped = clipped_step(optimizer, 1.0)
    assert norm > 0 and skipped.item() == 0.0
    assert torch.equal(parameters[1], before)


def test_only_matrices_decay() -> None:
    """With gradients of 0 the decay is all that moves: norms and the value head must not."""
    model = tiny_model(vocab_size=16, seed=0)
    value_head = nn.Linear(64, 1)  # a row of weights and a bias
    named = {**dict(model.named_parameters()), **dict(value_head.named_parameters("value"))}
    before = {name: p.detach().clone() for name, p in named.items()}
    optimizer = make_adamw(named.values(), CONFIG)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    for parameter in named.values():
        parameter.grad = torch.zeros_like(parameter)
    clipped_step(optimizer, 1.0)
    moved = {name for name, p in named.items() if not torch.equal(p, before[name])}
    matrices = {n for n in named if "norm" not in n and not n.startswith("value")}
    assert moved == matrices


def test_the_settings_are_the_configuration() -> None:
    optimizer = make_adamw(make_parameters(), CONFIG)
    for group in optimizer.param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (1e-2, (0.8, 0.95), 1e-5)
        assert group["fused"]


def test_a_new_optimizer_has_its_state() -> None:
    """Allocated at once, by a step that was none: later no memory is needed."""
    parameters = make_parameters()
    optimizer = make_adamw(parameters, CONFIG)
    assert all(torch.equal(a, b) for a, b in zip(parameters, make_parameters(), strict=True))
    assert all(p.grad is None for p in parameters)
    for parameter in parameters:
        state = optimizer.state[parameter]
        assert state["step"] == 0 and state["exp_avg"].shape == parameter.shape
        assert not state["exp_avg"].any() and not state["exp_avg_sq"].any()


def test_a_skipped_step_is_skipped_by_every_optimizer() -> None:
    both = [make_parameters(0), make_parameters(1)]
    optimizers = [make_adamw(parameters, CONFIG) for parameters in both]
    before = [state_of(optimizer) for optimizer in optimizers]
    give_gradients(both[0], 0, 1.0)
    give_gradients(both[1], 1, math.nan)
    norms = [grad_norm(optimizer) for optimizer in optimizers]
    apply_step(optimizers, norms, 1.0, ~torch.stack(norms).isfinite().all())
    assert norms[0].isfinite() and norms[1].isnan()
    for optimizer, old in zip(optimizers, before, strict=True):
        assert all(map(torch.equal, state_of(optimizer), old))


@pytest.mark.parametrize("eps", [0.0, 1e-50])
def test_a_weight_without_a_gradient_is_not_divided_by_0(eps: float) -> None:
    weight = nn.Parameter(torch.ones(2, 2))
    optimizer = make_adamw([weight], PPOConfig(adam_eps=eps, learning_rate=0.5))
    weight.grad = torch.tensor([[0.0, 0.0], [3.0, 0.0]])
    clipped_step(optimizer, 0.0)
    torch.testing.assert_close(weight.detach(), torch.tensor([[1.0, 1.0], [0.5, 1.0]]))
