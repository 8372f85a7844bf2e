// varlen_attention on the CPU: the kernels, compiled once for every instruction set.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/cpu_capability.h"
#include "common/dtype.h"
#include "varlen_attention/varlen_attention.h"

namespace keye_ops {

// A piece of work: rows [row_begin, row_end) of every segment in [segment_begin, segment_end), for
// all query heads of one key head. More than one segment: all rows.
struct AttentionTask {
  int64_t segment_begin, segment_end;
  int64_t row_begin, row_end;
  int kv_head;
};

// Bytes of scratch memory for tasks of up to this many rows a query head.
KEYE_DECLARE_FOR_ISAS(size_t varlen_attention_scratch(const VarlenAttentionParams&, Dtype,
                                                      int64_t rows))
KEYE_DECLARE_FOR_ISAS(void varlen_attention_task(const VarlenAttentionParams&, Dtype,
                                                 const AttentionTask&, void* scratch))

// The same for gradients; a task has all rows of its segments.
KEYE_DECLARE_FOR_ISAS(size_t varlen_attention_backward_scratch(const VarlenAttentionParams&, Dtype,
                                                               int64_t rows))
KEYE_DECLARE_FOR_ISAS(void varlen_attention_backward_task(const VarlenAttentionParams&, Dtype,
                                                          const AttentionTask&, void* scratch))

}  // namespace keye_ops
