// The tile of the GEMMs for sm_90a and their epilogue, which CUTLASS builds around a visitor tree.
#pragma once

// NOTE: the visitors need what this one includes.
#include <cutlass/epilogue/collective/collective_builder.hpp>

#include "common/gemm_element.h"

namespace keye_ops {

// A warpgroup computes 128 x 128; two blocks share what they load of b.
using Sm90Tile = cute::Shape<cute::_128, cute::_128, cute::_64>;
using Sm90Cluster = cute::Shape<cute::_2, cute::_1, cute::_1>;

template <class Callbacks>
using Sm90Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
    cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Sm90Tile, Sm90Cluster,
    cutlass::epilogue::collective::EpilogueTileAuto, float, float, void, cutlass::layout::RowMajor,
    kGemmAlignment, GemmElement, cutlass::layout::RowMajor, kGemmAlignment,
    cutlass::epilogue::TmaWarpSpecialized, Callbacks>::CollectiveOp;

}  // namespace keye_ops
