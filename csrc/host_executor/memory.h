// Guarded memory: where every byte belongs, and the last accesses to it.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "host_executor/clock.h"
#include "host_executor/executor.h"

namespace host_executor {

struct Block;

// What is known of one byte. All zero: in bounds, initialised, not touched by the kernel.
struct Cell {
  enum WriteFlag : uint64_t {
    kUninitialized = 1,
    kInFlight = 2,    // an asynchronous copy to it has not been performed yet
    kAsyncProxy = 4,  // the last write came through the async proxy
    kAtomic = 8,      // the last write was atomic
    kOutside = 16,    // between the elements of a strided tensor
    kMbarrier = 32
  };
  enum ReadFlag : uint64_t { kMany = 1 };  // the rest is an index into the lists of readers
  static constexpr int kFlagBits = 6;

  uint64_t write = 0, read = 0;  // an Epoch above the flags
  uint32_t write_site = 0, read_site = 0;

  Epoch writer() const { return {write >> kFlagBits}; }
};

struct Region {
  std::string name;
  unsigned char* base = nullptr;
  size_t bytes = 0;
  Role role = Role::kInput;
  Block* block = nullptr;  // whose shared memory this is
  Cell* cells = nullptr;   // null: dense, and never written
  size_t cells_bytes = 0;
  bool touched = false;  // by a launch
  Traffic traffic;       // of a launch

  bool contains(size_t offset, size_t size) const {
    return offset <= bytes && size <= bytes - offset;
  }
};

// One access, for whom and in which order.
struct Access {
  const Knowledge* knowledge;
  Epoch epoch;
  uint32_t site;
  bool async_proxy = false, atomic = false;
  bool in_order = true;  // after all earlier accesses of its agent

  bool follows(Epoch earlier) const {
    const bool same = earlier.cluster() == epoch.cluster() && earlier.agent() == epoch.agent();
    return (same && in_order) || knowledge->knows(earlier);
  }
};

// Regions lie in slots of one reserved range of addresses, far apart, so that a wild offset lands
// in a slot and the offset of an address tells its region.
class Memory {
 public:
  static Memory& instance();

  Region& allocate(const std::string& name, size_t bytes, Role role, const void* alignment_of);
  Region& allocate_shared(Block* block, size_t bytes);
  void free(Region& region);
  void free_all();

  bool reserved(const void* p) const {
    return static_cast<size_t>(static_cast<const unsigned char*>(p) - arena_) < kArenaBytes;
  }
  // Null in an empty slot.
  Region* find(const void* p);
  std::vector<Region*> regions();

  // Record an access, or report what is wrong with it. False: do not perform it.
  bool read(const void* p, size_t bytes, const Access& access);
  bool write(void* p, size_t bytes, const Access& access);
  // Bytes that an asynchronous copy will bring, and that it has brought.
  void expect(void* p, size_t bytes);
  void arrived(void* p, size_t bytes);
  void mark_mbarrier(void* p, bool present);
  // Between launches everything is ordered; what is initialised stays.
  void forget_accesses();
  // Adds what the accesses since then asked global memory for.
  void add_traffic(Report& report);

 private:
  static constexpr size_t kSlotBytes = size_t{1} << 37, kSlots = 256;
  static constexpr size_t kArenaBytes = kSlotBytes * kSlots;
  static constexpr size_t kGuardBytes = kSlotBytes / 4;

  Memory();
  Region& place(size_t bytes, const void* alignment_of, bool with_cells);
  Region* locate(const void* p, size_t bytes, const Access& access, const char* verb);
  bool check_order(const Region& region, Cell& cell, const void* p, const Access& access,
                   const char* verb);
  void note_reader(Cell& cell, const Access& access);
  bool check_readers(const Region& region, Cell& cell, const void* p, const Access& access);

  struct Reader {
    Epoch epoch;
    uint32_t site;
  };

  unsigned char* arena_ = nullptr;
  Region slots_[kSlots];
  std::vector<std::vector<Reader>> readers_;  // of cells with kMany
  std::vector<uint32_t> free_readers_;
};

}  // namespace host_executor
