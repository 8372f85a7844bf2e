// rope on the CPU: the kernels, compiled once for every instruction set.
#pragma once

#include <cstdint>

#include "common/cpu_capability.h"
#include "common/dtype.h"
#include "rope/rope.h"

namespace keye_ops {

constexpr int64_t kRopeTokensPerPartial = 32;  // tokens behind one row of dweight_partial

// Tokens [begin, end) of q and k.
KEYE_DECLARE_FOR_ISAS(void rope_forward_tokens(const RopeParams&, Dtype, int64_t begin,
                                               int64_t end))
// Rows [begin, end) of dweight_partial, and dx of the tokens behind them.
KEYE_DECLARE_FOR_ISAS(void rope_backward_partials(const RopeParams&, Dtype, int64_t begin,
                                                  int64_t end))

}  // namespace keye_ops
