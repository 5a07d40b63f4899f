// GAE of float tokens, four at a time, where the processor has AVX2. No Python here.
//
// With d_t = r_t + γ·V' − V_t and c = γλ, a step of four tokens is
//     A_t = (d_t + c·d_{t+1}) + c²·(d_{t+2} + c·d_{t+3}) + c⁴·A_{t+4}
// so that only its last product waits for the step before. Everything is double, one rounding per
// result.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "gae_inputs.hpp"

#if defined(__GNUC__) && defined(__x86_64__)

#include <immintrin.h>

#define FASTPPO_AVX2 __attribute__((target("avx2")))

namespace fastppo {

// Lanes 1, 2, 3 of x, then lane 0 of the four behind; lanes 2, 3, then 0 and 1.
FASTPPO_AVX2 inline __m256d two_on(__m256d x, __m256d behind) {
  return _mm256_permute2f128_pd(x, behind, 0x21);
}
FASTPPO_AVX2 inline __m256d one_on(__m256d x, __m256d behind) {
  return _mm256_shuffle_pd(x, two_on(x, behind), 0b0101);
}

// x + factor·y
FASTPPO_AVX2 inline __m256d plus(__m256d x, __m256d factor, __m256d y) {
  return _mm256_add_pd(x, _mm256_mul_pd(factor, y));
}

// Advantages under one decay, four at a time from the last token on.
struct Decayed {
  __m256d decay;
  __m256d square;
  __m256d fourth;
  __m256d pair;  // d_t + c·d_{t+1} of the four behind
  __m256d sum;

  FASTPPO_AVX2 explicit Decayed(double c)
      : decay(_mm256_set1_pd(c)),
        square(_mm256_set1_pd(c * c)),
        fourth(_mm256_set1_pd(c * c * (c * c))),
        pair(_mm256_setzero_pd()),
        sum(_mm256_setzero_pd()) {}

