// Where the elements of matrices lie in the registers of a warp, and in shared memory for wgmma.
#pragma once

#include <cstdint>

#include "host_executor/device.h"

namespace host_executor {

struct Place {
  int row, column;
};

// Fragments of mma.sync.m16n8k16 (and k8: its first half), counted in 16-bit values of a lane:
// https://docs.nvidia.com/cuda/parallel-thread-execution/#warp-level-matrix-fragment-mma-16816-float
constexpr Place mma_a_place(int lane, int i) {
  return {lane / 4 + i / 2 % 2 * 8, lane % 4 * 2 + i % 2 + i / 4 * 8};
}
constexpr Place mma_b_place(int lane, int i) {  // (k, n)
  return {lane % 4 * 2 + i % 2 + i / 2 * 8, lane / 4};
}
constexpr Place mma_d_place(int lane, int i) {
  return {lane / 4 + i / 2 * 8, lane % 4 * 2 + i % 2};
}

// Fragments of wgmma.m64nNk16: warp w of the warpgroup has rows 16 w to 16 w + 15.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#asynchronous-warpgroup-level-matrix-register-fragment
constexpr Place wgmma_a_place(int thread, int i) {
  const Place place = mma_a_place(thread % 32, i);
  return {thread / 32 * 16 + place.row, place.column};
}
constexpr Place wgmma_d_place(int thread, int i) {
  const Place place = mma_d_place(thread % 32, i % 4);
  return {thread / 32 * 16 + place.row, i / 4 * 8 + place.column};
}

// The matrix descriptor, bit by bit:
// https://docs.nvidia.com/cuda/parallel-thread-execution/#asynchronous-warpgroup-level-matrix-shared-memory-layout-matrix-descriptor
struct MatrixDescriptor {
  uint32_t address, leading_bytes, stride_bytes, base_offset;
  Swizzle swizzle;
  bool reserved_bits;  // bits that must be zero are not
};
MatrixDescriptor decode_descriptor(uint64_t bits);

// Shared address of element (index along M or N, index along K) of an operand, before and after
// the swizzle. 16-bit elements.
uint32_t wgmma_address(const MatrixDescriptor& descriptor, bool mn_major, int mn, int k);
uint32_t swizzled(uint32_t address, Swizzle swizzle);

float value_of(Element element, uint16_t bits);

}  // namespace host_executor
