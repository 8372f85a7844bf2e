// add_layer_norm on CUDA: a team of lanes holds a row; see common/norm_row.cuh.
#pragma once

#include "add_layer_norm/add_layer_norm.h"
#include "common/added_rows.cuh"

namespace keye_ops {

struct AddLayerNormKernelParams {
  AddLayerNormParams op;
  NormPlan plan;
};

template <class T, int kChunks>
KEYE_KERNEL(kNormMaxThreads, 2)
add_layer_norm_forward_kernel(KEYE_PARAMS AddLayerNormKernelParams params) {
  const AddedRows<T, AddLayerNormParams> rows{params.op};
  norm_forward<T, NormKind::kLayer, kChunks>(params.plan, rows);
}

template <class T, int kChunks>
KEYE_KERNEL(kNormMaxThreads, 1)
add_layer_norm_backward_kernel(KEYE_PARAMS AddLayerNormKernelParams params) {
  const AddedRows<T, AddLayerNormParams> rows{params.op};
  norm_backward<T, NormKind::kLayer, kChunks>(params.plan, rows);
}

}  // namespace keye_ops
