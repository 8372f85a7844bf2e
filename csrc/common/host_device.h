// Functions that run on the host and on the device.
#pragma once

#if defined(__CUDACC__)
#define KEYE_HOST_DEVICE __host__ __device__ __forceinline__
#else
// Always inlined: sources are compiled once for every CPU instruction set, and an out-of-line copy
// made for a newer one must never be linked into code for an older one.
#define KEYE_HOST_DEVICE inline __attribute__((always_inline))
#endif
