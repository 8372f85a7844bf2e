// Twins of wgmma: every N, type and source of a; majors for some N. A kernel takes the same bits
// for operands in every swizzle, four products of 16 values of K each.
#pragma once

#include <type_traits>
#include <utility>

#include "common/memory.cuh"
#include "common/ptx.cuh"
#include "host_executor/twin/twin.h"

namespace keye_ops::twin {

using ptx::Major;

constexpr int kWarpgroup = 128, kNumSteps = 4, kWgmmaM = 64;
constexpr uint32_t kLineBytes = kNumSteps * 32;  // of one row or column of an operand
constexpr uint32_t kBytesA = kWgmmaM * kLineBytes;
template <int kN>
constexpr uint32_t kBytesB = (kN + 63) / 64 * 64 * kLineBytes;

// The descriptor of step `step` of an operand of num_lines rows (K-major) or columns.
// K-major: pieces of K as wide as the swizzle's span, one after the other. MN-major: pieces of MN,
// and in each all of K.
KEYE_DEVICE uint64_t operand(uint32_t address, uint32_t num_lines, bool is_mn_major,
                             Swizzle swizzle, uint32_t step) {
  const uint32_t span = swizzle_span(swizzle);
  const bool plain = swizzle == Swizzle::kNone;
  if (!is_mn_major) {
    const uint32_t piece = num_lines * span;
    address += plain ? step * 2 * piece : step * 32 / span * piece + step * 32 % span;
    return ptx::wgmma_descriptor({address, plain ? piece : 0, 8 * span, 0, swizzle});
  }
  const uint32_t next_k = 8 * span, next_mn = kNumSteps * 2 * next_k;
  address += step * 2 * next_k;
  return ptx::wgmma_descriptor(
      {address, plain ? next_k : next_mn, plain ? next_mn : next_k, 0, swizzle});
}

// a is in shared memory, or in registers where kFromRegisters.
template <class T, int kN, bool kFromRegisters, Major kAMajor, Major kBMajor>
KEYE_KERNEL(kWarpgroup, 1)
wgmma_kernel(KEYE_PARAMS TwinParams params) {
  const auto* in = reinterpret_cast<const FourWords*>(params.in);
  unsigned char* shared = shared_memory();
  for (uint32_t i = thread_idx(); i < (kBytesA + kBytesB<kN>) / 16; i += kWarpgroup) {
    store_bytes(shared + i * 16, load_bytes<FourWords>(in + i));
  }
  ptx::fence_proxy_async();
  syncthreads();
  uint32_t a[kNumSteps][4];
#pragma unroll
  for (int step = 0; kFromRegisters && step < kNumSteps; step++) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      a[step][i] = params.in[(step * kWarpgroup + thread_idx()) * 4 + i];
    }
  }
  const uint32_t matrix_a = shared_address(shared), matrix_b = matrix_a + kBytesA;
#pragma unroll 1
  for (uint32_t swizzle = 0; swizzle < 4; swizzle++) {
    float d[kN / 2];
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < kNumSteps; step++) {
      const uint64_t b = operand(matrix_b, kBMajor == Major::kK ? kN : 0, kBMajor == Major::kMN,
                                 Swizzle{swizzle}, static_cast<uint32_t>(step));
      if constexpr (kFromRegisters) {
        ptx::wgmma_rs<T, kN, kBMajor>(d, a[step], b, step > 0);
      } else {
        const uint64_t descriptor_a = operand(matrix_a, kWgmmaM, kAMajor == Major::kMN,
                                              Swizzle{swizzle}, static_cast<uint32_t>(step));
        ptx::wgmma_ss<T, kN, kAMajor, kBMajor>(d, descriptor_a, b, step > 0);
      }
    }
    ptx::wgmma_commit_group();
    ptx::wgmma_wait_group<0>();
    ptx::wgmma_accumulators_ready(d);
#pragma unroll
    for (int i = 0; i < kN / 2; i++) {
      store_bytes(params.out + (swizzle * (kN / 2) + i) * kWarpgroup + thread_idx(), d[i]);
    }
  }
}

template <class T, int kN, bool kFromRegisters, Major kAMajor = Major::kK,
          Major kBMajor = Major::kK>
void add_wgmma_twin(Twins& twins) {
  constexpr bool kIsHalf = std::is_same_v<T, Half>;
  const auto name_of = [](Major major) { return major == Major::kK ? "k" : "mn"; };
  twins.push_back(
      {std::string(kFromRegisters ? "wgmma_rs " : "wgmma_ss ") + (kIsHalf ? "fp16 n " : "bf16 n ") +
           std::to_string(kN) + " majors " + name_of(kAMajor) + " " + name_of(kBMajor),
       &wgmma_kernel<T, kN, kFromRegisters, kAMajor, kBMajor>, (kBytesA + kBytesB<kN>) / 4,
       4 * kWgmmaM * kN, kIsHalf ? "fp16" : "bf16", "sum", kWarpgroup, kBytesA + kBytesB<kN>});
}

template <class T, int kN>
void add_wgmma_twins_of_n(Twins& twins) {
  add_wgmma_twin<T, kN, false>(twins);
  add_wgmma_twin<T, kN, true>(twins);
  if constexpr (kN == 8 || kN == 72 || kN == 128 || kN == 256) {
    add_wgmma_twin<T, kN, false, Major::kMN, Major::kK>(twins);
    add_wgmma_twin<T, kN, false, Major::kK, Major::kMN>(twins);
    add_wgmma_twin<T, kN, false, Major::kMN, Major::kMN>(twins);
    add_wgmma_twin<T, kN, true, Major::kK, Major::kMN>(twins);
  }
}

template <class T, int... kEighths>
void add_wgmma_twins(Twins& twins, std::integer_sequence<int, kEighths...>) {
  (add_wgmma_twins_of_n<T, 8 * (kEighths + 1)>(twins), ...);
}

inline void add_wgmma_twins(Twins& twins) {
  add_wgmma_twins<BFloat16>(twins, std::make_integer_sequence<int, 32>());
  add_wgmma_twins<Half>(twins, std::make_integer_sequence<int, 32>());
}

}  // namespace keye_ops::twin
