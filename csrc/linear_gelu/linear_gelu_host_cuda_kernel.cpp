// linear_gelu's CUDA kernel on the host executor: every tensor becomes a guarded copy.
#include "host_executor/kernels.h"
#include "linear_gelu/linear_gelu_host_cuda.h"
#include "linear_gelu/linear_gelu_launch.cuh"

namespace keye_ops {
namespace {

using host_executor::Role;

template <class P>
void guard_values(const char* name, P*& p, int64_t numel, int64_t size, Role role) {
  p = static_cast<P*>(host_executor::guard(name, p, size, {{numel, size}}, role));
}

}  // namespace

void linear_gelu_pass_host_cuda(const LinearGeluParams& given, Dtype dtype, int device_index) {
  const struct Freed {
    ~Freed() { host_executor::free_copies(); }
  } freed;
  LinearGeluParams params = given;
  const int64_t size = size_of(dtype);
  const bool in_place = params.hidden == params.out;
  guard_values("hidden", params.hidden, params.numel, size, in_place ? Role::kInOut : Role::kInput);
  guard_values("out", params.out, params.numel, size, in_place ? Role::kInOut : Role::kOutput);
  if (params.dout != nullptr) {
    guard_values("dout", params.dout, params.numel, size, Role::kInput);
  }
  launch_linear_gelu_pass(params, dtype, device_index);
  host_executor::copy_back();
}

// ---- launches by name, past the op's checks ----

namespace {

using host_executor::Arguments;

template <class T>
host_executor::BoundKernel bind_linear_gelu(const LinearGeluParams& params) {
  if (params.dout == nullptr) {
    return params.tanh ? host_executor::bind_kernel(&linear_gelu_kernel<T, true, false>, params)
                       : host_executor::bind_kernel(&linear_gelu_kernel<T, false, false>, params);
  }
  return params.tanh ? host_executor::bind_kernel(&linear_gelu_kernel<T, true, true>, params)
                     : host_executor::bind_kernel(&linear_gelu_kernel<T, false, true>, params);
}

const bool kRegistered =
    host_executor::register_kernel("linear_gelu", [](const Arguments& arguments) {
      LinearGeluParams params{};
      params.out = arguments.array<void>("out");
      params.hidden = arguments.array_if_any<void>("hidden");
      if (params.hidden == nullptr) params.hidden = params.out;  // in place
      params.dout = arguments.array_if_any<void>("dout");
      params.numel = arguments.integer("numel");
      params.tanh = arguments.integer("tanh") != 0;
      switch (arguments.integer("dtype")) {
        case 0:
          return bind_linear_gelu<float>(params);
        case 1:
          return bind_linear_gelu<Half>(params);
        default:
          return bind_linear_gelu<BFloat16>(params);
      }
    });

}  // namespace

}  // namespace keye_ops
