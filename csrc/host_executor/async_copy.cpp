// cp.async, bulk copies and TMA. What a copy touches is checked when it is issued, in the order
// that its issuer knows; the bytes move later.
#include <algorithm>
#include <cstring>

#include "host_executor/matrix.h"
#include "host_executor/state.h"

namespace host_executor {
namespace {

// 16 bytes of shared memory and what of them has a place in global memory.
struct Piece {
  unsigned char* shared;
  unsigned char* global;  // of the first of the 16 bytes
  uint32_t begin, end;    // bytes inside of the tensor; others load as zeros, and are not stored
};

uint32_t agent_of(Thread& thread, uint32_t& agent) {
  if (agent == 0) agent = new_agent(*thread.block->cluster);
  return agent;
}

Access async_access(Thread& thread, uint32_t agent, uint32_t time, uint32_t site, bool proxy) {
  Access access = access_of(thread, site);
  access.epoch = Epoch::of(thread.block->cluster->number, agent, time);
  access.async_proxy = proxy;
  access.in_order = false;
  return access;
}

uint32_t last_time(const std::vector<AsyncPointer>& group) {
  uint32_t time = 0;
  for (const AsyncPointer& operation : group) time = std::max(time, operation->time);
  return time;
}

// Performs the oldest groups but `pending` ones; the time of the last operation in them.
uint32_t finish_groups(AsyncGroups& groups, size_t pending) {
  uint32_t time = 0;
  const size_t finished = groups.committed.size() - std::min(groups.committed.size(), pending);
  for (size_t i = 0; i < finished; i++) {
    for (const AsyncPointer& operation : groups.committed[i]) perform_async(*operation);
    time = std::max(time, last_time(groups.committed[i]));
  }
  return time;
}

void drop_groups(AsyncGroups& groups, size_t pending) {
  const size_t finished = groups.committed.size() - std::min(groups.committed.size(), pending);
  groups.committed.erase(groups.committed.begin(), groups.committed.begin() + finished);
}

void commit(AsyncGroups& groups) {
  groups.committed.push_back(std::move(groups.open));
  groups.open.clear();
}

bool check_map(int rank, const TensorMap& map, uint32_t shared, uint32_t site) {
  const uint32_t repeat =
      map.swizzle == Swizzle::kNone ? 128u : 128u << static_cast<int>(map.swizzle);
  if (shared % repeat != 0) {
    report(Kind::kMisaligned, site, 0,
           "a tensor copy's shared address must be a multiple of " + std::to_string(repeat) +
               " with this swizzle, got " + std::to_string(shared));
  }
  if (map.rank != static_cast<uint32_t>(rank)) {
    report(Kind::kInvalid, site, 0,
           "a tensor copy of rank " + std::to_string(rank) + " got a tensor map of rank " +
               std::to_string(map.rank));
    return false;
  }
  return true;
}

uint32_t box_bytes(const TensorMap& map) {
  uint32_t bytes = map.element_size;
  for (uint32_t dim = 0; dim < map.rank; dim++) bytes *= map.box[dim];
  return bytes;
}

// The pieces of a box, in the order in which they lie in shared memory before the swizzle.
std::vector<Piece> pieces_of(const TensorMap& map, uint32_t shared, const int* coords,
                             uint32_t site) {
  const uint32_t row_bytes = map.box[0] * map.element_size;
  const uint32_t rows = box_bytes(map) / row_bytes;
  std::vector<Piece> pieces;
  for (uint32_t row = 0; row < rows; row++) {
    int64_t offset = int64_t{coords[0]} * map.element_size;
    bool inside = true;
    uint32_t rest = row;
    for (uint32_t dim = 1; dim < map.rank; dim++) {
      const int64_t index = int64_t{coords[dim]} + rest % map.box[dim];
      rest /= map.box[dim];
      inside = inside && index >= 0 && index < static_cast<int64_t>(map.sizes[dim]);
      offset += index * static_cast<int64_t>(map.strides[dim]);
    }
    for (uint32_t chunk = 0; chunk < row_bytes; chunk += 16) {
      const uint32_t address = swizzled(shared + row * row_bytes + chunk, map.swizzle);
      const int64_t first = int64_t{coords[0]} * map.element_size + chunk;  // byte in the row
      const auto size = static_cast<int64_t>(map.sizes[0] * map.element_size);
      const int64_t begin = std::clamp<int64_t>(-first, 0, 16);
      const int64_t end = std::clamp<int64_t>(size - first, begin, 16);
      pieces.push_back({shared_pointer(address, 16, site, "tensor copy"),
                        static_cast<unsigned char*>(map.base) + offset + chunk,
                        static_cast<uint32_t>(inside ? begin : 0),
                        static_cast<uint32_t>(inside ? end : 0)});
    }
  }
  return pieces;
}

std::vector<Piece> bulk_pieces(uint32_t shared, void* global, uint32_t bytes, uint32_t site) {
  if (shared % 16 != 0 || reinterpret_cast<uintptr_t>(global) % 16 != 0 || bytes % 16 != 0) {
    report(Kind::kMisaligned, site, 0,
           "a bulk copy's addresses and size must be multiples of 16, got " +
               std::to_string(bytes) + " bytes");
  }
  std::vector<Piece> pieces;
  for (uint32_t offset = 0; offset + 16 <= bytes; offset += 16) {
    pieces.push_back({shared_pointer(shared + offset, 16, site, "bulk copy"),
                      static_cast<unsigned char*>(global) + offset, 0, 16});
  }
  return pieces;
}

void load_pieces(std::vector<Piece> pieces, uint32_t mbarrier, uint32_t bytes, uint32_t site) {
  Thread& thread = *machine->current;
  Block* owner = nullptr;
  Mbarrier* barrier = find_mbarrier(mbarrier, site, &owner);
  if (barrier == nullptr) return;
  if (owner != thread.block) {
    report(Kind::kInvalid, site, 0, "a copy completes on an mbarrier of another block");
  }
  if (!barrier->init_fenced) {
    report(Kind::kProxyFence, site, barrier->init_site,
           "a copy that completes on an mbarrier needs fence.mbarrier_init or fence.proxy.async "
           "after its init");
  }
  barrier->copy_site = site;
  const uint32_t time = next_time(*thread.block->cluster, barrier->agent);
  const Access access = async_access(thread, barrier->agent, time, site, /*proxy=*/true);
  Memory& memory = Memory::instance();
  for (Piece& piece : pieces) {
    if (piece.shared == nullptr || !memory.write(piece.shared, 16, access)) {
      piece.shared = nullptr;
      continue;
    }
    memory.expect(piece.shared, 16);
    if (piece.end > piece.begin &&
        !memory.read(piece.global + piece.begin, piece.end - piece.begin, access)) {
      piece.end = piece.begin;
    }
  }
  tick(thread);
  start_async(thread, time, site, [pieces = std::move(pieces), barrier, bytes, time] {
    for (const Piece& piece : pieces) {
      if (piece.shared == nullptr) continue;
      std::memset(piece.shared, 0, 16);
      std::memcpy(piece.shared + piece.begin, piece.global + piece.begin, piece.end - piece.begin);
      Memory::instance().arrived(piece.shared, 16);
    }
    complete_bytes(*barrier, bytes, time);
  });
}

void store_pieces(std::vector<Piece> pieces, uint32_t site) {
  Thread& thread = *machine->current;
  Cluster& cluster = *thread.block->cluster;
  const uint32_t reader = agent_of(thread, thread.bulk_read_agent);
  const uint32_t writer = agent_of(thread, thread.bulk_write_agent);
  const uint32_t time = next_time(cluster, reader);
  next_time(cluster, writer);
  const Access read = async_access(thread, reader, time, site, /*proxy=*/true);
  const Access write = async_access(thread, writer, time, site, /*proxy=*/true);
  Memory& memory = Memory::instance();
  for (Piece& piece : pieces) {
    const uint32_t bytes = piece.end - piece.begin;
    if (piece.shared == nullptr || bytes == 0 ||
        !memory.read(piece.shared + piece.begin, bytes, read) ||
        !memory.write(piece.global + piece.begin, bytes, write)) {
      piece.shared = nullptr;
    }
  }
  tick(thread);
  thread.bulk.open.push_back(start_async(thread, time, site, [pieces = std::move(pieces)] {
    for (const Piece& piece : pieces) {
      if (piece.shared == nullptr) continue;
      std::memcpy(piece.global + piece.begin, piece.shared + piece.begin, piece.end - piece.begin);
    }
  }));
}

}  // namespace

uint32_t swizzled(uint32_t address, Swizzle swizzle) {
  const uint32_t mask = (1u << static_cast<int>(swizzle)) - 1;  // of 16-byte units
  return address ^ (address >> 7 & mask) << 4;
}

void check_copies_at_exit(Thread& thread) {
  const auto check = [&](const AsyncGroups& groups, size_t waited, const char* what) {
    std::vector<AsyncPointer> unwaited = groups.open;
    for (size_t i = waited; i < groups.committed.size(); i++) {
      unwaited.insert(unwaited.end(), groups.committed[i].begin(), groups.committed[i].end());
    }
    for (const AsyncPointer& operation : unwaited) {
      report(Kind::kUnwaited, operation->site, 0,
             describe(thread) + " exits without a wait for " + what);
    }
  };
  check(thread.copies, 0, "its cp.async");
  check(thread.bulk, thread.bulk_read_waited, "a bulk store's reads of its shared memory");
}

// ---- device.h ----

void cp_async(uint32_t shared, const void* global, int bytes, int source_bytes) {
  const uint32_t site = HOST_EXECUTOR_SITE;
  maybe_preempt();
  Thread& thread = *machine->current;
  const auto source = reinterpret_cast<uintptr_t>(global);
  if (shared % bytes != 0 || (source_bytes > 0 && source % bytes != 0)) {
    report(Kind::kMisaligned, site, 0,
           "cp.async of " + std::to_string(bytes) + " bytes by " + describe(thread) +
               " with an address that is no multiple of it");
  }
  if (source_bytes < 0 || source_bytes > bytes) {
    report(Kind::kInvalid, site, 0,
           "cp.async of " + std::to_string(bytes) + " bytes got a source of " +
               std::to_string(source_bytes));
    return;
  }
  unsigned char* p = shared_pointer(shared, bytes, site, "cp.async");
  if (p == nullptr) return;
  const uint32_t agent = agent_of(thread, thread.copy_agent);
  const uint32_t time = next_time(*thread.block->cluster, agent);
  const Access access = async_access(thread, agent, time, site, /*proxy=*/false);
  Memory& memory = Memory::instance();
  machine->report.counters.accesses++;
  if (!memory.write(p, bytes, access)) return;
  memory.expect(p, bytes);
  if (source_bytes > 0 && !memory.read(global, source_bytes, access)) source_bytes = 0;
  if (machine->schedule.counters) {
    count_request(thread, p, bytes, site, /*shared=*/true);
    if (source_bytes > 0) count_request(thread, global, source_bytes, site, /*shared=*/false);
  }
  tick(thread);
  thread.copies.open.push_back(start_async(thread, time, site, [p, global, bytes, source_bytes] {
    std::memset(p, 0, bytes);
    std::memcpy(p, global, source_bytes);
    Memory::instance().arrived(p, bytes);
  }));
}

void cp_async_commit() { commit(machine->current->copies); }

void cp_async_wait(int pending_groups) {
  Thread& thread = *machine->current;
  if (const uint32_t time = finish_groups(thread.copies, pending_groups)) {
    thread.knowledge.seen.raise(thread.copy_agent, time);
  }
  drop_groups(thread.copies, pending_groups);
}

void tma_load(int rank, uint32_t shared, const TensorMap* map, const int* coords,
              uint32_t mbarrier) {
  const uint32_t site = HOST_EXECUTOR_SITE;
  if (!check_map(rank, *map, shared, site)) return;
  load_pieces(pieces_of(*map, shared, coords, site), mbarrier, box_bytes(*map), site);
}

void tma_store(int rank, const TensorMap* map, uint32_t shared, const int* coords) {
  const uint32_t site = HOST_EXECUTOR_SITE;
  if (!check_map(rank, *map, shared, site)) return;
  store_pieces(pieces_of(*map, shared, coords, site), site);
}

void bulk_load(uint32_t shared, const void* global, uint32_t bytes, uint32_t mbarrier) {
  const uint32_t site = HOST_EXECUTOR_SITE;
  load_pieces(bulk_pieces(shared, const_cast<void*>(global), bytes, site), mbarrier, bytes, site);
}

void bulk_store(void* global, uint32_t shared, uint32_t bytes) {
  const uint32_t site = HOST_EXECUTOR_SITE;
  store_pieces(bulk_pieces(shared, global, bytes, site), site);
}

void bulk_commit() { commit(machine->current->bulk); }

void bulk_wait(int pending_groups, bool read_only) {
  Thread& thread = *machine->current;
  const size_t before = thread.bulk.committed.size();
  if (const uint32_t time = finish_groups(thread.bulk, pending_groups)) {
    thread.knowledge.seen.raise(thread.bulk_read_agent, time);
    if (!read_only) thread.knowledge.seen.raise(thread.bulk_write_agent, time);
  }
  const size_t pending = std::min<size_t>(pending_groups, before);
  thread.bulk_read_waited = std::max(thread.bulk_read_waited, before - pending);
  if (!read_only) {
    drop_groups(thread.bulk, pending_groups);
    thread.bulk_read_waited -= before - thread.bulk.committed.size();
  }
}

}  // namespace host_executor
