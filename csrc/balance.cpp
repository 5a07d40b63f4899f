// fastppo._C: bins, partition.

#include <pybind11/stl.h>

#include "balance_core.hpp"
#include "read.hpp"
#include "register.hpp"

namespace fastppo {

namespace {

using Groups = std::vector<std::vector<std::int64_t>>;

Groups bins(py::handle lengths, py::handle token_budget) {
  const std::vector<std::int64_t> counts = read_lengths(lengths, "lengths");
  const std::int64_t budget = read_integer(token_budget, "token_budget");
  if (budget < 1) fail("token_budget", "≥ 1", std::to_string(budget));
  const auto longest = std::max_element(counts.begin(), counts.end());
  if (longest != counts.end() && *longest > budget) {
    fail("token_budget",
         "≥ " + std::to_string(*longest) + ", the longest sequence (lengths[" +
             std::to_string(longest - counts.begin()) + "])",
         std::to_string(budget) + "; raise the budget or drop the sequence");
  }
  const py::gil_scoped_release nogil;
  return best_fit_decreasing(counts, budget);
}

Groups partition(py::handle lengths, py::handle k) {
  const std::vector<std::int64_t> costs = read_lengths(lengths, "lengths");
  const std::int64_t parts = read_integer(k, "k");
  if (parts < 1) fail("k", "≥ 1", std::to_string(parts));
  constexpr std::int64_t most = 1 << 20;
  if (parts > most) fail("k", "≤ " + std::to_string(most), std::to_string(parts));
  std::int64_t total = 0;
  for (const std::int64_t cost : costs) {
    if (cost > std::numeric_limits<std::int64_t>::max() - total) {
      fail("lengths", "a sum within int64", "a larger one");
    }
    total += cost;
  }
  const py::gil_scoped_release nogil;
  return karmarkar_karp(costs, static_cast<std::size_t>(parts));
}

}  // namespace

void register_balance(py::module_& m) {
  m.def("bins", &bins, py::arg("lengths"), py::arg("token_budget"),
        "Best-fit-decreasing bins of indices, the sum of lengths in each ≤ token_budget.");
  m.def("partition", &partition, py::arg("lengths"), py::arg("k"),
        "Karmarkar–Karp partition of indices into k parts of nearly equal total length.");
}

}  // namespace fastppo
