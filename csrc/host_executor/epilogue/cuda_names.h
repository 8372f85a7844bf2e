// Names of CUDA that CUTLASS's headers say in functions that are never called here.
#pragma once

#include <vector_types.h>

extern const uint3 threadIdx, blockIdx;
extern const dim3 blockDim, gridDim;
void __syncthreads();
void __threadfence();
