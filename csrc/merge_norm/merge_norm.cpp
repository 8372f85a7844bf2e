// merge_norm: schema, argument checks, output allocation.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "common/allocate.h"
#include "common/check.h"
#include "common/grid.h"
#include "common/partial_sums.h"
#include "merge_norm/merge_norm_op.h"

namespace keye_ops {
namespace {

using torch::stable::Tensor;

constexpr const char* kOp = "merge_norm";

void check_rows(const char* name, const Tensor& tensor) {
  KEYE_CHECK(tensor.numel() == 0 || tensor.size(1) == 1 || tensor.stride(1) == 1, kOp, ": ", name,
             " must have unit last stride, got ", tensor.stride(1));
}

void check_vector(const char* name, const Tensor& vector, const Tensor& x) {
  check_same(kOp, name, vector, "x", x);
  KEYE_CHECK(vector.is_contiguous(), kOp, ": ", name, " must be contiguous, got stride ",
             vector.stride(0));
}

MergeNormDevice device_of(const Tensor& tensor) {
  return tensor.is_cpu() ? MergeNormDevice::kCpu : MergeNormDevice::kCuda;
}

// Checks all but the bias and the gradient, and describes the merge.
MergeNormParams merge_norm_params(const Tensor& x, const Tensor& weight, const Tensor& grid,
                                  const Tensor& image_offsets, int64_t side, bool block_order,
                                  double eps) {
  check_floating(kOp, "x", x);
  KEYE_CHECK(x.dim() == 2, kOp, ": x must be [N, C], got ", shape_of(x));
  KEYE_CHECK(side >= 1 && side <= kMergeNormMaxSide, kOp, ": spatial_merge_size must be from 1 to ",
             kMergeNormMaxSide, ", got ", side);
  const int64_t total = x.size(0), hidden = x.size(1), square = side * side;
  KEYE_CHECK(total % square == 0, kOp, ": x must have a multiple of ", square, " rows, got ",
             total);
  check_rows("x", x);
  const bool first = weight.dim() == 1 && weight.size(0) == hidden;
  KEYE_CHECK(first || (weight.dim() == 1 && weight.size(0) == square * hidden), kOp,
             ": weight must be [", hidden, "] (norm, then merge) or [", square * hidden,
             "] (after), got ", shape_of(weight));
  check_vector("weight", weight, x);
  const bool check_values = merge_norm_backend(device_of(x)).traits.checks_values;
  check_grid(kOp, grid, image_offsets, x, total, side, check_values);

  MergeNormParams params{};
  params.x = x.const_data_ptr();
  params.weight = weight.const_data_ptr();
  params.grid = grid.const_data_ptr<int32_t>();
  params.image_offsets = image_offsets.const_data_ptr<int32_t>();
  params.x_stride = stride_of(x, 0);
  params.total = total;
  params.hidden = hidden;
  params.num_images = grid.size(0);
  params.side = side;
  params.eps = eps;
  params.block_order = block_order;
  params.norm_first = first;
  return params;
}

}  // namespace

MergeNormBackend& merge_norm_backend(MergeNormDevice device) {
  static MergeNormBackend backends[2] = {};
  return backends[static_cast<int>(device)];
}

Tensor merge_norm(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& grid,
                  const Tensor& image_offsets, int64_t spatial_merge_size, bool block_order,
                  double eps) {
  MergeNormParams params =
      merge_norm_params(x, weight, grid, image_offsets, spatial_merge_size, block_order, eps);
  KEYE_CHECK(bias.dim() == 1 && bias.size(0) == weight.size(0), kOp, ": bias must be [",
             weight.size(0), "], got ", shape_of(bias));
  check_vector("bias", bias, x);
  const int64_t square = params.side * params.side;
  Tensor out = new_empty_like(x, {params.total / square, square * params.hidden});
  params.bias = bias.const_data_ptr();
  params.out = out.mutable_data_ptr();
  if (x.numel() > 0) {
    const MergeNormBackend& backend = merge_norm_backend(device_of(x));
    backend.forward(params, float_dtype_of(x.scalar_type()), x.get_device_index());
  }
  return out;
}

std::tuple<Tensor, Tensor, Tensor> merge_norm_backward(const Tensor& dout, const Tensor& x,
                                                       const Tensor& weight, const Tensor& grid,
                                                       const Tensor& image_offsets,
                                                       int64_t spatial_merge_size, bool block_order,
                                                       double eps) {
  MergeNormParams params =
      merge_norm_params(x, weight, grid, image_offsets, spatial_merge_size, block_order, eps);
  const int64_t square = params.side * params.side;
  const int64_t tokens = params.total / square, width = square * params.hidden;
  KEYE_CHECK(dout.dim() == 2 && dout.size(0) == tokens && dout.size(1) == width, kOp,
             ": dout must be [", tokens, ", ", width, "], got ", shape_of(dout));
  check_same(kOp, "dout", dout, "x", x);
  check_rows("dout", dout);

  const MergeNormBackend& backend = merge_norm_backend(device_of(x));
  const int32_t partial_dtype =
      backend.traits.partials_are_fp64 ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32();
  params.num_partials = backend.num_partials(x.numel() > 0 ? tokens : 0);
  Tensor dx = new_empty_like(x);
  Tensor dweight_partial = new_empty(x, {params.num_partials, weight.size(0)}, partial_dtype);
  Tensor dbias_partial = new_empty(x, {params.num_partials, weight.size(0)}, partial_dtype);
  params.dout = dout.const_data_ptr();
  params.dout_stride = stride_of(dout, 0);
  params.dx = dx.mutable_data_ptr();
  params.dweight_partial = dweight_partial.mutable_data_ptr();
  params.dbias_partial = dbias_partial.mutable_data_ptr();
  if (x.numel() > 0) {
    backend.backward(params, float_dtype_of(x.scalar_type()), x.get_device_index());
  }
  return {dx, sum_of_rows(dweight_partial, x), sum_of_rows(dbias_partial, x)};
}

STABLE_TORCH_LIBRARY_FRAGMENT(keye_ops, m) {
  m.def(
      "merge_norm(Tensor x, Tensor weight, Tensor bias, Tensor grid, Tensor image_offsets, "
      "int spatial_merge_size=2, bool block_order=False, float eps=1e-05) -> Tensor");
  m.def(
      "merge_norm_backward(Tensor dout, Tensor x, Tensor weight, Tensor grid, "
      "Tensor image_offsets, int spatial_merge_size, bool block_order, float eps) "
      "-> (Tensor, Tensor, Tensor)");
}

}  // namespace keye_ops
