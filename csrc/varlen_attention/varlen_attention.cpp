// varlen_attention: schema, argument checks, output allocation.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>

#include "common/allocate.h"
#include "common/check.h"
#include "varlen_attention/varlen_attention_op.h"

namespace keye_ops {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr const char* kOp = "varlen_attention";
constexpr int64_t kMaxHeadDim = 4096;  // sizes the scratch memory of the CPU

void check_rows(const char* name, const Tensor& x, int64_t rows, int64_t heads, int64_t head_dim) {
  KEYE_CHECK(x.dim() == 3 && x.size(0) == rows && x.size(1) == heads && x.size(2) == head_dim, kOp,
             ": ", name, " must be [", rows, ", ", heads, ", ", head_dim, "], got ", shape_of(x));
}

void check_stride(const char* name, const Tensor& x) {
  KEYE_CHECK(x.numel() == 0 || x.size(2) <= 1 || x.stride(2) == 1, kOp, ": ", name,
             " must have unit last stride, got ", x.stride(2));
}

void check_seqlens(const char* name, const Tensor& cu_seqlens) {
  KEYE_CHECK(cu_seqlens.scalar_type() == ScalarType::Int && cu_seqlens.dim() == 1 &&
                 cu_seqlens.size(0) > 0,
             kOp, ": ", name, " must be int32 [num_segments + 1], got ",
             dtype_name(cu_seqlens.scalar_type()), " ", shape_of(cu_seqlens));
  KEYE_CHECK(cu_seqlens.is_contiguous(), kOp, ": ", name, " must be contiguous, got stride ",
             cu_seqlens.stride(0));
}

void check_seqlens_pair(const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k) {
  check_seqlens("cu_seqlens_q", cu_seqlens_q);
  check_seqlens("cu_seqlens_k", cu_seqlens_k);
  KEYE_CHECK(cu_seqlens_q.size(0) == cu_seqlens_k.size(0), kOp,
             ": cu_seqlens_q and cu_seqlens_k must have equal lengths, got (", cu_seqlens_q.size(0),
             ", ", cu_seqlens_k.size(0), ")");
}

// On the host a bad value raises; reading one on a device would make the host wait.
void check_offsets(const char* name, const int32_t* offsets, int64_t num_segments, int64_t total,
                   const char* longest_name, std::optional<int64_t> longest) {
  KEYE_CHECK(offsets[0] == 0, kOp, ": ", name, " must start at 0, got ", offsets[0]);
  int64_t most = 0;
  for (int64_t i = 0; i < num_segments; i++) {
    KEYE_CHECK(offsets[i] <= offsets[i + 1], kOp, ": ", name, " must not decrease, got ",
               offsets[i], " then ", offsets[i + 1]);
    most = std::max<int64_t>(most, int64_t{offsets[i + 1]} - offsets[i]);
  }
  KEYE_CHECK(offsets[num_segments] <= total, kOp, ": ", name, " must end within the ", total,
             " rows, got ", offsets[num_segments]);
  KEYE_CHECK(!longest.has_value() || *longest >= most, kOp, ": ", longest_name,
             " must be at least the longest segment, ", most, ", got ", *longest);
}

AttentionTensor attention_tensor(const Tensor& x) {
  return {const_cast<void*>(x.const_data_ptr()), stride_of(x, 0), stride_of(x, 1)};
}

// Checks everything and describes the inputs.
VarlenAttentionParams attention_params(const Tensor& q, const Tensor& k, const Tensor& v,
                                       const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
                                       std::optional<int64_t> max_seqlen_q,
                                       std::optional<int64_t> max_seqlen_k,
                                       std::optional<double> softmax_scale, bool causal) {
  check_floating(kOp, "q", q);
  KEYE_CHECK(q.dim() == 3, kOp, ": q must be [Nq, H, D], got ", shape_of(q));
  KEYE_CHECK(k.dim() == 3 && k.size(2) == q.size(2), kOp, ": k must be [Nk, Hkv, ", q.size(2),
             "], got ", shape_of(k));
  check_same(kOp, "k", k, "q", q);
  check_rows("v", v, k.size(0), k.size(1), k.size(2));
  check_same(kOp, "v", v, "q", q);
  const int64_t heads = q.size(1), kv_heads = k.size(1);
  KEYE_CHECK(kv_heads > 0 && heads % kv_heads == 0, kOp,
             ": num_heads must be a multiple of num_kv_heads, got (", heads, ", ", kv_heads, ")");
  KEYE_CHECK(q.size(2) >= 1 && q.size(2) <= kMaxHeadDim, kOp, ": head_dim must be from 1 to ",
             kMaxHeadDim, ", got ", q.size(2));
  check_seqlens_pair(cu_seqlens_q, cu_seqlens_k);
  KEYE_CHECK(same_device(cu_seqlens_q, q), kOp,
             ": cu_seqlens_q must be on q's device, got another");
  KEYE_CHECK(same_device(cu_seqlens_k, q), kOp,
             ": cu_seqlens_k must be on q's device, got another");
  check_stride("q", q);
  check_stride("k", k);
  check_stride("v", v);

  VarlenAttentionParams params{};
  params.q = attention_tensor(q);
  params.k = attention_tensor(k);
  params.v = attention_tensor(v);
  params.cu_seqlens_q = cu_seqlens_q.const_data_ptr<int32_t>();
  params.cu_seqlens_k = cu_seqlens_k.const_data_ptr<int32_t>();
  params.total_q = q.size(0);
  params.total_k = k.size(0);
  params.num_segments = cu_seqlens_q.size(0) - 1;
  params.num_heads = static_cast<int>(heads);
  params.num_kv_heads = static_cast<int>(kv_heads);
  params.head_dim = static_cast<int>(q.size(2));
  params.softmax_scale = softmax_scale.value_or(1 / std::sqrt(static_cast<double>(q.size(2))));
  params.causal = causal;
  if (q.is_cpu()) {
    check_offsets("cu_seqlens_q", params.cu_seqlens_q, params.num_segments, params.total_q,
                  "max_seqlen_q", max_seqlen_q);
    check_offsets("cu_seqlens_k", params.cu_seqlens_k, params.num_segments, params.total_k,
                  "max_seqlen_k", max_seqlen_k);
  }
  return params;
}

int32_t lse_dtype(const Tensor& q) {
  return q.scalar_type() == ScalarType::Double ? aoti_torch_dtype_float64()
                                               : aoti_torch_dtype_float32();
}

AttentionBackend& backend_of(const Tensor& q) {
  return attention_backend(q.is_cpu() ? AttentionDevice::kCpu : AttentionDevice::kCuda);
}

// The plan that was given, or one of these offsets; keep what it returns until the kernels are
// launched.
Tensor planned(VarlenAttentionParams& params, const Tensor& q, const std::optional<Tensor>& given,
               bool backward) {
  const AttentionBackend& backend = backend_of(q);
  if (backend.plan == nullptr) return Tensor();
  const int64_t words = attention_plan_words(params.total_q, params.total_k, params.num_segments);
  if (given.has_value()) {
    KEYE_CHECK(given->scalar_type() == ScalarType::Int && given->dim() == 1 &&
                   given->size(0) == words && same_device(*given, q),
               kOp, ": plan must be what varlen_attention_plan gives for these offsets, int32 [",
               words, "] on q's device, got ", dtype_name(given->scalar_type()), " ",
               shape_of(*given));
  }
  Tensor plan = given.has_value() ? *given : new_empty(q, {words}, aoti_torch_dtype_int32());
  if (!given.has_value()) {
    backend.plan(params, plan.mutable_data_ptr<int32_t>(), backward, q.get_device_index());
  }
  params.plan = attention_plan_in(plan.const_data_ptr<int32_t>(), params.total_q, params.total_k,
                                  params.num_segments);
  return plan;
}

}  // namespace

