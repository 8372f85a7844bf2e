// The grids of a packed batch, as every op that takes them checks them; see keye_ops/grid.py.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <string>

#include "common/check.h"

namespace keye_ops {

inline void check_grid_tensor(const char* op, const char* name, const torch::stable::Tensor& tensor,
                              const torch::stable::Tensor& other) {
  KEYE_CHECK(tensor.scalar_type() == torch::headeronly::ScalarType::Int, op, ": ", name,
             " must be int32, got ", dtype_name(tensor.scalar_type()));
  KEYE_CHECK(same_device(tensor, other), op, ": ", name, " must be on ", device_name(other),
             ", got ", device_name(tensor));
  KEYE_CHECK(tensor.is_contiguous(), op, ": ", name, " must be contiguous, got stride ",
             tensor.stride(0));
}

// Requires grid [num_images, 3] and image_offsets [num_images + 1] that describe `total` patches.
// Values are looked at only where the backend wants it: they are on the host then.
inline void check_grid(const char* op, const torch::stable::Tensor& grid,
                       const torch::stable::Tensor& image_offsets,
                       const torch::stable::Tensor& other, int64_t total, int64_t merge,
                       bool check_values) {
  KEYE_CHECK(grid.dim() == 2 && grid.size(1) == 3, op, ": grid must be [num_images, 3], got ",
             shape_of(grid));
  const int64_t num_images = grid.size(0);
  KEYE_CHECK(image_offsets.dim() == 1 && image_offsets.size(0) == num_images + 1, op,
             ": image_offsets must be [", num_images + 1, "], got ", shape_of(image_offsets));
  check_grid_tensor(op, "grid", grid, other);
  check_grid_tensor(op, "image_offsets", image_offsets, other);
  if (!check_values) return;

  const int32_t* sizes = grid.const_data_ptr<int32_t>();
  const int32_t* offsets = image_offsets.const_data_ptr<int32_t>();
  for (int64_t i = 0; i < num_images; i++) {
    const int64_t t = sizes[3 * i], h = sizes[3 * i + 1], w = sizes[3 * i + 2];
    const bool good = t >= 1 && h >= 1 && w >= 1 && h % merge == 0 && w % merge == 0;
    KEYE_CHECK(good, op, ": grid must hold positive (t, h, w)",
               merge > 1 ? message(" with h and w multiples of ", merge) : std::string(),
               ", got [[", t, ", ", h, ", ", w, "]]");
  }
  int64_t sum = 0;
  bool good = offsets[0] == 0;
  for (int64_t i = 0; i < num_images && good; i++) {
    const int64_t t = sizes[3 * i], h = sizes[3 * i + 1], w = sizes[3 * i + 2];
    good = w <= total / (t * h);  // else the product might overflow
    sum += good ? t * h * w : 0;
    good = good && sum <= total && offsets[i + 1] == sum;
  }
  if (good && sum == total) return;
  std::string last;
  for (int64_t i = std::max<int64_t>(0, num_images - 2); i <= num_images; i++) {
    last += message(last.empty() ? "" : ", ", offsets[i]);
  }
  KEYE_CHECK(false, op, ": image_offsets must be the sums of t * h * w up to the ", total,
             " patches, got [", last, "]");
}

}  // namespace keye_ops
