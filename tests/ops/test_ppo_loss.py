"""ppo_loss: every option against float64 autograd, masking, splitting, metrics, peers' formulas."""

from __future__ import annotations

import math

import pytest
import torch

from fastppo import _C
from fastppo.ops import (
    PPO_METRIC_NAMES,
    PPOLossConfig,
    combine_ppo_metrics,
    ppo_loss,
    ppo_loss_reference,
    reduce_ppo_metrics,
)
from fastppo.ops._ppo_loss_config import config_arguments
from fastppo.ops._ppo_loss_op import ppo_loss_torch

LENGTHS = [7, 0, 1, 30, 12]
CU = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)], dtype=torch.int32)
N = 50

OPTIONS = {
    "plain": {},
    "asymmetric": {"clip_coef_low": 0.1, "clip_coef_high": 0.3},
    "dual": {"dual_clip": 1.5},
    "k1": {"kl_coef": 0.1, "kl_estimator": "k1"},
    "k2": {"kl_coef": 0.1, "kl_estimator": "k2"},
    "k3": {"kl_coef": 0.1, "kl_estimator": "k3"},
    "entropy": {"ent_coef": 0.02},
    "tis": {"is_correction": "tis", "is_cap": 1.2},
    "icepop": {"is_correction": "icepop", "is_low": 0.8, "is_high": 1.3},
    "sequence": {"ratio_level": "sequence", "clip_coef_low": 0.02, "clip_coef_high": 0.03},
    "everything": {
        "clip_coef_low": 0.1,
        "clip_coef_high": 0.3,
        "dual_clip": 1.2,
        "kl_coef": 0.05,
        "ent_coef": 0.01,
        "is_correction": "tis",
        "is_cap": 1.1,
    },
    "everything, sequence": {
        "ratio_level": "sequence",
        "dual_clip": 1.01,
        "kl_coef": 0.05,
        "ent_coef": 0.01,
        "is_correction": "icepop",
        "is_high": 1.2,
    },
}


def draw(rng, n=N, dtype=torch.float32):
    lp = -3 * torch.rand(n, generator=rng) - 0.01
    near = [lp + 0.3 * torch.randn(n, generator=rng) for _ in range(3)]
    weights = torch.rand(n, generator=rng) * (torch.rand(n, generator=rng) < 0.7) / max(n, 1)
    inputs = {
        "logprobs": lp,
        "old_logprobs": near[0],
        "advantages": torch.randn(n, generator=rng),
        "weights": weights,
        "entropy": torch.rand(n, generator=rng),
        "ref_logprobs": near[1],
        "rollout_logprobs": near[2],
    }
    return {name: x.to(dtype) for name, x in inputs.items()}


def run(fn, inputs, config, cu=CU):
    lp = inputs["logprobs"].detach().clone().requires_grad_()
    entropy = inputs["entropy"].detach().clone().requires_grad_()
    rest = {k: v for k, v in inputs.items() if k not in ("logprobs", "entropy")}
    out = fn(lp, config=config, entropy=entropy, cu_seqlens=cu, **rest)
    g, h = torch.autograd.grad(2.5 * out.loss, (lp, entropy), allow_unused=True)
    zero = torch.zeros_like(lp)
    return out.loss.detach(), zero if g is None else g, zero if h is None else h, out.metrics


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_against_float64(option, dtype, rng, no_worse):
    config = PPOLossConfig(**OPTIONS[option])
    inputs = draw(rng, dtype=dtype)
    truth = run(ppo_loss_reference, {k: v.double() for k, v in inputs.items()}, config)
    plain = run(ppo_loss_reference, inputs, config)
    ours = run(ppo_loss, inputs, config)
    for a, b, c in zip(ours, plain, truth, strict=True):
        no_worse(a, b, c)
    assert ours[0].dtype == ours[3].dtype == torch.float32


@pytest.mark.parametrize("n", [1, 65_537])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_sizes_against_float64(n, dtype, rng, no_worse):
    config = PPOLossConfig(**OPTIONS["everything"])
    inputs = draw(rng, n, dtype)
    inputs["weights"] = (inputs["weights"].float() * n + 0.01).to(dtype)
    cu = torch.tensor([0, n])
    truth = run(ppo_loss_reference, {k: v.double() for k, v in inputs.items()}, config, cu)
    plain = run(ppo_loss_reference, inputs, config, cu)
    for a, b, c in zip(run(ppo_loss, inputs, config, cu), plain, truth, strict=True):
        no_worse(a, b, c)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["logprobs", "old_logprobs", "advantages", "ref_logprobs"])
