// The running machine: threads, warps, blocks and clusters, and what waits for what.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <list>
#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "host_executor/executor.h"
#include "host_executor/fiber.h"
#include "host_executor/memory.h"

namespace host_executor {

constexpr size_t kStackBytes = size_t{128} << 10;
constexpr int kWarpSize = 32, kWarpgroupSize = 128;
constexpr uint32_t kSharedBase = 0x400;  // the window begins with memory of the system
constexpr int kSharedRankShift = 24;

struct Block;
struct Cluster;
struct Thread;

// A copy or a product that the hardware performs some time after its issue.
struct AsyncOperation {
  std::function<void()> perform;
  Block* block = nullptr;  // of the issuing thread
  uint32_t time = 0;       // of its agent
  uint32_t site = 0;
  bool done = false;
};
using AsyncPointer = std::shared_ptr<AsyncOperation>;

// Operations in commit order: cp.async and bulk copies of a thread.
struct AsyncGroups {
  std::vector<AsyncPointer> open;
  std::vector<std::vector<AsyncPointer>> committed;
};

struct WgmmaOperation {
  int n = 0, arrived = 0;
  uint64_t a_descriptor = 0, b_descriptor = 0;
  Element element = Element::kBFloat16;
  bool accumulate = false, a_mn_major = false, b_mn_major = false, from_registers = false;
  float* d[kWarpgroupSize] = {};
  uint32_t a[kWarpgroupSize][4] = {};
  Knowledge issuers[4];  // what all lanes of a warp know
  AsyncPointer operation;
};

struct Warpgroup {
  std::deque<std::shared_ptr<WgmmaOperation>> queue;  // issued and not yet performed, in order
  uint64_t first = 0;                                 // number of the queue's first operation
  uint32_t agent = 0;                                 // reads shared memory for them
  std::vector<Thread*> waiters;                       // for the other threads' issue
};

// Registers that a wgmma in flight owns.
struct OwnedRegisters {
  const unsigned char* begin;
  size_t bytes;
  bool readable;
  uint64_t operation;
};

struct Thread {
  ThreadIdentity identity;
  Fiber fiber;
  const unsigned char* stack = nullptr;
  Block* block = nullptr;
  uint32_t index = 0;  // in its block
  uint32_t agent = 0, time = 1;
  Knowledge knowledge;
  bool done = false, waiting = false, released = false;
  const char* waits_for = "";  // with a number, for messages
  int wait_number = 0;
  uint32_t wait_site = 0;

  AsyncGroups copies, bulk;
  uint32_t copy_agent = 0, bulk_read_agent = 0, bulk_write_agent = 0;
  size_t bulk_read_waited = 0;  // oldest bulk groups whose sources may be overwritten

  uint64_t wgmma_issued = 0, wgmma_waited = 0;
  std::vector<uint64_t> wgmma_groups;  // number of operations issued up to each commit
  uint32_t wgmma_site = 0;
  bool wgmma_fenced = false;
  std::vector<OwnedRegisters> owned;
  std::vector<OwnedRegisters> accumulators;  // of earlier operations: writing them needs a fence

  Knowledge released_by_fence, acquired_by_atomics;  // of thread_fence
  bool has_fenced = false;
  bool cluster_arrived = false;
  uint64_t cluster_generation = 0;
  std::unordered_map<uint32_t, uint32_t> occurrences;  // of a site, for counters

