#include "register.hpp"

PYBIND11_MODULE(_C, m) {
  m.doc() = "Packing without padding: ragged sequences into one arena, bins, partitions.";
  fastppo::register_pack(m);
  fastppo::register_balance(m);
}
