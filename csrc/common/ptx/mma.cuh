// Matrix products of a warp, fp32 accumulators: d [16, 8] += a [16, K] b [8, K]^T, of BFloat16 or
// Half.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/dtype.h"
#include "common/thread.cuh"

namespace keye_ops::ptx {

#if !defined(__CUDACC__)
template <class T>
constexpr host_executor::Element kHostElement =
    std::is_same_v<T, Half> ? host_executor::Element::kHalf : host_executor::Element::kBFloat16;
#endif

// Lane l holds rows l / 4 (the first half of its values) and l / 4 + 8, columns 2 (l % 4) + {0, 1}.
// #warp-level-matrix-instructions-mma
template <class T>
KEYE_DEVICE void mma_m16n8k8(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t b) {
  static_assert(std::is_same_v<T, BFloat16> || std::is_same_v<T, Half>, "of 16 bits");
#if defined(__CUDACC__)
#define KEYE_MMA(types)                                                   \
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32." types              \
               ".f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};" \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])           \
               : "r"(a0), "r"(a1), "r"(b))
  if constexpr (std::is_same_v<T, Half>) {
    KEYE_MMA("f16.f16");
  } else {
    KEYE_MMA("bf16.bf16");
  }
#undef KEYE_MMA
#else
  const uint32_t a[2] = {a0, a1};
  host_executor::mma_m16n8(kHostElement<T>, 8, d, a, &b, d);
#endif
}

// a0 and a1 are k 0 to 7, a2 and a3 (of the same rows) k 8 to 15; b0 and b1 likewise.
// #warp-level-matrix-instructions-mma
template <class T>
KEYE_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  static_assert(std::is_same_v<T, BFloat16> || std::is_same_v<T, Half>, "of 16 bits");
#if defined(__CUDACC__)
#define KEYE_MMA(types)                                                               \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." types                         \
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                       \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
  if constexpr (std::is_same_v<T, Half>) {
    KEYE_MMA("f16.f16");
  } else {
    KEYE_MMA("bf16.bf16");
  }
#undef KEYE_MMA
#else
  const uint32_t b[2] = {b0, b1};
  host_executor::mma_m16n8(kHostElement<T>, 16, d, a, b, d);
#endif
}

}  // namespace keye_ops::ptx
