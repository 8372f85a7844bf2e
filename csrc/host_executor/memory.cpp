#include "host_executor/memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "host_executor/state.h"

namespace host_executor {
namespace {

constexpr size_t kPoisonLimit = size_t{64} << 20;  // a bigger output is not filled byte by byte

void* map(size_t bytes) {
  void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) {
    throw std::runtime_error("host_executor: mmap must reserve address space, got no " +
                             std::to_string(bytes) + " bytes");
  }
  return p;
}

uint64_t word_of(const Access& access, uint64_t flags) {
  return access.epoch.bits << Cell::kFlagBits | flags;
}

}  // namespace

Memory& Memory::instance() {
  static Memory memory;
  return memory;
}

Memory::Memory() : arena_(static_cast<unsigned char*>(map(kArenaBytes))) {}

Region& Memory::place(size_t bytes, const void* alignment_of, bool with_cells) {
  if (bytes > kSlotBytes - 2 * kGuardBytes) {
    throw std::runtime_error("host_executor: a tensor must take at most 64 GiB, got " +
                             std::to_string(bytes) + " bytes");
  }
  for (size_t i = 0; i < kSlots; i++) {
    Region& region = slots_[i];
    if (region.base != nullptr) continue;
    region = Region{};
    region.base =
        arena_ + i * kSlotBytes + kGuardBytes + reinterpret_cast<uintptr_t>(alignment_of) % 256;
    region.bytes = bytes;
    if (with_cells && bytes > 0) {
      region.cells_bytes = bytes * sizeof(Cell);
      region.cells = static_cast<Cell*>(map(region.cells_bytes));
    }
    return region;
  }
  throw std::runtime_error("host_executor: at most " + std::to_string(kSlots) +
                           " tensors can exist at a time");
}

Region& Memory::allocate(const std::string& name, size_t bytes, Role role,
                         const void* alignment_of) {
  Region& region = place(bytes, alignment_of, role != Role::kInput);
  region.name = name;
  region.role = role;
  if (role == Role::kOutput && bytes <= kPoisonLimit) {
    std::memset(region.base, 0xff, bytes);
    for (size_t i = 0; i < bytes; i++) region.cells[i].write = Cell::kUninitialized;
  }
  return region;
}

Region& Memory::allocate_shared(Block* block, size_t bytes) {
  Region& region = place(bytes, nullptr, true);
  region.name = "shared memory";
  region.role = Role::kInOut;
  region.block = block;
  std::memset(region.base, 0xff, bytes);
  for (size_t i = 0; i < bytes; i++) region.cells[i].write = Cell::kUninitialized;
  return region;
}

void Memory::free(Region& region) {
  if (region.cells != nullptr) {
    for (size_t i = 0; region.block != nullptr && i < region.bytes; i++) {
      if (region.cells[i].read & Cell::kMany) {
        free_readers_.push_back(region.cells[i].read >> Cell::kFlagBits);
      }
    }
    munmap(region.cells, region.cells_bytes);
  }
  // The whole slot: wild stores may have touched its guards.
  madvise(arena_ + (&region - slots_) * kSlotBytes, kSlotBytes, MADV_DONTNEED);
  region = Region{};
}

void Memory::free_all() {
  for (Region& region : slots_) {
    if (region.base != nullptr) free(region);
  }
  readers_.clear();
  free_readers_.clear();
}

Region* Memory::find(const void* p) {
  if (!reserved(p)) return nullptr;
  Region& region = slots_[(static_cast<const unsigned char*>(p) - arena_) / kSlotBytes];
  return region.base == nullptr ? nullptr : &region;
}

std::vector<Region*> Memory::regions() {
  std::vector<Region*> all;
  for (Region& region : slots_) {
    if (region.base != nullptr) all.push_back(&region);
  }
  return all;
}

Region* Memory::locate(const void* p, size_t bytes, const Access& access, const char* verb) {
  Region* region = find(p);
  const auto what = [&] { return verb + std::string(" of ") + std::to_string(bytes) + " bytes "; };
  if (region == nullptr) {
    report(Kind::kOutOfBounds, access.site, 0, what() + "far from every tensor");
    return nullptr;
  }
  const size_t offset = static_cast<const unsigned char*>(p) - region->base;
  bool inside = region->contains(offset, bytes);
  for (size_t i = 0; inside && region->cells != nullptr && i < bytes; i++) {
    inside = !(region->cells[offset + i].write & Cell::kOutside);
  }
  if (!inside) {
    report(Kind::kOutOfBounds, access.site, 0, what() + "at " + describe(*region, p));
    return nullptr;
  }
  if (region->block != nullptr && machine->current != nullptr) {
    Block& block = *region->block;
    Thread& thread = *machine->current;
    if (block.cluster != thread.block->cluster) {
      report(Kind::kOutOfBounds, access.site, 0,
             what() + "in the shared memory of another cluster");
      return nullptr;
    }
    if (&block != thread.block) {
      block.remote_access.raise(access.epoch.agent(), access.epoch.time());
      if (block.live == 0) {
        report(Kind::kClusterExit, access.site, 0,
               what() + "in the shared memory of block " + std::to_string(block.rank) +
                   " of the cluster, which has exited");
      }
    }
  }
  return region;
}

