// Matrix products of a warpgroup: d [64, kN] (fp32, in registers) = a [64, 16] b [kN, 16]^T, or +=
// it.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/dtype.h"
#include "common/ptx/mma.cuh"
#include "common/swizzle.h"
#include "common/thread.cuh"

namespace keye_ops::ptx {

// How a matrix lies in shared memory: in units of 8 lines of a swizzle's span (16 bytes without
// one). K-major: a line is a row's piece of K, and the strides lead to the next unit in K (without
// a swizzle only) and to the next 8 rows. MN-major, swizzled: a line is a piece of MN for one k,
// and the strides lead to the next unit in MN and to the next 8 of K.
// #asynchronous-warpgroup-level-matrix-shared-memory-layout-matrix-descriptor
struct SharedMatrix {
  uint32_t address;
  uint32_t leading_byte_offset;
  uint32_t stride_byte_offset;
  uint32_t base_offset;  // (address / 128) % 8 of the swizzle's pattern: 0 where aligned to it
  Swizzle swizzle;
};

KEYE_HOST_DEVICE constexpr uint64_t wgmma_descriptor(const SharedMatrix& matrix) {
  const auto field = [](uint32_t bytes) { return uint64_t{bytes >> 4 & 0x3fffu}; };
  const uint64_t swizzle = (4 - static_cast<uint64_t>(matrix.swizzle)) & 3;  // 1 is 128, 3 is 32
  return field(matrix.address) | field(matrix.leading_byte_offset) << 16 |
         field(matrix.stride_byte_offset) << 32 | uint64_t{matrix.base_offset & 7} << 49 |
         swizzle << 62;
}

// Before the first product, and where registers have been touched since the last one.
// #asynchronous-warpgroup-level-matrix-instructions-wgmma-fence
KEYE_DEVICE void wgmma_fence() {
  KEYE_CUDA_OR_HOST(asm volatile("wgmma.fence.sync.aligned;" :: : "memory"),
                    host_executor::wgmma_fence());
}

// #asynchronous-warpgroup-level-matrix-instructions-wgmma-commit-group
KEYE_DEVICE void wgmma_commit_group() {
  KEYE_CUDA_OR_HOST(asm volatile("wgmma.commit_group.sync.aligned;" :: : "memory"),
                    host_executor::wgmma_commit());
}

// Until at most kPending groups are incomplete.
// #asynchronous-warpgroup-level-matrix-instructions-wgmma-wait-group
template <int kPending>
KEYE_DEVICE void wgmma_wait_group() {
  KEYE_CUDA_OR_HOST(asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory"),
                    host_executor::wgmma_wait(kPending));
}

enum class Major { kK, kMN };  // the dimension that has unit stride

#if defined(__CUDACC__)
// KEYE_LIST_n(f) is f for every four accumulators but the first four, in order.
#define KEYE_LIST_8(f)
#define KEYE_LIST_16(f) KEYE_LIST_8(f) f(4, 5, 6, 7)
#define KEYE_LIST_24(f) KEYE_LIST_16(f) f(8, 9, 10, 11)
#define KEYE_LIST_32(f) KEYE_LIST_24(f) f(12, 13, 14, 15)
#define KEYE_LIST_40(f) KEYE_LIST_32(f) f(16, 17, 18, 19)
#define KEYE_LIST_48(f) KEYE_LIST_40(f) f(20, 21, 22, 23)
#define KEYE_LIST_56(f) KEYE_LIST_48(f) f(24, 25, 26, 27)
#define KEYE_LIST_64(f) KEYE_LIST_56(f) f(28, 29, 30, 31)
#define KEYE_LIST_72(f) KEYE_LIST_64(f) f(32, 33, 34, 35)
#define KEYE_LIST_80(f) KEYE_LIST_72(f) f(36, 37, 38, 39)
#define KEYE_LIST_88(f) KEYE_LIST_80(f) f(40, 41, 42, 43)
#define KEYE_LIST_96(f) KEYE_LIST_88(f) f(44, 45, 46, 47)
#define KEYE_LIST_104(f) KEYE_LIST_96(f) f(48, 49, 50, 51)
#define KEYE_LIST_112(f) KEYE_LIST_104(f) f(52, 53, 54, 55)
#define KEYE_LIST_120(f) KEYE_LIST_112(f) f(56, 57, 58, 59)
#define KEYE_LIST_128(f) KEYE_LIST_120(f) f(60, 61, 62, 63)
#define KEYE_LIST_136(f) KEYE_LIST_128(f) f(64, 65, 66, 67)
#define KEYE_LIST_144(f) KEYE_LIST_136(f) f(68, 69, 70, 71)
#define KEYE_LIST_152(f) KEYE_LIST_144(f) f(72, 73, 74, 75)
#define KEYE_LIST_160(f) KEYE_LIST_152(f) f(76, 77, 78, 79)
#define KEYE_LIST_168(f) KEYE_LIST_160(f) f(80, 81, 82, 83)
#define KEYE_LIST_176(f) KEYE_LIST_168(f) f(84, 85, 86, 87)
#define KEYE_LIST_184(f) KEYE_LIST_176(f) f(88, 89, 90, 91)
#define KEYE_LIST_192(f) KEYE_LIST_184(f) f(92, 93, 94, 95)
#define KEYE_LIST_200(f) KEYE_LIST_192(f) f(96, 97, 98, 99)
#define KEYE_LIST_208(f) KEYE_LIST_200(f) f(100, 101, 102, 103)
#define KEYE_LIST_216(f) KEYE_LIST_208(f) f(104, 105, 106, 107)
#define KEYE_LIST_224(f) KEYE_LIST_216(f) f(108, 109, 110, 111)
#define KEYE_LIST_232(f) KEYE_LIST_224(f) f(112, 113, 114, 115)
#define KEYE_LIST_240(f) KEYE_LIST_232(f) f(116, 117, 118, 119)
#define KEYE_LIST_248(f) KEYE_LIST_240(f) f(120, 121, 122, 123)
#define KEYE_LIST_256(f) KEYE_LIST_248(f) f(124, 125, 126, 127)

// clang-format off
// f(n, indices of the operands after the n / 2 accumulators).
#define KEYE_FOR_EVERY_N(f) \
  f(8, 4, 5, 6, 7, 8, 9, 10) \
  f(16, 8, 9, 10, 11, 12, 13, 14) \
  f(24, 12, 13, 14, 15, 16, 17, 18) \
  f(32, 16, 17, 18, 19, 20, 21, 22) \
  f(40, 20, 21, 22, 23, 24, 25, 26) \
  f(48, 24, 25, 26, 27, 28, 29, 30) \
  f(56, 28, 29, 30, 31, 32, 33, 34) \
  f(64, 32, 33, 34, 35, 36, 37, 38) \
  f(72, 36, 37, 38, 39, 40, 41, 42) \
  f(80, 40, 41, 42, 43, 44, 45, 46) \
  f(88, 44, 45, 46, 47, 48, 49, 50) \
  f(96, 48, 49, 50, 51, 52, 53, 54) \
  f(104, 52, 53, 54, 55, 56, 57, 58) \
  f(112, 56, 57, 58, 59, 60, 61, 62) \
  f(120, 60, 61, 62, 63, 64, 65, 66) \
  f(128, 64, 65, 66, 67, 68, 69, 70) \
  f(136, 68, 69, 70, 71, 72, 73, 74) \
  f(144, 72, 73, 74, 75, 76, 77, 78) \
  f(152, 76, 77, 78, 79, 80, 81, 82) \
  f(160, 80, 81, 82, 83, 84, 85, 86) \
  f(168, 84, 85, 86, 87, 88, 89, 90) \
  f(176, 88, 89, 90, 91, 92, 93, 94) \
  f(184, 92, 93, 94, 95, 96, 97, 98) \
  f(192, 96, 97, 98, 99, 100, 101, 102) \
  f(200, 100, 101, 102, 103, 104, 105, 106) \
  f(208, 104, 105, 106, 107, 108, 109, 110) \
  f(216, 108, 109, 110, 111, 112, 113, 114) \
  f(224, 112, 113, 114, 115, 116, 117, 118) \
  f(232, 116, 117, 118, 119, 120, 121, 122) \
  f(240, 120, 121, 122, 123, 124, 125, 126) \
  f(248, 124, 125, 126, 127, 128, 129, 130) \
  f(256, 128, 129, 130, 131, 132, 133, 134)
// clang-format on

#define KEYE_NAME(i, j, k, l) ", %" #i ", %" #j ", %" #k ", %" #l
#define KEYE_VALUE(i, j, k, l) , "+f"(d[i]), "+f"(d[j]), "+f"(d[k]), "+f"(d[l])
#define KEYE_WGMMA(n, types, accumulates, inputs, ...)                                   \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #accumulates                         \
               ", 0;\nwgmma.mma_async.sync.aligned.m64n" #n "k16.f32." types             \
               " {%0, %1, %2, %3" KEYE_LIST_##n(KEYE_NAME) "}, " inputs ";\n}"           \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])KEYE_LIST_##n(KEYE_VALUE) \
               : __VA_ARGS__                                                             \
               : "memory");
