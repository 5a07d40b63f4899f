// Memory safety of the Python-free core, to be run under the address and undefined-behaviour
// sanitizers: many small random batches, bins and partitions, each result checked.

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <new>
#include <random>

#include "../../csrc/balance_core.hpp"
#include "../../csrc/gae_core.hpp"
#include "../../csrc/pack_core.hpp"

namespace {

using namespace fastppo;

void check(bool ok, const char* what) {
  if (ok) return;
  std::fprintf(stderr, "failed: %s\n", what);
  std::exit(1);
}

template <typename T>
Segment segment(const std::vector<T>& values, Dtype dtype) {
  return {reinterpret_cast<const std::byte*>(values.data()),
          static_cast<std::int64_t>(values.size()), sizeof(T), dtype};
}

struct Free {
  void operator()(std::byte* p) const { ::operator delete(p, std::align_val_t{kAlignment}); }
};

void pack_once(std::mt19937& rng) {
  const std::size_t count = rng() % 6;
  std::vector<std::vector<std::int64_t>> prompts(count);
  std::vector<std::vector<std::uint8_t>> responses(count);
  std::vector<std::vector<double>> logprobs(count);
  std::vector<std::vector<std::uint8_t>> masks(count);
  Ragged p{"prompts", {}, false};
  Ragged r{"responses", {}, false};
  Ragged l{"rollout_logprobs", {}, false};
  Ragged m{"loss_mask", {}, false};
  std::size_t tokens = 0;
  for (std::size_t b = 0; b < count; ++b) {
    prompts[b].resize(1 + rng() % 5);
    responses[b].resize(rng() % 5);
    for (auto& x : prompts[b]) x = static_cast<std::int64_t>(rng() % 2147483648u);
    for (auto& x : responses[b]) x = static_cast<std::uint8_t>(rng());
    logprobs[b].assign(responses[b].size(), -0.5);
    masks[b].assign(responses[b].size(), 2);
    tokens += prompts[b].size() + responses[b].size();
    p.segments.push_back(segment(prompts[b], Dtype::i64));
    r.segments.push_back(segment(responses[b], Dtype::u8));
    l.segments.push_back(segment(logprobs[b], Dtype::f64));
    m.segments.push_back(segment(masks[b], Dtype::b8));
  }
  const Plan plan(p, r, rng() % 2 ? &l : nullptr, rng() % 2 ? &m : nullptr, nullptr);
  // Exactly nbytes: one byte too many written is an error under the sanitizer.
  const std::unique_ptr<std::byte, Free> arena(
      static_cast<std::byte*>(::operator new(plan.nbytes(), std::align_val_t{kAlignment})));
  plan.fill(arena.get());
  check(static_cast<std::size_t>(plan.num_tokens()) == tokens, "number of tokens");
  const auto* ids = reinterpret_cast<const std::int32_t*>(arena.get());
  for (std::size_t b = 0; b < count; ++b) {
    for (const std::int64_t x : prompts[b]) check(*ids++ == x, "prompt token");
    for (const std::uint8_t x : responses[b]) check(*ids++ == x, "response token");
  }
}

// Unaligned, strided and reversed sources, and the error path of every width.
template <typename T>
void bad_token(T value, Dtype dtype) {
  std::vector<std::byte> memory(1 + 4 * sizeof(T));
  for (int i = 0; i < 4; ++i) {
    const T x = i == 1 ? value : T{3};
    std::memcpy(memory.data() + 1 + static_cast<std::size_t>(i) * sizeof(T), &x, sizeof(T));
  }
  for (const bool reversed : {false, true}) {
    Segment s{memory.data() + 1, 4, sizeof(T), dtype};
    if (reversed) {
      s.data += 3 * sizeof(T);
      s.stride = -s.stride;
    }
    const Ragged p{"prompts", {s}, false};
    const Plan plan(p, Ragged{"responses", {Segment{}}, false}, nullptr, nullptr, nullptr);
    const std::unique_ptr<std::byte, Free> arena(
        static_cast<std::byte*>(::operator new(plan.nbytes(), std::align_val_t{kAlignment})));
    std::string message;
    try {
      plan.fill(arena.get());
    } catch (const std::invalid_argument& error) {
      message = error.what();
    }
    const std::string where = reversed ? "prompts[0][2]" : "prompts[0][1]";
    check(message.compare(0, where.size(), where) == 0, "error names the token");
  }
}

void group_once(std::mt19937& rng) {
  std::vector<std::int64_t> lengths(rng() % 20);
  for (auto& x : lengths) x = static_cast<std::int64_t>(rng() % 50);
  const std::size_t k = 1 + rng() % 7;
  for (const auto& groups : {best_fit_decreasing(lengths, 50), karmarkar_karp(lengths, k)}) {
    std::vector<int> seen(lengths.size(), 0);
    for (const auto& group : groups) {
      for (const std::int64_t i : group) ++seen[static_cast<std::size_t>(i)];
    }
    check(std::all_of(seen.begin(), seen.end(), [](int n) { return n == 1; }), "each index once");
  }
}

// At γ = λ = 1 a return is the sum of the rewards from its token on, KL and score included.
template <typename T>
void gae_once(std::mt19937& rng) {
  std::vector<std::int64_t> offsets{0};
  for (std::size_t b = rng() % 5; b > 0; --b) {
    offsets.push_back(offsets.back() + static_cast<std::int64_t>(rng() % 12));
  }
  const auto n = static_cast<std::size_t>(offsets.back());
  const std::size_t sequences = offsets.size() - 1;
  std::vector<T> rewards(n), values(n), kl(n, T{2}), scores(sequences, T{5}), end(sequences, T{1});
  std::vector<std::uint8_t> mask(n);
  for (std::size_t i = 0; i < n; ++i) {
    rewards[i] = static_cast<T>(rng() % 9);
    values[i] = static_cast<T>(rng() % 9);
    mask[i] = static_cast<std::uint8_t>(rng() % 2);
  }
  std::vector<T> advantages(n), returns(n);
  const std::vector<double> ones(sequences, 1.0);
  GaeInputs<T> in;
  in.offsets = offsets.data();
  in.num_sequences = static_cast<std::int64_t>(sequences);
  in.rewards = rewards.data();
  in.values = values.data();
  in.mask = mask.data();
  in.kl = kl.data();
  in.kl_coef = 0.5;
  in.bootstrap = end.data();
  in.scores = scores.data();
  in.gamma = in.actor_lambda = {ones.data(), 1};
  if (rng() % 2) in.critic_lambda = {ones.data(), 1};
  gae(in, MaskMode::carry, advantages.data(), returns.data());
  for (std::size_t b = 0; b < sequences; ++b) {
    T expected = T{1};
    bool last = true;
    for (auto i = static_cast<std::size_t>(offsets[b + 1]);
         i-- > static_cast<std::size_t>(offsets[b]);) {
      if (mask[i] != 0) expected += rewards[i] - T{1} + (last ? T{5} : T{0});
      if (mask[i] != 0) last = false;
      check(returns[i] == (mask[i] != 0 ? expected : T{0}), "return");
      check(advantages[i] == (mask[i] != 0 ? expected - values[i] : T{0}), "advantage");
    }
  }
  for (const MaskMode mode : {MaskMode::dense_zero, MaskMode::none}) {
    gae(in, mode, advantages.data(), returns.data());
    for (std::size_t i = 0; i < n; ++i) check(mask[i] != 0 || returns[i] == T{0}, "masked return");
  }
  if (n > 0) {  // one step of n environments, every episode over: the advantage is r − V
    const std::vector<std::uint8_t> over(n, 1);
    gae_classic<T>(1, offsets.back(), rewards.data(), values.data(), values.data(), over.data(),
                   nullptr, nullptr, 1.0, 1.0, advantages.data(), returns.data());
    for (std::size_t i = 0; i < n; ++i) check(returns[i] == rewards[i], "last step");
  }
  gae(in, MaskMode::carry, advantages.data(), returns.data());
  whiten(rng() % 2 ? mask.data() : nullptr, offsets.back(), 1e-8, advantages.data());
  for (const T x : advantages) check(std::isfinite(x), "whitened");
}

// The path that this processor takes and the one for any give the same numbers where arithmetic is
// exact: integers, and decays that are powers of 2, over few enough tokens for a double.
void gae_paths_once(std::mt19937& rng) {
  std::vector<std::int64_t> offsets{0};
  for (std::size_t b = rng() % 5; b > 0; --b) {
    offsets.push_back(offsets.back() + static_cast<std::int64_t>(rng() % 16));
  }
  const auto n = static_cast<std::size_t>(offsets.back());
  const std::size_t sequences = offsets.size() - 1;
  const auto draw = [&](std::size_t count) {
    std::vector<float> x(count);
    for (float& each : x) each = static_cast<float>(rng() % 17) - 8.0f;
    return x;
  };
  std::vector<float> rewards = draw(n), values = draw(n);
  const std::vector<float> kl = draw(n), scores = draw(sequences), end = draw(sequences);
  std::vector<std::uint8_t> mask(n);
  for (auto& x : mask) x = static_cast<std::uint8_t>(rng() % 3 != 0);
  std::vector<double> decays[3];
  for (auto& decay : decays) {
    for (std::size_t b = 0; b < sequences; ++b) decay.push_back(rng() % 2 ? 0.5 : 1.0);
  }
  GaeInputs<float> in;
  in.offsets = offsets.data();
  in.num_sequences = static_cast<std::int64_t>(sequences);
  in.values = values.data();
  if (rng() % 4) in.rewards = rewards.data();
  if (rng() % 4) in.mask = mask.data();
  if (rng() % 2) in.kl = kl.data();
  in.kl_coef = 0.25;
  if (rng() % 2) in.bootstrap = end.data();
  if (rng() % 2) in.scores = scores.data();
  in.gamma = {decays[0].data(), 1};
  in.actor_lambda = {decays[1].data(), 1};
  if (rng() % 2) in.critic_lambda = {decays[2].data(), 1};
  for (const MaskMode mode : {MaskMode::none, MaskMode::dense_zero, MaskMode::carry}) {
    if (mode != MaskMode::none && in.mask != nullptr) {  // neither looks at what is masked
      for (std::size_t i = 0; i < n; ++i) {
        if (mask[i] == 0) values[i] = rewards[i] = std::numeric_limits<float>::quiet_NaN();
      }
    }
    std::vector<float> ours(2 * n, -1.0f), portable(2 * n, -2.0f);
    gae(in, mode, ours.data(), ours.data() + n);
    gae_portable(in, mode, portable.data(), portable.data() + n);
    check(ours == portable, "the same GAE on every processor");
  }
}

}  // namespace

int main() {
  std::mt19937 rng(0);
  for (int i = 0; i < 2000; ++i) {
    pack_once(rng);
    group_once(rng);
    gae_once<float>(rng);
    gae_once<double>(rng);
    gae_paths_once(rng);
  }
  bad_token<std::int8_t>(-1, Dtype::i8);
  bad_token<std::int16_t>(-1, Dtype::i16);
  bad_token<std::int32_t>(-1, Dtype::i32);
  bad_token<std::int64_t>(-1, Dtype::i64);
  bad_token<std::int64_t>(std::int64_t{1} << 31, Dtype::i64);
  bad_token<std::uint32_t>(0x80000000u, Dtype::u32);
  bad_token<std::uint64_t>(std::uint64_t{1} << 40, Dtype::u64);
  std::puts("ok");
  return 0;
}
