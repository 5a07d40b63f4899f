// Which sequences go together: token-budget bins and balanced partitions. No Python here.

#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <numeric>
#include <queue>
#include <set>
#include <utility>
#include <vector>

namespace fastppo {

// Best-fit decreasing: the longest sequence first, each into the fullest bin that still has room
// for it, else into a new bin. Ties: the lower index first, the older bin first. O(n log n).
// Bins in the order they were opened, indices ascending inside each. Needs lengths ≤ budget.
inline std::vector<std::vector<std::int64_t>> best_fit_decreasing(
    const std::vector<std::int64_t>& lengths, std::int64_t budget) {
  std::vector<std::size_t> order(lengths.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::stable_sort(order.begin(), order.end(),
                   [&](std::size_t a, std::size_t b) { return lengths[a] > lengths[b]; });
  std::vector<std::vector<std::int64_t>> bins;
  std::set<std::pair<std::int64_t, std::size_t>> room;  // (tokens left, bin)
  for (const std::size_t index : order) {
    const std::int64_t length = lengths[index];
    const auto found = room.lower_bound({length, std::size_t{0}});
    std::size_t bin = bins.size();
    std::int64_t left = budget;
    if (found == room.end()) {
      bins.emplace_back();
    } else {
      left = found->first;
      bin = found->second;
      room.erase(found);
    }
    bins[bin].push_back(static_cast<std::int64_t>(index));
    room.emplace(left - length, bin);
  }
  for (auto& bin : bins) std::sort(bin.begin(), bin.end());
  return bins;
}

// Karmarkar–Karp largest differencing for k parts (Karmarkar & Karp 1982; the multiway form is in
// Michiels et al., "Performance ratios of the differencing method", 2003). Every sequence starts
// as a k-tuple of parts with one part filled; the two tuples of largest spread (most loaded minus
// least loaded part) are merged, most loaded part of one with least loaded part of the other,
// until one tuple is left. Ties: the tuple made first. Empty parts are not stored, so memory is
// O(n); time is O(n (k log k + log n)).
// Parts from most to least loaded, indices ascending inside each. With at least k sequences no
// part is empty. Needs a sum of costs within int64.
inline std::vector<std::vector<std::int64_t>> karmarkar_karp(
    const std::vector<std::int64_t>& costs, std::size_t k) {
  constexpr std::size_t none = std::numeric_limits<std::size_t>::max();
  // The members of a part are a linked list through `next`, so that joining two parts is O(1).
  struct Part {
    std::int64_t cost;
    std::size_t count;
    std::size_t head;
    std::size_t tail;
  };
  struct Entry {
    std::int64_t spread;
    std::size_t made;  // also the place of its parts in `tuples`
    bool operator<(const Entry& other) const {
      return spread != other.spread ? spread < other.spread : made > other.made;
    }
  };
  std::vector<std::vector<std::int64_t>> result(k);
  if (costs.empty()) return result;
  std::vector<std::size_t> next(costs.size(), none);
  std::vector<std::vector<Part>> tuples;
  tuples.reserve(2 * costs.size());
  std::priority_queue<Entry> queue;
  const auto push = [&](std::vector<Part> parts) {
    const std::int64_t least = parts.size() < k ? 0 : parts.back().cost;
    queue.push({parts.front().cost - least, tuples.size()});
    tuples.push_back(std::move(parts));
  };
  for (std::size_t i = 0; i < costs.size(); ++i) {
    push({Part{costs[i], 1, i, i}});
  }
  while (queue.size() > 1) {
    std::vector<Part> first = std::move(tuples[queue.top().made]);
    queue.pop();
    std::vector<Part> second = std::move(tuples[queue.top().made]);
    queue.pop();
    // Part j of `second` meets part k - 1 - j of `first`, or takes its place where it is empty.
    const std::size_t filled = first.size();
    for (std::size_t j = second.size(); j-- > 0;) {
      const Part& from = second[j];
      if (k - 1 - j >= filled) {
        first.push_back(from);
        continue;
      }
      Part& into = first[k - 1 - j];
      next[into.tail] = from.head;
      into.tail = from.tail;
      into.cost += from.cost;
      into.count += from.count;
    }
    std::stable_sort(first.begin(), first.end(), [](const Part& a, const Part& b) {
      return a.cost != b.cost ? a.cost > b.cost : a.count > b.count;
    });
    push(std::move(first));
  }
  const std::vector<Part>& last = tuples[queue.top().made];
  for (std::size_t j = 0; j < last.size(); ++j) {
    for (std::size_t i = last[j].head; i != none; i = next[i]) {
      result[j].push_back(static_cast<std::int64_t>(i));
    }
    std::sort(result[j].begin(), result[j].end());
  }
  return result;
}

}  // namespace fastppo
