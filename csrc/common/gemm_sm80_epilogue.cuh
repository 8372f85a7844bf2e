// The tile of the GEMMs from sm_80 on, and which of its values a thread has in the epilogue.
#pragma once

// NOTE: visitors.hpp needs what the others include.
#include <cutlass/arch/memory.h>
#include <cutlass/epilogue/threadblock/default_thread_map_tensor_op.h>
#include <cutlass/gemm_coord.h>
#include <cutlass/numeric_conversion.h>

#include <cutlass/epilogue/threadblock/fusion/visitors.hpp>

#include "common/gemm_element.h"

namespace keye_ops {

using Sm80Tile = cutlass::gemm::GemmShape<128, 128, 32>;
using Sm80Warp = cutlass::gemm::GemmShape<64, 64, 32>;

// Which elements of the tile a thread holds in the epilogue: 16 bytes of a row at a time.
using Sm80ThreadMap =
    cutlass::epilogue::threadblock::OutputTileThreadLayout<Sm80Tile, Sm80Warp, GemmElement,
                                                           kGemmAlignment, /*Stages=*/1>;

using Sm80Rows = cute::Stride<int64_t, cute::Int<1>, cute::Int<0>>;  // of out

// out, rounded once.
using Sm80Store = cutlass::epilogue::threadblock::VisitorAuxStore<
    Sm80ThreadMap, GemmElement, cutlass::FloatRoundStyle::round_to_nearest, Sm80Rows>;

}  // namespace keye_ops