bool Memory::check_order(const Region& region, Cell& cell, const void* p, const Access& access,
                         const char* verb) {
  const Epoch writer = cell.writer();
  const bool both_atomic = access.atomic && (cell.write & Cell::kAtomic);
  if (!both_atomic && !access.follows(writer)) {
    report(Kind::kRace, access.site, cell.write_site,
           std::string(verb) + " of " + describe(region, p) + " by " + describe(access.epoch) +
               " is not ordered after the write by " + describe(writer));
    return false;
  }
  // NOTE: the fence that kernels have is one for shared memory; none would help in global memory.
  if (access.async_proxy && !(cell.write & Cell::kAsyncProxy) &&
      (region.block == nullptr || !access.knowledge->knows_fenced(writer))) {
    report(Kind::kProxyFence, access.site, cell.write_site,
           std::string(verb) + " of " + describe(region, p) +
               " through the async proxy needs fence.proxy.async after the write by " +
               describe(writer));
    return false;
  }
  return true;
}

void Memory::note_reader(Cell& cell, const Access& access) {
  const uint64_t mine = word_of(access, 0);
  if (cell.read == mine) return;
  const auto replaceable = [&](Epoch epoch) {
    return (epoch.cluster() == access.epoch.cluster() && epoch.agent() == access.epoch.agent()) ||
           access.knowledge->knows(epoch);
  };
  if (cell.read == 0 ||
      (!(cell.read & Cell::kMany) && replaceable({cell.read >> Cell::kFlagBits}))) {
    cell.read = mine;
    cell.read_site = access.site;
    return;
  }
  if (!(cell.read & Cell::kMany)) {
    uint32_t index = static_cast<uint32_t>(readers_.size());
    if (free_readers_.empty()) {
      readers_.emplace_back();
    } else {
      index = free_readers_.back();
      free_readers_.pop_back();
      readers_[index].clear();
    }
    readers_[index].push_back({{cell.read >> Cell::kFlagBits}, cell.read_site});
    cell.read = uint64_t{index} << Cell::kFlagBits | Cell::kMany;
  }
  std::vector<Reader>& readers = readers_[cell.read >> Cell::kFlagBits];
  // NOTE: who comes later than a reader stands for it; lists stay short.
  readers.erase(std::remove_if(readers.begin(), readers.end(),
                               [&](const Reader& reader) { return replaceable(reader.epoch); }),
                readers.end());
  readers.push_back({access.epoch, access.site});
}

bool Memory::check_readers(const Region& region, Cell& cell, const void* p, const Access& access) {
  const auto check = [&](Epoch epoch, uint32_t site) {
    if (access.follows(epoch)) return true;
    report(Kind::kRace, access.site, site,
           "write of " + describe(region, p) + " by " + describe(access.epoch) +
               " is not ordered after the read by " + describe(epoch));
    return false;
  };
  if (!(cell.read & Cell::kMany)) return check({cell.read >> Cell::kFlagBits}, cell.read_site);
  const uint32_t index = cell.read >> Cell::kFlagBits;
  bool good = true;
  for (const Reader& reader : readers_[index]) good = good && check(reader.epoch, reader.site);
  free_readers_.push_back(index);
  return good;
}

bool Memory::read(const void* p, size_t bytes, const Access& access) {
  Region* region = locate(p, bytes, access, "read");
  if (region == nullptr) return false;
  region->traffic.bytes_loaded += bytes;
  if (region->role == Role::kInput) return true;
  region->touched = true;
  Cell* cells = region->cells + (static_cast<const unsigned char*>(p) - region->base);
  bool good = true;
  uint64_t checked = 0;
  for (size_t i = 0; i < bytes; i++) {
    Cell& cell = cells[i];
    const unsigned char* place = static_cast<const unsigned char*>(p) + i;
    if (good && (cell.write & Cell::kMbarrier)) {
      report(Kind::kMbarrier, access.site, cell.write_site,
             "read of an mbarrier at " + describe(*region, place));
      good = false;
    }
    if (good && cell.write != checked && cell.writer()) {
      good = check_order(*region, cell, place, access, "read");
      checked = cell.write;
    }
    if (cell.write & (Cell::kUninitialized | Cell::kInFlight)) {
      const bool in_flight = cell.write & Cell::kInFlight;
      if (good) {
        report(Kind::kUninitialized, access.site, cell.write_site,
               (in_flight ? "read of bytes that an asynchronous copy has not brought yet, at "
                          : "read of bytes that nobody has written, at ") +
                   describe(*region, place));
        good = false;
      }
      cell.write &= ~uint64_t{Cell::kUninitialized};
    }
    if (!access.atomic) note_reader(cell, access);
  }
  return true;
}

