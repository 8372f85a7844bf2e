// rope: schema, argument checks, output allocation.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "common/allocate.h"
#include "common/check.h"
#include "rope/rope_op.h"

namespace keye_ops {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void check_strides(const char* name, const Tensor& tensor) {
  KEYE_CHECK(tensor.numel() == 0 || tensor.stride(2) == 1, "rope: ", name,
             " must have unit last stride, got ", tensor.stride(2));
}

void check_contiguous(const char* name, const Tensor& vector) {
  KEYE_CHECK(vector.is_contiguous(), "rope: ", name, " must be contiguous, got stride ",
             vector.stride(0));
}

void check_heads(const char* name, const Tensor& tensor, const Tensor& q) {
  KEYE_CHECK(tensor.dim() == 3 && tensor.size(0) == q.size(0) && tensor.size(2) == q.size(2),
             "rope: ", name, " must be [", q.size(0), ", heads, ", q.size(2), "], got ",
             shape_of(tensor));
  check_same("rope", name, tensor, "q", q);
  check_strides(name, tensor);
}

void check_table(const Tensor& q, const Tensor& position_ids, const Tensor& inv_freq,
                 const Tensor& axis) {
  const int64_t total = q.size(0), pairs = q.size(2) / 2;
  KEYE_CHECK(position_ids.dim() == 2 && position_ids.size(1) == total,
             "rope: position_ids must be [axes, ", total, "], got ", shape_of(position_ids));
  KEYE_CHECK(is_integer(position_ids.scalar_type()) && same_device(position_ids, q),
             "rope: position_ids must be int32 or int64 on q's device, got ",
             dtype_name(position_ids.scalar_type()));
  KEYE_CHECK(position_ids.size(0) >= 1 && position_ids.size(0) <= kRopeMaxAxes,
             "rope: position_ids must have 1 to ", kRopeMaxAxes, " axes, got ",
             position_ids.size(0));
  KEYE_CHECK(inv_freq.dim() == 1 && inv_freq.size(0) == pairs, "rope: inv_freq must be [", pairs,
             "], got ", shape_of(inv_freq));
  check_contiguous("inv_freq", inv_freq);
  KEYE_CHECK(inv_freq.scalar_type() == ScalarType::Float && same_device(inv_freq, q),
             "rope: inv_freq must be fp32 on q's device, got ", dtype_name(inv_freq.scalar_type()));
  KEYE_CHECK(axis.dim() == 1 && axis.size(0) == pairs, "rope: axis must be [", pairs, "], got ",
             shape_of(axis));
  check_contiguous("axis", axis);
  KEYE_CHECK(axis.scalar_type() == ScalarType::Int && same_device(axis, q),
             "rope: axis must be int32 on q's device, got ", dtype_name(axis.scalar_type()));
}

void check_weights(const Tensor& q, const std::optional<Tensor>& q_norm_weight,
                   const std::optional<Tensor>& k_norm_weight) {
  KEYE_CHECK(q_norm_weight.has_value() == k_norm_weight.has_value(),
             "rope: q_norm_weight and k_norm_weight must be given together, got one of them");
  const char* names[] = {"q_norm_weight", "k_norm_weight"};
  const std::optional<Tensor>* weights[] = {&q_norm_weight, &k_norm_weight};
  for (int i = 0; i < 2; i++) {
    if (!weights[i]->has_value()) continue;
    const Tensor& weight = **weights[i];
    KEYE_CHECK(weight.dim() == 1 && weight.size(0) == q.size(2), "rope: ", names[i], " must be [",
               q.size(2), "], got ", shape_of(weight));
    check_contiguous(names[i], weight);
    check_same("rope", names[i], weight, "q", q);
  }
}

RopeDevice device_of(const Tensor& tensor) {
  return tensor.is_cpu() ? RopeDevice::kCpu : RopeDevice::kCuda;
}

// On the host a bad value raises; reading one on a device would make the host wait, so kernels
// clamp, and report to the error word.
void check_values(const RopeParams& params) {
  for (int j = 0; j < params.head_dim / 2; j++) {
    KEYE_CHECK(params.inv_freq[j] >= 0 && params.inv_freq[j] <= 1,
               requirement_of(DeviceError::kRopeInvFreq), ", got ", params.inv_freq[j]);
    KEYE_CHECK(params.axis[j] >= 0 && params.axis[j] < params.num_axes,
               "rope: axis must be in [0, ", params.num_axes, "), got ", params.axis[j]);
  }
  for (int axis = 0; axis < params.num_axes; axis++) {
    for (int64_t token = 0; token < params.total; token++) {
      const int64_t position = rope_position(params, axis, token);
      KEYE_CHECK(position >= 0 && position < kRopeMaxPosition,
                 requirement_of(DeviceError::kRopePositions), ", got ", position);
    }
  }
}

RopeTensor rope_tensor(const Tensor& x, const Tensor& out, const std::optional<Tensor>& weight) {
  RopeTensor tensor{};
  tensor.x = x.const_data_ptr();
  tensor.out = out.mutable_data_ptr();
  tensor.norm_weight = weight.has_value() ? weight->const_data_ptr() : nullptr;
  tensor.x_stride_token = stride_of(x, 0);
  tensor.x_stride_head = stride_of(x, 1);
  tensor.out_stride_token = stride_of(out, 0);
  tensor.out_stride_head = stride_of(out, 1);
  tensor.num_heads = static_cast<int>(x.size(1));
  return tensor;
}

// Checks everything and describes q -> out_q, k -> out_k.
RopeParams rope_params(const Tensor& q, const Tensor& k, const Tensor& position_ids,
                       const Tensor& inv_freq, const Tensor& axis, bool interleaved, bool inverse,
                       double norm_eps) {
  check_floating("rope", "q", q);
  KEYE_CHECK(q.dim() == 3, "rope: q must be [N, H, D], got ", shape_of(q));
  const int64_t head_dim = q.size(2);
  KEYE_CHECK(head_dim % 2 == 0 && head_dim >= 2 && head_dim <= kRopeMaxHeadDim,
             "rope: head_dim must be even, from 2 to ", kRopeMaxHeadDim, ", got ", head_dim);
  check_strides("q", q);
  check_heads("k", k, q);
  check_table(q, position_ids, inv_freq, axis);

  RopeParams params{};
  params.position_ids = position_ids.const_data_ptr();
  params.inv_freq = inv_freq.const_data_ptr<float>();
  params.axis = axis.const_data_ptr<int32_t>();
  params.position_stride_axis = position_ids.stride(0);
  params.position_stride_token = position_ids.stride(1);
  params.total = q.size(0);
  params.num_axes = static_cast<int>(position_ids.size(0));
  params.head_dim = static_cast<int>(head_dim);
  params.norm_eps = norm_eps;
  params.position_is_int64 = position_ids.scalar_type() == ScalarType::Long;
  params.interleaved = interleaved;
  params.inverse = inverse;
  if (rope_backend(device_of(q)).traits.checks_values) check_values(params);
  return params;
}

// In place every element must be its own: no two indices of a tensor, and none of q and of k, may
// meet.
void check_inplace(const char* name, const Tensor& tensor) {
  // Tokens and heads, the finer first: each step must clear everything that the finer one covers.
  const bool tokens_finer = stride_of(tensor, 0) < stride_of(tensor, 1) && tensor.size(0) > 1;
  const int64_t dims[] = {tokens_finer ? 0 : 1, tokens_finer ? 1 : 0};
  int64_t extent = tensor.size(2);
  for (const int64_t dim : dims) {
    if (tensor.size(dim) <= 1) continue;
    KEYE_CHECK(tensor.stride(dim) >= extent, "rope: ", name,
               " must not overlap itself to be rotated in place, got stride ", tensor.stride(dim),
               " in dimension ", dim);
    extent = (tensor.size(dim) - 1) * tensor.stride(dim) + extent;
  }
}

void check_disjoint(const Tensor& q, const Tensor& k) {
  if (q.numel() == 0 || k.numel() == 0) return;
  const int64_t size = static_cast<int64_t>(q.element_size());
  const auto address = [](const Tensor& x) {
    return reinterpret_cast<int64_t>(x.const_data_ptr());
  };
  const auto heads = [](const Tensor& x) { return (x.size(1) - 1) * stride_of(x, 1) + x.size(2); };
  const auto all = [&](const Tensor& x) { return (x.size(0) - 1) * stride_of(x, 0) + heads(x); };
  const int64_t distance = address(k) - address(q);
  bool apart = distance >= all(q) * size || -distance >= all(k) * size;
  // Views of one packed tensor: the heads of k lie between those of q of two tokens.
  const int64_t step = stride_of(q, 0) * size;
  if (!apart && step > 0 && stride_of(q, 0) == stride_of(k, 0)) {
    const int64_t between = ((distance % step) + step) % step;
    apart = between >= heads(q) * size && between + heads(k) * size <= step;
  }
  KEYE_CHECK(apart, "rope: q and k must not share memory to be rotated in place, got addresses ",
             distance, " bytes apart");
}

}  // namespace

