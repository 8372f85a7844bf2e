// What kernels report of values that only the device sees: cu_seqlens, grids, positions. They go on
// with values that are safe; whoever asks for errors gets the first.
#pragma once

#include <cstdint>
#include <string>

#include "common/error.h"

namespace keye_ops {

// Every requirement that a kernel checks; the texts are those of requirement_of.
enum class DeviceError : uint32_t {
  kNone,
  kRopePositions,
  kRopeInvFreq,
  kRopeAxis,
  kMergeNormGrid,
  kMergeNormOffsets,
  kPatchEmbedGrid,
  kPatchEmbedOffsets,
  kPatchEmbedPositions,
  kAttentionOffsetsQ,
  kAttentionOffsetsK,
  kCount
};

// The first error since the last look; zeros if there was none.
struct ErrorWord {
  uint32_t code;  // a DeviceError
  uint32_t unused;
  double value;  // what was received
};

// The op and the requirement, as its check on the host would say.
inline const char* requirement_of(DeviceError error) {
  switch (error) {
    case DeviceError::kRopePositions:
      return "rope: position_ids must be in [0, 2**24)";
    case DeviceError::kRopeInvFreq:
      return "rope: inv_freq must be in [0, 1]";
    case DeviceError::kRopeAxis:
      return "rope: axis must name a row of position_ids";
    case DeviceError::kMergeNormGrid:
      return "merge_norm: grid must hold positive (t, h, w) with h and w multiples of the merge";
    case DeviceError::kMergeNormOffsets:
      return "merge_norm: image_offsets must be the sums of t * h * w up to the patches";
    case DeviceError::kPatchEmbedGrid:
      return "patch_embed: grid must hold positive (t, h, w)";
    case DeviceError::kPatchEmbedOffsets:
      return "patch_embed: image_offsets must be the sums of t * h * w up to the patches";
    case DeviceError::kPatchEmbedPositions:
      return "patch_embed: position_ids must lie inside their image's grid";
    case DeviceError::kAttentionOffsetsQ:
      return "varlen_attention: cu_seqlens_q must rise from 0 to at most Nq";
    case DeviceError::kAttentionOffsetsK:
      return "varlen_attention: cu_seqlens_k must rise from 0 to at most Nk";
    default:
      return "keye_ops: an error word must hold a known code";
  }
}

inline std::string text_of(const ErrorWord& word) {
  std::ostringstream text;
  text.precision(17);  // an integer, as most are, is printed as one
  text << requirement_of(static_cast<DeviceError>(word.code)) << ", got " << word.value;
  return text.str();
}

}  // namespace keye_ops
