// linear_gelu: schema, argument checks, and the matrix products, which are torch's.
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

void check_linear_gelu(const Tensor& x, const Tensor& weight, const Tensor& bias,
                       const std::string& approximate) {
  check_floating(kOp, "x", x);
  KEYE_CHECK(x.dim() == 2, kOp, ": x must be [M, K], got ", shape_of(x));
  KEYE_CHECK(weight.dim() == 2 && weight.size(1) == x.size(1), kOp, ": weight must be [N, ",
             x.size(1), "], got ", shape_of(weight));
  check_same(kOp, "weight", weight, "x", x);
  KEYE_CHECK(bias.dim() == 1 && bias.size(0) == weight.size(0), kOp, ": bias must be [",
             weight.size(0), "], got ", shape_of(bias));
  check_same(kOp, "bias", bias, "x", x);
  KEYE_CHECK(approximate == "none" || approximate == "tanh", kOp,
             ": approximate must be \"none\" or \"tanh\", got ", approximate);
}

// The variants with an output are used because autocast leaves them their dtype.
template <size_t kCount>
Tensor call(const char* name, std::array<StableIValue, kCount> arguments) {
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, "out", arguments.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(arguments[0]);
}

// x @ weight.T + bias, contiguous
Tensor linear(const Tensor& x, const Tensor& weight, const Tensor& bias) {
  const Tensor out = new_empty_like(x, {x.size(0), weight.size(0)});
  const std::optional<Tensor> optional_bias = bias;
  return call<4>("aten::linear", {from(x), from(weight), from(optional_bias), from(out)});
}

Tensor product(const Tensor& a, const Tensor& b) {
  const Tensor out = new_empty_like(a, {a.size(0), b.size(1)});
  return call<3>("aten::mm", {from(a), from(b), from(out)});
}

void pass(Tensor& hidden, const void* dout, const std::string& approximate) {
  const LinearGeluParams params{hidden.mutable_data_ptr(), dout, hidden.numel(),
                                approximate == "tanh"};
  const auto device = hidden.is_cpu() ? LinearGeluDevice::kCpu : LinearGeluDevice::kCuda;
  if (params.numel > 0) {
    linear_gelu_backend(device).pass(params, hidden.scalar_type(), hidden.get_device_index());
  }
}

}  // namespace

LinearGeluBackend& linear_gelu_backend(LinearGeluDevice device) {
  static LinearGeluBackend backends[2] = {};
  return backends[static_cast<int>(device)];
}

Tensor linear_gelu(const Tensor& x, const Tensor& weight, const Tensor& bias,
                   const std::string& approximate) {
  check_linear_gelu(x, weight, bias, approximate);
  Tensor hidden = linear(x, weight, bias);
  pass(hidden, nullptr, approximate);
  return hidden;
}

std::tuple<Tensor, Tensor, Tensor> linear_gelu_backward(const Tensor& dout, const Tensor& x,
                                                        const Tensor& weight, const Tensor& bias,
                                                        const std::string& approximate) {
  check_linear_gelu(x, weight, bias, approximate);
  KEYE_CHECK(dout.dim() == 2 && dout.size(0) == x.size(0) && dout.size(1) == weight.size(0), kOp,
             ": dout must be [", x.size(0), ", ", weight.size(0), "], got ", shape_of(dout));
  check_same(kOp, "dout", dout, "x", x);
  const Tensor rows = dout.is_contiguous() ? dout : torch::stable::contiguous(dout);
  Tensor dhidden = linear(x, weight, bias);
  pass(dhidden, rows.const_data_ptr(), approximate);
  return {product(dhidden, weight), product(torch::stable::transpose(dhidden, 0, 1), x),
          sum_of_rows(dhidden, x)};
}

STABLE_TORCH_LIBRARY_FRAGMENT(keye_ops, m) {
  m.def("linear_gelu(Tensor x, Tensor weight, Tensor bias, str approximate=\"none\") -> Tensor");
  m.def(
      "linear_gelu_backward(Tensor dout, Tensor x, Tensor weight, Tensor bias, str approximate) "
      "-> (Tensor, Tensor, Tensor)");
}

}  // namespace keye_ops
