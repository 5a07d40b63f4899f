// Advantage recurrences over packed sequences, backwards in time. No Python here.
//
// Formulas and mask modes: fastppo/ops/gae.py, gae_classic.py. Inputs and outputs are
// float or double, every recurrence runs in double: one rounding per result. A masked token is
// handled by selects, not branches, since masks are unpredictable and its slots may hold NaN.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <vector>

#include "gae_avx2.hpp"
#include "gae_inputs.hpp"

namespace fastppo {

// The recurrence of one sequence, from its last token towards its first.
template <MaskMode mode, bool masked, bool two, typename T>
struct Walk {
  std::int64_t t = 0;      // the token behind the next one
  std::int64_t first = 0;  // of the sequence
  double gamma = 0.0;
  double decay = 0.0;
  double critic_decay = 0.0;
  double next = 0.0;
  double score = 0.0;
  double actor = 0.0;
  double critic = 0.0;

  void start(const GaeInputs<T>& in, std::int64_t b) {
    t = in.offsets[b + 1];
    first = in.offsets[b];
    gamma = in.gamma[b];
    decay = gamma * in.actor_lambda[b];
    critic_decay = two ? gamma * in.critic_lambda[b] : decay;
    next = in.bootstrap != nullptr ? static_cast<double>(in.bootstrap[b]) : 0.0;
    score = in.scores != nullptr ? static_cast<double>(in.scores[b]) : 0.0;
    actor = critic = 0.0;
  }

