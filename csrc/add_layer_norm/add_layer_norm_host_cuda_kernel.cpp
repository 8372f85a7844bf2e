// add_layer_norm's CUDA kernels on the host executor: every tensor becomes a guarded copy.
#include "add_layer_norm/add_layer_norm_host_cuda.h"
#include "add_layer_norm/add_layer_norm_launch.cuh"
#include "common/norm_host_cuda.h"

namespace keye_ops {
namespace {

using host_executor::Role;

template <class Launch>
void on_host(const Launch& launch, AddLayerNormParams params, Dtype dtype, int device_index) {
  launch_guarded([&] {
    guard_added_rows(params, dtype);
    guard_tensor("bias", params.bias, size_of(dtype), {{params.hidden, 1}}, Role::kInput);
    guard_tensor("dbias_partial", params.dbias_partial, sizeof(float),
                 {{params.num_partials, params.hidden}, {params.hidden, 1}}, Role::kOutput);
    launch(params, dtype, device_index);
  });
}

}  // namespace

void add_layer_norm_forward_host_cuda(const AddLayerNormParams& params, Dtype dtype,
                                      int device_index) {
  on_host([](const auto&... args) { launch_add_layer_norm_forward(args...); }, params, dtype,
          device_index);
}

void add_layer_norm_backward_host_cuda(const AddLayerNormParams& params, Dtype dtype,
                                       int device_index) {
  on_host([](const auto&... args) { launch_add_layer_norm_backward(args...); }, params, dtype,
          device_index);
}

int add_layer_norm_num_partials_host_cuda(int64_t rows) { return norm_num_partials(rows); }

// ---- launches by name, past the op's checks and with any grid ----

namespace {

const bool kRegistered =
    host_executor::register_kernel("add_layer_norm", [](const host_executor::Arguments& arguments) {
      const AddLayerNormKernelParams params{named_added_rows<AddLayerNormParams>(arguments),
                                            named_norm_plan(arguments)};
      const bool backward = arguments.integer("backward") != 0;
      return bind_norm(arguments, params, [&](auto type, auto chunks) {
        using T = decltype(type);
        constexpr int kChunks = decltype(chunks)::value;
        return backward ? &add_layer_norm_backward_kernel<T, kChunks>
                        : &add_layer_norm_forward_kernel<T, kChunks>;
      });
    });

}  // namespace

}  // namespace keye_ops
