// add_rms_norm on the CPU: the kernels, compiled once for every instruction set.
#pragma once

#include <cstdint>

#include "add_rms_norm/add_rms_norm.h"
#include "common/cpu_capability.h"
#include "common/dtype.h"

namespace keye_ops {

constexpr int64_t kAddRmsNormRowsPerPartial = 64;  // rows behind one partial gradient

// Rows [begin, end).
KEYE_DECLARE_FOR_ISAS(void add_rms_norm_forward_rows(const AddRmsNormParams&, Dtype, int64_t begin,
                                                     int64_t end))
// One row of dweight_partial, and dx of the rows behind it.
KEYE_DECLARE_FOR_ISAS(void add_rms_norm_backward_partial(const AddRmsNormParams&, Dtype,
                                                         int64_t partial))

}  // namespace keye_ops