  FASTPPO_AVX2 void step(__m256d delta, __m256d delta_behind) {
    const __m256d x = plus(delta, decay, one_on(delta, delta_behind));
    sum = plus(plus(x, square, two_on(x, pair)), fourth, sum);
    pair = x;
  }
};

// All bits set in the last `count` lanes: a sequence may begin inside a four. No library call here
// or below, for which every running sum would have to leave its register.
FASTPPO_AVX2 inline __m128i last_lanes(int count) {
  return _mm_cmpgt_epi32(_mm_setr_epi32(0, 1, 2, 3), _mm_set1_epi32(3 - count));
}

// The last `count` lanes from memory, 0 in those before.
FASTPPO_AVX2 inline __m128 load_last(const float* p, int count) {
  return count == 4 ? _mm_loadu_ps(p) : _mm_maskload_ps(p + count - 4, last_lanes(count));
}

FASTPPO_AVX2 inline void store_last(float* p, int count, __m128 x) {
  if (count == 4) {
    _mm_storeu_ps(p, x);
  } else {
    _mm_maskstore_ps(p + count - 4, last_lanes(count), x);
  }
}

// All bits set where the mask is 0.
FASTPPO_AVX2 inline __m128 hidden_last(const std::uint8_t* mask, int count) {
  std::uint32_t bytes = 0;
  if (count == 4) {
    std::memcpy(&bytes, mask, 4);
  } else {
    for (int i = 0; i < count; ++i) bytes |= std::uint32_t{mask[i]} << (8 * (4 - count + i));
  }
  const __m128i wide = _mm_cvtepu8_epi32(_mm_cvtsi32_si128(static_cast<int>(bytes)));
  return _mm_castsi128_ps(_mm_cmpeq_epi32(wide, _mm_setzero_si128()));
}

template <bool masked>
FASTPPO_AVX2 inline __m128 shown(__m128 hidden, __m128 x) {
  return masked ? _mm_andnot_ps(hidden, x) : x;
}

// Masked slots are steps too; `zeroes` makes their values and rewards 0.
template <bool masked, bool zeroes, bool two>
FASTPPO_AVX2 void gae_fours(const GaeInputs<float>& in, float* advantages, float* returns) {
  const __m256d kl_coef = _mm256_set1_pd(in.kl_coef);
  for (std::int64_t b = 0; b < in.num_sequences; ++b) {
    const std::int64_t first = in.offsets[b];
    std::int64_t stop = in.offsets[b + 1];
    std::int64_t scored = in.scores != nullptr ? stop - 1 : -1;
    while (masked && scored >= first && in.mask[scored] == 0) --scored;
    const __m256d gamma = _mm256_set1_pd(in.gamma[b]);
    Decayed actor(in.gamma[b] * in.actor_lambda[b]);
    Decayed critic(two ? in.gamma[b] * in.critic_lambda[b] : 0.0);
    __m256d delta_behind = _mm256_setzero_pd();
    __m256d value_behind =
        _mm256_set1_pd(in.bootstrap != nullptr ? static_cast<double>(in.bootstrap[b]) : 0.0);
    while (stop > first) {
      const std::int64_t t = std::max(first, stop - 4);
      const auto count = static_cast<int>(stop - t);
      __m128 value = load_last(in.values + t, count);
      __m128 reward = in.rewards != nullptr ? load_last(in.rewards + t, count) : _mm_setzero_ps();
      const __m128 hidden = masked ? hidden_last(in.mask + t, count) : _mm_setzero_ps();
      if (zeroes) {
        value = _mm_andnot_ps(hidden, value);
        reward = _mm_andnot_ps(hidden, reward);
      }
      const __m256d v = _mm256_cvtps_pd(value);
      __m256d r = _mm256_cvtps_pd(reward);
      if (in.kl != nullptr) {
        const __m128 kl = shown<masked>(hidden, load_last(in.kl + t, count));
        r = _mm256_sub_pd(r, _mm256_mul_pd(kl_coef, _mm256_cvtps_pd(kl)));
      }
      if (scored >= t) {
        double lanes[4] = {};
        lanes[4 - (stop - scored)] = static_cast<double>(in.scores[b]);
        r = _mm256_add_pd(r, _mm256_loadu_pd(lanes));
        scored = -1;
      }
      const __m256d delta = _mm256_sub_pd(plus(r, gamma, one_on(v, value_behind)), v);
      actor.step(delta, delta_behind);
      if (two) critic.step(delta, delta_behind);
      delta_behind = delta;
      value_behind = v;
      const __m256d target = _mm256_add_pd(two ? critic.sum : actor.sum, v);
      store_last(advantages + t, count, shown<masked>(hidden, _mm256_cvtpd_ps(actor.sum)));
      store_last(returns + t, count, shown<masked>(hidden, _mm256_cvtpd_ps(target)));
      stop = t;
    }
  }
}

template <bool masked, bool zeroes>
void gae_fours(const GaeInputs<float>& in, float* advantages, float* returns) {
  if (in.critic_lambda.data != nullptr) {
    gae_fours<masked, zeroes, true>(in, advantages, returns);
  } else {
    gae_fours<masked, zeroes, false>(in, advantages, returns);
  }
}

// Whether it was done: carried masks leave gaps between the steps, and AVX2 may be missing.
inline bool gae_avx2(const GaeInputs<float>& in, MaskMode mode, float* advantages, float* returns) {
  const bool masked = in.mask != nullptr;
  if ((masked && mode == MaskMode::carry) || !__builtin_cpu_supports("avx2")) return false;
  if (!masked) {
    gae_fours<false, false>(in, advantages, returns);
  } else if (mode == MaskMode::dense_zero) {
    gae_fours<true, true>(in, advantages, returns);
  } else {
    gae_fours<true, false>(in, advantages, returns);
  }
  return true;
}

}  // namespace fastppo

#undef FASTPPO_AVX2

#else

namespace fastppo {

inline bool gae_avx2(const GaeInputs<float>&, MaskMode, float*, float*) { return false; }

}  // namespace fastppo

#endif