bool Memory::write(void* p, size_t bytes, const Access& access) {
  Region* region = locate(p, bytes, access, "write");
  if (region == nullptr) return false;
  region->traffic.bytes_stored += bytes;
  if (region->role == Role::kInput) {
    report(Kind::kReadOnly, access.site, 0, "write to " + describe(*region, p) + ", an input");
    return false;
  }
  Cell* cells = region->cells + (static_cast<unsigned char*>(p) - region->base);
  region->touched = true;
  bool good = true;
  uint64_t checked = 0, checked_read = 0;
  const uint64_t word = word_of(access, (access.async_proxy ? uint64_t{Cell::kAsyncProxy} : 0) |
                                            (access.atomic ? uint64_t{Cell::kAtomic} : 0));
  for (size_t i = 0; i < bytes; i++) {
    Cell& cell = cells[i];
    const unsigned char* place = static_cast<const unsigned char*>(p) + i;
    if (good && (cell.write & Cell::kMbarrier)) {
      report(Kind::kMbarrier, access.site, cell.write_site,
             "write over an mbarrier at " + describe(*region, place));
      good = false;
    }
    if (good && cell.write != checked && cell.writer()) {
      good = check_order(*region, cell, place, access, "write");
      checked = cell.write;
    }
    if (cell.read != 0 && ((good && cell.read != checked_read) || (cell.read & Cell::kMany))) {
      const uint64_t reader = cell.read;
      const bool ordered = check_readers(*region, cell, place, access);
      good = good && ordered;
      checked_read = reader & Cell::kMany ? 0 : reader;
    }
    cell.write = word | (cell.write & Cell::kMbarrier);
    cell.write_site = access.site;
    cell.read = 0;
  }
  return true;
}

void Memory::expect(void* p, size_t bytes) {
  Region* region = find(p);
  Cell* cells = region->cells + (static_cast<unsigned char*>(p) - region->base);
  for (size_t i = 0; i < bytes; i++) cells[i].write |= Cell::kInFlight;
  std::memset(p, 0xff, bytes);
}

void Memory::arrived(void* p, size_t bytes) {
  Region* region = find(p);
  Cell* cells = region->cells + (static_cast<unsigned char*>(p) - region->base);
  for (size_t i = 0; i < bytes; i++) cells[i].write &= ~uint64_t{Cell::kInFlight};
}

void Memory::forget_accesses() {
  for (Region& region : slots_) {
    region.traffic = {};
    if (!region.touched || region.cells == nullptr) continue;
    region.touched = false;
    if (region.bytes > kPoisonLimit) {  // has no flags to keep
      madvise(region.cells, region.cells_bytes, MADV_DONTNEED);
      continue;
    }
    for (size_t i = 0; i < region.bytes; i++) {
      Cell& cell = region.cells[i];
      cell.write &= Cell::kUninitialized | Cell::kOutside;
      cell.read = 0;
    }
  }
  readers_.clear();
  free_readers_.clear();
}

void Memory::add_traffic(Report& report) {
  for (const Region* region : regions()) {
    const Traffic& traffic = region->traffic;
    if (region->block != nullptr || traffic.bytes_loaded + traffic.bytes_stored == 0) continue;
    report.counters.global_bytes_loaded += traffic.bytes_loaded;
    report.counters.global_bytes_stored += traffic.bytes_stored;
    Traffic& sum = report.traffic[region->name];
    sum.bytes_loaded += traffic.bytes_loaded;
    sum.bytes_stored += traffic.bytes_stored;
    sum.sectors_loaded += traffic.sectors_loaded;
    sum.sectors_stored += traffic.sectors_stored;
  }
}

void Memory::mark_mbarrier(void* p, bool present) {
  Region* region = find(p);
  Cell* cells = region->cells + (static_cast<unsigned char*>(p) - region->base);
  for (size_t i = 0; i < 8; i++) {
    cells[i].write =
        present ? cells[i].write | Cell::kMbarrier : cells[i].write & ~uint64_t{Cell::kMbarrier};
  }
}

// ---- the harness's side ----

