// The rows of add_layer_norm and add_rms_norm, for common/norm_row.cuh.
#pragma once

#include "common/norm_row.cuh"

namespace keye_ops {

template <class T>
struct AddedRow : NormRow<T> {
  const T* x;
  T* dx;
};

template <class T, class Params>
struct AddedRows {
  const Params& params;

  KEYE_DEVICE AddedRow<T> at(int64_t index) const {
    const auto row = [&](const void* tensor, int64_t stride) {
      return static_cast<const T*>(tensor) + index * stride;
    };
    AddedRow<T> found{};
    found.inside = true;
    found.x = row(params.x, params.x_stride);
    if (params.residual != nullptr) found.residual = row(params.residual, params.residual_stride);
    found.sum = static_cast<T*>(params.sum) + index * params.hidden;
    found.out = static_cast<T*>(params.normed) + index * params.hidden;
    found.dout = row(params.dnormed, params.dnormed_stride);
    if (params.dsum != nullptr) found.dsum = row(params.dsum, params.dsum_stride);
    found.dx = static_cast<T*>(params.dx) + index * params.hidden;
    return found;
  }
  KEYE_DEVICE const T* x_of(const AddedRow<T>& row, int chunk) const {
    return row.x + int64_t{chunk} * kVectorSize<T>;
  }
  KEYE_DEVICE T* dx_of(const AddedRow<T>& row, int chunk) const {
    return row.dx + int64_t{chunk} * kVectorSize<T>;
  }
};

}  // namespace keye_ops