def test_a_valid_token_that_is_not_finite_shows(option, bad, name, rng):
    """As in the torch code that other devices run: in the loss or its gradient, and nowhere else
    than where it belongs."""
    inputs = draw(rng)
    at = int(inputs["weights"].nonzero()[5])
    inputs[name][at] = bad
    order = ("logprobs", "entropy", "old_logprobs", "advantages", "weights")
    tensors = [inputs[k] for k in (*order, "ref_logprobs", "rollout_logprobs")]
    settings = config_arguments(PPOLossConfig(**OPTIONS[option]))
    result = torch.ops.fastppo.ppo_loss(*tensors, CU, *settings)
    expected = ppo_loss_torch(*tensors, CU, *settings)
    for a, b in zip(result, expected, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True, rtol=1e-5, atol=1e-6)
    if bad != bad and name != "ref_logprobs":
        assert result[0].isnan()
        assert result[1][at].isnan()


def test_strided_inputs(rng):
    config = PPOLossConfig(**OPTIONS["everything"])
    inputs = draw(rng)
    strided = {k: torch.stack([v, v + 1], dim=1)[:, 0] for k, v in inputs.items()}
    strided = {k: v.clone() if k in ("logprobs", "entropy") else v for k, v in strided.items()}
    for a, b in zip(run(ppo_loss, strided, config), run(ppo_loss, inputs, config), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("option", ["plain", "everything", "everything, sequence"])
def test_custom_op(option, rng):
    i = draw(rng)
    settings = config_arguments(PPOLossConfig(**OPTIONS[option]))
    tensors = (i["logprobs"], i["entropy"], i["old_logprobs"], i["advantages"], i["weights"])
    optional = (i["ref_logprobs"], i["rollout_logprobs"], CU)
    op = torch.ops.fastppo.ppo_loss.default
    torch.library.opcheck(op, (*tensors, *optional, *settings))
    if option == "plain":  # the whole check takes a NaN, not measured, for a difference
        checks = ("test_schema", "test_faketensor")
        arguments = (tensors[0], None, *tensors[2:], None, None, None, *settings)
        torch.library.opcheck(op, arguments, test_utils=checks)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo
@pytest.mark.parametrize("option", ["plain", "everything", "sequence"])
def test_compiles_without_a_graph_break(option, rng):
    config = PPOLossConfig(**OPTIONS[option])
    compiled = torch.compile(ppo_loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for n, cu in ((N, CU), (8, CU[:4])):
        inputs = {k: v[:n] for k, v in draw(rng).items()}
        expected, result = (run(f, inputs, config, cu) for f in (ppo_loss, compiled))
        for a, b in zip(result, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo
def test_compiles_once_for_every_number_of_tokens(rng):
    torch._dynamo.reset()
    compiled = torch.compile(ppo_loss, fullgraph=True, backend="aot_eager", dynamic=True)
    config = PPOLossConfig(**OPTIONS["everything"])
    run(compiled, draw(rng), config)
    with torch.compiler.set_stance("fail_on_recompile"):
        for n in (2, 17, 300):
            run(compiled, draw(rng, n), config, torch.tensor([0, 1, 1, 2, 2, n]).int())


@pytest.mark.parametrize("option", OPTIONS)
def test_gradcheck(option, rng):
    inputs = draw(rng, dtype=torch.float64)
    lp, entropy = inputs.pop("logprobs"), inputs.pop("entropy")
    config = PPOLossConfig(**OPTIONS[option])

    def loss(lp, entropy):
        return ppo_loss(lp, config=config, entropy=entropy, cu_seqlens=CU, **inputs).loss

    assert torch.autograd.gradcheck(loss, (lp.requires_grad_(), entropy.requires_grad_()))


@pytest.mark.parametrize("option", OPTIONS)
def test_masked_tokens_may_hold_anything(option, rng):
    config = PPOLossConfig(**OPTIONS[option])
    inputs = draw(rng)
    masked = inputs["weights"] == 0
    clean = run(ppo_loss, inputs, config)
    for poison in (torch.nan, torch.inf, -torch.inf):
        dirty = {
            k: v if k == "weights" else torch.where(masked, poison, v) for k, v in inputs.items()
        }
        for a, b in zip(clean, run(ppo_loss, dirty, config), strict=True):
            assert torch.equal(a, b)
    assert (clean[1][masked] == 0).all()
    assert (clean[2][masked] == 0).all()


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("n", [0, N])
def test_nothing_valid(option, n, rng):
    inputs = {k: torch.full_like(v, torch.nan) for k, v in draw(rng, n).items()}
    inputs["weights"] = torch.zeros(n)
    cu = CU if n else torch.tensor([0, 0])
    loss, g, h, metrics = run(ppo_loss, inputs, PPOLossConfig(**OPTIONS[option]), cu)
    assert float(loss) == 0.0
    assert (g == 0).all()
    assert (h == 0).all()
    assert all(float(x) == 0.0 for x in reduce_ppo_metrics(metrics).values())


@pytest.mark.parametrize("option", OPTIONS)
def test_splitting_whole_sequences_adds_up(option, rng):
    config = PPOLossConfig(**OPTIONS[option])
    inputs = draw(rng)
    whole = run(ppo_loss, inputs, config)
    parts = []
    for first, last in [(0, 1), (1, 3), (3, 5)]:
        rows = slice(int(CU[first]), int(CU[last]))
        part = {k: v[rows] for k, v in inputs.items()}
        parts.append(run(ppo_loss, part, config, CU[first : last + 1] - CU[first]))
    losses, g, h, metrics = zip(*parts, strict=True)
    torch.testing.assert_close(sum(losses), whole[0])
    torch.testing.assert_close(torch.cat(g), whole[1])
    torch.testing.assert_close(torch.cat(h), whole[2])
    torch.testing.assert_close(combine_ppo_metrics(metrics), whole[3])


def test_clip_gradient_by_hand():
    # ratio, advantage -> gradient of the loss with respect to logprob, clip 0.2 and dual clip 3
    cases = [
        (1.0, 2.0, -2.0),
        (1.3, 2.0, 0.0),  # clipped from above
        (0.5, 2.0, -1.0),  # below the range but the unclipped branch is the larger one
        (0.5, -2.0, 0.0),  # clipped from below
        (1.3, -2.0, 2.6),
        (4.0, -2.0, 0.0),  # dual clip
    ]
    lp = torch.tensor([math.log(r) for r, _, _ in cases], requires_grad=True)
    adv = torch.tensor([a for _, a, _ in cases])
    n = len(cases)
    out = ppo_loss(lp, torch.zeros(n), adv, torch.ones(n), PPOLossConfig(dual_clip=3.0))
    out.loss.backward()
    torch.testing.assert_close(lp.grad, torch.tensor([g for _, _, g in cases]))
    metrics = reduce_ppo_metrics(out.metrics)
    assert float(metrics["clipfrac"]) == pytest.approx(5 / 6)
    assert float(metrics["clipfrac_high"]) == pytest.approx(1 / 6)
    assert float(metrics["clipfrac_low"]) == pytest.approx(1 / 6)
    assert float(metrics["clipfrac_dual"]) == pytest.approx(1 / 6)


def test_cleanrl_expression(rng):
    i = draw(rng)
    logratio = i["logprobs"] - i["old_logprobs"]
    ratio = logratio.exp()
    pg_loss1 = -i["advantages"] * ratio
    pg_loss2 = -i["advantages"] * torch.clamp(ratio, 1 - 0.2, 1 + 0.2)
    pg_loss = torch.max(pg_loss1, pg_loss2).mean()
    uniform = torch.full((N,), 1 / N)
    out = ppo_loss(i["logprobs"], i["old_logprobs"], i["advantages"], uniform, PPOLossConfig())
    torch.testing.assert_close(out.loss, pg_loss)
    metrics = reduce_ppo_metrics(out.metrics)
    torch.testing.assert_close(metrics["policy_loss"], pg_loss)
    torch.testing.assert_close(metrics["old_approx_kl"], (-logratio).mean())
    torch.testing.assert_close(metrics["approx_kl"], ((ratio - 1) - logratio).mean())
    torch.testing.assert_close(metrics["clipfrac"], ((ratio - 1).abs() > 0.2).float().mean())
    ess = ratio.sum() ** 2 / (N * (ratio**2).sum())
    torch.testing.assert_close(metrics["ess"], ess)


def test_gspo_sequence_mean(rng):
    """GSPO, equations 5 and 7: s_i = exp(mean log-ratio), loss = mean over sequences."""
    lengths = [4, 9]
    cu = torch.tensor([0, 4, 13])
    i = draw(rng, 13)
    adv = torch.tensor([1.0, -0.5])
    weights = torch.cat([torch.full((k,), 1 / (k * 2)) for k in lengths])
    log_ratio = (i["logprobs"] - i["old_logprobs"]).split(lengths)
    s = torch.stack([x.mean() for x in log_ratio]).exp()
    expected = -torch.min(s * adv, s.clamp(0.9, 1.1) * adv).mean()
    config = PPOLossConfig(ratio_level="sequence", clip_coef_low=0.1, clip_coef_high=0.1)
    per_token = adv.repeat_interleave(torch.tensor(lengths))
    args = (i["logprobs"], i["old_logprobs"], per_token, weights, config)
    torch.testing.assert_close(ppo_loss(*args, cu_seqlens=cu).loss, expected)


def test_on_policy_ratio_is_one(rng):
    lp = draw(rng)["logprobs"]
    adv, w = torch.randn(N, generator=rng), torch.full((N,), 1 / N)
    metrics = reduce_ppo_metrics(ppo_loss(lp, lp, adv, w, PPOLossConfig()).metrics)
    assert float(metrics["ratio"]) == float(metrics["ratio_max"]) == float(metrics["ess"]) == 1.0
    assert float(metrics["approx_kl"]) == float(metrics["clipfrac"]) == 0.0


def test_extreme_log_ratios_stay_finite():
    lp = torch.tensor([0.0, -500.0, -1e30], requires_grad=True)
    old = torch.tensor([-500.0, 0.0, 0.0])
    config = PPOLossConfig(kl_coef=0.1)
    out = ppo_loss(lp, old, -torch.ones(3), torch.ones(3), config, ref_logprobs=old)
    out.loss.backward()
    assert torch.isfinite(out.loss)
    assert torch.isfinite(lp.grad).all()


def test_inputs_not_given_are_not_measured(rng):
    i = draw(rng)
    args = (i["logprobs"], i["old_logprobs"], i["advantages"], i["weights"], PPOLossConfig())
    vector = ppo_loss(*args).metrics
    assert vector.shape == (len(PPO_METRIC_NAMES),)
    metrics = reduce_ppo_metrics(vector)
    missing = {name for name, x in metrics.items() if x.isnan()}
    assert missing == {"entropy", "ref_kl", "logprob_diff", "logprob_diff_max", "rollout_kl"}
    assert float(metrics["num_tokens"]) == float((i["weights"] != 0).sum())


def test_constants_get_no_gradient(rng):
    i = {k: v.requires_grad_() for k, v in draw(rng).items()}
    config = PPOLossConfig(kl_coef=0.1, ent_coef=0.1)
    ppo_loss(**i, config=config).loss.backward()
    assert {k for k, v in i.items() if v.grad is not None} == {"logprobs", "entropy"}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("clip_coef_low", 1.5),
        ("clip_coef_high", -0.1),
        ("dual_clip", 1.0),
        ("kl_estimator", "k4"),
        ("ratio_level", "word"),
        ("is_correction", "mask"),
        ("is_cap", 0.0),
        ("is_low", 6.0),
    ],
)
def test_bad_config_is_named(field, value):
    with pytest.raises(ValueError, match=field):
        PPOLossConfig(**{field: value})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"kl_coef": 0.1}, "ref_logprobs: kl_coef = 0.1 needs"),
        ({"ent_coef": 0.1}, "entropy: ent_coef = 0.1 needs"),
        ({"is_correction": "tis"}, "rollout_logprobs: is_correction = 'tis' needs"),
        ({"ratio_level": "sequence"}, "cu_seqlens: ratio_level = 'sequence' needs"),
    ],
)
def test_missing_inputs_are_named(config, message):
    z = torch.zeros(3)
    with pytest.raises(ValueError, match=message):
        ppo_loss(z, z, z, z, PPOLossConfig(**config))


