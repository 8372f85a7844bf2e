// add_rms_norm on CUDA: a team of lanes holds a row; see common/norm_row.cuh.
#pragma once

#include "add_rms_norm/add_rms_norm.h"
#include "common/added_rows.cuh"

namespace keye_ops {

struct AddRmsNormKernelParams {
  AddRmsNormParams op;
  NormPlan plan;
};

template <class T, int kChunks>
KEYE_KERNEL(kNormMaxThreads, 2)
add_rms_norm_forward_kernel(KEYE_PARAMS AddRmsNormKernelParams params) {
  const AddedRows<T, AddRmsNormParams> rows{params.op};
  norm_forward<T, NormKind::kRms, kChunks>(params.plan, rows);
}

template <class T, int kChunks>
KEYE_KERNEL(kNormMaxThreads, 1)
add_rms_norm_backward_kernel(KEYE_PARAMS AddRmsNormKernelParams params) {
  const AddedRows<T, AddRmsNormParams> rows{params.op};
  norm_backward<T, NormKind::kRms, kChunks>(params.plan, rows);
}

}  // namespace keye_ops
