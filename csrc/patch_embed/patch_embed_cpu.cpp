// patch_embed on the CPU: threads, and registration.
#include "patch_embed/patch_embed_cpu.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <memory>

#include "common/parallel.h"
#include "patch_embed/patch_embed_op.h"

namespace keye_ops {
namespace {

constexpr int64_t kGrainElements = 32768;  // less is not worth a thread

void pack(const PixelRowsParams& params, std::optional<Dtype> pixels, Dtype rows,
          int /*device_index*/) {
  const auto bytes = KEYE_SELECT_ISA(pack_bytes);
  const auto floats = KEYE_SELECT_ISA(pack_floats);
  const int64_t grain = std::max<int64_t>(1, kGrainElements / params.inner);
  torch::stable::parallel_for(0, params.total, grain, [&](int64_t begin, int64_t end) {
    if (pixels) {
      floats(params, *pixels, rows, begin, end);
    } else {
      bytes(params, rows, begin, end);
    }
  });
}

void add_positions(const PatchEmbedParams& params, Dtype dtype, int /*device_index*/) {
  const auto patches = KEYE_SELECT_ISA(patch_embed_add_positions);
  const int64_t grain = std::max<int64_t>(1, kGrainElements / params.hidden);
  torch::stable::parallel_for(0, params.total, grain, [&](int64_t begin, int64_t end) {
    patches(params, dtype, begin, end);
  });
}

void backward(const PatchEmbedParams& params, Dtype dtype, int /*device_index*/) {
  const auto columns = KEYE_SELECT_ISA(patch_embed_backward_columns);
  const int64_t blocks = (params.hidden + kPatchEmbedColumns - 1) / kPatchEmbedColumns;
  const int64_t num_sums = (params.side * params.side + 1) * kPatchEmbedColumns;
  for_each_task_with(
      blocks, [&] { return std::make_unique<double[]>(num_sums); },
      [&](const std::unique_ptr<double[]>& sums, int64_t block) {
        columns(params, dtype, block, sums.get());
      });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(keye_ops, CPU, m) {
  patch_embed_backend(PatchEmbedDevice::kCpu) = {&pack,
                                                 &add_positions,
                                                 /*fused=*/nullptr,
                                                 &backward,
                                                 /*cells=*/nullptr,
                                                 /*num_parts=*/nullptr,
                                                 /*packs_any_dtype=*/true,
                                                 /*row_bytes=*/1,
                                                 kCpuTraits};
  m.impl("patch_embed", TORCH_BOX(&patch_embed));
  m.impl("patch_embed_backward", TORCH_BOX(&patch_embed_backward));
}

}  // namespace keye_ops