AttentionBackend& attention_backend(AttentionDevice device) {
  static AttentionBackend backends[2] = {};
  return backends[static_cast<int>(device)];
}

std::tuple<Tensor, Tensor> varlen_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                            const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
                                            std::optional<int64_t> max_seqlen_q,
                                            std::optional<int64_t> max_seqlen_k,
                                            std::optional<double> softmax_scale, bool causal,
                                            bool return_lse, const std::optional<Tensor>& plan) {
  VarlenAttentionParams params = attention_params(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
                                                  max_seqlen_k, softmax_scale, causal);
  Tensor out = new_empty_like(q);
  Tensor lse = return_lse ? new_empty(q, {q.size(1), q.size(0)}, lse_dtype(q))
                          : new_empty(q, {0}, lse_dtype(q));
  params.out = attention_tensor(out);
  params.softmax_lse = return_lse ? lse.mutable_data_ptr() : nullptr;
  const Tensor kept = planned(params, q, plan, false);
  backend_of(q).forward(params, float_dtype_of(q.scalar_type()), q.get_device_index());
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> varlen_attention_backward(
    const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
    const Tensor& softmax_lse, const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
    std::optional<int64_t> max_seqlen_q, std::optional<int64_t> max_seqlen_k,
    std::optional<double> softmax_scale, bool causal, const std::optional<Tensor>& plan) {
  VarlenAttentionParams params = attention_params(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
                                                  max_seqlen_k, softmax_scale, causal);
  const Tensor* rows[] = {&dout, &out};
  const char* names[] = {"dout", "out"};
  for (int i = 0; i < 2; i++) {
    check_rows(names[i], *rows[i], q.size(0), q.size(1), q.size(2));
    check_same(kOp, names[i], *rows[i], "q", q);
    check_stride(names[i], *rows[i]);
  }
  const bool wide = q.scalar_type() == ScalarType::Double;
  KEYE_CHECK(softmax_lse.dim() == 2 && softmax_lse.size(0) == q.size(1) &&
                 softmax_lse.size(1) == q.size(0) && softmax_lse.is_contiguous() &&
                 softmax_lse.scalar_type() == (wide ? ScalarType::Double : ScalarType::Float),
             kOp, ": softmax_lse must be contiguous ", wide ? "fp64" : "fp32", " [", q.size(1),
             ", ", q.size(0), "], got ", dtype_name(softmax_lse.scalar_type()), " ",
             shape_of(softmax_lse));
  Tensor dq = new_empty_like(q), dk = new_empty_like(k), dv = new_empty_like(v);
  params.out = attention_tensor(out);
  params.dout = attention_tensor(dout);
  params.dq = attention_tensor(dq);
  params.dk = attention_tensor(dk);
  params.dv = attention_tensor(dv);
  params.softmax_lse = const_cast<void*>(softmax_lse.const_data_ptr());
  const Tensor kept = planned(params, q, plan, true);
  Tensor delta;
  if (backend_of(q).plan != nullptr) {
    delta = new_empty(q, {q.size(1), q.size(0)}, aoti_torch_dtype_float32());
    params.delta = delta.mutable_data_ptr<float>();
  }
  backend_of(q).backward(params, float_dtype_of(q.scalar_type()), q.get_device_index());
  return {dq, dk, dv};
}

Tensor varlen_attention_plan(const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
                             int64_t total_q, int64_t total_k, bool causal) {
  check_seqlens_pair(cu_seqlens_q, cu_seqlens_k);
  KEYE_CHECK(same_device(cu_seqlens_k, cu_seqlens_q), kOp,
             ": cu_seqlens_k must be on cu_seqlens_q's device, got another");
  KEYE_CHECK(total_q >= 0 && total_k >= 0, kOp, ": totals must not be negative, got (", total_q,
             ", ", total_k, ")");
  VarlenAttentionParams params{};
  params.cu_seqlens_q = cu_seqlens_q.const_data_ptr<int32_t>();
  params.cu_seqlens_k = cu_seqlens_k.const_data_ptr<int32_t>();
  params.num_segments = cu_seqlens_q.size(0) - 1;
  params.total_q = total_q;
  params.total_k = total_k;
  params.causal = causal;
  const AttentionBackend& backend = backend_of(cu_seqlens_q);
  const int64_t words =
      backend.plan == nullptr ? 0 : attention_plan_words(total_q, total_k, params.num_segments);
  Tensor plan = new_empty(cu_seqlens_q, {words}, aoti_torch_dtype_int32());
  if (words > 0) {
    backend.plan(params, plan.mutable_data_ptr<int32_t>(), true, cu_seqlens_q.get_device_index());
  }
  return plan;
}

STABLE_TORCH_LIBRARY_FRAGMENT(keye_ops, m) {
  m.def(
      "varlen_attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, "
      "SymInt? max_seqlen_q=None, SymInt? max_seqlen_k=None, float? softmax_scale=None, "
      "bool causal=False, bool return_lse=True, Tensor? plan=None) -> (Tensor, Tensor)");
  m.def(
      "varlen_attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, "
      "Tensor softmax_lse, Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt? max_seqlen_q, "
      "SymInt? max_seqlen_k, float? softmax_scale, bool causal, Tensor? plan=None) -> (Tensor, "
      "Tensor, Tensor)");
  m.def(
      "varlen_attention_plan(Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt total_q, "
      "SymInt total_k, bool causal=False) -> Tensor");
}

}  // namespace keye_ops
