// merge_norm's CUDA kernels on the host executor: every tensor becomes a guarded copy.
#include "common/norm_host_cuda.h"
#include "merge_norm/merge_norm_host_cuda.h"
#include "merge_norm/merge_norm_launch.cuh"

namespace keye_ops {
namespace {

using host_executor::Role;

template <class Launch>
void on_host(const Launch& launch, MergeNormParams params, Dtype dtype, int device_index) {
  const int64_t size = size_of(dtype), square = params.side * params.side;
  const int64_t tokens = params.total / square, width = square * params.hidden;
  const int64_t normed = params.norm_first ? params.hidden : width;
  launch_guarded([&] {
    guard_tensor("x", params.x, size, {{params.total, params.x_stride}, {params.hidden, 1}},
                 Role::kInput);
    guard_tensor("weight", params.weight, size, {{normed, 1}}, Role::kInput);
    guard_tensor("bias", params.bias, size, {{normed, 1}}, Role::kInput);
    guard_tensor("out", params.out, size, {{tokens, width}, {width, 1}}, Role::kOutput);
    guard_tensor("dout", params.dout, size, {{tokens, params.dout_stride}, {width, 1}},
                 Role::kInput);
    guard_tensor("dx", params.dx, size, {{params.total, params.hidden}, {params.hidden, 1}},
                 Role::kOutput);
    guard_tensor("dweight_partial", params.dweight_partial, sizeof(float),
                 {{params.num_partials, normed}, {normed, 1}}, Role::kOutput);
    guard_tensor("dbias_partial", params.dbias_partial, sizeof(float),
                 {{params.num_partials, normed}, {normed, 1}}, Role::kOutput);
    guard_tensor("grid", params.grid, sizeof(int32_t), {{params.num_images, 3}, {3, 1}},
                 Role::kInput);
    guard_tensor("image_offsets", params.image_offsets, sizeof(int32_t),
                 {{params.num_images + 1, 1}}, Role::kInput);
    launch(params, dtype, device_index);
  });
}

}  // namespace

void merge_norm_forward_host_cuda(const MergeNormParams& params, Dtype dtype, int device_index) {
  on_host([](const auto&... args) { launch_merge_norm_forward(args...); }, params, dtype,
          device_index);
}

void merge_norm_backward_host_cuda(const MergeNormParams& params, Dtype dtype, int device_index) {
  on_host([](const auto&... args) { launch_merge_norm_backward(args...); }, params, dtype,
          device_index);
}

int merge_norm_num_partials_host_cuda(int64_t rows) { return norm_num_partials(rows); }

// ---- launches by name, past the op's checks and with any grid ----

namespace {

const bool kRegistered =
    host_executor::register_kernel("merge_norm", [](const host_executor::Arguments& arguments) {
      MergeNormKernelParams params{};
      MergeNormParams& op = params.op;
      op.x = arguments.array<void>("x");
      op.out = arguments.array_if_any<void>("out");
      op.dout = arguments.array_if_any<void>("dout");
      op.dx = arguments.array_if_any<void>("dx");
      op.grid = arguments.array<int32_t>("grid");
      op.image_offsets = arguments.array<int32_t>("image_offsets");
      op.error_word = arguments.array<ErrorWord>("error_word");
      op.x_stride = arguments.integer("x_stride");
      op.dout_stride = arguments.integer("dout_stride");
      op.total = arguments.integer("total");
      op.hidden = arguments.integer("hidden");
      op.num_images = arguments.integer("num_images");
      op.side = arguments.integer("side");
      op.block_order = arguments.integer("block_order") != 0;
      op.norm_first = arguments.integer("norm_first") != 0;
      params.plan = named_norm_plan(arguments);
      params.patch_chunks = static_cast<int>(arguments.integer("patch_chunks"));
      params.per_patch_chunks = 1.0f / static_cast<float>(params.patch_chunks);
      params.per_side = 1.0f / static_cast<float>(op.side);
      const bool backward = arguments.integer("backward") != 0;
      return bind_norm(arguments, params, [&](auto type, auto chunks) {
        using T = decltype(type);
        constexpr int kChunks = decltype(chunks)::value;
        return backward ? &merge_norm_backward_kernel<T, kChunks>
                        : &merge_norm_forward_kernel<T, kChunks>;
      });
    });

}  // namespace

}  // namespace keye_ops
