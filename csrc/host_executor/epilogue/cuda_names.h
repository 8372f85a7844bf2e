// Names of CUDA that CUTLASS's headers say in functions that are never called here.
#pragma once

#include <vector_types.h>

extern const uint3 threadIdx, blockIdx;
extern const dim3 blockDim, gridDim;
void __syncthreads();
void __threadfence();
void __syncwarp(unsigned mask = 0xffffffffu);
int __syncthreads_and(int predicate);
