// rope's CUDA kernels on the host executor: every tensor becomes a guarded copy.
#include <string>
#include <vector>

#include "host_executor/kernels.h"
#include "rope/rope_host_cuda.h"
#include "rope/rope_launch.cuh"

namespace keye_ops {
namespace {

using host_executor::Dimension;
using host_executor::Role;

// Strides are in elements.
template <class P>
void guard_argument(const std::string& name, P*& p, int64_t element_size,
                    std::vector<Dimension> dimensions, Role role) {
  if (p == nullptr) return;
  for (Dimension& dimension : dimensions) dimension.stride *= element_size;
  p = static_cast<P*>(host_executor::guard(name.c_str(), p, element_size, dimensions, role));
}

void guard_tensor(const std::string& name, const RopeParams& params, int64_t size, RopeTensor& t) {
  const auto rows = [&](int64_t stride_token, int64_t stride_head) -> std::vector<Dimension> {
    return {{params.total, stride_token}, {t.num_heads, stride_head}, {params.head_dim, 1}};
  };
  const bool in_place = t.x == t.out;
  guard_argument(name, t.x, size, rows(t.x_stride_token, t.x_stride_head),
                 in_place ? Role::kInOut : Role::kInput);
  guard_argument(name + "'s output", t.out, size, rows(t.out_stride_token, t.out_stride_head),
                 in_place ? Role::kInOut : Role::kOutput);
  guard_argument("d" + name, t.dout, size, rows(t.dout_stride_token, t.dout_stride_head),
                 Role::kInput);
  guard_argument(name + "_norm_weight", t.norm_weight, size, {{params.head_dim, 1}}, Role::kInput);
  guard_argument("d" + name + "_norm_weight", t.dweight_partial, sizeof(float),
                 {{params.num_partials, params.head_dim}, {params.head_dim, 1}}, Role::kOutput);
}

template <class Launch>
void on_host(const Launch& launch, RopeParams params, Dtype dtype, int device_index) {
  const struct Freed {
    ~Freed() { host_executor::free_copies(); }
  } freed;
  guard_argument("position_ids", params.position_ids, params.position_is_int64 ? 8 : 4,
                 {{params.num_axes, params.position_stride_axis},
                  {params.total, params.position_stride_token}},
                 Role::kInput);
  guard_argument("inv_freq", params.inv_freq, sizeof(float), {{params.head_dim / 2, 1}},
                 Role::kInput);
  guard_argument("axis", params.axis, sizeof(int32_t), {{params.head_dim / 2, 1}}, Role::kInput);
  guard_tensor("q", params, size_of(dtype), params.q);
  guard_tensor("k", params, size_of(dtype), params.k);
  launch(params, dtype, device_index);
  host_executor::copy_back();
}

}  // namespace

void rope_forward_host_cuda(const RopeParams& params, Dtype dtype, int device_index) {
  on_host(launch_rope_forward, params, dtype, device_index);
}

void rope_backward_host_cuda(const RopeParams& params, Dtype dtype, int device_index) {
  on_host(launch_rope_backward, params, dtype, device_index);
}

int rope_num_partials_host_cuda(int64_t total) { return rope_num_partials(total); }

// ---- launches by name, past the op's checks: with any grid, and values that ops would refuse ----

namespace {

using host_executor::Arguments;

RopeTensor named_tensor(const Arguments& arguments, const std::string& name, int head_dim) {
  RopeTensor t{};
  t.x = arguments.array<void>(name);
  t.out = arguments.array<void>("out_" + name);
  t.dout = arguments.array_if_any<void>("d" + name);
  t.norm_weight = arguments.array_if_any<void>(name + "_norm_weight");
  t.dweight_partial = arguments.array_if_any<void>("d" + name + "_norm_weight");
  t.num_heads = static_cast<int>(arguments.integer(name + "_heads"));
  t.x_stride_head = t.out_stride_head = t.dout_stride_head = head_dim;
  t.x_stride_token = arguments.integer(name + "_stride_token");
  t.out_stride_token = t.dout_stride_token = int64_t{head_dim} * t.num_heads;
  return t;
}

template <class T>
host_executor::BoundKernel bind_rope(RopeMode mode, const RopeKernelParams& params) {
  switch (mode) {
    case RopeMode::kRotate:
      return host_executor::bind_kernel(&rope_kernel<T, RopeMode::kRotate>, params);
    case RopeMode::kNormRotate:
      return host_executor::bind_kernel(&rope_kernel<T, RopeMode::kNormRotate>, params);
    default:
      return host_executor::bind_kernel(&rope_kernel<T, RopeMode::kNormBackward>, params);
  }
}

const bool kRegistered = host_executor::register_kernel("rope", [](const Arguments& arguments) {
  RopeKernelParams params{};
  RopeParams& rope = params.rope;
  rope.head_dim = static_cast<int>(arguments.integer("head_dim"));
  rope.q = named_tensor(arguments, "q", rope.head_dim);
  rope.k = named_tensor(arguments, "k", rope.head_dim);
  rope.position_ids = arguments.array<void>("position_ids");
  rope.inv_freq = arguments.array<float>("inv_freq");
  rope.axis = arguments.array<int32_t>("axis");
  rope.error_word = arguments.array<ErrorWord>("error_word");
  rope.total = arguments.integer("total");
  rope.position_stride_axis = rope.total;
  rope.position_stride_token = 1;
  rope.num_axes = static_cast<int>(arguments.integer("num_axes"));
  rope.norm_eps = arguments.number("norm_eps");
  rope.position_is_int64 = arguments.integer("position_is_int64") != 0;
  rope.interleaved = arguments.integer("interleaved") != 0;
  rope.inverse = arguments.integer("inverse") != 0;
  params.rows_per_item = static_cast<int>(arguments.integer("rows_per_item"));
  params.items_per_token = static_cast<int>(arguments.integer("items_per_token"));
  const auto mode = static_cast<RopeMode>(arguments.integer("mode"));
  switch (arguments.integer("dtype")) {
    case 0:
      return bind_rope<float>(mode, params);
    case 1:
      return bind_rope<Half>(mode, params);
    default:
      return bind_rope<BFloat16>(mode, params);
  }
});

}  // namespace

}  // namespace keye_ops
