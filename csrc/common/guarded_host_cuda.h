// Launches of an op on the host executor, with guarded copies in the places of its tensors.
#pragma once

#include <vector>

#include "host_executor/kernels.h"

namespace keye_ops {

// Puts a guarded copy in the place of a tensor, if there is one. Strides are in elements.
template <class P>
void guard_tensor(const char* name, P*& p, int64_t element_size,
                  std::vector<host_executor::Dimension> dimensions, host_executor::Role role) {
  if (p == nullptr) return;
  for (host_executor::Dimension& dimension : dimensions) dimension.stride *= element_size;
  p = static_cast<P*>(host_executor::guard(name, p, element_size, dimensions, role));
}

template <class Launch>
void launch_guarded(const Launch& launch) {
  const struct Freed {
    ~Freed() { host_executor::free_copies(); }
  } freed;
  launch();
  host_executor::copy_back();
}

}  // namespace keye_ops
