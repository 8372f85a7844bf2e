// What a kernel's thread may ask of the executor: one function for every device built-in and PTX
// instruction that has an effect beyond the thread's own registers. The headers of the kernel
// vocabulary (thread.cuh, ptx/*.cuh) call them when a host compiler compiles a kernel.
//
// Every function is called by the running thread. The place of the call, for reports, is its return
// address, so callers must be inlined into the kernel.
#pragma once

#include <cstddef>
#include <cstdint>

#define HOST_EXECUTOR_API __attribute__((visibility("default")))

namespace host_executor {

struct Dim3 {
  uint32_t x = 1, y = 1, z = 1;
};

// ---- who am I ----

struct ThreadIdentity {
  Dim3 thread_idx{0, 0, 0}, block_idx{0, 0, 0}, block_dim, grid_dim;
  Dim3 cluster_dim;
  uint32_t cluster_rank = 0;  // of the block in its cluster
};

HOST_EXECUTOR_API const ThreadIdentity& this_thread();

// ---- barriers and warp collectives ----

// bar.sync: num_threads 0 means the block. Aligned: all lanes of a warp arrive at the same place.
HOST_EXECUTOR_API void barrier_sync(int id, int num_threads);
// bar.arrive: counts, but does not wait.
HOST_EXECUTOR_API void barrier_arrive(int id, int num_threads);
HOST_EXECUTOR_API void sync_warp(uint32_t mask);

enum class Shuffle { kIndex, kUp, kDown, kXor };
HOST_EXECUTOR_API uint32_t shuffle(uint32_t mask, uint32_t value, Shuffle mode, int operand);
HOST_EXECUTOR_API uint32_t ballot(uint32_t mask, bool predicate);

enum class Reduce { kAdd, kMin, kMax, kAnd, kOr, kXor };
HOST_EXECUTOR_API uint32_t reduce(uint32_t mask, uint32_t value, Reduce op, bool is_signed);
// elect.sync: true in one lane of the mask, which one depends on the seed.
HOST_EXECUTOR_API bool elect(uint32_t mask);

// barrier.cluster.arrive.release and barrier.cluster.wait.acquire.
HOST_EXECUTOR_API void cluster_arrive();
HOST_EXECUTOR_API void cluster_wait();

// ---- memory ----

// One vector access of 2 to 16 bytes to shared or global memory.
HOST_EXECUTOR_API void load(void* registers, const void* memory, int bytes);
HOST_EXECUTOR_API void store(void* memory, const void* registers, int bytes);

// Dynamic shared memory of the block, and addresses of the shared window: that of a block's own
// memory is an address in its cluster, too.
HOST_EXECUTOR_API unsigned char* shared_memory();
HOST_EXECUTOR_API uint32_t shared_address(const void* memory);
HOST_EXECUTOR_API uint32_t map_shared_rank(uint32_t address, uint32_t rank);
// ld.shared::cluster, st.shared::cluster.
HOST_EXECUTOR_API void load_shared(void* registers, uint32_t address, int bytes);
HOST_EXECUTOR_API void store_shared(uint32_t address, const void* registers, int bytes);

enum class Atomic { kAdd, kMin, kMax, kAnd, kOr, kExchange, kCompareAndSwap };
// Relaxed, at device scope; returns the old value.
HOST_EXECUTOR_API uint32_t atomic32(Atomic op, uint32_t* memory, uint32_t value, uint32_t compare);
HOST_EXECUTOR_API uint64_t atomic64(Atomic op, uint64_t* memory, uint64_t value, uint64_t compare);
// __threadfence: with a relaxed atomic after or before it, a release or an acquire.
HOST_EXECUTOR_API void thread_fence();

// ---- cp.async ----

// Copies source_bytes of bytes (4, 8, 16); the rest become zeros.
HOST_EXECUTOR_API void cp_async(uint32_t shared, const void* global, int bytes, int source_bytes);
HOST_EXECUTOR_API void cp_async_commit();
HOST_EXECUTOR_API void cp_async_wait(int pending_groups);

// ---- matrices ----

// ldmatrix and stmatrix of 1, 2 or 4 matrices of 8 x 8 16-bit values.
HOST_EXECUTOR_API void ldmatrix(uint32_t* registers, uint32_t shared, int count, bool transposed);
HOST_EXECUTOR_API void stmatrix(uint32_t shared, const uint32_t* registers, int count,
                                bool transposed);

enum class Element { kBFloat16, kHalf };
// mma.sync.m16n8k{8,16}.row.col with fp32 accumulators: d = a b + c.
HOST_EXECUTOR_API void mma_m16n8(Element element, int k, float* d, const uint32_t* a,
                                 const uint32_t* b, const float* c);

// ---- mbarrier ----

HOST_EXECUTOR_API void mbarrier_init(uint32_t shared, uint32_t count);
HOST_EXECUTOR_API void mbarrier_invalidate(uint32_t shared);
HOST_EXECUTOR_API void mbarrier_expect_tx(uint32_t shared, uint32_t bytes);
// The barrier may lie in another block of the cluster.
HOST_EXECUTOR_API void mbarrier_arrive(uint32_t shared, uint32_t count);
// mbarrier.try_wait.parity; here it returns only when the phase has completed.
HOST_EXECUTOR_API bool mbarrier_try_wait(uint32_t shared, uint32_t parity);
// mbarrier.test_wait.parity: does not wait, but lets others run.
HOST_EXECUTOR_API bool mbarrier_test_wait(uint32_t shared, uint32_t parity);
HOST_EXECUTOR_API void fence_mbarrier_init();
HOST_EXECUTOR_API void fence_proxy_async();

// ---- bulk copies and TMA ----

enum class Swizzle : uint32_t { kNone, k32, k64, k128 };  // bytes; as CUtensorMapSwizzle counts

// What cuTensorMapEncodeTiled makes, in clear. Dimension 0 has unit stride.
struct alignas(64) TensorMap {
  void* base = nullptr;
  uint64_t sizes[5] = {1, 1, 1, 1, 1};
  uint64_t strides[5] = {0, 0, 0, 0, 0};  // bytes
  uint32_t box[5] = {1, 1, 1, 1, 1};
  uint32_t rank = 0, element_size = 0;
  Swizzle swizzle = Swizzle::kNone;
};

HOST_EXECUTOR_API void tma_load(int rank, uint32_t shared, const TensorMap* map, const int* coords,
                                uint32_t mbarrier);
HOST_EXECUTOR_API void tma_store(int rank, const TensorMap* map, uint32_t shared,
                                 const int* coords);
HOST_EXECUTOR_API void bulk_load(uint32_t shared, const void* global, uint32_t bytes,
                                 uint32_t mbarrier);
HOST_EXECUTOR_API void bulk_store(void* global, uint32_t shared, uint32_t bytes);
HOST_EXECUTOR_API void bulk_commit();
// read_only: wait until the sources may be overwritten, not until the copies are complete.
HOST_EXECUTOR_API void bulk_wait(int pending_groups, bool read_only);

// ---- wgmma ----

HOST_EXECUTOR_API void wgmma_fence();
// m64nNk16 with fp32 accumulators d[n / 2]. A comes from shared memory (a_registers null) or from
// four registers. Majors: false is K-major, true MN-major.
HOST_EXECUTOR_API void wgmma(Element element, int n, float* d, const uint32_t* a_registers,
                             uint64_t a_descriptor, uint64_t b_descriptor, bool accumulate,
                             bool a_mn_major, bool b_mn_major);
HOST_EXECUTOR_API void wgmma_commit();
HOST_EXECUTOR_API void wgmma_wait(int pending_groups);

// ---- the rest ----

HOST_EXECUTOR_API void set_max_registers(int count, bool increase);
// griddepcontrol.wait and .launch_dependents.
HOST_EXECUTOR_API void grid_dependency_wait();
HOST_EXECUTOR_API void grid_dependency_launch();

}  // namespace host_executor
