// linear_gelu: schema, argument checks, and the matrix products, which are torch's but for the one
// that a device fuses with the rest.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <array>
#include <optional>

#include "common/allocate.h"
#include "common/check.h"
#include "common/partial_sums.h"
#include "linear_gelu/linear_gelu_op.h"

namespace keye_ops {
namespace {

using torch::stable::Tensor;
using torch::stable::detail::from;

constexpr const char* kOp = "linear_gelu";

void check_product(const Tensor& x, const Tensor& weight, const std::string& approximate) {
  check_floating(kOp, "x", x);
  KEYE_CHECK(x.dim() == 2, kOp, ": x must be [M, K], got ", shape_of(x));
  KEYE_CHECK(weight.dim() == 2 && weight.size(1) == x.size(1), kOp, ": weight must be [N, ",
             x.size(1), "], got ", shape_of(weight));
  check_same(kOp, "weight", weight, "x", x);
  KEYE_CHECK(approximate == "none" || approximate == "tanh", kOp,
             ": approximate must be \"none\" or \"tanh\", got ", approximate);
}

void check_bias(const Tensor& x, const Tensor& weight, const Tensor& bias) {
  KEYE_CHECK(bias.dim() == 1 && bias.size(0) == weight.size(0), kOp, ": bias must be [",
             weight.size(0), "], got ", shape_of(bias));
  check_same(kOp, "bias", bias, "x", x);
}

void check_hidden(const char* name, const Tensor& tensor, const Tensor& x, const Tensor& weight) {
  KEYE_CHECK(tensor.dim() == 2 && tensor.size(0) == x.size(0) && tensor.size(1) == weight.size(0),
             kOp, ": ", name, " must be [", x.size(0), ", ", weight.size(0), "], got ",
             shape_of(tensor));
  check_same(kOp, name, tensor, "x", x);
}

// The variants with an output are used because autocast leaves them their dtype.
template <size_t kCount>
Tensor call(const char* name, std::array<StableIValue, kCount> arguments) {
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, "out", arguments.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(arguments[0]);
}

// x @ weight.T + bias, into out
void linear(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& out) {
  const std::optional<Tensor> optional_bias = bias;
  call<4>("aten::linear", {from(x), from(weight), from(optional_bias), from(out)});
}

Tensor product(const Tensor& a, const Tensor& b) {
  const Tensor out = new_empty_like(a, {a.size(0), b.size(1)});
  return call<3>("aten::mm", {from(a), from(b), from(out)});
}

LinearGeluBackend& backend_of(const Tensor& tensor) {
  return linear_gelu_backend(tensor.is_cpu() ? LinearGeluDevice::kCpu : LinearGeluDevice::kCuda);
}

void pass(Tensor& out, const void* hidden, const void* dout, const std::string& approximate) {
  const LinearGeluParams params{out.mutable_data_ptr(), hidden, dout, out.numel(),
                                approximate == "tanh"};
  if (params.numel == 0) return;
  backend_of(out).pass(params, float_dtype_of(out.scalar_type()), out.get_device_index());
}

// As kernels read it: contiguous and aligned to 16 bytes.
Tensor as_vectors(const Tensor& tensor) {
  const bool aligned = reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0;
  if (!tensor.is_contiguous()) return torch::stable::contiguous(tensor);
  return aligned ? tensor : torch::stable::clone(tensor);
}

// Into out, by one GEMM; or false.
bool fused(const Tensor& x, const Tensor& weight, const Tensor& bias, bool tanh, Tensor& out) {
  const auto fused_gemm = backend_of(x).fused;
  if (fused_gemm == nullptr || x.scalar_type() != torch::headeronly::ScalarType::BFloat16) {
    return false;
  }
  // NOTE: not stride_of, to which a column broadcast to all is no different from a single one.
  const bool unit_strides = x.stride(1) == 1 && weight.stride(1) == 1 && bias.is_contiguous() &&
                            is_aligned(bias.const_data_ptr());
  LinearGeluGemmParams params{};
  params.gemm = {x.const_data_ptr(),     weight.const_data_ptr(),
                 out.mutable_data_ptr(), row_stride(x),
                 row_stride(weight),     x.size(0),
                 weight.size(0),         x.size(1)};
  params.bias = bias.const_data_ptr();
  params.tanh = tanh;
  return unit_strides && is_fit(params.gemm) && fused_gemm(params, x.get_device_index());
}

}  // namespace

LinearGeluBackend& linear_gelu_backend(LinearGeluDevice device) {
  static LinearGeluBackend backends[2] = {};
  return backends[static_cast<int>(device)];
}

Tensor linear_gelu(const Tensor& x, const Tensor& weight, const Tensor& bias,
                   const std::string& approximate) {
  check_product(x, weight, approximate);
  check_bias(x, weight, bias);
  Tensor out = new_empty_like(x, {x.size(0), weight.size(0)});
  if (!fused(x, weight, bias, approximate == "tanh", out)) {
    linear(x, weight, bias, out);
    pass(out, out.const_data_ptr(), nullptr, approximate);
  }
  return out;
}

std::tuple<Tensor, Tensor> linear_gelu_forward(const Tensor& x, const Tensor& weight,
                                               const Tensor& bias, const std::string& approximate) {
  check_product(x, weight, approximate);
  check_bias(x, weight, bias);
  const Tensor hidden = new_empty_like(x, {x.size(0), weight.size(0)});
  linear(x, weight, bias, hidden);
  Tensor out = new_empty_like(hidden);
  pass(out, hidden.const_data_ptr(), nullptr, approximate);
  return {out, hidden};
}

std::tuple<Tensor, Tensor, Tensor> linear_gelu_backward(const Tensor& dout, const Tensor& x,
                                                        const Tensor& weight, const Tensor& hidden,
                                                        const std::string& approximate) {
  check_product(x, weight, approximate);
  check_hidden("hidden", hidden, x, weight);
  check_hidden("dout", dout, x, weight);
  const Tensor rows = as_vectors(dout), hidden_rows = as_vectors(hidden);
  Tensor dhidden = new_empty_like(hidden);
  pass(dhidden, hidden_rows.const_data_ptr(), rows.const_data_ptr(), approximate);
  return {product(dhidden, weight), product(torch::stable::transpose(dhidden, 0, 1), x),
          sum_of_rows(dhidden, x)};
}

STABLE_TORCH_LIBRARY_FRAGMENT(keye_ops, m) {
  m.def("linear_gelu(Tensor x, Tensor weight, Tensor bias, str approximate=\"none\") -> Tensor");
  m.def(
      "linear_gelu_forward(Tensor x, Tensor weight, Tensor bias, str approximate=\"none\") -> "
      "(Tensor, Tensor)");
  m.def(
      "linear_gelu_backward(Tensor dout, Tensor x, Tensor weight, Tensor hidden, str approximate) "
      "-> (Tensor, Tensor, Tensor)");
}

}  // namespace keye_ops
