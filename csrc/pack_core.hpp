// Packing of ragged sequences into one arena. No Python here.
//
// The layouts (B sequences, T prompt + response tokens, N response tokens) are those of
// fastppo/data/sequences.py. Every field of a packed batch lives in one arena; every field starts on a
// multiple of kAlignment bytes, so that one copy moves the batch and every typed view is aligned.
// Errors are std::invalid_argument with "name: expected ..., got ...".

#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace fastppo {

constexpr std::size_t kAlignment = 128;
constexpr std::int64_t kInt32Max = std::numeric_limits<std::int32_t>::max();

inline std::size_t align_up(std::size_t n) { return (n + kAlignment - 1) / kAlignment * kAlignment; }

enum class Dtype { b8, i8, i16, i32, i64, u8, u16, u32, u64, f32, f64 };

inline const char* dtype_name(Dtype dtype) {
  constexpr const char* names[] = {"bool",  "int8",   "int16",  "int32",   "int64",  "uint8",
                                   "uint16", "uint32", "uint64", "float32", "float64"};
  return names[static_cast<std::size_t>(dtype)];
}

inline std::size_t dtype_size(Dtype dtype) {
  constexpr std::size_t sizes[] = {1, 1, 2, 4, 8, 1, 2, 4, 8, 4, 8};
  return sizes[static_cast<std::size_t>(dtype)];
}

inline bool is_integer(Dtype dtype) { return dtype >= Dtype::i8 && dtype <= Dtype::u64; }

// One sequence of numbers in somebody else's memory; `stride` in bytes, of either sign.
struct Segment {
  const std::byte* data = nullptr;
  std::int64_t count = 0;
  std::ptrdiff_t stride = 0;
  Dtype dtype = Dtype::i32;
};

// The sequences of one argument. `flat`: they were given as one array and their lengths, so an
// error counts elements from the start of that array.
struct Ragged {
  std::string name;
  std::vector<Segment> segments;
  bool flat = false;

  std::string at(std::size_t sequence) const { return name + "[" + std::to_string(sequence) + "]"; }

  std::string at(std::size_t sequence, std::int64_t element) const {
    if (!flat) return at(sequence) + "[" + std::to_string(element) + "]";
    for (std::size_t b = 0; b < sequence; ++b) element += segments[b].count;
    return name + "[" + std::to_string(element) + "]";
  }
};

// One typed array inside the arena.
struct Field {
  const char* name;
  std::size_t offset;  // bytes from the start of the arena, a multiple of kAlignment
  Dtype dtype;
  std::size_t count;  // elements
};

[[noreturn]] inline void fail(const std::string& where, const std::string& expected,
                              const std::string& got) {
  throw std::invalid_argument(where + ": expected " + expected + ", got " + got);
}

// The bits that are set only in values of T outside 0..2^31-1.
template <typename T>
constexpr std::make_unsigned_t<T> out_of_range_bits() {
  using U = std::make_unsigned_t<T>;
  if constexpr (sizeof(T) >= 4) return static_cast<U>(~static_cast<U>(kInt32Max));
  if constexpr (std::is_signed_v<T>) return static_cast<U>(U{1} << (8 * sizeof(T) - 1));
  return U{0};
}

template <typename T>
T load(const Segment& s, std::int64_t i) {
  T value;
  std::memcpy(&value, s.data + i * s.stride, sizeof(T));
  return value;
}

// Copies with conversion; contiguous sources take a loop that compilers vectorise.
template <typename T, typename Out, typename Visit>
void convert(const Segment& s, Out* out, Visit visit) {
  if (s.stride == static_cast<std::ptrdiff_t>(sizeof(T))) {
    for (std::int64_t i = 0; i < s.count; ++i) {
      T value;
      std::memcpy(&value, s.data + static_cast<std::size_t>(i) * sizeof(T), sizeof(T));
      visit(value);
      out[i] = static_cast<Out>(value);
    }
    return;
  }
  for (std::int64_t i = 0; i < s.count; ++i) {
    const T value = load<T>(s, i);
    visit(value);
    out[i] = static_cast<Out>(value);
  }
}

template <typename T>
void copy_tokens(const Ragged& source, std::size_t b, std::int32_t* out) {
  using U = std::make_unsigned_t<T>;
  constexpr U bad = out_of_range_bits<T>();
  const Segment& s = source.segments[b];
  U seen = 0;
  convert<T>(s, out, [&seen](T value) { seen = static_cast<U>(seen | static_cast<U>(value)); });
  if ((seen & bad) == 0) return;
  for (std::int64_t i = 0; i < s.count; ++i) {
    const T value = load<T>(s, i);
    if ((static_cast<U>(value) & bad) != 0) {
      fail(source.at(b, i), "a token id in 0..2147483647", std::to_string(value));
    }
  }
}

