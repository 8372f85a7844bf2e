// Twins of thread.cuh and ptx/approx.cuh, and of barriers of a part of the block.
#pragma once

#include "common/memory.cuh"
#include "common/ptx.cuh"
#include "common/thread.cuh"
#include "host_executor/twin/twin.h"

namespace keye_ops::twin {

KEYE_KERNEL(64, 1) indices_kernel(KEYE_PARAMS TwinParams params) {
  const int64_t block = (block_idx_z() * 2 + block_idx_y()) * grid_size() + block_idx();
  uint32_t* out = params.out + (block * block_size() + thread_idx()) * 4;
  out[0] = static_cast<uint32_t>(block_idx() * 100 + block_idx_y() * 10 + block_idx_z());
  out[1] = static_cast<uint32_t>(grid_size() * 1000 + block_size());
  out[2] = static_cast<uint32_t>(thread_idx());
  out[3] = static_cast<uint32_t>(warp_in_block());
}

KEYE_KERNEL(kWarpSize, 1) shuffles_kernel(KEYE_PARAMS TwinParams params) {
  const int lane_idx = thread_idx();
  const uint32_t value = params.in[lane_idx];
  const int operand = static_cast<int>(params.in[32 + lane_idx] % 32);
  const uint32_t half = lane_idx < 16 ? 0xffffu : 0xffff0000u;
  uint32_t* out = params.out + lane_idx;
  out[0] = shuffle(value, operand);
  out[32] = shuffle_up(value, operand);
  out[64] = shuffle_down(value, operand);
  out[96] = shuffle_xor(value, operand);
  out[128] = shuffle(value, lane_idx / 16 * 16 + operand % 16, half);
  out[160] = shuffle_xor(value, operand % 16, half);
}

KEYE_KERNEL(kWarpSize, 1) votes_kernel(KEYE_PARAMS TwinParams params) {
  const int lane_idx = thread_idx();
  const bool odd = params.in[lane_idx] % 2 != 0;
  const bool rare = params.in[32 + lane_idx] % 16 == 0;
  const uint32_t half = lane_idx < 16 ? 0xffffu : 0xffff0000u;
  uint32_t* out = params.out + lane_idx;
  out[0] = warp_ballot(odd);
  out[32] = warp_ballot(odd, half);
  out[64] = warp_any(odd) ? 1 : 0;
  out[96] = warp_any(rare, half) ? 1 : 0;
  out[128] = warp_any(false) ? 1 : 0;
  out[160] = warp_all(true) ? 1 : 0;
  out[192] = warp_all(odd) ? 1 : 0;
  out[224] = warp_all(!rare, half) ? 1 : 0;
}

KEYE_KERNEL(kWarpSize, 1) reductions_kernel(KEYE_PARAMS TwinParams params) {
  const int lane_idx = thread_idx();
  const uint32_t value = params.in[lane_idx];
  const int number = static_cast<int>(value);
  for (int i = 0; i < 2; i++) {
    const uint32_t mask = i == 0 ? kFullMask : lane_idx < 16 ? 0xffffu : 0xffff0000u;
    uint32_t* out = params.out + i * 288 + lane_idx;
    out[0] = reduce_add(value, mask);
    out[32] = reduce_min(value, mask);
    out[64] = reduce_max(value, mask);
    out[96] = reduce_and(value, mask);
    out[128] = reduce_or(value, mask);
    out[160] = reduce_xor(value, mask);
    out[192] = static_cast<uint32_t>(reduce_add(number, mask));
    out[224] = static_cast<uint32_t>(reduce_min(number, mask));
    out[256] = static_cast<uint32_t>(reduce_max(number, mask));
  }
}

// Warps pass values around by barriers: one waits for the other, then both for each other.
KEYE_KERNEL(64, 1) barriers_kernel(KEYE_PARAMS TwinParams params) {
  auto* shared = reinterpret_cast<uint32_t*>(shared_memory());
  const int thread = thread_idx(), other = (thread + 32) % 64;
  shared[thread] = params.in[thread];
  if (warp_in_block() == 0) {
    ptx::bar_arrive(1, 64);
  } else {
    ptx::bar_sync(1, 64);
    params.out[thread] = shared[other];
  }
  ptx::bar_sync(2, 64);
  params.out[64 + thread] = shared[other];
  sync_warp();
  syncthreads();
  shared[other] = params.in[thread];
  syncthreads();
  params.out[128 + thread] = shared[thread];
}

// ---- approximations and conversions, 64 values a lane ----

struct Ex2 {
  static KEYE_DEVICE float of(float x) { return ptx::ex2_approx_ftz(x); }
};
struct Rcp {
  static KEYE_DEVICE float of(float x) { return ptx::rcp_approx_ftz(x); }
};
struct RsqrtFtz {
  static KEYE_DEVICE float of(float x) { return ptx::rsqrt_approx_ftz(x); }
};
struct Rsqrt {
  static KEYE_DEVICE float of(float x) { return rsqrt_of(x); }
};
struct Log {
  static KEYE_DEVICE float of(float x) { return log_of(x); }
};

constexpr int kNumFloats = 2048;

template <class F>
KEYE_KERNEL(kWarpSize, 1)
approximation_kernel(KEYE_PARAMS TwinParams params) {
  for (int i = thread_idx(); i < kNumFloats; i += kWarpSize) {
    const auto x = load_bytes<float>(params.in + i);
    store_bytes(params.out + i, F::of(x));
  }
}

KEYE_KERNEL(kWarpSize, 1) maximum_kernel(KEYE_PARAMS TwinParams params) {
  for (int i = thread_idx(); i < kNumFloats; i += kWarpSize) {
    const auto a = load_bytes<float>(params.in + i);
    const auto b = load_bytes<float>(params.in + (i + 1) % kNumFloats);
    store_bytes(params.out + i, max_of(a, b));
  }
}

template <class T>
KEYE_KERNEL(kWarpSize, 1)
conversion_kernel(KEYE_PARAMS TwinParams params) {
  for (int i = thread_idx(); i < kNumFloats; i += kWarpSize) {
    const auto low = load_bytes<float>(params.in + i);
    const auto high = load_bytes<float>(params.in + (i + 1) % kNumFloats);
    params.out[i] = ptx::cvt_rn_x2<T>(low, high);
  }
}

KEYE_KERNEL(kWarpSize, 1) popcount_kernel(KEYE_PARAMS TwinParams params) {
  params.out[thread_idx()] = static_cast<uint32_t>(popcount(params.in[thread_idx()]));
}

// Words stay as they are.
KEYE_KERNEL(kWarpSize, 1) forget_kernel(KEYE_PARAMS TwinParams params) {
  uint32_t word = params.in[thread_idx()];
  ptx::forget(word);
  params.out[thread_idx()] = word;
}

inline void add_warp_twins(Twins& twins) {
  Twin indices{"indices", &indices_kernel, 1, 12 * 64 * 4};
  indices.num_threads = 64;
  indices.grid = {3, 2, 2};
  twins.push_back(indices);
  twins.push_back({"shuffles", &shuffles_kernel, 64, 192});
  twins.push_back({"votes", &votes_kernel, 64, 256});
  twins.push_back({"reductions", &reductions_kernel, 32, 576});
  twins.push_back({"barriers", &barriers_kernel, 64, 192, "bits", "exact", 64, 256});
  const auto unary = [&](const char* name, void (*kernel)(TwinParams), const char* rule) {
    twins.push_back({name, kernel, kNumFloats, kNumFloats, "floats", rule});
  };
  unary("ex2_approx_ftz", &approximation_kernel<Ex2>, "ulp2");
  unary("rcp_approx_ftz", &approximation_kernel<Rcp>, "ulp1");
  unary("rsqrt_approx_ftz", &approximation_kernel<RsqrtFtz>, "ulp2");
  unary("rsqrt_of", &approximation_kernel<Rsqrt>, "ulp2");
  unary("log_of", &approximation_kernel<Log>, "ulp2");
  unary("max_of", &maximum_kernel, "ulp1");
  twins.push_back({"popcount", &popcount_kernel, kWarpSize, kWarpSize});
  twins.push_back({"forget", &forget_kernel, kWarpSize, kWarpSize});
  unary("cvt_rn_x2 bf16", &conversion_kernel<BFloat16>, "exact");
  unary("cvt_rn_x2 fp16", &conversion_kernel<Half>, "exact");
}

}  // namespace keye_ops::twin
