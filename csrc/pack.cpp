// fastppo._C: PackPlan, Arena.

#include <memory>
#include <new>

#include "read.hpp"
#include "register.hpp"

namespace fastppo {

namespace {

// Bytes aligned to kAlignment that Python reads and writes through the buffer protocol.
class Arena {
 public:
  explicit Arena(std::size_t nbytes)
      : nbytes_(nbytes),
        data_(static_cast<std::byte*>(::operator new(nbytes, std::align_val_t{kAlignment}))) {}

  std::byte* data() const { return data_.get(); }
  std::size_t nbytes() const { return nbytes_; }

 private:
  struct Delete {
    void operator()(std::byte* p) const { ::operator delete(p, std::align_val_t{kAlignment}); }
  };
  std::size_t nbytes_;
  std::unique_ptr<std::byte, Delete> data_;
};

class PackPlan {
 public:
  PackPlan(py::handle prompts, py::handle responses, py::handle prompt_lengths,
           py::handle response_lengths, py::handle logprobs, py::handle mask,
           py::handle truncated)
      : plan_(read(prompts, responses, prompt_lengths, response_lengths, logprobs, mask,
                   truncated)) {}

  const Plan& plan() const { return plan_; }

  py::dict fields() const {
    py::dict table;
    for (const Field& field : plan_.fields()) {
      table[field.name] = py::make_tuple(field.offset, dtype_name(field.dtype), field.count);
    }
    return table;
  }

  void fill(py::handle out) const {
    Py_buffer view;
    if (PyObject_GetBuffer(out.ptr(), &view, PyBUF_WRITABLE | PyBUF_C_CONTIGUOUS) != 0) {
      PyErr_Clear();
      fail_type("out", "a writable contiguous buffer", Py_TYPE(out.ptr())->tp_name);
    }
    const std::unique_ptr<Py_buffer, void (*)(Py_buffer*)> release(&view, PyBuffer_Release);
    if (static_cast<std::size_t>(view.len) < plan_.nbytes()) {
      fail("out", "≥ " + std::to_string(plan_.nbytes()) + " bytes", std::to_string(view.len));
    }
    const std::size_t past = reinterpret_cast<std::uintptr_t>(view.buf) % kAlignment;
    if (past != 0) {
      fail("out", "an address that is a multiple of " + std::to_string(kAlignment),
           "one " + std::to_string(past) + " past it");
    }
    const py::gil_scoped_release nogil;
    plan_.fill(static_cast<std::byte*>(view.buf));
  }

  std::unique_ptr<Arena> arena() const {
    auto arena = std::make_unique<Arena>(plan_.nbytes());
    const py::gil_scoped_release nogil;
    plan_.fill(arena->data());
    return arena;
  }

 private:
  Plan read(py::handle prompts, py::handle responses, py::handle prompt_lengths,
            py::handle response_lengths, py::handle logprobs, py::handle mask,
            py::handle truncated) {
    const auto per_token = [&](py::handle object, const char* name, Kind kind) {
      if (object.is_none()) return Ragged{};
      return reader_.ragged(object, response_lengths, name, "response_lengths", kind);
    };
    Ragged prompt =
        reader_.ragged(prompts, prompt_lengths, "prompts", "prompt_lengths", Kind::integer);
    Ragged response = reader_.ragged(responses, response_lengths, "responses",
                                     "response_lengths", Kind::integer);
    const Ragged floats = per_token(logprobs, "rollout_logprobs", Kind::floating);
    const Ragged bools = per_token(mask, "loss_mask", Kind::boolean);
    Segment cut;
    if (!truncated.is_none()) cut = reader_.sequence(truncated, "truncated", Kind::boolean);
    return Plan(std::move(prompt), std::move(response), logprobs.is_none() ? nullptr : &floats,
                mask.is_none() ? nullptr : &bools, truncated.is_none() ? nullptr : &cut);
  }

  Reader reader_;  // before plan_, which points into it
  Plan plan_;
};

}  // namespace

void register_pack(py::module_& m) {
  m.attr("ALIGNMENT") = kAlignment;

  py::class_<Arena>(m, "Arena", py::buffer_protocol(),
                    "Bytes aligned to ALIGNMENT, readable and writable as a buffer.")
      .def_buffer([](Arena& arena) {
        return py::buffer_info(reinterpret_cast<std::uint8_t*>(arena.data()),
                               static_cast<py::ssize_t>(arena.nbytes()));
      })
      .def_property_readonly("nbytes", &Arena::nbytes)
      .def("__len__", &Arena::nbytes);

  py::class_<PackPlan>(m, "PackPlan", "Checked sizes and field table of one packed batch.")
      .def(py::init<py::object, py::object, py::object, py::object, py::object, py::object,
                    py::object>(),
           py::arg("prompts"), py::arg("responses"), py::kw_only(),
           py::arg("prompt_lengths") = py::none(), py::arg("response_lengths") = py::none(),
           py::arg("rollout_logprobs") = py::none(), py::arg("loss_mask") = py::none(),
           py::arg("truncated") = py::none())
      .def_property_readonly("num_sequences",
                             [](const PackPlan& p) { return p.plan().num_sequences(); })
      .def_property_readonly("num_tokens", [](const PackPlan& p) { return p.plan().num_tokens(); })
      .def_property_readonly("num_responses",
                             [](const PackPlan& p) { return p.plan().num_responses(); })
      .def_property_readonly("max_seqlen", [](const PackPlan& p) { return p.plan().max_seqlen(); })
      .def_property_readonly("nbytes", [](const PackPlan& p) { return p.plan().nbytes(); })
      .def_property_readonly("fields", &PackPlan::fields,
                             "name → (offset in bytes, dtype, number of elements)")
      .def("fill", [](const PackPlan& p, const py::object& out) { p.fill(out); }, py::arg("out"),
           "Writes the nbytes of the arena into a writable buffer aligned to ALIGNMENT.")
      .def("arena", &PackPlan::arena, "A new filled Arena.");
}

}  // namespace fastppo
