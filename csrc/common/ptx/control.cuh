// What the compiler keeps in registers, registers of a warpgroup, and grids that overlap.
#pragma once

#include <cstdint>

#include "common/thread.cuh"

namespace keye_ops::ptx {

// No instruction: the compiler takes the register for changed, so that it computes what comes from
// it again instead of keeping that in more registers.
template <class T>
KEYE_DEVICE void forget(T& word) {
  static_assert(sizeof(T) == 4, "a register has 32 bits");
  KEYE_CUDA_OR_HOST(asm volatile("" : "+r"(word)), static_cast<void>(word));
}

// Registers a thread: a multiple of 8 from 24 to 256; executed by the whole warpgroup.
// #miscellaneous-instructions-setmaxnreg
template <int kCount>
KEYE_DEVICE void setmaxnreg_inc() {
  static_assert(kCount % 8 == 0 && kCount >= 24 && kCount <= 256,
                "setmaxnreg takes 24, 32 ... 256");
  KEYE_CUDA_OR_HOST(asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount)),
                    host_executor::set_max_registers(kCount, true));
}
template <int kCount>
KEYE_DEVICE void setmaxnreg_dec() {
  static_assert(kCount % 8 == 0 && kCount >= 24 && kCount <= 256,
                "setmaxnreg takes 24, 32 ... 256");
  KEYE_CUDA_OR_HOST(asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount)),
                    host_executor::set_max_registers(kCount, false));
}

// Waits until the grids before this one have completed and their stores are visible.
// #parallel-synchronization-and-communication-instructions-griddepcontrol
KEYE_DEVICE void griddepcontrol_wait() {
  KEYE_CUDA_OR_HOST(asm volatile("griddepcontrol.wait;" :: : "memory"),
                    host_executor::grid_dependency_wait());
}
// The grid after this one may start when every block has come here.
KEYE_DEVICE void griddepcontrol_launch_dependents() {
  KEYE_CUDA_OR_HOST(asm volatile("griddepcontrol.launch_dependents;" :: : "memory"),
                    host_executor::grid_dependency_launch());
}

}  // namespace keye_ops::ptx
