// PTX instructions, one function each, named after the instruction; on the host, calls of the host
// executor. Links are anchors of https://docs.nvidia.com/cuda/parallel-thread-execution/
#pragma once

#include "common/ptx/approx.cuh"
#include "common/ptx/barrier.cuh"
#include "common/ptx/cluster.cuh"
#include "common/ptx/control.cuh"
#include "common/ptx/ldst.cuh"
#include "common/ptx/mbarrier.cuh"
#include "common/ptx/mma.cuh"
#include "common/ptx/tma.cuh"
#include "common/ptx/wgmma.cuh"