inline void copy_tokens(const Ragged& source, std::size_t b, std::int32_t* out) {
  switch (source.segments[b].dtype) {
    case Dtype::i8: return copy_tokens<std::int8_t>(source, b, out);
    case Dtype::i16: return copy_tokens<std::int16_t>(source, b, out);
    case Dtype::i32: return copy_tokens<std::int32_t>(source, b, out);
    case Dtype::i64: return copy_tokens<std::int64_t>(source, b, out);
    case Dtype::u8: return copy_tokens<std::uint8_t>(source, b, out);
    case Dtype::u16: return copy_tokens<std::uint16_t>(source, b, out);
    case Dtype::u32: return copy_tokens<std::uint32_t>(source, b, out);
    case Dtype::u64: return copy_tokens<std::uint64_t>(source, b, out);
    default: throw std::logic_error("copy_tokens: not an integer type");
  }
}

inline void copy_floats(const Segment& s, float* out) {
  if (s.dtype == Dtype::f32) return convert<float>(s, out, [](float) {});
  if (s.dtype == Dtype::f64) return convert<double>(s, out, [](double) {});
  throw std::logic_error("copy_floats: not a float type");
}

inline void copy_bools(const Segment& s, std::uint8_t* out) {
  if (s.dtype != Dtype::b8) throw std::logic_error("copy_bools: not bool");
  for (std::int64_t i = 0; i < s.count; ++i) out[i] = load<std::uint8_t>(s, i) != 0 ? 1 : 0;
}

// Everything about one packed batch except the bytes: sizes, field table, where to read from.
class Plan {
 public:
  // `prompts` and `responses` hold integers, `logprobs` (or null) floats, `mask` (or null) and
  // `truncated` (or null: none was) bools; `truncated` is one segment. The memory that the
  // segments point to must outlive the calls of fill().
  Plan(Ragged prompts, Ragged responses, const Ragged* logprobs, const Ragged* mask,
       const Segment* truncated)
      : prompts_(std::move(prompts)), responses_(std::move(responses)) {
    const std::size_t count = prompts_.segments.size();
    same_count(responses_, count, "one per prompt");
    cu_seqlens_.assign(count + 1, 0);
    cu_responses_.assign(count + 1, 0);
    std::int64_t tokens = 0;
    std::int64_t generated = 0;
    for (std::size_t b = 0; b < count; ++b) {
      const std::int64_t prompt = prompts_.segments[b].count;
      if (prompt < 1) {
        fail(prompts_.flat ? "prompt_lengths[" + std::to_string(b) + "]" : prompts_.at(b),
             "≥ 1 token", std::to_string(prompt) +
                              "; a response token is predicted from the position before it");
      }
      const std::int64_t response = responses_.segments[b].count;
      // Counts come from outside and may be anything below 2^63: add without overflow.
      const std::uint64_t total = static_cast<std::uint64_t>(tokens) +
                                  static_cast<std::uint64_t>(prompt) +
                                  static_cast<std::uint64_t>(response);
      if (total > static_cast<std::uint64_t>(kInt32Max)) {
        fail("prompts and responses", "≤ 2147483647 tokens in all (int32 offsets)",
             std::to_string(total) + " in the first " + std::to_string(b + 1) +
                 " sequences; pack fewer at a time");
      }
      tokens += prompt + response;
      generated += response;
      max_seqlen_ = std::max(max_seqlen_, prompt + response);
      cu_seqlens_[b + 1] = static_cast<std::int32_t>(tokens);
      cu_responses_[b + 1] = static_cast<std::int32_t>(generated);
    }
    if (logprobs != nullptr) logprobs_ = per_token(*logprobs);
    if (mask != nullptr) mask_ = per_token(*mask);
    if (truncated != nullptr) {
      truncated_ = *truncated;
      if (truncated_.count != static_cast<std::int64_t>(count)) {
        fail("truncated", std::to_string(count) + " values, one per sequence",
             std::to_string(truncated_.count));
      }
    }
    const auto num_tokens = static_cast<std::size_t>(tokens);
    const auto num_responses = static_cast<std::size_t>(generated);
    add("input_ids", Dtype::i32, num_tokens);
    add("position_ids", Dtype::i32, num_tokens);
    add("cu_seqlens", Dtype::i32, count + 1);
    add("targets", Dtype::i32, num_responses);
    add("rows", Dtype::i32, num_responses);
    add("cu_responses", Dtype::i32, count + 1);
    add("truncated", Dtype::b8, count);
    if (logprobs != nullptr) add("rollout_logprobs", Dtype::f32, num_responses);
    if (mask != nullptr) add("loss_mask", Dtype::b8, num_responses);
  }