namespace {

struct Copy {
  const void* host;
  std::vector<Dimension> dimensions;
  int64_t element_size, first;  // offset in bytes of the host address in the region
  Region* region;
};

std::vector<Copy>& copies() {
  static std::vector<Copy> all;
  return all;
}

// Calls f(offset in bytes, bytes) for every run of elements that lie side by side.
template <class F>
void for_each_run(const std::vector<Dimension>& dimensions, int64_t element_size, const F& f,
                  size_t dim = 0, int64_t offset = 0) {
  if (dim == dimensions.size()) return f(offset, element_size);
  const Dimension& dimension = dimensions[dim];
  if (dim + 1 == dimensions.size() && dimension.stride == element_size) {
    return f(offset, dimension.size * element_size);
  }
  for (int64_t i = 0; i < (dimension.stride == 0 ? 1 : dimension.size); i++) {
    for_each_run(dimensions, element_size, f, dim + 1, offset + i * dimension.stride);
  }
}

// From the host, or to it.
void transfer(const Copy& copy, bool to_host) {
  if (copy.region->bytes == 0) return;
  for_each_run(copy.dimensions, copy.element_size, [&](int64_t offset, int64_t bytes) {
    auto* host = static_cast<unsigned char*>(const_cast<void*>(copy.host)) + offset;
    unsigned char* guarded = copy.region->base + copy.first + offset;
    if (to_host) {
      std::memcpy(host, guarded, bytes);
    } else {
      std::memcpy(guarded, host, bytes);
    }
  });
}

}  // namespace

void* allocate(const char* name, size_t bytes, Role role, const void* alignment_of) {
  return Memory::instance().allocate(name, bytes, role, alignment_of).base;
}

void* guard(const char* name, const void* host, int64_t element_size,
            const std::vector<Dimension>& dimensions, Role role) {
  for (Copy& copy : copies()) {
    if (copy.host != host || !(copy.dimensions == dimensions)) continue;
    Region& region = *copy.region;
    if (region.role != role) {
      if (region.cells == nullptr && region.bytes > 0) {
        region.cells_bytes = region.bytes * sizeof(Cell);
        region.cells = static_cast<Cell*>(map(region.cells_bytes));
      }
      for_each_run(dimensions, element_size, [&](int64_t offset, int64_t bytes) {
        for (int64_t i = 0; i < bytes; i++) region.cells[copy.first + offset + i].write = 0;
      });
      region.role = Role::kInOut;
      transfer(copy, /*to_host=*/false);
    }
    return region.base + copy.first;
  }

  int64_t first = 0, last = element_size, elements = 1;
  for (const Dimension& dimension : dimensions) {
    elements *= dimension.size;
    const int64_t extent = (dimension.size - 1) * dimension.stride;
    (extent < 0 ? first : last) += extent;
  }
  if (elements == 0) first = last = 0;
  const size_t bytes = last - first;
  Memory& memory = Memory::instance();
  // The first element is congruent to the host's, not the lowest one.
  const void* low = static_cast<const unsigned char*>(host) + first;
  Region& region = memory.allocate(name, bytes, role, low);
  const Copy copy{host, dimensions, element_size, -first, &region};
  copies().push_back(copy);
  if (bytes == 0) return region.base;
  const bool dense = static_cast<int64_t>(bytes) <= elements * element_size;
  if (!dense && bytes <= kPoisonLimit) {
    if (region.cells == nullptr) {
      region.cells_bytes = bytes * sizeof(Cell);
      region.cells = static_cast<Cell*>(map(region.cells_bytes));
    }
    for (size_t i = 0; i < bytes; i++) region.cells[i].write |= Cell::kOutside;
    for_each_run(dimensions, element_size, [&](int64_t offset, int64_t run) {
      for (int64_t i = 0; i < run; i++) {
        region.cells[copy.first + offset + i].write &= ~uint64_t{Cell::kOutside};
      }
    });
  }
  if (role != Role::kOutput) transfer(copy, /*to_host=*/false);
  return region.base + copy.first;
}

void* device_variable(const char* name, size_t bytes) {
  static std::map<std::string, std::vector<unsigned char>> variables;
  std::vector<unsigned char>& variable = variables[name];
  variable.resize(bytes);
  return variable.data();
}

void copy_back() {
  for (const Copy& copy : copies()) {
    if (copy.region->role != Role::kInput) transfer(copy, /*to_host=*/true);
  }
}

void free_copies() {
  for (const Copy& copy : copies()) {
    Memory::instance().free(*copy.region);
  }
  copies().clear();
}

void free_all() {
  copies().clear();
  Memory::instance().free_all();
}

size_t unwritten_bytes(const void* memory) {
  const Region* region = Memory::instance().find(memory);
  if (region == nullptr || region->cells == nullptr) return 0;
  size_t unwritten = 0;
  for (size_t i = 0; i < region->bytes; i++) {
    const uint64_t flags = region->cells[i].write;
    unwritten += (flags & Cell::kUninitialized) && !(flags & Cell::kOutside);
  }
  return unwritten;
}

}  // namespace host_executor
