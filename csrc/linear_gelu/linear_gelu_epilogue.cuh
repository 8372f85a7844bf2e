// GELU of the fragments that CUTLASS's epilogues hold.
#pragma once

#include <cutlass/array.h>

#include "common/gelu.h"

namespace keye_ops {

// As CUTLASS takes functors: a template of the fragment.
template <class Fragment>
struct GeluErf {
  CUTLASS_DEVICE Fragment operator()(const Fragment& x) const {
    Fragment y;
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < Fragment::kElements; i++) y[i] = x[i] * gelu_gate(x[i]).value;
    return y;
  }
};

template <class Fragment>
struct GeluTanh {
  CUTLASS_DEVICE Fragment operator()(const Fragment& x) const {
    Fragment y;
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < Fragment::kElements; i++) y[i] = x[i] * gelu_tanh_gate(x[i]).value;
    return y;
  }
};

}  // namespace keye_ops
