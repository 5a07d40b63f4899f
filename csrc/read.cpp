#include "read.hpp"

#include <optional>

namespace fastppo {

namespace {

const char* elements(Kind kind) {
  switch (kind) {
    case Kind::integer: return "integers";
    case Kind::floating: return "floats (float32 or float64)";
    default: return "bools";
  }
}

std::string type_name(py::handle object) { return Py_TYPE(object.ptr())->tp_name; }

bool is_text(py::handle object) { return PyUnicode_Check(object.ptr()) != 0; }

bool is_array(py::handle object) {
  return PyObject_CheckBuffer(object.ptr()) != 0 || py::hasattr(object, "__array__");
}

bool little_endian() {
  const std::uint16_t one = 1;
  unsigned char first = 0;
  std::memcpy(&first, &one, 1);
  return first == 1;
}

std::optional<Dtype> integer_dtype(bool is_signed, Py_ssize_t itemsize) {
  switch (itemsize) {
    case 1: return is_signed ? Dtype::i8 : Dtype::u8;
    case 2: return is_signed ? Dtype::i16 : Dtype::u16;
    case 4: return is_signed ? Dtype::i32 : Dtype::u32;
    case 8: return is_signed ? Dtype::i64 : Dtype::u64;
    default: return std::nullopt;
  }
}

// The element type of a buffer, or nothing where it is not a native-endian number.
std::optional<Dtype> buffer_dtype(const Py_buffer& view) {
  std::string format = view.format != nullptr ? view.format : "B";
  if (format.size() == 2 && std::strchr("@=<>!", format[0]) != nullptr) {
    const bool native = format[0] == '@' || format[0] == '=' ||
                        (format[0] == '<') == little_endian();
    if (!native && view.itemsize > 1) return std::nullopt;
    format.erase(0, 1);
  }
  if (format.size() != 1) return std::nullopt;
  switch (format[0]) {
    case '?': return Dtype::b8;
    case 'b': case 'h': case 'i': case 'l': case 'q': case 'n':
      return integer_dtype(true, view.itemsize);
    case 'B': case 'H': case 'I': case 'L': case 'Q': case 'N':
      return integer_dtype(false, view.itemsize);
    case 'f': return Dtype::f32;
    case 'd': return Dtype::f64;
    default: return std::nullopt;
  }
}

bool matches(Dtype dtype, Kind kind) {
  if (kind == Kind::integer) return is_integer(dtype);
  if (kind == Kind::floating) return dtype == Dtype::f32 || dtype == Dtype::f64;
  return dtype == Dtype::b8;
}

std::string array_description(py::handle given, const Py_buffer& view) {
  if (py::hasattr(given, "dtype")) {
    return std::string(py::str(given.attr("dtype"))) + " " + type_name(given);
  }
  return type_name(given) + " of format '" + (view.format != nullptr ? view.format : "B") + "'";
}

std::int64_t integer_item(py::handle item, const std::string& name) {
  if (PyBool_Check(item.ptr()) != 0 || PyIndex_Check(item.ptr()) == 0) {
    fail_type(name, "an integer", type_name(item));
  }
  const auto index = py::reinterpret_steal<py::object>(PyNumber_Index(item.ptr()));
  if (!index) {
    PyErr_Clear();
    fail_type(name, "an integer", type_name(item));
  }
  int overflow = 0;
  const std::int64_t value = PyLong_AsLongLongAndOverflow(index.ptr(), &overflow);
  if (overflow != 0) {
    fail(name, "an integer within int64", overflow > 0 ? "a larger one" : "a smaller one");
  }
  return value;
}

double float_item(py::handle item, const std::string& name) {
  if (PyBool_Check(item.ptr()) != 0 ||
      (PyFloat_Check(item.ptr()) == 0 && !py::hasattr(item, "__float__"))) {
    fail_type(name, "a float", type_name(item));
  }
  const double value = PyFloat_AsDouble(item.ptr());
  if (PyErr_Occurred() != nullptr) {
    PyErr_Clear();
    fail_type(name, "a float", type_name(item));
  }
  return value;
}

std::uint8_t bool_item(py::handle item, const std::string& name) {
  if (PyBool_Check(item.ptr()) != 0) return item.ptr() == Py_True ? 1 : 0;
  const std::string type = type_name(item);
  if (type != "numpy.bool" && type != "numpy.bool_") fail_type(name, "a bool", type);
  return PyObject_IsTrue(item.ptr()) == 1 ? 1 : 0;
}

// Calls f(i, item) for the items of a Python sequence. The length is read anew each time and the
// item is owned: converting an item may run Python code that changes the sequence.
template <typename F>
void for_items(py::handle object, const std::string& name, F f) {
  const auto fast =
      py::reinterpret_steal<py::object>(PySequence_Fast(object.ptr(), "not a sequence"));
  if (!fast) {
    PyErr_Clear();
    fail_type(name, "a sequence", type_name(object));
  }
  for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(fast.ptr()); ++i) {
    f(i, py::reinterpret_borrow<py::object>(PySequence_Fast_GET_ITEM(fast.ptr(), i)));
  }
}

std::string at(const std::string& name, Py_ssize_t i) {
  return name + "[" + std::to_string(i) + "]";
}

template <typename T>
Segment segment_of(const std::vector<T>& values, Dtype dtype) {
  return {reinterpret_cast<const std::byte*>(values.data()),
          static_cast<std::int64_t>(values.size()), sizeof(T), dtype};
}

std::int64_t integer_at(const Segment& s, std::int64_t i, const std::string& name) {
  switch (s.dtype) {
    case Dtype::i8: return load<std::int8_t>(s, i);
    case Dtype::i16: return load<std::int16_t>(s, i);
    case Dtype::i32: return load<std::int32_t>(s, i);
    case Dtype::i64: return load<std::int64_t>(s, i);
    case Dtype::u8: return load<std::uint8_t>(s, i);
    case Dtype::u16: return load<std::uint16_t>(s, i);
    case Dtype::u32: return load<std::uint32_t>(s, i);
    default: break;
  }
  const auto value = load<std::uint64_t>(s, i);
  if (value > static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max())) {
    fail(at(name, i), "an integer within int64", std::to_string(value));
  }
  return static_cast<std::int64_t>(value);
}

}  // namespace

