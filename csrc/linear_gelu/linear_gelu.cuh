// linear_gelu on CUDA: the elementwise pass. A thread computes 16 bytes at a time.
#pragma once

#include "common/gelu.h"
#include "common/vec.cuh"
#include "linear_gelu/linear_gelu.h"

namespace keye_ops {

constexpr int kLinearGeluThreads = 256;
constexpr int kLinearGeluVectors = 4;  // of a thread; their loads are on their way together

// One value, for what does not fill a vector.
template <class T>
KEYE_DEVICE float load_value(const T* p) {
  if constexpr (sizeof(T) == 4) {
    return load_bytes<float>(p);
  } else {
    return to_float(load_bytes<T>(p));
  }
}
template <class T>
KEYE_DEVICE void store_value(T* p, float value) {
  if constexpr (sizeof(T) == 4) {
    store_bytes(p, value);
  } else {
    store_bytes(p, T{static_cast<uint16_t>(ptx::cvt_rn_x2<T>(value, 0.0f))});
  }
}

template <bool kTanh, bool kBackward, int kVec>
KEYE_DEVICE void gelu_vector(float (&hidden)[kVec], const float (&dout)[kVec]) {
#pragma unroll
  for (int i = 0; i < kVec; i++) {
    hidden[i] = kBackward ? gelu_dx<kTanh>(hidden[i], dout[i]) : gelu<kTanh>(hidden[i]);
  }
}

template <class T, bool kTanh, bool kBackward>
KEYE_KERNEL(kLinearGeluThreads, 4)
linear_gelu_kernel(KEYE_PARAMS LinearGeluParams params) {
  constexpr int kVec = kVectorSize<T>;
  const T* hidden = static_cast<const T*>(params.hidden);
  const T* dout = static_cast<const T*>(params.dout);
  T* out = static_cast<T*>(params.out);
  const int64_t num_vectors = params.numel / kVec;
  const int64_t first = block_idx() * kLinearGeluThreads * kLinearGeluVectors + thread_idx();

  // Load all vectors of this thread, then compute and store them.
  Chunk hidden_chunks[kLinearGeluVectors] = {}, dout_chunks[kLinearGeluVectors] = {};
#pragma unroll
  for (int i = 0; i < kLinearGeluVectors; i++) {
    const int64_t vector = first + int64_t{i} * kLinearGeluThreads;
    if (vector >= num_vectors) continue;
    hidden_chunks[i] = load_bytes<Chunk>(hidden + vector * kVec);
    if constexpr (kBackward) dout_chunks[i] = load_bytes<Chunk>(dout + vector * kVec);
  }
#pragma unroll
  for (int i = 0; i < kLinearGeluVectors; i++) {
    const int64_t vector = first + int64_t{i} * kLinearGeluThreads;
    if (vector >= num_vectors) continue;
    float x[kVec], dy[kVec];
    unpack<T>(hidden_chunks[i], x);
    unpack<T>(dout_chunks[i], dy);
    gelu_vector<kTanh, kBackward>(x, dy);
    store_vector(out + vector * kVec, x);
  }

  // The values behind the last whole vector, one a thread of the last block.
  const int64_t rest = num_vectors * kVec + thread_idx();
  if (block_idx() + 1 == grid_size() && rest < params.numel) {
    float x[1] = {load_value(hidden + rest)}, dy[1] = {};
    if constexpr (kBackward) dy[0] = load_value(dout + rest);
    gelu_vector<kTanh, kBackward>(x, dy);
    store_value(out + rest, x[0]);
  }
}

}  // namespace keye_ops
