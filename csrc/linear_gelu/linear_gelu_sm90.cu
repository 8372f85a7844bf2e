// linear_gelu's GEMM for sm_90a.
#include "common/gemm_sm90.cuh"
#include "linear_gelu/linear_gelu_epilogue.cuh"
#include "linear_gelu/linear_gelu_gemm.h"

namespace keye_ops {
namespace {

using namespace cutlass::epilogue::fusion;

constexpr auto kNearest = cutlass::FloatRoundStyle::round_to_nearest;

// gelu(product + bias), in fp32 up to the one rounding.
using Bias = Sm90RowBroadcast<0, Sm90Tile, GemmElement, float>;
using Hidden = Sm90EVT<Sm90Compute<cutlass::plus, float, float, kNearest>, Sm90AccFetch, Bias>;
template <template <class> class Gelu>
using Epilogue = Sm90EVT<Sm90Compute<Gelu, GemmElement, float, kNearest>, Hidden>;

template <template <class> class Gelu>
void launch_linear_gelu(const LinearGeluGemmParams& params, int device_index) {
  typename Epilogue<Gelu>::Arguments epilogue{};
  epilogue.op_0.op_1.ptr_row = static_cast<const GemmElement*>(params.bias);
  Sm90Gemm<Epilogue<Gelu>>::launch("linear_gelu", params.gemm, epilogue, device_index);
}

}  // namespace

void linear_gelu_sm90(const LinearGeluGemmParams& params, int device_index) {
  params.tanh ? launch_linear_gelu<GeluTanh>(params, device_index)
              : launch_linear_gelu<GeluErf>(params, device_index);
}

}  // namespace keye_ops