void fail_type(const std::string& where, const std::string& expected, const std::string& got) {
  throw py::type_error(where + ": expected " + expected + ", got " + got);
}

Reader::~Reader() {
  for (Py_buffer& view : views_) PyBuffer_Release(&view);
}

Segment Reader::from_buffer(py::handle object, py::handle given, const std::string& name,
                            Kind kind) {
  const std::string expected = std::string("a 1-D sequence of ") + elements(kind);
  Py_buffer& kept = views_.emplace_back();
  if (PyObject_GetBuffer(object.ptr(), &kept, PyBUF_RECORDS_RO) != 0) {
    PyErr_Clear();
    views_.pop_back();
    fail_type(name, expected, type_name(given) + ", which does not show its memory");
  }
  const std::optional<Dtype> dtype = buffer_dtype(kept);
  if (!dtype || !matches(*dtype, kind)) fail_type(name, expected, array_description(given, kept));
  if (kept.ndim != 1) fail(name, expected, "a " + std::to_string(kept.ndim) + "-D array");
  return {static_cast<const std::byte*>(kept.buf), kept.shape[0], kept.strides[0], *dtype};
}

Segment Reader::from_items(py::handle object, const std::string& name, Kind kind) {
  if (kind == Kind::integer) {
    std::vector<std::int64_t>& values = integers_.emplace_back();
    for_items(object, name, [&](Py_ssize_t i, const py::object& item) {
      if (PyLong_CheckExact(item.ptr()) != 0) {
        int overflow = 0;
        values.push_back(PyLong_AsLongLongAndOverflow(item.ptr(), &overflow));
        if (overflow == 0) return;
        values.pop_back();
      }
      values.push_back(integer_item(item, at(name, i)));
    });
    return segment_of(values, Dtype::i64);
  }
  if (kind == Kind::floating) {
    std::vector<double>& values = floats_.emplace_back();
    for_items(object, name, [&](Py_ssize_t i, const py::object& item) {
      values.push_back(PyFloat_CheckExact(item.ptr()) != 0 ? PyFloat_AS_DOUBLE(item.ptr())
                                                           : float_item(item, at(name, i)));
    });
    return segment_of(values, Dtype::f64);
  }
  std::vector<std::uint8_t>& values = bools_.emplace_back();
  for_items(object, name, [&](Py_ssize_t i, const py::object& item) {
    values.push_back(bool_item(item, at(name, i)));
  });
  return segment_of(values, Dtype::b8);
}

