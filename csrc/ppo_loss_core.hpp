// The PPO loss of tokens, its gradients and metrics in one pass. No Python here.
//
// Formulas and metrics: fastppo/ops/ppo_loss.py, _ppo_metrics.py. Inputs and gradients are float or
// double, everything between is double. A comparison with NaN is false: each select below is
// written so that a NaN of a valid token reaches the loss and its gradient.

#pragma once

#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>

namespace fastppo {

constexpr double kLogRatioLimit = 20.0;

inline double clamp(double x, double low, double high) {
  return x < low ? low : x > high ? high : x;
}

inline double clamped_exp(double x) { return std::exp(clamp(x, -kLogRatioLimit, kLogRatioLimit)); }

// The larger one, or NaN once there was one.
inline double larger(double so_far, double x) { return x > so_far || x != x ? x : so_far; }

enum class Correction { none, tis, icepop };

struct PPOSettings {
  double low = 0.0;
  double high = 0.0;
  double dual_clip = 0.0;  // infinity: no bound
  double kl_coef = 0.0;
  int kl = 3;  // k1, k2 or k3
  double ent_coef = 0.0;
  Correction correction = Correction::none;
  double is_cap = 0.0;
  double is_low = 0.0;
  double is_high = 0.0;
};

// N tokens. Null where not given: entropy, ref, rollout.
template <typename T>
struct PPOTokens {
  std::int64_t count = 0;
  const T* logprobs = nullptr;
  const T* entropy = nullptr;
  const T* old = nullptr;
  const T* advantages = nullptr;
  const T* weights = nullptr;
  const T* ref = nullptr;
  const T* rollout = nullptr;
};

// The loss, then PPO_METRIC_NAMES.
constexpr std::size_t kPPOEntries = 20;

// `entropy_grad` may be null.
template <typename T>
std::array<double, kPPOEntries> ppo_loss(const PPOTokens<T>& in, const PPOSettings& s,
                                         T* logprob_grad, T* entropy_grad) {
  double count = 0.0, policy_loss = 0.0, kl_loss = 0.0, entropy_loss = 0.0;
  double clipped_tokens = 0.0, clipped_low = 0.0, clipped_high = 0.0, clipped_dual = 0.0;
  double approx_kl = 0.0, old_approx_kl = 0.0, entropy = 0.0, ratio = 0.0, ratio_squared = 0.0;
  double ref_kl = 0.0, drift = 0.0, drift_kl = 0.0, is_weights = 0.0, is_clipped = 0.0;
  double ratio_max = 0.0, drift_max = 0.0;
  for (std::int64_t t = 0; t < in.count; ++t) {
    const auto w = static_cast<double>(in.weights[t]);
    if (w == 0.0) {
      logprob_grad[t] = T{0};
      if (entropy_grad != nullptr) entropy_grad[t] = T{0};
      continue;
    }
    const auto lp = static_cast<double>(in.logprobs[t]);
    const auto old = static_cast<double>(in.old[t]);
    const auto adv = static_cast<double>(in.advantages[t]);
    const double x = lp - old;
    const double r = clamped_exp(x);
    const double unclipped = -adv * r;
    const double clipped = -adv * clamp(r, s.low, s.high);
    const bool cut = unclipped < clipped;
    double pg = cut ? clipped : unclipped;
    const double bound = -adv * s.dual_clip;
    const bool bounded = adv < 0.0 && pg > bound;
    if (bounded) pg = bound;

    double is = 1.0;
    if (in.rollout != nullptr) {
      const auto rollout = static_cast<double>(in.rollout[t]);
      const double d = lp - rollout;
      drift += std::abs(d);
      drift_max = larger(drift_max, std::abs(d));
      drift_kl += clamped_exp(d) - 1.0 - d;
      if (s.correction != Correction::none) {
        is = clamped_exp(old - rollout);
        const bool tis = s.correction == Correction::tis;
        const bool off = tis ? is > s.is_cap : is < s.is_low || is > s.is_high;
        if (off) is = tis ? s.is_cap : 0.0;
        is_clipped += off ? 1.0 : 0.0;
      }
    }
    policy_loss += w * is * pg;
    const bool active = !cut && !bounded && !(std::abs(x) > kLogRatioLimit);
    double g = active ? -adv * r * is * w : 0.0;

    if (in.ref != nullptr) {
      const double d = lp - static_cast<double>(in.ref[t]);
      const double growth = clamped_exp(-d) - 1.0;
      ref_kl += growth + d;
      if (s.kl_coef != 0.0) {
        const double kl = s.kl == 1 ? d : s.kl == 2 ? d * d / 2.0 : growth + d;
        const double slope = s.kl == 1   ? 1.0
                             : s.kl == 2 ? d
                                         : std::abs(d) > kLogRatioLimit ? 1.0 : -growth;
        kl_loss += s.kl_coef * w * kl;
        g += s.kl_coef * w * slope;
      }
    }
    if (in.entropy != nullptr) {
      const auto h = static_cast<double>(in.entropy[t]);
      entropy += h;
      if (s.ent_coef != 0.0) entropy_loss -= s.ent_coef * w * h;
    }
    logprob_grad[t] = static_cast<T>(g);
    if (entropy_grad != nullptr) entropy_grad[t] = static_cast<T>(-s.ent_coef * w);

    count += 1.0;
    const bool below = r < s.low;
    const bool above = r > s.high;
    clipped_tokens += below || above ? 1.0 : 0.0;
    clipped_low += below && adv < 0.0 ? 1.0 : 0.0;
    clipped_high += above && adv > 0.0 ? 1.0 : 0.0;
    clipped_dual += bounded ? 1.0 : 0.0;
    approx_kl += r - 1.0 - x;
    old_approx_kl -= x;
    ratio += r;
    ratio_squared += r * r;
    ratio_max = larger(ratio_max, r);
    is_weights += is;
  }
  const double nan = std::numeric_limits<double>::quiet_NaN();
  if (in.entropy == nullptr) entropy = nan;
  if (in.ref == nullptr) ref_kl = nan;
  if (in.rollout == nullptr) drift = drift_max = drift_kl = nan;
  return {policy_loss + kl_loss + entropy_loss, count, policy_loss, kl_loss, clipped_tokens,
          clipped_low, clipped_high, clipped_dual, approx_kl, old_approx_kl, entropy, ratio,
          ratio_squared, ref_kl, drift, drift_kl, is_weights, is_clipped, ratio_max, drift_max};
}

}  // namespace fastppo