RopeBackend& rope_backend(RopeDevice device) {
  static RopeBackend backends[2] = {};
  return backends[static_cast<int>(device)];
}

std::tuple<Tensor, Tensor> rope(const Tensor& q, const Tensor& k, const Tensor& position_ids,
                                const Tensor& inv_freq, const Tensor& axis, bool interleaved,
                                bool inverse, std::optional<Tensor> q_norm_weight,
                                std::optional<Tensor> k_norm_weight, double norm_eps) {
  RopeParams params =
      rope_params(q, k, position_ids, inv_freq, axis, interleaved, inverse, norm_eps);
  check_weights(q, q_norm_weight, k_norm_weight);
  Tensor out_q = new_empty_like(q), out_k = new_empty_like(k);
  params.q = rope_tensor(q, out_q, q_norm_weight);
  params.k = rope_tensor(k, out_k, k_norm_weight);
  rope_backend(device_of(q)).forward(params, float_dtype_of(q.scalar_type()), q.get_device_index());
  return {out_q, out_k};
}

void rope_inplace(const Tensor& q, const Tensor& k, const Tensor& position_ids,
                  const Tensor& inv_freq, const Tensor& axis, bool interleaved, bool inverse,
                  std::optional<Tensor> q_norm_weight, std::optional<Tensor> k_norm_weight,
                  double norm_eps) {
  RopeParams params =
      rope_params(q, k, position_ids, inv_freq, axis, interleaved, inverse, norm_eps);
  check_weights(q, q_norm_weight, k_norm_weight);
  check_inplace("q", q);
  check_inplace("k", k);
  check_disjoint(q, k);
  params.q = rope_tensor(q, q, q_norm_weight);
  params.k = rope_tensor(k, k, k_norm_weight);
  rope_backend(device_of(q)).forward(params, float_dtype_of(q.scalar_type()), q.get_device_index());
}

