// How many threads and blocks the norms of common/norm_row.cuh take, and what they ask of tensors.
#pragma once

#include <algorithm>

#include "common/dtype.h"
#include "common/launch.cuh"
#include "common/norm_row.cuh"

namespace keye_ops {

constexpr int64_t kNormMaxWidth = int64_t{1} << 20;  // values of a row
// Rows of partial sums, and blocks of a backward: enough for the largest GPU, whatever the GPU, as
// the order of the sums is part of the result.
constexpr int64_t kNormMaxPartials = 384;
constexpr int64_t kNormMaxBlocks = 8192;  // of a forward

constexpr int kNormTeams = 4;  // of a block, where a team is one warp

struct NormLaunch {
  NormPlan plan;
  LaunchShape shape;
  bool in_registers;  // kNormChunks, else 0 of them
};

inline int norm_num_partials(int64_t rows) {
  return static_cast<int>(std::min(rows, kNormMaxPartials));
}

// num_partials of 0 is for a forward.
template <class T>
NormLaunch norm_launch(const char* op, int64_t num_rows, int64_t width, int num_partials,
                       double eps) {
  constexpr int kVec = kVectorSize<T>;
  KEYE_CHECK(width % kVec == 0 && width <= kNormMaxWidth, op,
             ": rows on CUDA must have a multiple ", "of ", kVec, " values up to ", kNormMaxWidth,
             " in this dtype, got ", width);
  NormLaunch launch{};
  launch.plan.num_rows = num_rows;
  launch.plan.num_chunks = static_cast<int>(width / kVec);
  launch.plan.eps = static_cast<float>(eps);

  constexpr int kWarpChunks = kWarpSize * kNormChunks;
  const int wanted = static_cast<int>(ceil_div(launch.plan.num_chunks, kWarpChunks));
  launch.in_registers = wanted <= kNormMaxWarps;
  launch.plan.num_warps = std::min(wanted, kNormMaxWarps);
  const int teams = launch.plan.num_warps == 1 ? kNormTeams : 1;
  launch.plan.num_teams = teams;
  LaunchShape& shape = launch.shape;
  shape.num_threads = teams * launch.plan.num_warps * kWarpSize;
  shape.num_blocks =
      num_partials > 0 ? num_partials : std::min(ceil_div(num_rows, teams), kNormMaxBlocks);
  launch.plan.all_teams = static_cast<int>(shape.num_blocks) * teams;
  const int shelf_bytes = shape.num_threads * kNormChunks * kVectorBytes;
  shape.shared_bytes =
      num_partials > 0 ? kNormSumsBytes<T> + 2 * shelf_bytes : kNormScratchBytes + shelf_bytes;
  return launch;
}

template <class Params>
void launch_norm(const char* op, void (*in_registers)(Params), void (*from_memory)(Params),
                 const NormLaunch& norm, int device_index, const Params& params) {
  launch(op, norm.in_registers ? in_registers : from_memory, norm.shape, device_index, params);
}

// Rows of a tensor are read and written 16 bytes at a time.
template <class T>
void check_norm_rows(const char* op, const char* name, const void* pointer, int64_t stride) {
  const auto address = reinterpret_cast<int64_t>(pointer);
  const int64_t bytes = stride * static_cast<int64_t>(sizeof(T));
  KEYE_CHECK(address % kVectorBytes == 0 && bytes % kVectorBytes == 0, op, ": rows of ", name,
             " must start at multiples of 16 bytes on CUDA, got address ", address, " and stride ",
             bytes);
}

}  // namespace keye_ops
