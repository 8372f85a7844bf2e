// merge_norm on the CPU: the kernels, compiled once for every instruction set.
#pragma once

#include <cstdint>

#include "common/cpu_capability.h"
#include "common/dtype.h"
#include "merge_norm/merge_norm.h"

namespace keye_ops {

constexpr int64_t kMergeNormTokensPerPartial = 32;  // merged tokens behind one partial gradient

// Merged tokens [begin, end).
KEYE_DECLARE_FOR_ISAS(void merge_norm_forward_tokens(const MergeNormParams&, Dtype, int64_t begin,
                                                     int64_t end))
// One row of dweight_partial and dbias_partial, and dx of the patches behind it.
KEYE_DECLARE_FOR_ISAS(void merge_norm_backward_partial(const MergeNormParams&, Dtype,
                                                       int64_t partial))

}  // namespace keye_ops
