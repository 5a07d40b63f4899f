// fastppo._C: gae, gae_classic.

#include <pybind11/stl.h>

#include <deque>
#include <optional>
#include <string>
#include <vector>

#include "gae_core.hpp"
#include "read.hpp"
#include "register.hpp"

namespace fastppo {

namespace {

// Arguments of one call, checked. Everything stays alive, and in place, as long as this does.
class Arguments {
 public:
  explicit Arguments(Dtype dtype) : dtype_(dtype) {}
  Arguments(const Arguments&) = delete;
  Arguments& operator=(const Arguments&) = delete;
  ~Arguments() {
    for (Py_buffer& view : outputs_) PyBuffer_Release(&view);
  }

  // (count,) numbers of the call's element type, or null for None.
  template <typename T>
  const T* floats(py::handle object, const char* name, std::int64_t count) {
    if (object.is_none()) return nullptr;
    return static_cast<const T*>(array(object, name, Kind::floating, dtype_, count));
  }

  const std::uint8_t* bools(py::handle object, const char* name, std::int64_t count) {
    if (object.is_none()) return nullptr;
    return static_cast<const std::uint8_t*>(array(object, name, Kind::boolean, Dtype::b8, count));
  }

  // A number, or (count,) float64; null data for None.
  PerSequence per_sequence(py::handle object, const char* name, std::int64_t count) {
    if (object.is_none()) return {};
    if (PyFloat_Check(object.ptr()) != 0 || PyLong_Check(object.ptr()) != 0) {
      scalars_.push_back(PyFloat_AsDouble(object.ptr()));
      return {&scalars_.back(), 0};
    }
    return {static_cast<const double*>(array(object, name, Kind::floating, Dtype::f64, count)), 1};
  }

  template <typename T>
  T* output(py::handle object, const char* name, std::int64_t count) {
    const std::string expected = std::string("a writable contiguous buffer of ") +
                                 std::to_string(count) + " " + dtype_name(dtype_);
    Py_buffer& view = outputs_.emplace_back();
    if (PyObject_GetBuffer(object.ptr(), &view,
                           PyBUF_WRITABLE | PyBUF_C_CONTIGUOUS | PyBUF_FORMAT) != 0) {
      PyErr_Clear();
      outputs_.pop_back();
      fail_type(name, expected, Py_TYPE(object.ptr())->tp_name);
    }
    const Segment seen = reader_.sequence(object, name, Kind::floating);
    if (seen.dtype != dtype_ || seen.count != count) {
      fail(name, expected, std::to_string(seen.count) + " " + dtype_name(seen.dtype));
    }
    return static_cast<T*>(view.buf);
  }

 private:
  const void* array(py::handle object, const char* name, Kind kind, Dtype dtype,
                    std::int64_t count) {
    const Segment s = reader_.sequence(object, name, kind);
    const auto size = static_cast<std::ptrdiff_t>(dtype_size(dtype));
    if (s.dtype != dtype || s.count != count || (s.stride != size && s.count > 1)) {
      fail(name, std::to_string(count) + " contiguous " + dtype_name(dtype),
           std::to_string(s.count) + " " + dtype_name(s.dtype) + " with a stride of " +
               std::to_string(s.stride) + " bytes");
    }
    return s.data;
  }

