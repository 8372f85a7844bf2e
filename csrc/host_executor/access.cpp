// Loads and stores of kernels: the compiler's instrumentation, and those of the vocabulary.
#include <algorithm>
#include <cstring>
#include <map>
#include <set>

#include "host_executor/state.h"

namespace host_executor {
namespace {

enum class Direction { kRead, kWrite };

bool checked_access(const void* p, size_t bytes, Direction direction, uint32_t site) {
  Thread& thread = *machine->current;
  machine->report.counters.accesses++;
  Memory& memory = Memory::instance();
  if (reinterpret_cast<uintptr_t>(p) % bytes != 0) {
    report(Kind::kMisaligned, site, 0,
           "access of " + std::to_string(bytes) + " bytes by " + describe(thread) +
               " to an address that is no multiple of it");
  }
  const Access access = access_of(thread, site);
  const bool good = direction == Direction::kRead
                        ? memory.read(p, bytes, access)
                        : memory.write(const_cast<void*>(p), bytes, access);
  if (machine->schedule.counters) {
    const Region* region = memory.find(p);
    count_request(thread, p, bytes, site, region != nullptr && region->block != nullptr,
                  direction == Direction::kWrite);
  }
  return good;
}

// Of code that the compiler instrumented: the access itself follows.
void instrumented(const void* p, size_t bytes, Direction direction, const void* place) {
  if (machine == nullptr || machine->current == nullptr) return;
  Thread& thread = *machine->current;
  if (!Memory::instance().reserved(p)) {
    const size_t in_stack = static_cast<const unsigned char*>(p) - thread.stack;
    if (direction == Direction::kWrite && in_stack >= kStackBytes) {
      report(Kind::kOutOfBounds, site_of(place), 0,
             "write of " + std::to_string(bytes) + " bytes by " + describe(thread) +
                 " to memory that is neither a tensor, nor shared, nor its own");
    }
    if (!thread.owned.empty() || !thread.accumulators.empty()) {
      check_registers(thread, p, bytes, direction == Direction::kWrite, site_of(place));
    }
    return;
  }
  checked_access(p, bytes, direction, site_of(place));
  maybe_preempt();
}

uint64_t combine(Atomic op, uint64_t old, uint64_t value, uint64_t compare) {
  switch (op) {
    case Atomic::kAdd:
      return old + value;
    case Atomic::kMin:
      return std::min(old, value);
    case Atomic::kMax:
      return std::max(old, value);
    case Atomic::kAnd:
      return old & value;
    case Atomic::kOr:
      return old | value;
    case Atomic::kExchange:
      return value;
    case Atomic::kCompareAndSwap:
      return old == compare ? value : old;
  }
  return old;
}

template <class T>
T atomic(Atomic op, T* p, T value, T compare, uint32_t site) {
  Thread& thread = *machine->current;
  machine->report.counters.accesses++;
  maybe_preempt();
  if (reinterpret_cast<uintptr_t>(p) % sizeof(T) != 0) {
    report(Kind::kMisaligned, site, 0, "atomic by " + describe(thread) + " off its alignment");
  }
  Access access = access_of(thread, site);
  access.atomic = true;
  Memory& memory = Memory::instance();
  const bool uses_old = op != Atomic::kExchange;  // to start with an exchange is fine
  if ((uses_old && !memory.read(p, sizeof(T), access)) || !memory.write(p, sizeof(T), access)) {
    return T{};
  }
  // What a fence published before an atomic is known to who fences after an atomic there.
  Block* const block = memory.find(p)->block;
  auto& atomics = block != nullptr ? block->atomics : machine->atomics;
  Knowledge& here = atomics[reinterpret_cast<uintptr_t>(p)];
  thread.acquired_by_atomics.join(here);
  const T old = *p;
  const bool writes = op != Atomic::kCompareAndSwap || old == compare;
  if (thread.has_fenced && writes) here.join(thread.released_by_fence);
  *p = static_cast<T>(combine(op, old, value, compare));
  if (*p == old) {
    poll(thread, "a change by an atomic at address",
         static_cast<int>(reinterpret_cast<uintptr_t>(p)), site);
  } else {
    machine->polls = 0;
  }
  return old;
}

// Threads whose addresses one wavefront serves: fewer for wide accesses.
uint32_t lanes_at_once(uint32_t bytes) { return bytes <= 4 ? 32 : bytes == 8 ? 16 : 8; }

void count_shared(const Request& request, Counters& counters) {
  std::map<uint32_t, std::map<uint64_t, std::set<uint64_t>>> banks_of_wavefront;
  for (const auto& [lane, access] : request.lanes) {
    const auto [address, bytes] = access;
    auto& banks = banks_of_wavefront[lane / lanes_at_once(bytes)];
    for (uint64_t word = address / 4; word <= (address + bytes - 1) / 4; word++) {
      banks[word % 32].insert(word);
    }
  }
  for (const auto& [first, banks] : banks_of_wavefront) {
    size_t wavefronts = 1, words = 0;
    for (const auto& [bank, in_bank] : banks) {
      wavefronts = std::max(wavefronts, in_bank.size());
      words += in_bank.size();
    }
    counters.shared_requests++;
    counters.shared_wavefronts += wavefronts;
    counters.shared_ideal += (words + 31) / 32;
  }
}

void count_global(const Request& request, Counters& counters) {
  std::set<uint64_t> sectors, touched;
  std::set<std::pair<Region*, uint64_t>> of_regions;
  for (const auto& [lane, access] : request.lanes) {
    const auto [address, bytes] = access;
    Region* region = Memory::instance().find(reinterpret_cast<const void*>(address));
    for (uint64_t sector = address / 32; sector <= (address + bytes - 1) / 32; sector++) {
      if (region != nullptr) of_regions.insert({region, sector});
    }
    for (uint64_t byte = address; byte < address + bytes; byte++) {
      sectors.insert(byte / 32);
      touched.insert(byte);
    }
  }
  counters.global_requests++;
  counters.global_sectors += sectors.size();
  counters.global_ideal += (touched.size() + 31) / 32;
  for (const auto& [region, sector] : of_regions) {
    Traffic& traffic = region->traffic;
    (request.stores ? traffic.sectors_stored : traffic.sectors_loaded)++;
  }
}

}  // namespace

Access access_of(Thread& thread, uint32_t site) {
  return {&thread.knowledge, thread.epoch(), site};
}

void count_request(Thread& thread, const void* p, size_t bytes, uint32_t site, bool shared,
                   bool stores) {
  const uint64_t occurrence = thread.occurrences[site * 2 + shared]++;
  const uint64_t key = ((occurrence * 8192 + site) * 2 + shared) * 32 + thread.index / kWarpSize;
  Request& request = thread.block->requests[key];
  request.shared = shared;
  request.stores = stores;
  request.lanes[thread.lane()] = {reinterpret_cast<uintptr_t>(p), static_cast<uint32_t>(bytes)};
}

void count_requests(Block& block) {
  Counters& counters = machine->report.counters;
  for (const auto& [key, request] : block.requests) {
    request.shared ? count_shared(request, counters) : count_global(request, counters);
  }
  block.requests.clear();
}

// ---- device.h ----

const ThreadIdentity& this_thread() { return machine->current->identity; }

void load(void* registers, const void* memory, int bytes) {
  const uint32_t site = HOST_EXECUTOR_SITE;
  check_registers(*machine->current, registers, bytes, /*is_write=*/true, site);
  maybe_preempt();
  if (checked_access(memory, bytes, Direction::kRead, site)) {
    std::memcpy(registers, memory, bytes);
  } else {
    std::memset(registers, 0xff, bytes);
  }
}

void store(void* memory, const void* registers, int bytes) {
  const uint32_t site = HOST_EXECUTOR_SITE;
  check_registers(*machine->current, registers, bytes, /*is_write=*/false, site);
  maybe_preempt();
  if (checked_access(memory, bytes, Direction::kWrite, site)) {
    std::memcpy(memory, registers, bytes);
  }
}

unsigned char* shared_memory() {
  const Region* region = machine->current->block->shared;
  if (region == nullptr) {
    report(Kind::kInvalid, HOST_EXECUTOR_SITE, 0,
           "a kernel that was launched without shared memory asks for it");
    return nullptr;
  }
  return region->base;
}

uint32_t shared_address(const void* memory) {
  Region* region = Memory::instance().find(memory);
  if (region == nullptr || region->block == nullptr) {
    report(Kind::kInvalid, HOST_EXECUTOR_SITE, 0, "a shared address of memory that is not shared");
    return 0;
  }
  const auto offset =
      static_cast<uint32_t>(static_cast<const unsigned char*>(memory) - region->base);
  return region->block->rank << kSharedRankShift | (kSharedBase + offset);
}

uint32_t map_shared_rank(uint32_t address, uint32_t rank) {
  const size_t blocks = machine->current->block->cluster->blocks.size();
  if (rank >= blocks) {
    report(Kind::kInvalid, HOST_EXECUTOR_SITE, 0,
           "mapa to block " + std::to_string(rank) + " of a cluster of " + std::to_string(blocks));
  }
  return rank << kSharedRankShift | (address & ((1u << kSharedRankShift) - 1));
}

unsigned char* shared_pointer(uint32_t address, size_t bytes, uint32_t site, const char* what) {
  const auto& blocks = machine->current->block->cluster->blocks;
  const uint32_t rank = address >> kSharedRankShift;
  const uint32_t offset = (address & ((1u << kSharedRankShift) - 1)) - kSharedBase;
  const Region* region = rank < blocks.size() ? blocks[rank]->shared : nullptr;
  if (region == nullptr || !region->contains(offset, bytes)) {
    report(Kind::kOutOfBounds, site, 0,
           std::string(what) + " of " + std::to_string(bytes) + " bytes at offset " +
               std::to_string(static_cast<int32_t>(offset)) + " of shared memory, which has " +
               std::to_string(region == nullptr ? 0 : region->bytes));
    return nullptr;
  }
  return region->base + offset;
}

void load_shared(void* registers, uint32_t address, int bytes) {
  const uint32_t site = HOST_EXECUTOR_SITE;
  check_registers(*machine->current, registers, bytes, /*is_write=*/true, site);
  maybe_preempt();
  const unsigned char* p = shared_pointer(address, bytes, site, "load");
  if (p != nullptr && checked_access(p, bytes, Direction::kRead, site)) {
    std::memcpy(registers, p, bytes);
  } else {
    std::memset(registers, 0xff, bytes);
  }
}

void store_shared(uint32_t address, const void* registers, int bytes) {
  const uint32_t site = HOST_EXECUTOR_SITE;
  check_registers(*machine->current, registers, bytes, /*is_write=*/false, site);
  maybe_preempt();
  unsigned char* p = shared_pointer(address, bytes, site, "store");
  if (p != nullptr && checked_access(p, bytes, Direction::kWrite, site)) {
    std::memcpy(p, registers, bytes);
  }
}

uint32_t atomic32(Atomic op, uint32_t* memory, uint32_t value, uint32_t compare) {
  return atomic(op, memory, value, compare, HOST_EXECUTOR_SITE);
}

uint64_t atomic64(Atomic op, uint64_t* memory, uint64_t value, uint64_t compare) {
  return atomic(op, memory, value, compare, HOST_EXECUTOR_SITE);
}

void thread_fence() {
  Thread& thread = *machine->current;
  acquire(thread, thread.acquired_by_atomics);
  thread.released_by_fence = thread.knowledge;
  thread.has_fenced = true;
  tick(thread);
}

}  // namespace host_executor

