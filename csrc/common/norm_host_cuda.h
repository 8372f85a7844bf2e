// The norms on the host executor: guards of their tensors, and launches by name.
#pragma once

#include <type_traits>
#include <vector>

#include "common/guarded_host_cuda.h"
#include "common/norm_launch.cuh"

namespace keye_ops {

// What add_layer_norm and add_rms_norm have in common.
template <class Params>
void guard_added_rows(Params& params, Dtype dtype) {
  using host_executor::Role;
  const int64_t size = size_of(dtype);
  const auto rows = [&](int64_t stride) -> std::vector<host_executor::Dimension> {
    return {{params.total, stride}, {params.hidden, 1}};
  };
  guard_tensor("x", params.x, size, rows(params.x_stride), Role::kInput);
  guard_tensor("residual", params.residual, size, rows(params.residual_stride), Role::kInput);
  guard_tensor("weight", params.weight, size, {{params.hidden, 1}}, Role::kInput);
  guard_tensor("sum", params.sum, size, rows(params.hidden), Role::kOutput);
  guard_tensor("normed", params.normed, size, rows(params.hidden), Role::kOutput);
  guard_tensor("dsum", params.dsum, size, rows(params.dsum_stride), Role::kInput);
  guard_tensor("dnormed", params.dnormed, size, rows(params.dnormed_stride), Role::kInput);
  guard_tensor("dx", params.dx, size, rows(params.hidden), Role::kOutput);
  guard_tensor("dweight_partial", params.dweight_partial, sizeof(float),
               {{params.num_partials, params.hidden}, {params.hidden, 1}}, Role::kOutput);
}

// ---- launches by name ----

template <class Params>
Params named_added_rows(const host_executor::Arguments& arguments) {
  Params params{};
  params.x = arguments.array<void>("x");
  params.residual = arguments.array_if_any<void>("residual");
  params.weight = arguments.array<void>("weight");
  params.sum = arguments.array_if_any<void>("sum");
  params.normed = arguments.array_if_any<void>("normed");
  params.dsum = arguments.array_if_any<void>("dsum");
  params.dnormed = arguments.array_if_any<void>("dnormed");
  params.dx = arguments.array_if_any<void>("dx");
  params.x_stride = arguments.integer("x_stride");
  params.total = arguments.integer("total");
  params.hidden = arguments.integer("hidden");
  params.residual_stride = params.dsum_stride = params.dnormed_stride = params.hidden;
  return params;
}

inline NormPlan named_norm_plan(const host_executor::Arguments& arguments) {
  NormPlan plan{};
  plan.weight = arguments.array<void>("weight");
  plan.bias = arguments.array_if_any<void>("bias");
  plan.dweight_partial = arguments.array_if_any<float>("dweight_partial");
  plan.dbias_partial = arguments.array_if_any<float>("dbias_partial");
  plan.num_rows = arguments.integer("num_rows");
  plan.num_chunks = static_cast<int>(arguments.integer("num_chunks"));
  plan.num_warps = static_cast<int>(arguments.integer("num_warps"));
  plan.num_teams = static_cast<int>(arguments.integer("num_teams"));
  plan.all_teams = static_cast<int>(arguments.integer("all_teams"));
  plan.eps = static_cast<float>(arguments.number("eps"));
  return plan;
}

// The kernel of the dtype that the arguments name, of those that choose(type, chunks) gives.
template <class Params, class Choose>
host_executor::BoundKernel bind_norm(const host_executor::Arguments& arguments,
                                     const Params& params, const Choose& choose) {
  const auto of_type = [&](auto type) {
    const bool in_registers = arguments.integer("in_registers") != 0;
    return host_executor::bind_kernel(in_registers
                                          ? choose(type, std::integral_constant<int, kNormChunks>{})
                                          : choose(type, std::integral_constant<int, 0>{}),
                                      params);
  };
  switch (arguments.integer("dtype")) {
    case 0:
      return of_type(float{});
    case 1:
      return of_type(Half{});
    default:
      return of_type(BFloat16{});
  }
}

}  // namespace keye_ops