  Dtype dtype_;
  Reader reader_;
  std::deque<double> scalars_;
  std::deque<Py_buffer> outputs_;
};

std::vector<std::int64_t> read_offsets(py::handle cu_seqlens, std::int64_t count) {
  std::vector<std::int64_t> offsets = read_lengths(cu_seqlens, "cu_seqlens");
  if (offsets.empty() || offsets.front() != 0 || offsets.back() != count) {
    fail("cu_seqlens", "offsets from 0 to " + std::to_string(count),
         offsets.empty() ? "none"
                         : std::to_string(offsets.front()) + " to " +
                               std::to_string(offsets.back()));
  }
  for (std::size_t b = 1; b < offsets.size(); ++b) {
    if (offsets[b] >= offsets[b - 1]) continue;
    fail("cu_seqlens[" + std::to_string(b) + "]", "≥ " + std::to_string(offsets[b - 1]),
         std::to_string(offsets[b]));
  }
  return offsets;
}

MaskMode read_mode(const std::string& name) {
  if (name == "carry") return MaskMode::carry;
  if (name == "dense-zero") return MaskMode::dense_zero;
  if (name == "none") return MaskMode::none;
  fail("mask_mode", "carry, dense-zero or none", name);
}

struct GaeObjects {
  py::object advantages, returns, rewards, values, mask, bootstrap, kl, scores;
  py::object gamma, gae_lambda, returns_lambda;
};

template <typename T>
void run_gae(const GaeObjects& o, const std::vector<std::int64_t>& offsets, MaskMode mode,
             double kl_coef, const std::optional<double>& whiten_eps, Dtype dtype) {
  const std::int64_t n = offsets.back();
  const auto b = static_cast<std::int64_t>(offsets.size()) - 1;
  Arguments args(dtype);
  GaeInputs<T> in;
  in.offsets = offsets.data();
  in.num_sequences = b;
  in.rewards = args.floats<T>(o.rewards, "rewards", n);
  in.values = args.floats<T>(o.values, "values", n);
  in.mask = args.bools(o.mask, "mask", n);
  in.kl = args.floats<T>(o.kl, "kl", n);
  in.bootstrap = args.floats<T>(o.bootstrap, "bootstrap", b);
  in.scores = args.floats<T>(o.scores, "scores", b);
  in.gamma = args.per_sequence(o.gamma, "gamma", b);
  in.actor_lambda = args.per_sequence(o.gae_lambda, "gae_lambda", b);
  in.critic_lambda = args.per_sequence(o.returns_lambda, "returns_lambda", b);
  in.kl_coef = kl_coef;
  T* advantages = args.output<T>(o.advantages, "advantages", n);
  T* returns = args.output<T>(o.returns, "returns", n);
  const py::gil_scoped_release nogil;
  gae(in, mode, advantages, returns);
  if (whiten_eps) whiten(in.mask, n, *whiten_eps, advantages);
}

// Calls f(float or double, its Dtype) for the element type of `values`.
template <typename F>
void with_type_of(const Segment& values, F f) {
  if (values.dtype == Dtype::f32) {
    f(float{}, Dtype::f32);
  } else {
    f(double{}, Dtype::f64);
  }
}

void gae_into(const py::object& advantages, const py::object& returns, const py::object& values,
              const py::object& cu_seqlens, const py::object& gamma,
              const py::object& gae_lambda, const py::object& returns_lambda,
              const py::object& rewards, const py::object& mask, const std::string& mask_mode,
              const py::object& bootstrap, const py::object& kl, double kl_coef,
              const py::object& scores, const std::optional<double>& whiten_eps) {
  if (gamma.is_none() || gae_lambda.is_none()) fail_type("gamma, gae_lambda", "numbers", "None");
  Reader reader;
  const Segment v = reader.sequence(values, "values", Kind::floating);
  const std::vector<std::int64_t> offsets = read_offsets(cu_seqlens, v.count);
  const GaeObjects objects{advantages, returns, rewards, values,     mask,          bootstrap,
                           kl,         scores,  gamma,   gae_lambda, returns_lambda};
  with_type_of(v, [&](auto zero, Dtype dtype) {
    run_gae<decltype(zero)>(objects, offsets, read_mode(mask_mode), kl_coef, whiten_eps, dtype);
  });
}

void classic_into(const py::object& advantages, const py::object& returns,
                  const py::object& rewards, const py::object& values,
                  const py::object& next_value, const py::object& terminated,
                  const py::object& truncated, const py::object& final_values, double gamma,
                  double gae_lambda) {
  for (const py::object& x : {rewards, next_value, terminated}) {
    if (x.is_none()) fail_type("rewards, next_value, terminated", "arrays", "None");
  }
  Reader reader;
  const Segment v = reader.sequence(values, "values", Kind::floating);
  const std::int64_t envs = reader.sequence(next_value, "next_value", Kind::floating).count;
  if (envs < 1 || v.count % envs != 0) {
    fail("values", "a multiple of the " + std::to_string(envs) + " entries of next_value",
         std::to_string(v.count));
  }
  if (!truncated.is_none() && final_values.is_none()) {
    fail("final_values", "an array beside truncated", "None");
  }
  with_type_of(v, [&](auto zero, Dtype dtype) {
    using T = decltype(zero);
    Arguments args(dtype);
    const T* r = args.floats<T>(rewards, "rewards", v.count);
    const T* value = args.floats<T>(values, "values", v.count);
    const T* next = args.floats<T>(next_value, "next_value", envs);
    const T* final = args.floats<T>(final_values, "final_values", v.count);
    const std::uint8_t* stop = args.bools(terminated, "terminated", v.count);
    const std::uint8_t* cut = args.bools(truncated, "truncated", v.count);
    T* adv = args.output<T>(advantages, "advantages", v.count);
    T* ret = args.output<T>(returns, "returns", v.count);
    const py::gil_scoped_release nogil;
    gae_classic(v.count / envs, envs, r, value, next, stop, cut, final, gamma, gae_lambda, adv,
                ret);
  });
}

}  // namespace

void register_gae(py::module_& m) {
  m.def("gae", &gae_into, py::arg("advantages"), py::arg("returns"), py::arg("values"),
        py::arg("cu_seqlens"), py::kw_only(), py::arg("gamma"), py::arg("gae_lambda"),
        py::arg("returns_lambda") = py::none(), py::arg("rewards") = py::none(),
        py::arg("mask") = py::none(), py::arg("mask_mode") = "carry",
        py::arg("bootstrap") = py::none(), py::arg("kl") = py::none(), py::arg("kl_coef") = 0.0,
        py::arg("scores") = py::none(), py::arg("whiten_eps") = py::none(),
        "Writes the advantages and returns of packed sequences.");
  m.def("gae_classic", &classic_into, py::arg("advantages"), py::arg("returns"),
        py::arg("rewards"), py::arg("values"), py::arg("next_value"), py::arg("terminated"),
        py::arg("truncated"), py::arg("final_values"), py::kw_only(), py::arg("gamma"),
        py::arg("gae_lambda"), "Writes the advantages and returns of a flat (steps, envs) rollout.");
}

}  // namespace fastppo
