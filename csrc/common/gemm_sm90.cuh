// A bf16 GEMM for sm_90a around any epilogue: TMA and wgmma, one warpgroup's epilogue beside the
// other's products.
#pragma once

#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>

#include "common/device_facts.h"
#include "common/gemm_launch.cuh"
#include "common/gemm_sm90_epilogue.cuh"

namespace keye_ops {

template <class Callbacks>
struct Sm90Gemm {
  using Epilogue = Sm90Epilogue<Callbacks>;
  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, GemmElement, cutlass::layout::RowMajor,
      kGemmAlignment, GemmElement, cutlass::layout::ColumnMajor, kGemmAlignment, float, Sm90Tile,
      Sm90Cluster,
      cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(
          sizeof(typename Epilogue::SharedStorage))>,
      cutlass::gemm::KernelTmaWarpSpecializedPingpong>::CollectiveOp;
  using Kernel =
      cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int, int>, Mainloop, Epilogue>;
  using Device = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;

  static void launch(const char* op, const GemmParams& params,
                     const typename Callbacks::Arguments& epilogue, int device_index) {
    using cute::Int;
    const cute::Stride<int64_t, Int<1>, int64_t> a_strides{params.a_stride, {}, 0};
    const cute::Stride<int64_t, Int<1>, int64_t> b_strides{params.b_stride, {}, 0};
    const cute::Stride<int64_t, Int<1>, int64_t> out_strides{params.n, {}, 0};
    const auto [m, n, k] = std::array{static_cast<int>(params.m), static_cast<int>(params.n),
                                      static_cast<int>(params.k)};
    typename Device::Arguments arguments{
        cutlass::gemm::GemmUniversalMode::kGemm,
        {m, n, k, 1},
        {static_cast<const GemmElement*>(params.a), a_strides,
         static_cast<const GemmElement*>(params.b), b_strides},
        {epilogue, nullptr, out_strides, static_cast<GemmElement*>(params.out), out_strides}};
    arguments.hw_info.device_id = device_index;
    arguments.hw_info.sm_count = device_facts(device_index).num_sms;
    launch_gemm<Device>(op, params, arguments, device_index);
  }
};

}  // namespace keye_ops
