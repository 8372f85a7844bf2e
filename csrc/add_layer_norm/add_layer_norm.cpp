// add_layer_norm: schema, argument checks, output allocation.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "add_layer_norm/add_layer_norm_op.h"
#include "common/allocate.h"
#include "common/check.h"
#include "common/partial_sums.h"

namespace keye_ops {
namespace {

using torch::stable::Tensor;

constexpr const char* kOp = "add_layer_norm";

void check_rows(const char* name, const Tensor& tensor) {
  KEYE_CHECK(tensor.numel() == 0 || tensor.size(1) == 1 || tensor.stride(1) == 1, kOp, ": ", name,
             " must have unit last stride, got ", tensor.stride(1));
}

// Another tensor of the rows that `x`, called other_name, has.
void check_like(const char* name, const Tensor& tensor, const char* other_name, const Tensor& x) {
  KEYE_CHECK(tensor.dim() == 2 && tensor.size(0) == x.size(0) && tensor.size(1) == x.size(1), kOp,
             ": ", name, " must be [", x.size(0), ", ", x.size(1), "], got ", shape_of(tensor));
  check_same(kOp, name, tensor, other_name, x);
  check_rows(name, tensor);
}

void check_vector(const char* name, const Tensor& vector, const char* other_name, const Tensor& x) {
  KEYE_CHECK(vector.dim() == 1 && vector.size(0) == x.size(1), kOp, ": ", name, " must be [",
             x.size(1), "], got ", shape_of(vector));
  check_same(kOp, name, vector, other_name, x);
  KEYE_CHECK(vector.is_contiguous(), kOp, ": ", name, " must be contiguous, got stride ",
             vector.stride(0));
}

AddLayerNormParams add_layer_norm_params(const char* name, const Tensor& x, const Tensor& weight,
                                         double eps) {
  check_floating(kOp, name, x);
  KEYE_CHECK(x.dim() == 2, kOp, ": ", name, " must be [N, C], got ", shape_of(x));
  check_rows(name, x);
  check_vector("weight", weight, name, x);
  AddLayerNormParams params{};
  params.x = x.const_data_ptr();
  params.weight = weight.const_data_ptr();
  params.x_stride = stride_of(x, 0);
  params.total = x.size(0);
  params.hidden = x.size(1);
  params.eps = eps;
  return params;
}

AddLayerNormDevice device_of(const Tensor& tensor) {
  return tensor.is_cpu() ? AddLayerNormDevice::kCpu : AddLayerNormDevice::kCuda;
}

}  // namespace

AddLayerNormBackend& add_layer_norm_backend(AddLayerNormDevice device) {
  static AddLayerNormBackend backends[2] = {};
  return backends[static_cast<int>(device)];
}

std::tuple<Tensor, Tensor> add_layer_norm(const Tensor& x, std::optional<Tensor> residual,
                                          const Tensor& weight, const Tensor& bias, double eps) {
  AddLayerNormParams params = add_layer_norm_params("x", x, weight, eps);
  check_vector("bias", bias, "x", x);
  if (residual.has_value()) check_like("residual", *residual, "x", x);
  Tensor sum = residual.has_value() ? new_empty_like(x) : new_empty_like(x, {0});
  Tensor normed = new_empty_like(x);
  params.bias = bias.const_data_ptr();
  params.normed = normed.mutable_data_ptr();
  if (residual.has_value()) {
    params.residual = residual->const_data_ptr();
    params.residual_stride = stride_of(*residual, 0);
    params.sum = sum.mutable_data_ptr();
  }
  if (x.numel() > 0) {
    const AddLayerNormBackend& backend = add_layer_norm_backend(device_of(x));
    backend.forward(params, float_dtype_of(x.scalar_type()), x.get_device_index());
  }
  return {sum, normed};
}

std::tuple<Tensor, Tensor, Tensor> add_layer_norm_backward(std::optional<Tensor> dsum,
                                                           const Tensor& dnormed, const Tensor& sum,
                                                           const Tensor& weight, double eps) {
  AddLayerNormParams params = add_layer_norm_params("sum", sum, weight, eps);
  check_like("dnormed", dnormed, "sum", sum);
  if (dsum.has_value()) check_like("dsum", *dsum, "sum", sum);

  const AddLayerNormBackend& backend = add_layer_norm_backend(device_of(sum));
  const int32_t partial_dtype =
      backend.traits.partials_are_fp64 ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32();
  params.num_partials = backend.num_partials(sum.numel() > 0 ? params.total : 0);
  Tensor dx = new_empty_like(sum);
  Tensor dweight_partial = new_empty(sum, {params.num_partials, params.hidden}, partial_dtype);
  Tensor dbias_partial = new_empty(sum, {params.num_partials, params.hidden}, partial_dtype);
  params.dnormed = dnormed.const_data_ptr();
  params.dnormed_stride = stride_of(dnormed, 0);
  if (dsum.has_value()) {
    params.dsum = dsum->const_data_ptr();
    params.dsum_stride = stride_of(*dsum, 0);
  }
  params.dx = dx.mutable_data_ptr();
  params.dweight_partial = dweight_partial.mutable_data_ptr();
  params.dbias_partial = dbias_partial.mutable_data_ptr();
  if (sum.numel() > 0) {
    backend.backward(params, float_dtype_of(sum.scalar_type()), sum.get_device_index());
  }
  return {dx, sum_of_rows(dweight_partial, sum), sum_of_rows(dbias_partial, sum)};
}

STABLE_TORCH_LIBRARY_FRAGMENT(keye_ops, m) {
  m.def(
      "add_layer_norm(Tensor x, Tensor? residual, Tensor weight, Tensor bias, float eps=1e-06) "
      "-> (Tensor, Tensor)");
  m.def(
      "add_layer_norm_backward(Tensor? dsum, Tensor dnormed, Tensor sum, Tensor weight, "
      "float eps) -> (Tensor, Tensor, Tensor)");
}

}  // namespace keye_ops
