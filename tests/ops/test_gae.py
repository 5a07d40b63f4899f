"""gae against plain loops, closed forms, masks, odd lengths; other trainers: test_gae_hosts.py."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from fastppo import ops
from fastppo.ops import gae, gae_reference, kl_penalty, whiten

# Empty sequences, single tokens, one block of 64 and its neighbours, several levels of blocks.
LENGTHS = [[], [0], [1], [3, 0, 1, 5], [63, 64, 65, 0, 1], [4099, 2, 130]]


def packed(lengths, rng, dtype=torch.float64):
    cu = torch.tensor([0, *torch.tensor(lengths, dtype=torch.long).cumsum(0)], dtype=torch.int32)
    n = int(cu[-1])
    rewards, values = torch.randn(2, n, generator=rng, dtype=dtype)
    return rewards, values, cu


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("mode", ["carry", "dense-zero", "none"])
@pytest.mark.parametrize("masked", [False, True])
def test_against_the_loop(lengths, mode, masked, rng):
    rewards, values, cu = packed(lengths, rng)
    options = {
        "gamma": 0.99,
        "gae_lambda": 0.95,
        "mask": torch.rand(len(values), generator=rng) < 0.7 if masked else None,
        "mask_mode": mode,
        "bootstrap": torch.randn(len(lengths), generator=rng, dtype=torch.float64),
    }
    truth = gae_reference(rewards, values, cu, **options)
    torch.testing.assert_close(gae(rewards, values, cu, **options), truth, rtol=1e-12, atol=1e-12)
    options["bootstrap"] = options["bootstrap"].float()
    single = gae(rewards.float(), values.float(), cu, **options)
    assert single.advantages.dtype == torch.float32
    torch.testing.assert_close(single.advantages.double(), truth.advantages, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_no_decay_over_a_long_sequence(gamma, rng):
    rewards, values, cu = packed([20000], rng)
    truth = gae_reference(rewards, values, cu, gamma=gamma, gae_lambda=1.0)
    result = gae(rewards, values, cu, gamma=gamma, gae_lambda=1.0)
    torch.testing.assert_close(result, truth, rtol=1e-10, atol=1e-10)


def test_integers_are_exact():
    rewards = torch.arange(200.0) % 7
    values = torch.arange(200.0) % 5
    cu = torch.tensor([0, 70, 200])
    result = gae(rewards, values, cu, gamma=1.0, gae_lambda=1.0)
    truth = gae_reference(rewards.double(), values.double(), cu, gamma=1.0, gae_lambda=1.0)
    assert torch.equal(result.advantages.double(), truth.advantages)
    assert torch.equal(result.returns.double(), truth.returns)


def test_closed_forms(rng):
    rewards, values, cu = packed([6, 4], rng)
    last = torch.tensor([5, 9])
    following = torch.cat([values[1:], values.new_zeros(1)])
    following[last] = 0
    one_step = gae(rewards, values, cu, gamma=0.9, gae_lambda=0.0)
    torch.testing.assert_close(one_step.advantages, rewards + 0.9 * following - values)
    monte_carlo = gae(rewards, values, cu, gamma=1.0, gae_lambda=1.0)
    to_go = torch.cat([p.flip(0).cumsum(0).flip(0) for p in rewards.split([6, 4])])
    torch.testing.assert_close(monte_carlo.returns, to_go)
    myopic = gae(rewards, values, cu, gamma=0.0, gae_lambda=0.95)
    torch.testing.assert_close(myopic.returns, rewards)


def test_cleanrl_loop(rng):
    """ppo.py lines 219-231 for one environment and nextdone = 0: truncated, bootstrapped."""
    rewards, values, cu = packed([17], rng)
    next_value, gamma, lam = torch.tensor([0.3], dtype=torch.float64), 0.98, 0.9
    advantages, lastgaelam = torch.zeros_like(rewards), 0
    for t in reversed(range(17)):
        nextvalues = next_value if t == 16 else values[t + 1]
        delta = rewards[t] + gamma * nextvalues - values[t]
        advantages[t] = lastgaelam = delta + gamma * lam * lastgaelam
    result = gae(rewards, values, cu, gamma=gamma, gae_lambda=lam, bootstrap=next_value)
    torch.testing.assert_close(result.advantages, advantages)
    torch.testing.assert_close(result.returns, advantages + values)


def tool_masks(rng, lengths):
    """Interior, leading and trailing masked spans."""
    mask = torch.rand(sum(lengths), generator=rng) < 0.6
    mask[2:5] = False
    mask[lengths[0] - 1] = False
    mask[lengths[0]] = False
    mask[lengths[0] + 1] = True
    return mask


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("mode", ["carry", "dense-zero"])
def test_masked_slots_may_hold_nan(mode, dtype, rng):
    rewards, values, cu = packed([12, 9], rng, dtype)
    mask = tool_masks(rng, [12, 9])
    options = {"gamma": 0.9, "gae_lambda": 0.8, "mask": mask, "mask_mode": mode}
    clean = gae(rewards, values, cu, **options)
    poison = [torch.where(mask, x, torch.nan) for x in (rewards, values)]
    assert all(torch.equal(a, b) for a, b in zip(gae(*poison, cu, **options), clean, strict=True))


def test_fully_masked_sequence_and_batch(rng):
    rewards, values, cu = packed([3, 4], rng)
    mask = torch.tensor([False] * 3 + [True] * 4)
    result = gae(rewards, values, cu, gamma=0.9, gae_lambda=0.8, mask=mask)
    assert (result.advantages[:3] == 0).all()
    alone = gae(rewards[3:], values[3:], torch.tensor([0, 4]), gamma=0.9, gae_lambda=0.8)
    torch.testing.assert_close(result.advantages[3:], alone.advantages)
    nothing = gae(rewards, values, cu, gamma=0.9, gae_lambda=0.8, mask=torch.zeros_like(mask))
    assert (nothing.advantages == 0).all()
    assert (nothing.returns == 0).all()


def test_sequences_do_not_see_each_other(rng):
    rewards, values, cu = packed([70, 130, 5], rng)
    before = gae(rewards, values, cu, gamma=1.0, gae_lambda=1.0).advantages
    rewards[70:200] = torch.randn(130, generator=rng, dtype=torch.float64)
    after = gae(rewards, values, cu, gamma=1.0, gae_lambda=1.0).advantages
    assert torch.equal(before[:70], after[:70])
    assert torch.equal(before[200:], after[200:])
    assert not torch.equal(before[70:200], after[70:200])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_nan_stays_in_its_sequence(masked, dtype, rng):
    """Every length around a few steps of four tokens, between sequences full of NaN and inf."""
    lengths = [n for length in range(14) for n in (3, length)]
    rewards, values, cu = packed(lengths, rng, dtype)
    odd = torch.repeat_interleave(torch.arange(28) % 2 == 1, torch.tensor(lengths))
    options = {"gamma": 1.0, "gae_lambda": 1.0, "returns_lambda": 0.5, "mask_mode": "none"}
    options["mask"] = torch.rand(len(odd), generator=rng) < 0.7 if masked else None
    clean = gae(rewards, values, cu, **options)
    rewards, values = torch.where(odd, rewards, torch.nan), torch.where(odd, values, torch.inf)
    poisoned = gae(rewards, values, cu, **options)
    assert all(torch.equal(a[odd], b[odd]) for a, b in zip(poisoned, clean, strict=True))
    assert not poisoned.advantages[~odd].isfinite().all()


def test_split_with_bootstrap_at_lambda_zero(rng):
    rewards, values, cu = packed([10], rng)
    whole = gae(rewards, values, cu, gamma=0.9, gae_lambda=0.0)
    bootstrap = torch.stack([values[4], values.new_zeros(())])
    options = {"gamma": 0.9, "gae_lambda": 0.0, "bootstrap": bootstrap}
    halves = gae(rewards, values, torch.tensor([0, 4, 10]), **options)
    torch.testing.assert_close(whole.advantages, halves.advantages)


def test_returns_lambda_only_changes_the_returns(rng):
    rewards, values, cu = packed([30, 7], rng)
    two = gae(rewards, values, cu, gamma=1.0, gae_lambda=0.9, returns_lambda=1.0)
    actor = gae(rewards, values, cu, gamma=1.0, gae_lambda=0.9)
    critic = gae(rewards, values, cu, gamma=1.0, gae_lambda=1.0)
    assert torch.equal(two.advantages, actor.advantages)
    assert torch.equal(two.returns, critic.returns)
    mask = torch.rand(37, generator=rng) < 0.5
    options = {"gamma": 1.0, "gae_lambda": 0.9, "returns_lambda": 1.0, "mask": mask}
    torch.testing.assert_close(
        gae(rewards, values, cu, **options), gae_reference(rewards, values, cu, **options)
    )


def test_result_is_a_constant_and_autocast_does_not_touch_it(rng):
    rewards, values, cu = packed([100], rng, torch.float32)
    plain = gae(rewards, values.requires_grad_(), cu, gamma=0.99, gae_lambda=0.95)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = gae(rewards, values, cu, gamma=0.99, gae_lambda=0.95)
    assert torch.equal(plain.advantages, cast.advantages)
    assert not plain.returns.requires_grad


MODES = ["carry", "dense-zero", "none"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("per_sequence", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_every_option_against_the_loop(mode, masked, per_sequence, dtype, rng):
    lengths = [3, 0, 1, 70, 5]
    rewards, values, cu = packed(lengths, rng)
    kl, scores = torch.randn(len(values), generator=rng), torch.randn(5, generator=rng)
    rewards, values = rewards.to(dtype), values.to(dtype)
    options = {
        "gamma": torch.rand(5, generator=rng) if per_sequence else 0.97,
        "gae_lambda": torch.rand(5, generator=rng) if per_sequence else 0.9,
        "returns_lambda": torch.rand(5, generator=rng) if per_sequence else 1.0,
        "mask": torch.rand(len(values), generator=rng) < 0.7 if masked else None,
        "mask_mode": mode,
        "bootstrap": torch.randn(5, generator=rng, dtype=torch.float64).to(dtype),
        "kl": kl.to(dtype),
        "kl_coef": 0.05,
        "scores": scores.to(dtype),
    }
    tolerance = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {}
    for rewarded in (True, False):
        given = rewards if rewarded else None
        truth = gae_reference(given, values.double(), cu, **options)
        result = gae(given, values, cu, **options)
        assert result.advantages.dtype == (dtype if dtype == torch.float64 else torch.float32)
        for x, y in zip(result, truth, strict=True):
            torch.testing.assert_close(x.double(), y, **(tolerance or {"rtol": 1e-6, "atol": 1e-6}))


@pytest.mark.parametrize("mode", MODES)
def test_integers_are_exact_in_every_mode(mode, rng):
    lengths = [40, 0, 1, 300, 17]
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0)])
    n = int(cu[-1])
    rewards, values, kl = torch.randint(-4, 5, (3, n), generator=rng).float()
    options = {
        "gamma": 1.0,
        "gae_lambda": 1.0,
        "returns_lambda": 0.0,
        "mask": torch.rand(n, generator=rng) < 0.6,
        "mask_mode": mode,
        "bootstrap": torch.randint(-4, 5, (5,), generator=rng).float(),
        "kl": kl,
        "kl_coef": 2.0,
        "scores": torch.randint(-4, 5, (5,), generator=rng).float(),
    }
    result, truth = (f(rewards, values, cu, **options) for f in (gae, gae_reference))
    assert torch.equal(result.advantages, truth.advantages)
    assert torch.equal(result.returns, truth.returns)


@pytest.mark.parametrize("masked", [False, True])
def test_discounted_returns_are_gae_with_values_of_0(masked, rng):
    """What the message of the removed op says, token by token."""
    rewards, values, cu = packed([3, 0, 1, 70], rng)
    mask = torch.rand(len(rewards), generator=rng) < 0.7 if masked else torch.ones(74) > 0
    bootstrap = torch.randn(4, generator=rng, dtype=torch.float64)
    expected = torch.zeros_like(rewards)
    for i, (start, stop) in enumerate(pairwise(cu.tolist())):
        to_go = bootstrap[i]
        for t in reversed(range(start, stop)):
            if mask[t]:
                expected[t] = to_go = rewards[t] + 0.9 * to_go
    options = {"gamma": 0.9, "gae_lambda": 1, "mask": mask, "bootstrap": bootstrap}
    result = gae(rewards, torch.zeros_like(values), cu, **options)
    torch.testing.assert_close(result.returns, expected)
    torch.testing.assert_close(result.advantages, expected)


@pytest.mark.parametrize(
    ("name", "instead"),
    [("discounted_returns", "values of 0 and gae_lambda=1"), ("vtrace", "is_correction")],
)
def test_removed_ops_say_what_to_do(name, instead):
    for gone in (name, f"{name}_reference"):
        assert not hasattr(ops, gone)
        with pytest.raises(AttributeError, match=f"no attribute '{gone}' any more: .*{instead}"):
            getattr(ops, gone)
    with pytest.raises(AttributeError, match=r"^module 'fastppo.ops' has no attribute 'gea'$"):
        ops.gea  # noqa: B018


@pytest.mark.parametrize("gamma", [1.0, 0.999])
def test_a_sequence_of_200_000_tokens(gamma, rng):
    rewards, values, cu = packed([200_000, 1], rng, torch.float32)
    result = gae(rewards, values, cu, gamma=gamma, gae_lambda=1.0)
    weighted = torch.cat([rewards[:-1].double(), torch.zeros(1, dtype=torch.float64)])
    if gamma == 1.0:  # λ = 1: returns are the discounted rewards to go
        to_go = rewards[:-1].double().flip(0).cumsum(0).flip(0)
        torch.testing.assert_close(result.returns[:-1].double(), to_go, rtol=1e-6, atol=1e-5)
    t = 199_000
    powers = gamma ** torch.arange(1000, dtype=torch.float64)
    expected = (weighted[t:-1] * powers).sum()
    torch.testing.assert_close(result.returns[t].double(), expected, rtol=1e-6, atol=1e-5)
    assert result.returns[-1] == rewards[-1]


def test_splitting_a_sequence_with_a_bootstrap(rng):
    """The first half lacks exactly what decays into it: (γλ)^(k−t)·A_k."""
    rewards, values, cu = packed([90], rng)
    gamma, lam, k = 0.99, 0.95, 37
    whole = gae(rewards, values, cu, gamma=gamma, gae_lambda=lam).advantages
    bootstrap = torch.stack([values[k], values.new_zeros(())])
    options = {"gamma": gamma, "gae_lambda": lam, "bootstrap": bootstrap}
    halves = gae(rewards, values, torch.tensor([0, k, 90]), **options).advantages
    assert torch.equal(halves[k:], whole[k:])
    missing = (gamma * lam) ** (k - torch.arange(k, dtype=torch.float64)) * whole[k]
    torch.testing.assert_close(halves[:k] + missing, whole[:k], rtol=1e-12, atol=1e-12)


def test_the_order_of_sequences_does_not_matter(rng):
    lengths = [5, 0, 130, 1, 64]
    rewards, values, cu = packed(lengths, rng, torch.float32)
    mask = torch.rand(200, generator=rng) < 0.7
    bootstrap, lam = torch.randn(5, generator=rng), torch.rand(5, generator=rng)
    options = {"gamma": 0.99, "mask_mode": "carry"}
    result = gae(
        rewards, values, cu, mask=mask, bootstrap=bootstrap, gae_lambda=lam, **options
    ).advantages
    order = [3, 4, 1, 0, 2]
    rows = torch.cat([torch.arange(200).split(lengths)[i] for i in order])
    moved = gae(
        rewards[rows],
        values[rows],
        torch.tensor([0, 1, 65, 65, 70, 200]),
        mask=mask[rows],
        bootstrap=bootstrap[order],
        gae_lambda=lam[order],
        **options,
    ).advantages
    assert torch.equal(moved, result[rows])


def test_kl_and_scores_are_rewards(rng):
    rewards, values, cu = packed([12, 9, 2], rng)
    mask = torch.cat([tool_masks(rng, [12, 9]), torch.zeros(2, dtype=torch.bool)])
    logprobs, ref = torch.randn(2, 23, generator=rng, dtype=torch.float64)
    kl, scores = kl_penalty(logprobs, ref, estimator="k1"), torch.tensor([1.0, -2.0, 5.0])
    shaped = rewards - torch.where(mask, 0.3 * kl, 0.0)
    for i, (start, stop) in enumerate([(0, 12), (12, 21)]):
        shaped[start + int(mask[start:stop].nonzero()[-1])] += scores[i]
    options = {"gamma": 0.9, "gae_lambda": 0.8, "mask": mask}
    by_hand = gae(shaped, values, cu, **options)
    poison = torch.where(mask, kl, torch.nan)
    folded = gae(rewards, values, cu, kl=poison, kl_coef=0.3, scores=scores, **options)
    torch.testing.assert_close(folded, by_hand)
    assert (folded.advantages[21:] == 0).all()  # nothing valid to put a score on


@pytest.mark.parametrize("masked", [False, True])
def test_norm_adv_whitens_the_advantages_only(masked, rng):
    rewards, values, cu = packed([30, 7, 1], rng, torch.float32)
    mask = torch.rand(38, generator=rng) < 0.5 if masked else None
    options = {"gamma": 1.0, "gae_lambda": 0.9, "mask": mask}
    plain = gae(rewards, values, cu, **options)
    normed = gae(rewards, values, cu, norm_adv=True, **options)
    torch.testing.assert_close(normed.advantages, whiten(plain.advantages, mask))
    assert torch.equal(normed.returns, plain.returns)


@pytest.mark.parametrize("valid", [0, 1, 5])
def test_norm_adv_of_equal_advantages_is_zero(valid):
    mask = torch.arange(5) < valid
    options = {"gamma": 0.0, "gae_lambda": 0.0, "mask": mask, "norm_adv": True}
    result = gae(torch.full((5,), 0.1), torch.full((5,), 3.3), torch.tensor([0, 5]), **options)
    assert (result.advantages == 0).all()


def test_not_contiguous_inputs(rng):
    rewards, values, cu = packed([30], rng)
    strided = [torch.stack([x, x], 1)[:, 0] for x in (rewards, values)]
    expected = gae(rewards, values, cu, gamma=0.9, gae_lambda=0.9)
    assert torch.equal(gae(*strided, cu, gamma=0.9, gae_lambda=0.9).returns, expected.returns)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "given", [(), *((i,) for i in range(6)), tuple(range(6))], ids=lambda given: f"{given}"
)
def test_custom_op(given, dtype, rng):
    """None, each alone, all: rewards, mask, bootstrap, kl, scores, discounts."""
    rewards, values, cu = packed([30, 0, 7], rng, dtype)
    mask = torch.rand(37, generator=rng) < 0.5
    discounts = torch.rand(3, 3, generator=rng, dtype=torch.float64)
    tensors = rewards, mask, rewards[:3], values, values[:3], discounts
    optional = [x if i in given else None for i, x in enumerate(tensors)]
    critic, mode, norm_adv, hint = 1.0, MODES[len(given) % 3], bool(given), 30
    if 0 in given:
        critic, hint = None, None
    torch.library.opcheck(
        torch.ops.fastppo.gae.default,
        (values, cu, *optional, 0.9, 0.8, critic, 0.1, mode, norm_adv, hint),
    )


def test_compiles_without_a_graph_break(rng):
    rewards, values, cu = packed([30, 7], rng, torch.float32)

    def both(r, v, longest):
        options = {"gamma": 0.9, "gae_lambda": 0.8, "scores": torch.ones(2), "norm_adv": True}
        advantages, returns = gae(r, v, cu, max_seqlen=longest, **options)
        return advantages + returns

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    expected = both(rewards, values, 30)
    assert torch.equal(compiled(rewards, values, 30), expected)
    assert torch.equal(compiled(rewards, values, 31), expected)  # torch sees that it varies
    with torch.compiler.set_stance("fail_on_recompile"):
        assert torch.equal(compiled(rewards, values, 32), expected)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"cu_seqlens": torch.tensor([1, 4])}, ValueError, r"cu_seqlens\[0\] = 0, got 1"),
        ({"cu_seqlens": torch.tensor([0, 3])}, ValueError, r"cu_seqlens: .*rows 4, got 3"),
        ({"cu_seqlens": torch.tensor([0, 3, 2, 4])}, ValueError, r"cu_seqlens\[1\] = 3 > .* = 2"),
        ({"cu_seqlens": torch.tensor([0.0, 4.0])}, TypeError, "cu_seqlens: .*int32 or int64"),
        ({"gamma": 1.01}, ValueError, r"gamma: .*\[0, 1\], got 1.01"),
        ({"gae_lambda": -0.1}, ValueError, "gae_lambda"),
        ({"returns_lambda": 2.0}, ValueError, "returns_lambda"),
        ({"rewards": torch.zeros(5)}, ValueError, r"rewards: .*got \(5,\)"),
        ({"mask": torch.ones(4)}, TypeError, "mask: .*got float32"),
        ({"mask_mode": "zero"}, ValueError, "mask_mode: expected"),
        ({"bootstrap": torch.zeros(2)}, ValueError, r"bootstrap: expected"),
        ({"scores": torch.zeros(4)}, ValueError, r"scores: .*got \(4,\)"),
        ({"kl": torch.zeros(3)}, ValueError, r"kl: .*got \(3,\)"),
        ({"gamma": torch.tensor([1.5])}, ValueError, r"gamma: .*\[0, 1\], got 1.5 to 1.5"),
        ({"gae_lambda": torch.zeros(2)}, ValueError, r"gae_lambda: expected"),
        ({"gamma": float("nan")}, ValueError, r"gamma: .*\[0, 1\], got nan"),
        ({"rewards": torch.zeros(4, device="meta")}, ValueError, "rewards: expected device cpu"),
        (
            {"cu_seqlens": torch.tensor([0, 4], device="meta")},
            ValueError,
            "cu_seqlens: .*got meta",
        ),
        ({"values": torch.zeros(4, dtype=torch.int64)}, TypeError, "values: expected dtype"),
        ({"max_seqlen": 3}, ValueError, "max_seqlen: .*got 3"),
        ({"max_seqlen": 4.0}, TypeError, "max_seqlen: .*got float"),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    args = {
        "rewards": torch.zeros(4),
        "values": torch.zeros(4),
        "cu_seqlens": torch.tensor([0, 4]),
        "gamma": 1.0,
        "gae_lambda": 1.0,
    }
    with pytest.raises(error, match=message):
        gae(**(args | change))


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [[200_000, 0, 1, 5000], [7] * 3000], ids=["long", "short"])
@pytest.mark.parametrize("mode", MODES)
def test_on_a_gpu(lengths, mode, rng):
    rewards, values, cu = packed(lengths, rng, torch.float32)
    given = {"mask": torch.rand(len(values), generator=rng) < 0.7}
    given |= {"scores": torch.randn(len(lengths), generator=rng), "kl": rewards.flip(0)}
    options = {"gamma": 1.0, "gae_lambda": 1.0, "returns_lambda": 0.9, "mask_mode": mode}
    options |= {"kl_coef": 0.1, "norm_adv": True}
    expected = gae(rewards, values, cu, **given, **options)
    on_gpu = {name: x.cuda() for name, x in given.items()}
    result = gae(rewards.cuda(), values.cuda(), cu.cuda(), **on_gpu, **options)
    for x, y in zip(result, expected, strict=True):
        torch.testing.assert_close(x.cpu(), y, rtol=1e-4, atol=1e-4 * float(y.abs().max()))
