// linear_gelu on the CPU: the pass, compiled once for every instruction set.
#pragma once

#include <cstdint>

#include "common/cpu_capability.h"
#include "common/dtype.h"
#include "linear_gelu/linear_gelu.h"

namespace keye_ops {

// Elements [begin, end). An element's bits do not depend on the range it is in.
KEYE_DECLARE_FOR_ISAS(void linear_gelu_pass(const LinearGeluParams&, Dtype, int64_t begin,
                                            int64_t end))

}  // namespace keye_ops