// ---- what the compiler calls for -fsanitize=thread ----

extern "C" {

#define HOST_EXECUTOR_HOOK(name, bytes, direction)                             \
  HOST_EXECUTOR_API void __tsan_##name(void* p) {                              \
    host_executor::instrumented(p, bytes, host_executor::Direction::direction, \
                                __builtin_return_address(0));                  \
  }
#define HOST_EXECUTOR_HOOKS(bytes)                        \
  HOST_EXECUTOR_HOOK(read##bytes, bytes, kRead)           \
  HOST_EXECUTOR_HOOK(write##bytes, bytes, kWrite)         \
  HOST_EXECUTOR_HOOK(unaligned_read##bytes, bytes, kRead) \
  HOST_EXECUTOR_HOOK(unaligned_write##bytes, bytes, kWrite)
HOST_EXECUTOR_HOOKS(1)
HOST_EXECUTOR_HOOKS(2)
HOST_EXECUTOR_HOOKS(4)
HOST_EXECUTOR_HOOKS(8)
HOST_EXECUTOR_HOOKS(16)

// NOTE: a range has no natural alignment, and no size that the hardware knows: one byte at a time.
#define HOST_EXECUTOR_RANGE(name, direction)                            \
  HOST_EXECUTOR_API void __tsan_##name##_range(void* p, size_t bytes) { \
    for (size_t i = 0; i < bytes; i++) {                                \
      host_executor::instrumented(static_cast<char*>(p) + i, 1,         \
                                  host_executor::Direction::direction,  \
                                  __builtin_return_address(0));         \
    }                                                                   \
  }
HOST_EXECUTOR_RANGE(read, kRead)
HOST_EXECUTOR_RANGE(write, kWrite)

HOST_EXECUTOR_API void __tsan_init() {}
HOST_EXECUTOR_API void __tsan_func_entry(void*) {}
HOST_EXECUTOR_API void __tsan_func_exit() {}
HOST_EXECUTOR_API void __tsan_vptr_update(void**, void*) {}
HOST_EXECUTOR_API void __tsan_vptr_read(void**) {}
}