std::tuple<Tensor, Tensor, Tensor, Tensor> rope_backward(
    const Tensor& dq, const Tensor& dk, const Tensor& q, const Tensor& k,
    const Tensor& position_ids, const Tensor& inv_freq, const Tensor& axis,
    const Tensor& q_norm_weight, const Tensor& k_norm_weight, bool interleaved, double norm_eps) {
  RopeParams params =
      rope_params(q, k, position_ids, inv_freq, axis, interleaved, /*inverse=*/true, norm_eps);
  check_weights(q, q_norm_weight, k_norm_weight);
  check_heads("dq", dq, q);
  check_heads("dk", dk, q);
  KEYE_CHECK(dq.size(1) == q.size(1) && dk.size(1) == k.size(1),
             "rope: dq and dk must have the heads of q and k, got ", dq.size(1), " and ",
             dk.size(1));

  const RopeBackend& backend = rope_backend(device_of(q));
  const int32_t partial_dtype =
      backend.traits.partials_are_fp64 ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32();
  params.num_partials = backend.num_partials(params.total);
  Tensor out_q = new_empty_like(q), out_k = new_empty_like(k);
  params.q = rope_tensor(q, out_q, q_norm_weight);
  params.k = rope_tensor(k, out_k, k_norm_weight);

  RopeTensor* tensors[] = {&params.q, &params.k};
  const Tensor* douts[] = {&dq, &dk};
  Tensor partials[2];
  for (int i = 0; i < 2; i++) {
    RopeTensor& tensor = *tensors[i];
    tensor.dout = douts[i]->const_data_ptr();
    tensor.dout_stride_token = stride_of(*douts[i], 0);
    tensor.dout_stride_head = stride_of(*douts[i], 1);
    partials[i] = new_empty(q, {params.num_partials, params.head_dim}, partial_dtype);
    tensor.dweight_partial = partials[i].mutable_data_ptr();
  }
  backend.backward(params, float_dtype_of(q.scalar_type()), q.get_device_index());

  // The second stage: rows are summed in a fixed order.
  const int64_t rows[] = {0};
  Tensor dweights[2];
  for (int i = 0; i < 2; i++) {
    dweights[i] = torch::stable::to(torch::stable::sum(partials[i], rows), q.scalar_type());
  }
  return {out_q, out_k, dweights[0], dweights[1]};
}

STABLE_TORCH_LIBRARY_FRAGMENT(keye_ops, m) {
  m.def(
      "rope(Tensor q, Tensor k, Tensor position_ids, Tensor inv_freq, Tensor axis, "
      "bool interleaved=False, bool inverse=False, Tensor? q_norm_weight=None, "
      "Tensor? k_norm_weight=None, float norm_eps=1e-06) -> (Tensor, Tensor)");
  m.def(
      "rope_(Tensor(a!) q, Tensor(b!) k, Tensor position_ids, Tensor inv_freq, Tensor axis, "
      "bool interleaved=False, bool inverse=False, Tensor? q_norm_weight=None, "
      "Tensor? k_norm_weight=None, float norm_eps=1e-06) -> ()");
  m.def(
      "rope_backward(Tensor dq, Tensor dk, Tensor q, Tensor k, Tensor position_ids, "
      "Tensor inv_freq, Tensor axis, Tensor q_norm_weight, Tensor k_norm_weight, "
      "bool interleaved, float norm_eps) -> (Tensor, Tensor, Tensor, Tensor)");
}

}  // namespace keye_ops
