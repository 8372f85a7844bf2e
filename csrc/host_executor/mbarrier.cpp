// mbarrier objects: arrivals, bytes of bulk copies, phases; and the fences around them.
#include <algorithm>

#include "host_executor/state.h"

namespace host_executor {
namespace {

constexpr int64_t kMaxPendingBytes = (1 << 20) - 1;

void complete_phase(Mbarrier& barrier) {
  if (barrier.pending != 0 || barrier.pending_bytes != 0) return;
  barrier.phase++;
  barrier.pending = barrier.count;
  barrier.completed.join(barrier.arriving);
  barrier.arriving.clear();
  std::vector<Thread*> waiters;
  std::swap(waiters, barrier.waiters);
  for (Thread* waiter : waiters) make_runnable(*waiter);
}

bool completed(const Mbarrier& barrier, uint32_t parity) { return (barrier.phase & 1) != parity; }

void check_wait(const Thread& thread, const Block& owner, uint32_t parity, uint32_t site) {
  if (&owner == thread.block && parity <= 1) return;
  report(
      Kind::kInvalid, site, 0,
      "a wait takes an mbarrier of the own block and parity 0 or 1, got " + std::to_string(parity));
}

void fence_initialized(Thread& thread) {
  for (const auto& block : thread.block->cluster->blocks) {
    for (auto& [offset, barrier] : block->mbarriers) {
      barrier.init_fenced |= barrier.init_thread == &thread;
    }
  }
}

}  // namespace

Mbarrier* find_mbarrier(uint32_t address, uint32_t site, Block** owner) {
  if (address % 8 != 0) {
    report(Kind::kMisaligned, site, 0, "an mbarrier's address is no multiple of 8");
  }
  unsigned char* p = shared_pointer(address, 8, site, "mbarrier");
  if (p == nullptr) return nullptr;
  Thread& thread = *machine->current;
  Block& block = *Memory::instance().find(p)->block;
  const auto found = block.mbarriers.find(p - block.shared->base);
  if (found == block.mbarriers.end()) {
    report(Kind::kMbarrier, site, 0,
           describe(thread) + " uses an mbarrier that nobody has initialised, at " +
               describe(*block.shared, p));
    return nullptr;
  }
  Mbarrier& barrier = found->second;
  if (&block != thread.block) {
    block.remote_access.raise(thread.agent, thread.time);
    if (block.live == 0) {
      report(Kind::kClusterExit, site, 0,
             describe(thread) + " uses an mbarrier of a block that has exited");
    }
  }
  if (barrier.init_thread != &thread && !thread.knowledge.knows(barrier.initialized)) {
    report(Kind::kRace, site, barrier.init_site,
           "use of an mbarrier by " + describe(thread) + " is not ordered after its init");
  }
  barrier.users.raise(thread.agent, thread.time);
  if (owner != nullptr) *owner = &block;
  return &barrier;
}

void complete_bytes(Mbarrier& barrier, int64_t bytes, uint32_t time) {
  barrier.pending_bytes -= bytes;
  barrier.arriving.seen.raise(barrier.agent, time);
  complete_phase(barrier);
}

// ---- device.h ----

void mbarrier_init(uint32_t shared, uint32_t count) {
  const uint32_t site = HOST_EXECUTOR_SITE;
  Thread& thread = *machine->current;
  unsigned char* p = shared_pointer(shared, 8, site, "mbarrier.init");
  if (p == nullptr) return;
  if (shared % 8 != 0 || count < 1 || count >= (1u << 20)) {
    report(
        Kind::kInvalid, site, 0,
        "mbarrier.init needs an address that is a multiple of 8 and a count from 1 to 2**20 - 1, "
        "got count " +
            std::to_string(count));
  }
  if (Memory::instance().find(p)->block != thread.block) {
    report(Kind::kInvalid, site, 0, "mbarrier.init of a barrier of another block");
    return;
  }
  // A live barrier there is reported as a write over it.
  Memory::instance().write(p, 8, access_of(thread, site));
  Memory::instance().mark_mbarrier(p, true);
  Mbarrier& barrier = thread.block->mbarriers[p - thread.block->shared->base];
  barrier = Mbarrier{};
  barrier.count = barrier.pending = count;
  barrier.agent = new_agent(*thread.block->cluster);
  barrier.arriving.cluster = barrier.completed.cluster = thread.block->cluster->number;
  barrier.initialized = thread.epoch();
  barrier.init_site = site;
  barrier.init_thread = &thread;
}

void mbarrier_invalidate(uint32_t shared) {
  const uint32_t site = HOST_EXECUTOR_SITE;
  if (find_mbarrier(shared, site, nullptr) == nullptr) return;
  Thread& thread = *machine->current;
  unsigned char* p = shared_pointer(shared, 8, site, "mbarrier.inval");
  if (Memory::instance().find(p)->block != thread.block) {
    report(Kind::kInvalid, site, 0, "mbarrier.inval of a barrier of another block");
    return;
  }
  const auto found = thread.block->mbarriers.find(p - thread.block->shared->base);
  const Mbarrier& barrier = found->second;
  for (uint32_t agent = 0; agent < barrier.users.size(); agent++) {
    if (barrier.users[agent] <= thread.knowledge.seen[agent]) continue;
    report(Kind::kRace, site, barrier.init_site,
           "mbarrier.inval by " + describe(thread) + " is not ordered after all uses of it");
    return;  // it stays: others may still wait for it
  }
  if (barrier.pending_bytes != 0 ||
      thread.knowledge.seen[barrier.agent] < thread.block->cluster->times[barrier.agent]) {
    report(Kind::kMbarrier, site, barrier.init_site,
           "mbarrier.inval before the copies that complete on it were waited for");
    return;
  }
  thread.block->mbarriers.erase(found);
  Memory::instance().mark_mbarrier(p, false);
}

void mbarrier_expect_tx(uint32_t shared, uint32_t bytes) {
  const uint32_t site = HOST_EXECUTOR_SITE;
  Mbarrier* barrier = find_mbarrier(shared, site, nullptr);
  if (barrier == nullptr) return;
  barrier->pending_bytes += bytes;
  if (barrier->pending_bytes > kMaxPendingBytes) {
    report(Kind::kMbarrier, site, 0, "an mbarrier expects more than 2**20 - 1 bytes");
  }
  complete_phase(*barrier);
}

void mbarrier_arrive(uint32_t shared, uint32_t count) {
  const uint32_t site = HOST_EXECUTOR_SITE;
  Thread& thread = *machine->current;
  maybe_preempt();
  Block* owner = nullptr;
  Mbarrier* barrier = find_mbarrier(shared, site, &owner);
  if (barrier == nullptr) return;
  if (owner != thread.block && !barrier->init_fenced) {
    report(Kind::kProxyFence, site, barrier->init_site,
           "a remote arrival on an mbarrier needs fence.mbarrier_init after its init");
  }
  if (count > barrier->pending) {
    report(Kind::kMbarrier, site, 0,
           describe(thread) + " arrives at an mbarrier whose phase expects " +
               std::to_string(barrier->pending) + " more arrivals");
    return;
  }
  release(thread, barrier->arriving);
  barrier->pending -= count;
  complete_phase(*barrier);
}

bool mbarrier_try_wait(uint32_t shared, uint32_t parity) {
  const uint32_t site = HOST_EXECUTOR_SITE;
  Block* owner = nullptr;
  Mbarrier* barrier = find_mbarrier(shared, site, &owner);
  if (barrier == nullptr) return true;
  check_wait(*machine->current, *owner, parity, site);
  Thread& thread = *machine->current;
  while (!completed(*barrier, parity)) {
    barrier->waiters.push_back(&thread);
    wait(thread, "an mbarrier's phase of parity", static_cast<int>(parity), site);
  }
  acquire(thread, barrier->completed);
  return true;
}

bool mbarrier_test_wait(uint32_t shared, uint32_t parity) {
  const uint32_t site = HOST_EXECUTOR_SITE;
  Block* owner = nullptr;
  Mbarrier* barrier = find_mbarrier(shared, site, &owner);
  if (barrier == nullptr) return true;
  check_wait(*machine->current, *owner, parity, site);
  if (!completed(*barrier, parity)) {
    poll(*machine->current, "an mbarrier's phase of parity", static_cast<int>(parity), site);
    return false;
  }
  acquire(*machine->current, barrier->completed);
  return true;
}

void fence_mbarrier_init() { fence_initialized(*machine->current); }

void fence_proxy_async() {
  Thread& thread = *machine->current;
  fence_initialized(thread);
  thread.knowledge.fenced.join(thread.knowledge.seen);
  tick(thread);
}

}  // namespace host_executor
