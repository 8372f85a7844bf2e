// Runs a CUDA kernel, compiled by a host compiler with -fsanitize=thread, on fibers of one CPU
// thread, and reports what no GPU would: see README.md.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "host_executor/device.h"

namespace host_executor {

// ---- memory ----

enum class Role {
  kInput,   // initialised; a store is an error
  kOutput,  // poisoned; a load before a store is an error
  kInOut    // initialised
};

// Guarded global memory: every byte before and behind it is out of bounds. Big tensors take address
// space only. The address is congruent to alignment_of modulo 256.
HOST_EXECUTOR_API void* allocate(const char* name, size_t bytes, Role role,
                                 const void* alignment_of = nullptr);

// A dimension of a tensor; strides in bytes, of any sign or zero.
struct Dimension {
  int64_t size, stride;
  bool operator==(const Dimension& other) const {
    return size == other.size && stride == other.stride;
  }
};

// A guarded copy of a tensor of the host: the same strides, and only the bytes of its elements in
// bounds. An output becomes poisoned. The same host address and dimensions give the same copy.
HOST_EXECUTOR_API void* guard(const char* name, const void* host, int64_t element_size,
                              const std::vector<Dimension>& dimensions, Role role);
// A variable on the device: zeroed host memory that lives as long as the process, one for all
// libraries of kernels, and found by its name. To be guarded like a tensor.
HOST_EXECUTOR_API void* device_variable(const char* name, size_t bytes);
// Copies every guarded output back to the host.
HOST_EXECUTOR_API void copy_back();
HOST_EXECUTOR_API void free_copies();  // what guard() made
HOST_EXECUTOR_API void free_all();
// Bytes of an output that no store has reached.
HOST_EXECUTOR_API size_t unwritten_bytes(const void* memory);

// ---- launches ----

enum class Order { kInOrder, kReversed, kRandom };
enum class Completion { kEarly, kLate, kRandom };  // of asynchronous operations

struct Schedule {
  uint64_t seed = 0;
  Order order = Order::kRandom;  // of threads and blocks
  int preempt_one_in = 16;       // accesses; 0 for never
  Completion completion = Completion::kRandom;
  bool counters = false;        // bank conflicts and sectors; slower
  bool require_outputs = true;  // a byte of an output that is not written is an error
  int resident_clusters = 1;    // that run at the same time
};

struct LaunchConfig {
  Dim3 grid, block, cluster;
  size_t shared_bytes = 0;
};

enum class Kind {
  kRace,
  kUninitialized,
  kOutOfBounds,
  kMisaligned,
  kReadOnly,
  kProxyFence,
  kDivergence,
  kDeadlock,
  kMbarrier,
  kUnwaited,
  kUnwritten,
  kWgmma,
  kClusterExit,
  kInvalid,
  kCrash
};
HOST_EXECUTOR_API const char* kind_name(Kind kind);

struct Finding {
  Kind kind;
  std::string text;             // with the thread, the memory and the values
  const void* place = nullptr;  // code addresses; the second is that of the other access
  const void* other = nullptr;
  uint64_t count = 1;
};

struct Counters {
  uint64_t accesses = 0, switches = 0, collectives = 0, asynchronous = 0;
  uint64_t shared_requests = 0, shared_wavefronts = 0;  // a warp's request and its ideal are equal
  uint64_t shared_ideal = 0;                            // wavefronts without conflicts
  uint64_t global_requests = 0, global_sectors = 0, global_ideal = 0;
  // What the accesses of global memory ask for: a byte counts once for every thread, atomic (both
  // ways) or asynchronous copy that asks for it.
  uint64_t global_bytes_loaded = 0, global_bytes_stored = 0;
};

struct Traffic {
  uint64_t bytes_loaded = 0, bytes_stored = 0;
  // With counters: 32-byte sectors of the requests of warps, which are what a GPU moves.
  uint64_t sectors_loaded = 0, sectors_stored = 0;
};

struct HOST_EXECUTOR_API Report {
  std::vector<Finding> findings;
  Counters counters;
  std::map<std::string, Traffic> traffic;  // by name of the memory: the counters' bytes
  uint64_t count(Kind kind) const;
  // Readable, with source lines of both places.
  std::string text() const;
};

HOST_EXECUTOR_API Report launch(const LaunchConfig& config, void (*run)(const void* context),
                                const void* context, const Schedule& schedule);

// For launchers that know nothing of schedules: the schedule that they use, and the reports that
// they leave behind.
HOST_EXECUTOR_API Schedule& default_schedule();
HOST_EXECUTOR_API std::vector<Report>& reports();

// Source lines of code addresses: "gemm.cuh:45 (in ldst.cuh:30)".
HOST_EXECUTOR_API std::vector<std::string> source_lines(const std::vector<const void*>& places);

}  // namespace host_executor
