// linear_gelu's GEMM for every GPU from sm_80 on that has none of its own.
#include "common/gemm_sm80.cuh"
#include "linear_gelu/linear_gelu_epilogue.cuh"
#include "linear_gelu/linear_gelu_gemm.h"

namespace keye_ops {
namespace {

using namespace cutlass::epilogue::threadblock;

constexpr auto kNearest = cutlass::FloatRoundStyle::round_to_nearest;

// gelu(product + bias), in fp32 up to the one rounding of the store.
using BiasStride = cute::Stride<cute::Int<0>, cute::Int<1>, cute::Int<0>>;
using Bias = VisitorRowBroadcast<Sm80ThreadMap, GemmElement, BiasStride>;
using Hidden =
    Sm80EVT<VisitorCompute<cutlass::plus, float, float, kNearest>, VisitorAccFetch, Bias>;
template <template <class> class Gelu>
using Values = Sm80EVT<VisitorCompute<Gelu, float, float, kNearest>, Hidden>;

template <template <class> class Gelu>
void launch_linear_gelu(const LinearGeluGemmParams& params, int device_index) {
  typename Values<Gelu>::Arguments values{};
  values.op_0.op_1.ptr_row = static_cast<const GemmElement*>(params.bias);
  Sm80Gemm<Values<Gelu>>::launch("linear_gelu", params.gemm, values, device_index);
}

}  // namespace

void linear_gelu_sm80(const LinearGeluGemmParams& params, int device_index) {
  params.tanh ? launch_linear_gelu<GeluTanh>(params, device_index)
              : launch_linear_gelu<GeluErf>(params, device_index);
}

}  // namespace keye_ops
