// Barriers of blocks, warps and clusters, and exchanges between the lanes of a warp.
#include <algorithm>

#include "host_executor/collective.h"

namespace host_executor {
namespace {

void check_barrier(Thread& thread, int id, int& num_threads, uint32_t site) {
  const int block = static_cast<int>(thread.block->threads.size());
  if (num_threads == 0) num_threads = block;
  const bool whole_warps = num_threads % kWarpSize == 0 || num_threads == block;
  if (id < 0 || id > 15 || !whole_warps || num_threads > block) {
    report(Kind::kInvalid, site, 0,
           "barrier " + std::to_string(id) + " of " + std::to_string(num_threads) +
               " threads in a block of " + std::to_string(block));
  }
}

// Counts the thread in; true if it was the last.
bool arrive(Thread& thread, Barrier& barrier, int id, int num_threads, uint32_t site) {
  if (barrier.arrived == 0) {
    barrier.expected = num_threads;
    barrier.knowledge.clear();
    barrier.knowledge.cluster = thread.block->cluster->number;
    barrier.warp_sites.clear();
  } else if (barrier.expected != num_threads) {
    report(Kind::kDivergence, site, 0,
           "barrier " + std::to_string(id) + " counts " + std::to_string(num_threads) +
               " threads here and " + std::to_string(barrier.expected) + " elsewhere");
  }
  const uint32_t warp = thread.index / kWarpSize;
  auto found = std::find_if(barrier.warp_sites.begin(), barrier.warp_sites.end(),
                            [warp](const WarpArrival& arrival) { return arrival.warp == warp; });
  if (found == barrier.warp_sites.end()) {
    found = barrier.warp_sites.insert(found, {warp, site, 0});
  } else if (found->site != site) {
    report(Kind::kDivergence, site, found->site,
           "lanes of warp " + std::to_string(warp) + " meet at different barriers");
  }
  found->lanes |= 1u << thread.lane();
  release(thread, barrier.knowledge);
  return ++barrier.arrived >= barrier.expected;
}

void open(Block& block, Barrier& barrier, int id) {
  barrier.arrived = 0;
  for (const WarpArrival& arrival : barrier.warp_sites) {
    const size_t lanes =
        std::min<size_t>(kWarpSize, block.threads.size() - arrival.warp * kWarpSize);
    if (arrival.lanes != ~0u >> (kWarpSize - lanes)) {
      report(Kind::kDivergence, arrival.site, 0,
             "barrier " + std::to_string(id) + " opens without some lanes of warp " +
                 std::to_string(arrival.warp));
    }
  }
  std::vector<Thread*> waiters;
  std::swap(waiters, barrier.waiters);
  for (Thread* waiter : waiters) {
    acquire(*waiter, barrier.knowledge);
    waiter->released = true;
    make_runnable(*waiter);
  }
}

struct Exchange {
  uint32_t value, result;
  int kind;
  int operand;
};

Exchange& exchange_of(Rendezvous& rendezvous, int lane) {
  return *static_cast<Exchange*>(rendezvous.arguments[lane]);
}

template <class F>
void for_each_lane(const Rendezvous& rendezvous, const F& f) {
  for (int lane = 0; lane < kWarpSize; lane++) {
    if (rendezvous.mask >> lane & 1) f(lane);
  }
}

// Lanes that come with different instructions do not meet on a GPU.
void check_same_kind(Rendezvous& rendezvous) {
  const int first = __builtin_ctz(rendezvous.mask);
  for_each_lane(rendezvous, [&](int lane) {
    if (exchange_of(rendezvous, lane).kind == exchange_of(rendezvous, first).kind) return;
    report(Kind::kDivergence, rendezvous.sites[lane], rendezvous.sites[first],
           "lanes of a warp meet in different operations");
  });
}

void run_shuffle(Block&, uint32_t warp, Rendezvous& rendezvous) {
  check_same_kind(rendezvous);
  for_each_lane(rendezvous, [&](int lane) {
    Exchange& mine = exchange_of(rendezvous, lane);
    const int operand = mine.operand & (kWarpSize - 1);  // as the hardware does
    int source = lane;
    switch (static_cast<Shuffle>(mine.kind)) {
      case Shuffle::kIndex:
        source = operand;
        break;
      case Shuffle::kUp:
        source = lane - operand;
        break;
      case Shuffle::kDown:
        source = lane + operand;
        break;
      case Shuffle::kXor:
        source = lane ^ operand;
        break;
    }
    if (source < 0 || source >= kWarpSize) source = lane;
    if (!(rendezvous.mask >> source & 1)) {
      report(Kind::kDivergence, rendezvous.sites[lane], 0,
             "lane " + std::to_string(lane) + " of warp " + std::to_string(warp) +
                 " shuffles from lane " + std::to_string(source) + ", which is not in the mask");
      mine.result = ~0u;
    } else {
      mine.result = exchange_of(rendezvous, source).value;
    }
  });
}

void run_ballot(Block&, uint32_t, Rendezvous& rendezvous) {
  uint32_t votes = 0;
  for_each_lane(rendezvous, [&](int lane) {
    votes |= static_cast<uint32_t>(exchange_of(rendezvous, lane).value != 0) << lane;
  });
  for_each_lane(rendezvous, [&](int lane) { exchange_of(rendezvous, lane).result = votes; });
}

template <class T>
uint32_t reduced(Rendezvous& rendezvous, Reduce op) {
  bool first = true;
  T result = 0;
  for_each_lane(rendezvous, [&](int lane) {
    const T value = static_cast<T>(exchange_of(rendezvous, lane).value);
    if (first) {
      result = value;
    } else {
      switch (op) {
        case Reduce::kAdd:
          result = static_cast<T>(static_cast<uint32_t>(result) + static_cast<uint32_t>(value));
          break;
        case Reduce::kMin:
          result = std::min(result, value);
          break;
        case Reduce::kMax:
          result = std::max(result, value);
          break;
        case Reduce::kAnd:
          result &= value;
          break;
        case Reduce::kOr:
          result |= value;
          break;
        case Reduce::kXor:
          result ^= value;
          break;
      }
    }
    first = false;
  });
  return static_cast<uint32_t>(result);
}

void run_reduce(Block&, uint32_t, Rendezvous& rendezvous) {
  check_same_kind(rendezvous);
  const int first_lane = __builtin_ctz(rendezvous.mask);
  const auto op = static_cast<Reduce>(exchange_of(rendezvous, first_lane).kind);
  const bool is_signed = exchange_of(rendezvous, first_lane).operand != 0;
  const uint32_t result =
      is_signed ? reduced<int32_t>(rendezvous, op) : reduced<uint32_t>(rendezvous, op);
  for_each_lane(rendezvous, [&](int lane) { exchange_of(rendezvous, lane).result = result; });
}

// The same lane for the same mask in a launch, but not always the lowest.
void run_elect(Block&, uint32_t, Rendezvous& rendezvous) {
  std::vector<int> lanes;
  for_each_lane(rendezvous, [&](int lane) { lanes.push_back(lane); });
  const uint64_t hash = (machine->schedule.seed + rendezvous.mask) * 0x9e3779b97f4a7c15u;
  const int elected = lanes[(hash >> 32) % lanes.size()];
  for_each_lane(rendezvous,
                [&](int lane) { exchange_of(rendezvous, lane).result = lane == elected; });
}

void run_nothing(Block&, uint32_t, Rendezvous&) {}

uint32_t exchange(Collective collective, uint32_t mask, Exchange arguments, uint32_t site,
                  void (*run)(Block&, uint32_t, Rendezvous&)) {
  meet(collective, mask, &arguments, site, /*aligned=*/false, run);
  return arguments.result;
}

}  // namespace

void meet(Collective collective, uint32_t mask, void* arguments, uint32_t site, bool aligned,
          void (*run)(Block& block, uint32_t warp, Rendezvous& rendezvous)) {
  Thread& thread = *machine->current;
  Block& block = *thread.block;
  const uint32_t warp = thread.index / kWarpSize, lane = thread.lane();
  machine->report.counters.collectives++;
  const size_t lanes = std::min<size_t>(kWarpSize, block.threads.size() - warp * kWarpSize);
  if (lanes < kWarpSize) mask &= (1u << lanes) - 1;  // a full mask means the lanes that exist
  if (!(mask >> lane & 1)) {
    report(Kind::kDivergence, site, 0,
           describe(thread) + " comes to a collective whose mask does not name it");
    return;
  }

  std::list<Rendezvous>& open = block.warps[warp];
  auto place = std::find_if(open.begin(), open.end(), [&](const Rendezvous& rendezvous) {
    return rendezvous.operation == static_cast<int>(collective) && rendezvous.mask == mask &&
           !(rendezvous.arrived >> lane & 1);
  });
  if (place == open.end()) {
    open.emplace_back();
    place = std::prev(open.end());
    place->operation = static_cast<int>(collective);
    place->mask = mask;
    place->knowledge.cluster = block.cluster->number;
  }
  place->arguments[lane] = arguments;
  place->sites[lane] = site;
  place->arrived |= 1u << lane;
  // NOTE: of the collectives only a sync orders memory.
  const bool orders = collective == Collective::kSync;
  if (orders) release(thread, place->knowledge);
  if (place->arrived != mask) {
    thread.released = false;
    while (!thread.released) wait(thread, "the other lanes of warp", warp, site);
    return;
  }

  Rendezvous rendezvous = std::move(*place);
  open.erase(place);
  for (int other = 0; aligned && other < kWarpSize; other++) {
    if ((mask >> other & 1) && rendezvous.sites[other] != site) {
      report(Kind::kDivergence, site, rendezvous.sites[other],
             "lanes of warp " + std::to_string(warp) +
                 " come to an aligned instruction at different places");
      break;
    }
  }
  run(block, warp, rendezvous);
  for_each_lane(rendezvous, [&](int other) {
    Thread& peer = block.threads[warp * kWarpSize + other];
    if (orders) acquire(peer, rendezvous.knowledge);
    peer.released = true;
    make_runnable(peer);
  });
}

// ---- device.h ----

void barrier_sync(int id, int num_threads) {
  const uint32_t site = HOST_EXECUTOR_SITE;
  Thread& thread = *machine->current;
  check_barrier(thread, id, num_threads, site);
  Barrier& barrier = thread.block->barriers[id];
  thread.released = false;
  const bool last = arrive(thread, barrier, id, num_threads, site);
  barrier.waiters.push_back(&thread);
  if (last) open(*thread.block, barrier, id);
  while (!thread.released) wait(thread, "barrier", id, site);
}

void barrier_arrive(int id, int num_threads) {
  const uint32_t site = HOST_EXECUTOR_SITE;
  Thread& thread = *machine->current;
  check_barrier(thread, id, num_threads, site);
  Barrier& barrier = thread.block->barriers[id];
  if (arrive(thread, barrier, id, num_threads, site)) open(*thread.block, barrier, id);
}

void sync_warp(uint32_t mask) {
  meet(Collective::kSync, mask, nullptr, HOST_EXECUTOR_SITE, false, &run_nothing);
}

uint32_t shuffle(uint32_t mask, uint32_t value, Shuffle mode, int operand) {
  return exchange(Collective::kShuffle, mask, {value, 0, static_cast<int>(mode), operand},
                  HOST_EXECUTOR_SITE, &run_shuffle);
}

uint32_t ballot(uint32_t mask, bool predicate) {
  return exchange(Collective::kBallot, mask, {predicate, 0, 0, 0}, HOST_EXECUTOR_SITE, &run_ballot);
}

uint32_t reduce(uint32_t mask, uint32_t value, Reduce op, bool is_signed) {
  return exchange(Collective::kReduce, mask, {value, 0, static_cast<int>(op), is_signed},
                  HOST_EXECUTOR_SITE, &run_reduce);
}

bool elect(uint32_t mask) {
  return exchange(Collective::kElect, mask, {0, 0, 0, 0}, HOST_EXECUTOR_SITE, &run_elect) != 0;
}

// ---- clusters ----

void cluster_barrier_check(Cluster& cluster) {
  if (cluster.barrier_arrived == 0 || cluster.barrier_arrived < cluster.live) return;
  cluster.barrier_arrived = 0;
  cluster.barrier_generation++;
  cluster.barrier_completed = cluster.barrier_arriving;
  cluster.barrier_arriving.clear();
  for (const auto& block : cluster.blocks) {
    for (Thread& thread : block->threads) make_runnable(thread);
  }
}

void cluster_arrive() {
  const uint32_t site = HOST_EXECUTOR_SITE;
  Thread& thread = *machine->current;
  Cluster& cluster = *thread.block->cluster;
  if (thread.cluster_arrived) {
    report(Kind::kDivergence, site, 0, describe(thread) + " arrives twice without a wait between");
  }
  thread.cluster_arrived = true;
  thread.cluster_generation = cluster.barrier_generation;
  release(thread, cluster.barrier_arriving);
  cluster.barrier_arrived++;
  cluster_barrier_check(cluster);
}

void cluster_wait() {
  const uint32_t site = HOST_EXECUTOR_SITE;
  Thread& thread = *machine->current;
  Cluster& cluster = *thread.block->cluster;
  if (!thread.cluster_arrived) {
    report(Kind::kDivergence, site, 0, describe(thread) + " waits for the cluster but never came");
    return;
  }
  while (cluster.barrier_generation == thread.cluster_generation) {
    wait(thread, "the cluster's barrier, generation", static_cast<int>(thread.cluster_generation),
         site);
  }
  thread.cluster_arrived = false;
  acquire(thread, cluster.barrier_completed);
}

}  // namespace host_executor
