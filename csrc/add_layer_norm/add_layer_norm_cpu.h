// add_layer_norm on the CPU: the kernels, compiled once for every instruction set.
#pragma once

#include <cstdint>

#include "add_layer_norm/add_layer_norm.h"
#include "common/cpu_capability.h"
#include "common/dtype.h"

namespace keye_ops {

constexpr int64_t kAddLayerNormRowsPerPartial = 64;  // rows behind one partial gradient

// Rows [begin, end).
KEYE_DECLARE_FOR_ISAS(void add_layer_norm_forward_rows(const AddLayerNormParams&, Dtype,
                                                       int64_t begin, int64_t end))
// One row of dweight_partial and dbias_partial, and dx of the rows behind it.
KEYE_DECLARE_FOR_ISAS(void add_layer_norm_backward_partial(const AddLayerNormParams&, Dtype,
                                                           int64_t partial))

}  // namespace keye_ops