def test_bad_shapes_are_named():
    z = torch.zeros(3)
    with pytest.raises(ValueError, match=r"^advantages: .*got \(2,\)"):
        ppo_loss(z, z, z[:2], z, PPOLossConfig())
    with pytest.raises(TypeError, match="weights: .* got bool"):
        ppo_loss(z, z, z, z.bool(), PPOLossConfig())
    with pytest.raises(ValueError, match="^old_logprobs: .*got meta"):
        ppo_loss(z, z.to("meta"), z, z, PPOLossConfig())
    with pytest.raises(ValueError, match=r"^entropy: .*got \(1,\)"):
        ppo_loss(z, z, z, z, PPOLossConfig(), entropy=z[:1])
    with pytest.raises(TypeError, match="^config: .*got dict"):
        ppo_loss(z, z, z, z, {})


def test_the_extension_refuses_other_arrays():
    x, entries = torch.zeros(3).numpy(), torch.zeros(20).double().numpy()
    numbers = dict.fromkeys(("low", "high", "kl_coef", "ent_coef", "is_cap", "is_low"), 1.0)
    numbers |= {"dual_clip": math.inf, "kl": 3, "correction": 0, "is_high": 1.0}
    good = [entries, x.copy(), None, x, None, x, x, x, None, None]
    for at, bad, message in (
        (7, x[:2], "weights: .*got 2"),
        (
            5,
            x.astype("float64"),
            "old_logprobs: .*got 3 of .*'d'",
        ),
        (8, torch.zeros(6).numpy()[::2], "ref_logprobs: expected"),
        (0, entries[:19], "entries: .*got 19"),
        (6, None, "advantages: .*got NoneType"),
    ):
        arguments = [*good[:at], bad, *good[at + 1 :]]
        with pytest.raises((TypeError, ValueError), match=message):
            _C.ppo_loss(*arguments, **numbers)
    _C.ppo_loss(*good, **numbers)
    assert entries[1] == 0.0
