// What the kernels are told that run the epilogues of patch_embed's GEMMs in tests.
#pragma once

#include <string>

#include "host_executor/kernels.h"
#include "patch_embed/patch_embed.h"

namespace keye_ops {

struct EpilogueTestParams {
  PatchEmbedParams patches;
  const float* products;  // [total, hidden]
  BFloat16* out;          // [total, hidden]
};

inline bool register_epilogue_test(const std::string& name, void (*kernel)(EpilogueTestParams)) {
  return host_executor::register_kernel(name, [kernel](const host_executor::Arguments& arguments) {
    EpilogueTestParams params{};
    PatchEmbedParams& patches = params.patches;
    patches.bias = arguments.array_if_any<void>("bias");
    patches.table = arguments.array<void>("table");
    patches.grid = arguments.array<int32_t>("grid");
    patches.image_offsets = arguments.array<int32_t>("image_offsets");
    patches.position_ids = arguments.array<void>("position_ids");
    patches.error_word = arguments.array<ErrorWord>("error_word");
    patches.position_stride = 2;
    patches.axis_stride = 1;
    patches.total = arguments.integer("total");
    patches.hidden = arguments.integer("hidden");
    patches.num_images = arguments.integer("num_images");
    patches.side = arguments.integer("side");
    patches.align_corners = arguments.integer("align_corners") != 0;
    params.products = arguments.array<float>("products");
    params.out = arguments.array<BFloat16>("out");
    return host_executor::bind_kernel(kernel, params);
  });
}

}  // namespace keye_ops
