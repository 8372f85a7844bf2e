// varlen_attention's CUDA kernels on the host executor: every tensor becomes a guarded copy.
#include <string>
#include <vector>

#include "common/guarded_host_cuda.h"
#include "varlen_attention/varlen_attention_host_cuda.h"
#include "varlen_attention/varlen_attention_launch.cuh"
#include "varlen_attention/varlen_attention_plan_launch.cuh"

namespace keye_ops {
namespace {

using host_executor::Role;

const AttentionHostCudaKernels* kernels = &kAttentionSm90HostCuda;

void guard_rows(const char* name, AttentionTensor& x, int64_t total, int64_t heads,
                int64_t head_dim, Role role) {
  guard_tensor(name, x.data, 2, {{total, x.stride_row}, {heads, x.stride_head}, {head_dim, 1}},
               role);
}

void guard_plan(AttentionPlan& plan, Role role) {
  guard_tensor("num_tiles", plan.num_tiles, sizeof(int32_t), {{2, 1}}, role);
  guard_tensor("q_tiles", plan.q_tiles, sizeof(AttentionTile), {{plan.max_q_tiles, 1}}, role);
  guard_tensor("k_tiles", plan.k_tiles, sizeof(AttentionTile), {{plan.max_k_tiles, 1}}, role);
}

void guard_all(VarlenAttentionParams& params, bool backward, Role delta = Role::kInput) {
  const int64_t heads = params.num_heads, kv_heads = params.num_kv_heads, size = params.head_dim;
  const int64_t total_q = params.total_q, total_k = params.total_k;
  guard_rows("q", params.q, total_q, heads, size, Role::kInput);
  guard_rows("k", params.k, total_k, kv_heads, size, Role::kInput);
  guard_rows("v", params.v, total_k, kv_heads, size, Role::kInput);
  guard_rows("out", params.out, total_q, heads, size, backward ? Role::kInput : Role::kOutput);
  guard_rows("dout", params.dout, total_q, heads, size, Role::kInput);
  guard_rows("dq", params.dq, total_q, heads, size, Role::kOutput);
  guard_rows("dk", params.dk, total_k, kv_heads, size, Role::kOutput);
  guard_rows("dv", params.dv, total_k, kv_heads, size, Role::kOutput);
  guard_tensor("softmax_lse", params.softmax_lse, sizeof(float), {{heads, total_q}, {total_q, 1}},
               backward ? Role::kInput : Role::kOutput);
  guard_tensor("delta", params.delta, sizeof(float), {{heads, total_q}, {total_q, 1}}, delta);
  guard_plan(params.plan, Role::kInput);
}

}  // namespace

void varlen_attention_set_capability(int capability) {
  kernels = capability == 90 ? &kAttentionSm90HostCuda : &kAttentionSm80HostCuda;
}

void varlen_attention_forward_host_cuda(const VarlenAttentionParams& given, Dtype dtype,
                                        int device_index) {
  VarlenAttentionParams params = given;
  launch_guarded([&] {
    guard_all(params, false);
    kernels->forward(params, dtype, device_index);
  });
}

void varlen_attention_backward_host_cuda(const VarlenAttentionParams& given, Dtype dtype,
                                         int device_index) {
  check_attention_gradients(given);
  // A launch at a time: each must write all of its outputs.
  const auto run = [&](AttentionHostCudaKernels::Launch launch, bool delta, bool keys,
                       bool queries) {
    VarlenAttentionParams params = given;
    if (!keys) params.dk.data = params.dv.data = nullptr;
    if (!queries) params.dq.data = nullptr;
    launch_guarded([&] {
      guard_all(params, true, delta ? Role::kOutput : Role::kInput);
      launch(params, dtype, device_index);
    });
  };
  run(kernels->delta, true, false, false);
  run(kernels->dkdv, false, true, false);
  run(kernels->dq, false, false, true);
}

void varlen_attention_plan_host_cuda(const VarlenAttentionParams& given, int32_t* memory,
                                     bool with_k_tiles, int device_index) {
  VarlenAttentionParams params = given;
  const int64_t words = attention_plan_words(params.total_q, params.total_k, params.num_segments);
  launch_guarded([&] {
    guard_tensor("cu_seqlens_q", params.cu_seqlens_q, sizeof(int32_t),
                 {{params.num_segments + 1, 1}}, Role::kInput);
    guard_tensor("cu_seqlens_k", params.cu_seqlens_k, sizeof(int32_t),
                 {{params.num_segments + 1, 1}}, Role::kInput);
    guard_tensor("plan", memory, sizeof(int32_t), {{words, 1}}, Role::kInOut);
    launch_attention_plan(params, memory, with_k_tiles, device_index);
  });
}

// ---- launches by name, past the op's checks: with offsets that ops would refuse ----

namespace {

using host_executor::Arguments;

const bool kRegistered =
    host_executor::register_kernel("attention_plan", [](const Arguments& arguments) {
      AttentionPlanParams params{};
      params.num_segments = arguments.integer("num_segments");
      const auto side = [&](const std::string& name) -> AttentionPlanSide {
        return {arguments.array<int32_t>("cu_seqlens_" + name), arguments.integer("total_" + name),
                arguments.array<AttentionTile>(name + "_tiles"),
                max_attention_tiles(arguments.integer("total_" + name), params.num_segments)};
      };
      params.q = side("q");
      params.k = side("k");
      params.num_tiles = arguments.array<int32_t>("num_tiles");
      params.error_word = arguments.array<ErrorWord>("error_word");
      params.causal = arguments.integer("causal") != 0;
      params.with_k_tiles = true;
      return host_executor::bind_kernel(&attention_plan_kernel, params);
    });

}  // namespace

}  // namespace keye_ops