Segment Reader::sequence(py::handle object, const std::string& name, Kind kind) {
  if (PyList_CheckExact(object.ptr()) != 0 || PyTuple_CheckExact(object.ptr()) != 0) {
    return from_items(object, name, kind);
  }
  if (PyObject_CheckBuffer(object.ptr()) != 0) return from_buffer(object, object, name, kind);
  const std::string expected = std::string("a 1-D sequence of ") + elements(kind);
  if (py::hasattr(object, "__array__")) {
    py::object array;
    try {
      array = object.attr("__array__")();
    } catch (py::error_already_set& error) {
      fail_type(name, expected + " in host memory",
                type_name(object) + " (" + std::string(py::str(error.value())) + ")");
    }
    return from_buffer(array, object, name, kind);
  }
  if (is_text(object) || PySequence_Check(object.ptr()) == 0) {
    fail_type(name, expected, type_name(object) + (is_text(object) ? "; tokenize it first" : ""));
  }
  return from_items(object, name, kind);
}

Ragged Reader::ragged(py::handle object, py::handle lengths, const std::string& name,
                      const std::string& lengths_name, Kind kind) {
  Ragged result;
  result.name = name;
  if (!lengths.is_none()) {
    result.flat = true;
    const std::vector<std::int64_t> counts = read_lengths(lengths, lengths_name);
    std::uint64_t total = 0;
    for (const std::int64_t count : counts) {
      total += static_cast<std::uint64_t>(count);
      if (total > static_cast<std::uint64_t>(kInt32Max)) {
        fail(lengths_name, "a sum ≤ 2147483647 (int32 offsets)",
             "at least " + std::to_string(total) + "; pack fewer sequences at a time");
      }
    }
    const Segment all = sequence(object, name, kind);
    if (all.count != static_cast<std::int64_t>(total)) {
      fail(name, std::to_string(total) + " values, the sum of " + lengths_name,
           std::to_string(all.count));
    }
    Segment piece = all;
    for (const std::int64_t count : counts) {
      piece.count = count;
      result.segments.push_back(piece);
      piece.data += count * piece.stride;
    }
    return result;
  }
  const std::string expected = std::string("a sequence of 1-D sequences of ") + elements(kind);
  const bool objects = py::hasattr(object, "dtype") &&
                       std::string(py::str(object.attr("dtype"))) == "object";
  if (is_array(object) && !objects) {
    fail_type(name, expected + ", or a flat array and " + lengths_name, type_name(object));
  }
  if (is_text(object) || PySequence_Check(object.ptr()) == 0) {
    fail_type(name, expected, type_name(object));
  }
  for_items(object, name, [&](Py_ssize_t i, const py::object& item) {
    result.segments.push_back(sequence(item, at(name, i), kind));
  });
  return result;
}

std::vector<std::int64_t> read_lengths(py::handle object, const std::string& name) {
  Reader reader;
  const Segment s = reader.sequence(object, name, Kind::integer);
  std::vector<std::int64_t> values(static_cast<std::size_t>(s.count));
  for (std::int64_t i = 0; i < s.count; ++i) {
    const std::int64_t value = integer_at(s, i, name);
    if (value < 0) fail(at(name, i), "≥ 0", std::to_string(value));
    values[static_cast<std::size_t>(i)] = value;
  }
  return values;
}

std::int64_t read_integer(py::handle object, const std::string& name) {
  return integer_item(object, name);
}

}  // namespace fastppo