  std::size_t num_sequences() const { return cu_seqlens_.size() - 1; }
  std::int32_t num_tokens() const { return cu_seqlens_.back(); }
  std::int32_t num_responses() const { return cu_responses_.back(); }
  std::int64_t max_seqlen() const { return max_seqlen_; }
  std::size_t nbytes() const { return nbytes_; }
  const std::vector<Field>& fields() const { return fields_; }

  // Writes all nbytes() of the arena (padding as zeros). `out` is aligned to kAlignment.
  void fill(std::byte* out) const {
    for (std::size_t f = 0; f < fields_.size(); ++f) {
      const std::size_t end = fields_[f].offset + fields_[f].count * dtype_size(fields_[f].dtype);
      const std::size_t next = f + 1 < fields_.size() ? fields_[f + 1].offset : nbytes_;
      std::memset(out + end, 0, next - end);
    }
    auto* input_ids = array<std::int32_t>(out, 0);
    auto* position_ids = array<std::int32_t>(out, 1);
    std::memcpy(out + fields_[2].offset, cu_seqlens_.data(), cu_seqlens_.size() * 4);
    auto* targets = array<std::int32_t>(out, 3);
    auto* rows = array<std::int32_t>(out, 4);
    std::memcpy(out + fields_[5].offset, cu_responses_.data(), cu_responses_.size() * 4);
    auto* truncated = array<std::uint8_t>(out, 6);
    std::memset(truncated, 0, num_sequences());
    if (truncated_.data != nullptr) copy_bools(truncated_, truncated);
    for (std::size_t b = 0; b < num_sequences(); ++b) {
      const std::int32_t first = cu_seqlens_[b];
      const std::int32_t response = cu_responses_[b + 1] - cu_responses_[b];
      const std::int32_t split = cu_seqlens_[b + 1] - response;
      copy_tokens(prompts_, b, input_ids + first);
      copy_tokens(responses_, b, input_ids + split);
      std::iota(position_ids + first, position_ids + cu_seqlens_[b + 1], 0);
      std::copy(input_ids + split, input_ids + split + response, targets + cu_responses_[b]);
      std::iota(rows + cu_responses_[b], rows + cu_responses_[b + 1], split - 1);
    }
    std::size_t next = 7;
    if (!logprobs_.name.empty()) {
      auto* logprobs = array<float>(out, next++);
      for (std::size_t b = 0; b < num_sequences(); ++b) {
        copy_floats(logprobs_.segments[b], logprobs + cu_responses_[b]);
      }
    }
    if (!mask_.name.empty()) {
      auto* mask = array<std::uint8_t>(out, next);
      for (std::size_t b = 0; b < num_sequences(); ++b) {
        copy_bools(mask_.segments[b], mask + cu_responses_[b]);
      }
    }
  }

 private:
  template <typename T>
  T* array(std::byte* out, std::size_t field) const {
    return reinterpret_cast<T*>(out + fields_[field].offset);
  }

  void add(const char* name, Dtype dtype, std::size_t count) {
    fields_.push_back({name, nbytes_, dtype, count});
    nbytes_ = align_up(nbytes_ + count * dtype_size(dtype));
  }

  static void same_count(const Ragged& ragged, std::size_t count, const char* why) {
    if (ragged.segments.size() == count) return;
    fail(ragged.name, std::to_string(count) + " sequences, " + why,
         std::to_string(ragged.segments.size()));
  }

  const Ragged& per_token(const Ragged& ragged) const {
    same_count(ragged, num_sequences(), "one per response");
    for (std::size_t b = 0; b < num_sequences(); ++b) {
      const std::int64_t expected = responses_.segments[b].count;
      if (ragged.segments[b].count == expected) continue;
      fail(ragged.at(b), std::to_string(expected) + " values, one per response token",
           std::to_string(ragged.segments[b].count));
    }
    return ragged;
  }

  Ragged prompts_;
  Ragged responses_;
  Ragged logprobs_;
  Ragged mask_;
  Segment truncated_;
  std::vector<std::int32_t> cu_seqlens_;
  std::vector<std::int32_t> cu_responses_;
  std::int64_t max_seqlen_ = 0;
  std::vector<Field> fields_;
  std::size_t nbytes_ = 0;
};

}  // namespace fastppo
