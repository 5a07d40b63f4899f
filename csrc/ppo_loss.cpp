// fastppo._C: ppo_loss.

#include "ppo_loss_core.hpp"

#include <algorithm>
#include <deque>
#include <string>

#include "read.hpp"
#include "register.hpp"

namespace fastppo {

namespace {

// Contiguous arrays of `count` T each, in place and alive as long as this is.
template <typename T>
class Arrays {
 public:
  explicit Arrays(py::ssize_t count) : count_(count) {}

  const T* input(const py::object& object, const char* name) {
    return view<T>(object, name, count_, false);
  }
  // Null for None.
  const T* optional(const py::object& object, const char* name) {
    return object.is_none() ? nullptr : input(object, name);
  }
  T* output(const py::object& object, const char* name) {
    return object.is_none() ? nullptr : view<T>(object, name, count_, true);
  }
  double* entries(const py::object& object, std::size_t count) {
    return view<double>(object, "entries", static_cast<py::ssize_t>(count), true);
  }

 private:
  template <typename U>
  U* view(const py::object& object, const char* name, py::ssize_t count, bool writable) {
    const std::string expected = std::to_string(count) + (writable ? " writable" : "") +
                                 " contiguous " + (sizeof(U) == 4 ? "float32" : "float64");
    if (!py::isinstance<py::buffer>(object)) {
      fail_type(name, expected, Py_TYPE(object.ptr())->tp_name);
    }
    const py::buffer_info& info =
        views_.emplace_back(py::reinterpret_borrow<py::buffer>(object).request(writable));
    if (!info.item_type_is_equivalent_to<U>() || info.ndim != 1 || info.size != count ||
        (count > 1 && info.strides[0] != static_cast<py::ssize_t>(sizeof(U)))) {
      fail(name, expected,
           std::to_string(info.size) + " of format '" + info.format + "' in " +
               std::to_string(info.ndim) + " dimensions");
    }
    return static_cast<U*>(info.ptr);
  }

  py::ssize_t count_;
  std::deque<py::buffer_info> views_;
};

// Calls f(zero, arrays) for the element type of the first array.
template <typename F>
void with_arrays_like(const py::buffer& first, F f) {
  const py::buffer_info info = first.request();
  if (info.item_type_is_equivalent_to<double>()) {
    f(double{}, Arrays<double>(info.size));
  } else {
    f(float{}, Arrays<float>(info.size));
  }
}

void ppo_loss_into(const py::object& entries, const py::object& logprob_grad,
                   const py::object& entropy_grad, const py::buffer& logprobs,
                   const py::object& entropy, const py::object& old, const py::object& advantages,
                   const py::object& weights, const py::object& ref, const py::object& rollout,
                   const PPOSettings& settings) {
  with_arrays_like(logprobs, [&](auto zero, auto arrays) {
    using T = decltype(zero);
    PPOTokens<T> in;
    in.count = logprobs.request().size;
    in.logprobs = arrays.input(logprobs, "logprobs");
    in.entropy = arrays.optional(entropy, "entropy");
    in.old = arrays.input(old, "old_logprobs");
    in.advantages = arrays.input(advantages, "advantages");
    in.weights = arrays.input(weights, "weights");
    in.ref = arrays.optional(ref, "ref_logprobs");
    in.rollout = arrays.optional(rollout, "rollout_logprobs");
    T* g = arrays.output(logprob_grad, "logprob_grad");
    T* h = arrays.output(entropy_grad, "entropy_grad");
    double* out = arrays.entries(entries, kPPOEntries);
    const py::gil_scoped_release nogil;
    const auto made = ppo_loss(in, settings, g, h);
    std::copy(made.begin(), made.end(), out);
  });
}

}  // namespace

void register_ppo_loss(py::module_& m) {
  m.def(
      "ppo_loss",
      [](const py::object& entries, const py::object& logprob_grad, const py::object& entropy_grad,
         const py::buffer& logprobs, const py::object& entropy, const py::object& old,
         const py::object& advantages, const py::object& weights, const py::object& ref,
         const py::object& rollout, double low, double high, double dual_clip, double kl_coef,
         int kl, double ent_coef, int correction, double is_cap, double is_low, double is_high) {
        const PPOSettings settings{low,      high, dual_clip, kl_coef,
                                   kl,       ent_coef, static_cast<Correction>(correction),
                                   is_cap,   is_low, is_high};
        ppo_loss_into(entries, logprob_grad, entropy_grad, logprobs, entropy, old, advantages,
                      weights, ref, rollout, settings);
      },
      py::arg("entries"), py::arg("logprob_grad"), py::arg("entropy_grad").none(true),
      py::arg("logprobs"), py::arg("entropy"), py::arg("old_logprobs"), py::arg("advantages"),
      py::arg("weights"), py::arg("ref_logprobs"), py::arg("rollout_logprobs"), py::kw_only(),
      py::arg("low"), py::arg("high"), py::arg("dual_clip"), py::arg("kl_coef"), py::arg("kl"),
      py::arg("ent_coef"), py::arg("correction"), py::arg("is_cap"), py::arg("is_low"),
      py::arg("is_high"), "Writes the PPO loss and its metrics, and the gradients.");
}

}  // namespace fastppo
