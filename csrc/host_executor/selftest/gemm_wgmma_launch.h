// What a launch of gemm_wgmma needs, on a GPU and on the executor.
#pragma once

#include "common/tensor_map.h"
#include "host_executor/selftest/gemm_wgmma.cuh"

namespace keye_ops::selftest {

// Row-major matrices of rows that are multiples of 16 bytes.
inline GemmWgmmaParams gemm_wgmma_params(const BFloat16* a, const BFloat16* b, BFloat16* c,
                                         int64_t m, int64_t n, int64_t k) {
  using G = GemmWgmma;
  const auto map = [](const char* name, const BFloat16* base, int64_t rows, int64_t columns,
                      int64_t box_rows, int64_t box_columns) {
    return make_tensor_map({name,
                            base,
                            sizeof(BFloat16),
                            {columns, rows},
                            {columns * static_cast<int64_t>(sizeof(BFloat16))},
                            {box_columns, box_rows},
                            G::kSwizzle});
  };
  return {map("gemm_wgmma: a", a, m, k, G::BLOCK_M, G::BLOCK_K),
          map("gemm_wgmma: b", b, n, k, G::BLOCK_N, G::BLOCK_K),
          map("gemm_wgmma: c", c, m, n, G::BLOCK_M, G::BLOCK_N), static_cast<int>(k)};
}

}  // namespace keye_ops::selftest
