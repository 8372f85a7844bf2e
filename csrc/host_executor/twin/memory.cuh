// Twins of memory.cuh, of cp.async, ldmatrix and mma.sync, and of an mbarrier's threads.
#pragma once

#include "common/memory.cuh"
#include "common/ptx.cuh"
#include "host_executor/twin/twin.h"

namespace keye_ops::twin {

// From memory to shared memory, another lane's to memory.
template <class V>
KEYE_KERNEL(kWarpSize, 1)
vector_kernel(KEYE_PARAMS TwinParams params) {
  const int lane_idx = thread_idx();
  unsigned char* shared = shared_memory();
  store_bytes(shared + (31 - lane_idx) * sizeof(V),
              load_bytes<V>(reinterpret_cast<const V*>(params.in) + lane_idx));
  sync_warp();
  store_bytes(reinterpret_cast<V*>(params.out) + lane_idx,
              load_bytes<V>(shared + lane_idx * sizeof(V)));
}

// Three cells for all lanes and one for each; the old values of the latter.
constexpr int kNumCells = 36, kNumOldValues = 160;
template <class T>
KEYE_DEVICE void run_atomics(T* cells, T* old_values, T value) {
  const int lane_idx = thread_idx();
  atomic_add(cells, value);
  atomic_max(cells + 1, value);
  atomic_or(cells + 2, value);
  T* cell = cells + 4 + lane_idx;
  T* old_value = old_values + lane_idx;
  const auto inverse = static_cast<T>(~value), half = static_cast<T>(value >> 1);
  old_value[0] = atomic_exchange(cell, value);
  old_value[32] = atomic_add(cell, value);
  old_value[64] = atomic_max(cell, inverse);
  old_value[96] = atomic_or(cell, half);
  const T now = max(static_cast<T>(value + value), inverse) | half;
  old_value[128] =
      atomic_compare_and_swap(cell, lane_idx % 2 == 0 ? now : static_cast<T>(now + 1), value);
}

template <class T>
KEYE_KERNEL(kWarpSize, 1)
atomics_kernel(KEYE_PARAMS TwinParams params) {
  auto* shared = reinterpret_cast<T*>(shared_memory());
  auto* out = reinterpret_cast<T*>(params.out);
  const T value = reinterpret_cast<const T*>(params.in)[thread_idx()];
  for (int i = thread_idx(); i < kNumCells; i += kWarpSize) shared[i] = 0;
  sync_warp();
  run_atomics(out, out + kNumCells, value);
  out += kNumCells + kNumOldValues;
  run_atomics(shared, out + kNumCells, value);
  thread_fence();
  sync_warp();
  for (int i = thread_idx(); i < kNumCells; i += kWarpSize) out[i] = shared[i];
}

// Two groups, with every number of source bytes; the first is read while the second may come.
template <int kBytes, bool kPastL1>
KEYE_KERNEL(kWarpSize, 1)
cp_async_kernel(KEYE_PARAMS TwinParams params) {
  const int lane_idx = thread_idx();
  auto* shared = reinterpret_cast<uint32_t*>(shared_memory()) + lane_idx * (kBytes / 4);
  const uint32_t* in = params.in + lane_idx * (kBytes / 4);
  const auto copy = [&](int group, int source_bytes) {
    const uint32_t target = shared_address(shared + group * 8 * kBytes);
    if constexpr (kPastL1) {
      ptx::cp_async_cg(target, in + group * 8 * kBytes, source_bytes);
    } else {
      ptx::cp_async_ca<kBytes>(target, in + group * 8 * kBytes, source_bytes);
    }
    ptx::cp_async_commit_group();
  };
  const auto store = [&](int group) {
    for (int i = 0; i < kBytes / 4; i++) {
      params.out[group * 8 * kBytes + lane_idx * (kBytes / 4) + i] = shared[group * 8 * kBytes + i];
    }
  };
  copy(0, lane_idx % (kBytes + 1));
  copy(1, kBytes - lane_idx % (kBytes + 1));
  ptx::cp_async_wait_group<1>();
  store(0);
  ptx::cp_async_wait_group<0>();
  store(1);
}

// Rows of 16 bytes, chosen by the last words of the input.
template <int kCount, bool kTransposed>
KEYE_KERNEL(kWarpSize, 1)
ldmatrix_kernel(KEYE_PARAMS TwinParams params) {
  const int lane_idx = thread_idx();
  unsigned char* shared = shared_memory();
  const auto* in = reinterpret_cast<const FourWords*>(params.in);
  store_bytes(shared + lane_idx * 16, load_bytes<FourWords>(in + lane_idx));
  sync_warp();
  uint32_t d[kCount];
  const uint32_t row = shared_address(shared) + params.in[128 + lane_idx] % 32 * 16;
  if constexpr (kTransposed) {
    ptx::ldmatrix_trans(d, row);
  } else {
    ptx::ldmatrix(d, row);
  }
  for (int i = 0; i < kCount; i++) params.out[lane_idx * kCount + i] = d[i];
}

// a, b, then c, which is made of small integers.
template <class T, int kK>
KEYE_KERNEL(kWarpSize, 1)
mma_kernel(KEYE_PARAMS TwinParams params) {
  const int lane_idx = thread_idx();
  const uint32_t* b = params.in + 128 + lane_idx * 2;
  uint32_t a[4];
  float d[4];
  for (int i = 0; i < 4; i++) {
    a[i] = params.in[lane_idx * 4 + i];
    d[i] = static_cast<float>(params.in[192 + lane_idx * 4 + i] % 16);
  }
  if constexpr (kK == 8) {
    ptx::mma_m16n8k8<T>(d, a[0], a[1], b[0]);
  } else {
    ptx::mma_m16n8k16<T>(d, a, b[0], b[1]);
  }
  for (int i = 0; i < 4; i++) store_bytes(params.out + lane_idx * 4 + i, d[i]);
}

// What a thread sees of the phases before and after it arrives.
KEYE_KERNEL(64, 1) mbarrier_threads_kernel(KEYE_PARAMS TwinParams params) {
  const uint32_t mbarrier = shared_address(shared_memory());
  uint32_t* out = params.out + thread_idx() * 4;
  if (thread_idx() == 0) ptx::mbarrier_init(mbarrier, 64);
  syncthreads();
  const auto completed = [&](uint32_t parity) -> uint32_t {
    return ptx::mbarrier_test_wait_parity(mbarrier, parity) ? 1 : 0;
  };
  out[0] = completed(1);
  out[1] = completed(0);
  ptx::mbarrier_arrive(mbarrier);
  while (completed(0) == 0) {
  }
  out[2] = completed(0);
  out[3] = completed(1);
  syncthreads();
  if (thread_idx() == 0) ptx::mbarrier_inval(mbarrier);
}

inline void add_memory_twins(Twins& twins) {
  const auto add = [&](const std::string& name, void (*kernel)(TwinParams), int in_words,
                       int out_words, const char* data = "bits", const char* rule = "exact",
                       uint32_t num_threads = kWarpSize) {
    twins.push_back({name, kernel, static_cast<uint32_t>(in_words),
                     static_cast<uint32_t>(out_words), data, rule, num_threads, 1024});
  };
  add("load_bytes 2", &vector_kernel<uint16_t>, 16, 16);
  add("load_bytes 4", &vector_kernel<uint32_t>, 32, 32);
  add("load_bytes 8", &vector_kernel<uint64_t>, 64, 64);
  add("load_bytes 16", &vector_kernel<FourWords>, 128, 128);
  add("atomics 32", &atomics_kernel<uint32_t>, 32, 2 * (kNumCells + kNumOldValues));
  add("atomics 64", &atomics_kernel<uint64_t>, 64, 4 * (kNumCells + kNumOldValues));
  add("cp_async_ca 4", &cp_async_kernel<4, false>, 64, 64);
  add("cp_async_ca 8", &cp_async_kernel<8, false>, 128, 128);
  add("cp_async_ca 16", &cp_async_kernel<16, false>, 256, 256);
  add("cp_async_cg 16", &cp_async_kernel<16, true>, 256, 256);
  add("ldmatrix 1", &ldmatrix_kernel<1, false>, 160, 32);
  add("ldmatrix 2", &ldmatrix_kernel<2, false>, 160, 64);
  add("ldmatrix 4", &ldmatrix_kernel<4, false>, 160, 128);
  add("ldmatrix_trans 1", &ldmatrix_kernel<1, true>, 160, 32);
  add("ldmatrix_trans 2", &ldmatrix_kernel<2, true>, 160, 64);
  add("ldmatrix_trans 4", &ldmatrix_kernel<4, true>, 160, 128);
  add("mma_m16n8k8 bf16", &mma_kernel<BFloat16, 8>, 320, 128, "bf16", "sum");
  add("mma_m16n8k8 fp16", &mma_kernel<Half, 8>, 320, 128, "fp16", "sum");
  add("mma_m16n8k16 bf16", &mma_kernel<BFloat16, 16>, 320, 128, "bf16", "sum");
  add("mma_m16n8k16 fp16", &mma_kernel<Half, 16>, 320, 128, "fp16", "sum");
  add("mbarrier_threads", &mbarrier_threads_kernel, 1, 256, "bits", "exact", 64);
}

}  // namespace keye_ops::twin
