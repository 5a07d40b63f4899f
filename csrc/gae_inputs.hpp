// What the advantage recurrences read. No Python here.

#pragma once

#include <cstdint>

namespace fastppo {

enum class MaskMode { carry, dense_zero, none };

// One double per sequence, or one for all of them (step 0).
struct PerSequence {
  const double* data = nullptr;
  std::int64_t step = 0;
  double operator[](std::int64_t b) const { return data[b * step]; }
};

// N tokens of B sequences. Pointers that may be null: rewards, mask, kl, bootstrap, scores and the
// data of critic_lambda (the critic's returns then use actor_lambda).
template <typename T>
struct GaeInputs {
  const std::int64_t* offsets = nullptr;  // (B+1,) from 0, non-decreasing
  std::int64_t num_sequences = 0;
  const T* rewards = nullptr;
  const T* values = nullptr;
  const std::uint8_t* mask = nullptr;
  const T* kl = nullptr;
  const T* bootstrap = nullptr;  // (B,)
  const T* scores = nullptr;     // (B,)
  PerSequence gamma;
  PerSequence actor_lambda;
  PerSequence critic_lambda;
  double kl_coef = 0.0;
};

}  // namespace fastppo
