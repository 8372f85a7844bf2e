// patch_embed on CUDA: the place of a patch, by values that nobody has looked at before.
#pragma once

#include "common/error_word.cuh"
#include "patch_embed/patch_embed.h"

namespace keye_ops {

// Reports what is wrong with it.
KEYE_DEVICE PatchPlace checked_place(const PatchEmbedParams& params, int64_t patch) {
  const PatchPlace place = patch_place(params, image_of(params, patch), patch);
  if (place.error != DeviceError::kNone) {
    report_error(params.error_word, place.error, static_cast<double>(place.received));
  }
  return place;
}

// What a token takes from the table; a token that is not good is to become zeros.
KEYE_DEVICE PatchTaps<float> checked_taps(const PatchEmbedParams& params, int64_t patch) {
  return taps_at<float>(params, checked_place(params, patch));
}

}  // namespace keye_ops
