// A bf16 GEMM for every GPU from sm_80 on around any epilogue: cp.async and mma.sync; where shared
// memory allows two blocks a multiprocessor, one's epilogue runs beside the other's products.
#pragma once

#include "common/gemm_launch.cuh"
// NOTE: this one needs what launchers include.
#include <cutlass/gemm/kernel/default_gemm_universal_with_visitor.h>

#include "common/gemm_sm80_epilogue.cuh"

namespace keye_ops {

constexpr int kSm80Stages = 4;

// Values is a tree that computes a fragment of out.
template <class Values>
struct Sm80Gemm {
  using RowMajor = cutlass::layout::RowMajor;
  using Callbacks = cutlass::epilogue::threadblock::Sm80EVT<Sm80Store, Values>;
  using Kernel = typename cutlass::gemm::kernel::DefaultGemmWithVisitor<
      GemmElement, RowMajor, cutlass::ComplexTransform::kNone, kGemmAlignment, GemmElement,
      cutlass::layout::ColumnMajor, cutlass::ComplexTransform::kNone, kGemmAlignment, GemmElement,
      RowMajor, kGemmAlignment, float, float, cutlass::arch::OpClassTensorOp, cutlass::arch::Sm80,
      Sm80Tile, Sm80Warp, cutlass::gemm::GemmShape<16, 8, 16>, Callbacks,
      cutlass::gemm::threadblock::GemmIdentityThreadblockSwizzle<8>, kSm80Stages,
      cutlass::arch::OpMultiplyAdd, /*EpilogueStages=*/1>::GemmKernel;
  using Device = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;

  static void launch(const char* op, const GemmParams& params,
                     const typename Values::Arguments& values, int device_index) {
    const cutlass::gemm::GemmCoord shape(static_cast<int>(params.m), static_cast<int>(params.n),
                                         static_cast<int>(params.k));
    const typename Sm80Store::Arguments store{static_cast<GemmElement*>(params.out),
                                              {params.n, {}, {}}};
    const typename Callbacks::Arguments epilogue{values, store};
    const typename Device::Arguments arguments(
        cutlass::gemm::GemmUniversalMode::kGemm, shape, /*batch_count=*/1, epilogue, params.a,
        params.b, /*ptr_C=*/nullptr, /*ptr_D=*/nullptr, /*batch_stride_A=*/0, 0, 0, 0,
        params.a_stride, params.b_stride, /*ldc=*/0, /*ldd=*/0);
    launch_gemm<Device>(op, params, arguments, device_index);
  }
};

}  // namespace keye_ops