  void step(const GaeInputs<T>& in, T* advantages, T* returns) {
    --t;
    const bool valid = !masked || in.mask[t] != 0;
    const bool counts = valid || mode == MaskMode::none;
    // Loads stand alone: one inside a select would have to be a branch.
    const double reward = in.rewards != nullptr ? static_cast<double>(in.rewards[t]) : 0.0;
    const double value = static_cast<double>(in.values[t]);
    const double penalty = in.kl != nullptr ? in.kl_coef * static_cast<double>(in.kl[t]) : 0.0;
    double r = counts ? reward : 0.0;
    const double v = counts ? value : 0.0;
    r -= valid ? penalty : 0.0;
    r += valid ? score : 0.0;
    score = valid ? 0.0 : score;
    const double delta = r + gamma * next - v;
    const bool moves = valid || mode != MaskMode::carry;
    next = moves ? v : next;
    actor = moves ? delta + decay * actor : actor;
    if (two) critic = moves ? delta + critic_decay * critic : critic;
    advantages[t] = valid ? static_cast<T>(actor) : T{0};
    returns[t] = valid ? static_cast<T>((two ? critic : actor) + v) : T{0};
  }
};

// Several sequences at a time: a step waits for the one before it, but not for those of others.
template <MaskMode mode, bool masked, bool two, typename T>
void gae_sequences(const GaeInputs<T>& in, T* advantages, T* returns) {
  constexpr int lanes = 3;
  Walk<mode, masked, two, T> walks[lanes];
  std::int64_t b = 0;
  while (true) {
    std::int64_t steps = std::numeric_limits<std::int64_t>::max();
    int busy = 0;
    for (Walk<mode, masked, two, T>& walk : walks) {
      while (walk.t == walk.first && b < in.num_sequences) walk.start(in, b++);
      if (walk.t == walk.first) continue;
      ++busy;
      steps = std::min(steps, walk.t - walk.first);
    }
    if (busy < lanes) break;
    for (std::int64_t i = 0; i < steps; ++i) {
      for (Walk<mode, masked, two, T>& walk : walks) walk.step(in, advantages, returns);
    }
  }
  for (Walk<mode, masked, two, T>& walk : walks) {
    while (walk.t > walk.first) walk.step(in, advantages, returns);
  }
}

template <MaskMode mode, bool masked, typename T>
void gae_lambdas(const GaeInputs<T>& in, T* advantages, T* returns) {
  if (in.critic_lambda.data != nullptr) {
    gae_sequences<mode, masked, true>(in, advantages, returns);
  } else {
    gae_sequences<mode, masked, false>(in, advantages, returns);
  }
}

// `gae` for any processor.
template <typename T>
void gae_portable(const GaeInputs<T>& in, MaskMode mode, T* advantages, T* returns) {
  if (in.mask == nullptr) {
    gae_lambdas<MaskMode::none, false>(in, advantages, returns);
  } else if (mode == MaskMode::carry) {
    gae_lambdas<MaskMode::carry, true>(in, advantages, returns);
  } else if (mode == MaskMode::dense_zero) {
    gae_lambdas<MaskMode::dense_zero, true>(in, advantages, returns);
  } else {
    gae_lambdas<MaskMode::none, true>(in, advantages, returns);
  }
}

// Writes advantages and returns, (N,) each; both are 0 at masked tokens.
template <typename T>
void gae(const GaeInputs<T>& in, MaskMode mode, T* advantages, T* returns) {
  if constexpr (std::is_same_v<T, float>) {
    if (gae_avx2(in, mode, advantages, returns)) return;
  }
  gae_portable(in, mode, advantages, returns);
}

// GAE of a (steps, envs) rollout whose rows hold several episodes. `final_values` may be null where
// nothing is truncated.
template <typename T>
void gae_classic(std::int64_t steps, std::int64_t envs, const T* rewards, const T* values,
                 const T* next_value, const std::uint8_t* terminated,
                 const std::uint8_t* truncated, const T* final_values, double gamma, double lambda,
                 T* advantages, T* returns) {
  const auto width = static_cast<std::size_t>(envs);
  std::vector<double> next(next_value, next_value + width);
  std::vector<double> carried(width, 0.0);
  for (std::int64_t t = steps - 1; t >= 0; --t) {
    for (std::int64_t e = 0; e < envs; ++e) {
      const std::int64_t i = t * envs + e;
      const auto k = static_cast<std::size_t>(e);
      const bool stop = terminated[i] != 0;
      const bool cut = truncated != nullptr && truncated[i] != 0;
      const double v = static_cast<double>(values[i]);
      const double final = final_values != nullptr ? static_cast<double>(final_values[i]) : 0.0;
      const double following = stop ? 0.0 : cut ? final : next[k];
      const double delta = static_cast<double>(rewards[i]) + gamma * following - v;
      carried[k] = delta + (stop || cut ? 0.0 : gamma * lambda * carried[k]);
      next[k] = v;
      advantages[i] = static_cast<T>(carried[k]);
      returns[i] = static_cast<T>(carried[k] + v);
    }
  }
}

// Σ f(i) for i in [begin, end) in a fixed order, in eight sums that do not wait for one another.
template <typename F>
double lane_sum(std::int64_t begin, std::int64_t end, F f) {
  constexpr std::int64_t lanes = 8;
  double sums[lanes] = {};
  std::int64_t i = begin;
  for (; i + lanes <= end; i += lanes) {
    for (std::int64_t k = 0; k < lanes; ++k) sums[k] += f(i + k);
  }
  for (; i < end; ++i) sums[0] += f(i);
  double total = 0.0;
  for (const double sum : sums) total += sum;
  return total;
}

template <bool masked, typename T>
void whiten_valid(const std::uint8_t* mask, std::int64_t count, double eps, T* x) {
  // A factor, not a select: compilers turn these selects into branches, which masks mispredict.
  static constexpr double factors[] = {0.0, 1.0};
  const auto weight = [&](std::int64_t i) { return masked ? factors[mask[i] != 0] : 1.0; };
  std::int64_t first = 0;
  while (first < count && weight(first) == 0.0) ++first;
  if (first == count) return;
  // Sums are taken of x − x₀, so that equal entries come out exactly 0.
  const double origin = static_cast<double>(x[first]);
  const double n = lane_sum(first, count, weight);
  const double mean = lane_sum(first, count, [&](std::int64_t i) {
    return weight(i) * (static_cast<double>(x[i]) - origin);
  }) / n;
  const double squares = lane_sum(first, count, [&](std::int64_t i) {
    const double d = static_cast<double>(x[i]) - origin - mean;
    return weight(i) * d * d;
  });
  const double scale = 1.0 / std::sqrt(squares / std::max(n - 1.0, 1.0) + eps);
  for (std::int64_t i = first; i < count; ++i) {
    const double y = (static_cast<double>(x[i]) - origin - mean) * scale;
    x[i] = static_cast<T>(weight(i) * y + 0.0);
  }
}

// x ← (x − mean)·rsqrt(var + eps) over the unmasked entries, var unbiased, 0 for n < 2. Masked
// entries are 0 before, as `gae` leaves them, and after.
template <typename T>
void whiten(const std::uint8_t* mask, std::int64_t count, double eps, T* x) {
  if (mask == nullptr) {
    whiten_valid<false>(mask, count, eps, x);
  } else {
    whiten_valid<true>(mask, count, eps, x);
  }
}

}  // namespace fastppo
