// From Python objects to the plain structs of pack_core.hpp, with errors that name the argument.

#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <deque>
#include <string>
#include <vector>

#include "pack_core.hpp"

namespace fastppo {

namespace py = pybind11;

enum class Kind { integer, floating, boolean };

// Reads arguments and keeps alive what the returned segments point to. Array-likes are read in
// place through the buffer protocol; Python lists are copied once. Use with the GIL held.
class Reader {
 public:
  Reader() = default;
  Reader(const Reader&) = delete;
  Reader& operator=(const Reader&) = delete;
  ~Reader();

  // A 1-D list, tuple, buffer or `__array__` object. `name` is what errors call it.
  Segment sequence(py::handle object, const std::string& name, Kind kind);

  // A sequence of such sequences, or, where `lengths` is not None, one of them and the lengths
  // it is cut into (`lengths_name` in errors).
  Ragged ragged(py::handle object, py::handle lengths, const std::string& name,
                const std::string& lengths_name, Kind kind);

 private:
  Segment from_buffer(py::handle object, py::handle given, const std::string& name, Kind kind);
  Segment from_items(py::handle object, const std::string& name, Kind kind);

  std::deque<Py_buffer> views_;  // a Py_buffer may point into itself: it must not move
  std::deque<std::vector<std::int64_t>> integers_;
  std::deque<std::vector<double>> floats_;
  std::deque<std::vector<std::uint8_t>> bools_;
};

// Non-negative integers from any 1-D sequence of them.
std::vector<std::int64_t> read_lengths(py::handle object, const std::string& name);

// One integer; bool and float are refused.
std::int64_t read_integer(py::handle object, const std::string& name);

[[noreturn]] void fail_type(const std::string& where, const std::string& expected,
                            const std::string& got);

}  // namespace fastppo