  uint32_t lane() const { return index % kWarpSize; }
  Epoch epoch() const;
};

// Lanes of a warp that have come to one collective.
struct Rendezvous {
  int operation = 0;
  uint32_t mask = 0, arrived = 0;
  void* arguments[kWarpSize] = {};
  uint32_t sites[kWarpSize] = {};
  Knowledge knowledge;
};

struct WarpArrival {
  uint32_t warp, site, lanes;
};

struct Barrier {
  int expected = 0, arrived = 0;
  Knowledge knowledge;
  std::vector<Thread*> waiters;
  std::vector<WarpArrival> warp_sites;
};

struct Mbarrier {
  uint32_t count = 0, pending = 0;
  int64_t pending_bytes = 0;
  uint64_t phase = 0;
  uint32_t agent = 0;  // of the copies that complete on it
  std::vector<Thread*> waiters;
  Knowledge arriving, completed;
  Epoch initialized;
  uint32_t init_site = 0, copy_site = 0;
  VectorClock users;
  bool init_fenced = false;
  Thread* init_thread = nullptr;
};

struct Request {  // accesses of a warp's lanes by one instruction
  bool shared = false, stores = false;
  std::map<uint32_t, std::pair<uint64_t, uint32_t>> lanes;  // address and bytes
};

struct Block {
  Cluster* cluster = nullptr;
  uint32_t rank = 0;
  std::vector<Thread> threads;
  std::vector<std::list<Rendezvous>> warps;
  std::vector<Warpgroup> warpgroups;
  std::unordered_map<int, Barrier> barriers;
  std::unordered_map<uint32_t, Mbarrier> mbarriers;  // by offset in shared memory
  Region* shared = nullptr;
  uint32_t live = 0;
  Knowledge exits;                                  // of all threads
  std::unordered_map<uint64_t, Knowledge> atomics;  // released at an address of shared memory
  VectorClock remote_access;  // to this block's shared memory, by other blocks
  std::unordered_map<uint64_t, Request> requests;
};

struct Cluster {
  uint32_t number = 0;  // in the order of execution, from 1
  std::vector<std::unique_ptr<Block>> blocks;
  uint32_t agents = 0, live = 0;
  std::vector<uint32_t> times;  // of asynchronous agents
  uint32_t barrier_arrived = 0;
  uint64_t barrier_generation = 0;
  Knowledge barrier_arriving, barrier_completed;
};

struct Random {
  uint64_t state;
  uint32_t operator()() {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return static_cast<uint32_t>(state >> 11);
  }
  uint32_t below(uint32_t limit) { return (*this)() % limit; }
};

struct Machine {
  Schedule schedule;
  LaunchConfig config;
  Random random{1};
  std::vector<uint32_t> order;  // indices of clusters, as they run
  Report report;
  void (*run)(const void*) = nullptr;
  const void* context = nullptr;
  Fiber main;
  Thread* current = nullptr;
  std::vector<Thread*> runnable;
  std::vector<AsyncPointer> pending;
  std::unordered_map<uint64_t, Knowledge> atomics;  // released at an address
  bool crashed = false;
  uint64_t polls = 0;  // in a row that found nothing new
};

// The machine of the launch under way, null between launches.
extern Machine* machine;

// ---- scheduler.cpp ----

// Where a block of a cluster, by its number, lies in the grid.
Dim3 block_idx_of(uint32_t cluster_number, uint32_t rank);
// Gives the turn away.
void yield();
// Gives the turn away until someone makes the thread runnable again.
void wait(Thread& thread, const char* waits_for, int number, uint32_t site);
void make_runnable(Thread& thread);
// An agent of asynchronous operations, and the time of its next one.
uint32_t new_agent(Cluster& cluster);
uint32_t next_time(Cluster& cluster, uint32_t agent);
// Moves the thread's time on, so that what it did before can be told from what it does after.
void tick(Thread& thread);
// The thread hands what it knows to `to`.
void release(Thread& thread, Knowledge& to);
void acquire(Thread& thread, const Knowledge& from);
// Performs it now or later, as the schedule says.
AsyncPointer start_async(Thread& thread, uint32_t time, uint32_t site,
                         std::function<void()> perform);
void perform_async(AsyncOperation& operation);
// Gives the turn away after a look at something that others must change.
void poll(Thread& thread, const char* waits_for, int number, uint32_t site);
void maybe_preempt();
void on_exit(Thread& thread);

// ---- report.cpp ----

uint32_t site_of(const void* place);
const void* place_of(uint32_t site);
void report(Kind kind, uint32_t site, uint32_t other, const std::string& text);
std::string describe(const Thread& thread);
std::string describe(const Region& region, const void* p);
std::string describe(Epoch epoch);

// ---- barrier.cpp ----

void cluster_barrier_check(Cluster& cluster);

// ---- mbarrier.cpp ----

Mbarrier* find_mbarrier(uint32_t address, uint32_t site, Block** owner);
void complete_bytes(Mbarrier& barrier, int64_t bytes, uint32_t time);

// ---- async_copy.cpp and wgmma.cpp ----

void check_copies_at_exit(Thread& thread);
void check_wgmma_at_exit(Thread& thread);
void check_registers(Thread& thread, const void* p, size_t bytes, bool is_write, uint32_t site);

// ---- shared memory by address ----

// Null, with a report, if the address is not in the cluster's shared memory.
unsigned char* shared_pointer(uint32_t address, size_t bytes, uint32_t site, const char* what);
Access access_of(Thread& thread, uint32_t site);
void count_request(Thread& thread, const void* p, size_t bytes, uint32_t site, bool shared,
                   bool stores = false);
void count_requests(Block& block);

#define HOST_EXECUTOR_SITE ::host_executor::site_of(__builtin_return_address(0))

}  // namespace host_executor
