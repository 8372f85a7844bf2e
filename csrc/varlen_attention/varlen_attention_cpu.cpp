// varlen_attention on the CPU: the division of work, threads, and registration.
#include "varlen_attention/varlen_attention_cpu.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <vector>

#include "common/check.h"
#include "common/parallel.h"
#include "varlen_attention/varlen_attention_op.h"

namespace keye_ops {
namespace {

constexpr int64_t kTaskRows = 1024;  // rows (of all query heads) that share packed keys
constexpr int64_t kMinTaskRows = 128;
constexpr int64_t kTasksPerThread = 4;
constexpr int64_t kTaskSegments = 4096;

struct Plan {
  std::vector<AttentionTask> spans;  // kv_head is left open: every span is a task for each of them
  int64_t most_rows = 1;
};

// Rows a task for each, long segments in pieces, short ones together. What a task computes does not
// depend on the division, so it may depend on the number of threads.
Plan make_plan(const VarlenAttentionParams& params, bool whole_segments) {
  const int64_t group = params.num_heads / params.num_kv_heads;
  const int64_t wanted = kTasksPerThread * torch::stable::get_num_threads();
  const int64_t rows = int64_t{params.cu_seqlens_q[params.num_segments]} * params.num_kv_heads;
  const int64_t least = std::max<int64_t>(1, kMinTaskRows / group);
  const int64_t most = std::max<int64_t>(least, kTaskRows / group);
  const int64_t piece = (std::clamp(rows / wanted, least, most) + 31) / 32 * 32;

  Plan plan;
  constexpr int64_t kAll = std::numeric_limits<int64_t>::max();
  int64_t gathered = 0;
  for (int64_t i = 0; i < params.num_segments; i++) {
    const int64_t num_rows = params.cu_seqlens_q[i + 1] - params.cu_seqlens_q[i];
    const int64_t num_keys = params.cu_seqlens_k[i + 1] - params.cu_seqlens_k[i];
    if (!whole_segments && num_rows > piece) {
      for (int64_t row = 0; row < num_rows; row += piece) {
        plan.spans.push_back({i, i + 1, row, std::min(row + piece, num_rows), 0});
      }
      plan.most_rows = std::max(plan.most_rows, piece);
      gathered = 0;
      continue;
    }
    plan.most_rows = std::max(plan.most_rows, num_rows);
    const int64_t size = std::max(num_rows, num_keys);
    const bool joins = gathered > 0 && gathered + size <= piece &&
                       i - plan.spans.back().segment_begin < kTaskSegments;
    if (joins) {
      plan.spans.back().segment_end = i + 1;
      gathered += size;
    } else {
      plan.spans.push_back({i, i + 1, 0, kAll, 0});
      gathered = size + 1;
    }
  }
  // Long tasks first, so that no thread is left with one at the end.
  const auto cost = [&](const AttentionTask& span) {
    const int64_t first = params.cu_seqlens_q[span.segment_begin];
    const int64_t num_rows = params.cu_seqlens_q[span.segment_end] - first;
    const int64_t num_keys =
        params.cu_seqlens_k[span.segment_end] - params.cu_seqlens_k[span.segment_begin];
    const int64_t end = std::min(span.row_end, num_rows);
    return static_cast<double>(end - span.row_begin) *
           visible_keys(params.causal, end - 1, num_rows, num_keys);
  };
  std::stable_sort(plan.spans.begin(), plan.spans.end(),
                   [&](const auto& a, const auto& b) { return cost(a) > cost(b); });
  return plan;
}

struct Free {
  void operator()(char* memory) const { ::operator delete(memory, std::align_val_t{64}); }
};

template <class F>
void run_plan(const VarlenAttentionParams& params, const Plan& plan, size_t scratch_bytes,
              const F& run) {
  const int64_t count = static_cast<int64_t>(plan.spans.size()) * params.num_kv_heads;
  for_each_task_with(
      count,
      [&] {
        return std::unique_ptr<char, Free>(
            static_cast<char*>(::operator new(scratch_bytes, std::align_val_t{64})));
      },
      [&](const std::unique_ptr<char, Free>& scratch, int64_t i) {
        AttentionTask task = plan.spans[i / params.num_kv_heads];
        task.kv_head = static_cast<int>(i % params.num_kv_heads);
        run(task, scratch.get());
      });
}

// Rows behind the last offset belong to no segment: zeros.
void clear_rest(const AttentionTensor& x, int64_t first, int64_t total, int heads, int head_dim,
                int64_t element_size) {
  for (int64_t row = first; row < total; row++) {
    for (int head = 0; head < heads; head++) {
      const int64_t offset = row * x.stride_row + head * x.stride_head;
      std::memset(static_cast<char*>(x.data) + offset * element_size, 0, head_dim * element_size);
    }
  }
}

template <class S>
void clear_lse(const VarlenAttentionParams& params, int64_t first) {
  for (int head = 0; head < params.num_heads; head++) {
    S* row = static_cast<S*>(params.softmax_lse) + head * params.total_q;
    std::fill(row + first, row + params.total_q, -std::numeric_limits<S>::infinity());
  }
}

void forward(const VarlenAttentionParams& params, Dtype dtype, int /*device_index*/) {
  const Plan plan = make_plan(params, false);
  const auto task_kernel = KEYE_SELECT_ISA(varlen_attention_task);
  const size_t bytes = KEYE_SELECT_ISA(varlen_attention_scratch)(params, dtype, plan.most_rows);
  run_plan(params, plan, bytes, [&](const AttentionTask& task, void* scratch) {
    task_kernel(params, dtype, task, scratch);
  });
  const int64_t end = params.cu_seqlens_q[params.num_segments];
  clear_rest(params.out, end, params.total_q, params.num_heads, params.head_dim, size_of(dtype));
  if (params.softmax_lse == nullptr) return;
  if (dtype == Dtype::kDouble) {
    clear_lse<double>(params, end);
  } else {
    clear_lse<float>(params, end);
  }
}

void backward(const VarlenAttentionParams& params, Dtype dtype, int /*device_index*/) {
  const Plan plan = make_plan(params, true);
  const auto task_kernel = KEYE_SELECT_ISA(varlen_attention_backward_task);
  const size_t bytes =
      KEYE_SELECT_ISA(varlen_attention_backward_scratch)(params, dtype, plan.most_rows);
  run_plan(params, plan, bytes, [&](const AttentionTask& task, void* scratch) {
    task_kernel(params, dtype, task, scratch);
  });
  const int64_t size = size_of(dtype);
  const int64_t end_q = params.cu_seqlens_q[params.num_segments];
  const int64_t end_k = params.cu_seqlens_k[params.num_segments];
  clear_rest(params.dq, end_q, params.total_q, params.num_heads, params.head_dim, size);
  clear_rest(params.dk, end_k, params.total_k, params.num_kv_heads, params.head_dim, size);
  clear_rest(params.dv, end_k, params.total_k, params.num_kv_heads, params.head_dim, size);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(keye_ops, CPU, m) {
  attention_backend(AttentionDevice::kCpu) = {&forward, &backward, nullptr};
  m.impl("varlen_attention", TORCH_BOX(&varlen_attention));
  m.impl("varlen_attention_backward", TORCH_BOX(&varlen_attention_backward));
  m.impl("varlen_attention_plan", TORCH_BOX(&varlen_attention_plan));
}

}  // namespace keye_ops
