// One registration function per topic; module.cpp calls them all.

#pragma once

#include <pybind11/pybind11.h>

namespace fastppo {

void register_pack(pybind11::module_& m);
void register_balance(pybind11::module_& m);
void register_gae(pybind11::module_& m);
void register_ppo_loss(pybind11::module_& m);

}  // namespace fastppo