#define KEYE_WGMMA_OF_TYPE(n, accumulates, inputs, ...)          \
  if constexpr (kN == n && std::is_same_v<T, Half>) {            \
    KEYE_WGMMA(n, "f16.f16", accumulates, inputs, __VA_ARGS__)   \
  } else if constexpr (kN == n) {                                \
    KEYE_WGMMA(n, "bf16.bf16", accumulates, inputs, __VA_ARGS__) \
  }
#define KEYE_WGMMA_SS(n, i0, i1, i2, i3, i4, i5, i6)                                        \
  KEYE_WGMMA_OF_TYPE(n, i2, "%" #i0 ", %" #i1 ", p, 1, 1, %" #i3 ", %" #i4, "l"(a), "l"(b), \
                     "r"(static_cast<int>(accumulate)), "n"(kAMajor == Major::kMN ? 1 : 0), \
                     "n"(kBMajor == Major::kMN ? 1 : 0))
#define KEYE_WGMMA_RS(n, i0, i1, i2, i3, i4, i5, i6)                                              \
  KEYE_WGMMA_OF_TYPE(n, i5, "{%" #i0 ", %" #i1 ", %" #i2 ", %" #i3 "}, %" #i4 ", p, 1, 1, %" #i6, \
                     "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b),                          \
                     "r"(static_cast<int>(accumulate)), "n"(kBMajor == Major::kMN ? 1 : 0))
#endif

// a and b in shared memory, by their descriptors. Warp w of the warpgroup holds rows 16 w to
// 16 w + 15 of d, every 8 columns as mma_m16n8k16 does.
// #asynchronous-warpgroup-level-matrix-instructions-wgmma-mma
template <class T, int kN, Major kAMajor = Major::kK, Major kBMajor = Major::kK>
KEYE_DEVICE void wgmma_ss(float (&d)[kN / 2], uint64_t a, uint64_t b, bool accumulate) {
  static_assert(std::is_same_v<T, BFloat16> || std::is_same_v<T, Half>, "of 16 bits");
  static_assert(kN % 8 == 0 && kN >= 8 && kN <= 256, "n is 8, 16 ... 256");
#if defined(__CUDACC__)
  KEYE_FOR_EVERY_N(KEYE_WGMMA_SS)
#else
  host_executor::wgmma(kHostElement<T>, kN, d, nullptr, a, b, accumulate, kAMajor == Major::kMN,
                       kBMajor == Major::kMN);
#endif
}

// a in registers, as in mma_m16n8k16; they may be overwritten when the product is complete.
// #asynchronous-warpgroup-level-matrix-instructions-wgmma-mma
template <class T, int kN, Major kBMajor = Major::kK>
KEYE_DEVICE void wgmma_rs(float (&d)[kN / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  static_assert(std::is_same_v<T, BFloat16> || std::is_same_v<T, Half>, "of 16 bits");
  static_assert(kN % 8 == 0 && kN >= 8 && kN <= 256, "n is 8, 16 ... 256");
#if defined(__CUDACC__)
  KEYE_FOR_EVERY_N(KEYE_WGMMA_RS)
#else
  host_executor::wgmma(kHostElement<T>, kN, d, a, 0, b, accumulate, false, kBMajor == Major::kMN);
#endif
}

// After a wait: the compiler, which takes d for written by wgmma itself, must not use it earlier.
template <int kCount>
KEYE_DEVICE void wgmma_accumulators_ready([[maybe_unused]] float (&d)[kCount]) {
#if defined(__CUDACC__)
#pragma unroll
  for (int i = 0; i < kCount; i++) asm volatile("" : "+f"(d[i])::"memory");
#endif
}

}  // namespace keye_ops::ptx
