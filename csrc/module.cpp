#include "register.hpp"

PYBIND11_MODULE(_C, m) {
  m.doc() = "Packing without padding (arena, bins, partitions) and CPU forms of ops.";
  fastppo::register_pack(m);
  fastppo::register_balance(m);
  fastppo::register_gae(m);
  fastppo::register_ppo_loss(m);
}
