// Runs the threads of a launch in turns, in an order that the seed chooses.
#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <iterator>
#include <numeric>
#include <stdexcept>

#include "host_executor/state.h"

namespace host_executor {

Machine* machine = nullptr;

namespace {

// Polls in a row that found nothing new: until late operations are performed, and until it counts
// as a deadlock.
constexpr uint64_t kIdlePolls = 4096, kDeadlockPolls = 1 << 22;
constexpr uint32_t kCompleteOneIn = 4;  // turns, for random completion

// Stacks are kept between launches; pages that a kernel never touches cost nothing.
void* stack_of(size_t index) {
  static std::vector<void*> stacks;
  while (stacks.size() <= index) {
    void* stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stack == MAP_FAILED) throw std::runtime_error("host_executor: no memory for a stack");
    stacks.push_back(stack);
  }
  return stacks[index];
}

void to_main() {
  Thread& thread = *machine->current;
  machine->main.resume(thread.fiber);
}

void thread_entry() {
  machine->run(machine->context);
  on_exit(*machine->current);
  to_main();
  __builtin_unreachable();
}

// A kernel that follows a wild pointer ends here instead of ending the process.
void crash_landing() {
  machine->crashed = true;
  to_main();
  __builtin_unreachable();
}

constexpr int kCrashSignals[] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE};
struct sigaction previous_handlers[std::size(kCrashSignals)];

void restore_handlers() {
  for (size_t i = 0; i < std::size(kCrashSignals); i++) {
    sigaction(kCrashSignals[i], &previous_handlers[i], nullptr);
  }
}

void on_crash(int signal, siginfo_t* info, void* raw_context) {
  if (machine == nullptr || machine->current == nullptr) return restore_handlers();
  auto* context = static_cast<ucontext_t*>(raw_context);
#if defined(__x86_64__)
  auto* place = reinterpret_cast<void*>(context->uc_mcontext.gregs[REG_RIP] + 1);
#else
  auto* place = reinterpret_cast<void*>(context->uc_mcontext.pc + 4);
#endif
  char address[64];
  snprintf(address, sizeof(address), "access to address %p", info->si_addr);
  // Kernels are compiled to trap where an index leaves a local array.
  const std::string what = signal == SIGILL   ? "index out of the bounds of an array"
                           : signal == SIGFPE ? "division of an integer by zero"
                                              : address;
  report(Kind::kCrash, site_of(place), 0, what + " by " + describe(*machine->current));
  // The thread's stack is not needed any more.
  auto top = reinterpret_cast<uintptr_t>(stack_of(0)) + kStackBytes - 256;
#if defined(__x86_64__)
  context->uc_mcontext.gregs[REG_RSP] = static_cast<greg_t>(top - 8);
  context->uc_mcontext.gregs[REG_RIP] = reinterpret_cast<greg_t>(&crash_landing);
#else
  context->uc_mcontext.sp = top;
  context->uc_mcontext.pc = reinterpret_cast<uintptr_t>(&crash_landing);
#endif
}

class CrashHandler {
 public:
  CrashHandler() {
    static char stack[64 << 10];
    stack_t alternative{};
    alternative.ss_sp = stack;
    alternative.ss_size = sizeof(stack);
    sigaltstack(&alternative, &previous_stack_);
    struct sigaction action{};
    action.sa_sigaction = &on_crash;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    for (size_t i = 0; i < std::size(kCrashSignals); i++) {
      sigaction(kCrashSignals[i], &action, &previous_handlers[i]);
    }
  }
  ~CrashHandler() {
    restore_handlers();
    sigaltstack(&previous_stack_, nullptr);
  }

 private:
  stack_t previous_stack_{};
};

uint64_t volume(Dim3 dim) { return uint64_t{dim.x} * dim.y * dim.z; }

Dim3 position(uint64_t index, Dim3 dim) {
  return {static_cast<uint32_t>(index % dim.x), static_cast<uint32_t>(index / dim.x % dim.y),
          static_cast<uint32_t>(index / dim.x / dim.y)};
}

std::unique_ptr<Cluster> make_cluster(const LaunchConfig& config, uint32_t number,
                                      size_t first_stack) {
  auto cluster = std::make_unique<Cluster>();
  cluster->number = number;
  const uint32_t num_blocks = volume(config.cluster), num_threads = volume(config.block);
  cluster->live = num_blocks * num_threads;
  cluster->barrier_arriving.cluster = cluster->barrier_completed.cluster = number;
  for (uint32_t rank = 0; rank < num_blocks; rank++) {
    auto block = std::make_unique<Block>();
    block->cluster = cluster.get();
    block->rank = rank;
    block->live = num_threads;
    block->exits.cluster = number;
    block->threads.resize(num_threads);
    block->warps.resize((num_threads + kWarpSize - 1) / kWarpSize);
    block->warpgroups.resize((num_threads + kWarpgroupSize - 1) / kWarpgroupSize);
    if (config.shared_bytes > 0) {
      block->shared = &Memory::instance().allocate_shared(block.get(), config.shared_bytes);
    }
    const Dim3 block_idx = block_idx_of(number, rank);
    for (uint32_t i = 0; i < num_threads; i++) {
      Thread& thread = block->threads[i];
      thread.identity = {
          position(i, config.block), block_idx, config.block, config.grid, config.cluster, rank};
      thread.block = block.get();
      thread.index = i;
      thread.agent = cluster->agents++;
      thread.knowledge.cluster = number;
      thread.knowledge.seen.raise(thread.agent, thread.time);
      thread.released_by_fence.cluster = thread.acquired_by_atomics.cluster = number;
      void* stack = stack_of(first_stack + thread.agent);
      thread.stack = static_cast<const unsigned char*>(stack);
      thread.fiber.start(stack, kStackBytes, &thread_entry);
      machine->runnable.push_back(&thread);
    }
    cluster->blocks.push_back(std::move(block));
  }
  return cluster;
}

// When nobody can go on: what everybody waits for.
void report_deadlock(const std::vector<std::unique_ptr<Cluster>>& clusters) {
  std::map<std::pair<std::string, uint32_t>, std::vector<const Thread*>> waiting;
  for (const auto& cluster : clusters) {
    for (const auto& block : cluster->blocks) {
      for (const Thread& thread : block->threads) {
        if (thread.done) continue;
        const std::string what = thread.waits_for + (" " + std::to_string(thread.wait_number));
        waiting[{what, thread.wait_site}].push_back(&thread);
      }
    }
  }
  for (const auto& [what, threads] : waiting) {
    report(Kind::kDeadlock, what.second, 0,
           std::to_string(threads.size()) + " threads, the first of them " +
               describe(*threads.front()) + ", wait forever for " + what.first);
  }
}

void check_block_at_exit(Block& block) {
  for (const AsyncPointer& operation : machine->pending) {
    if (operation->block == &block && !operation->done) {
      report(Kind::kUnwaited, operation->site, 0,
             "an asynchronous operation of a block was in flight when its last thread exited");
    }
  }
  for (const auto& [offset, barrier] : block.mbarriers) {
    if (block.cluster->times[barrier.agent] > block.exits.seen[barrier.agent] ||
        barrier.pending_bytes < 0) {
      report(Kind::kUnwaited, barrier.copy_site, barrier.init_site,
             "a block exits without a wait for a copy that completes on its mbarrier");
    }
  }
  for (uint32_t agent = 0; agent < block.remote_access.size(); agent++) {
    if (block.remote_access[agent] > block.exits.seen[agent]) {
      report(Kind::kClusterExit, 0, 0,
             "block " + std::to_string(block.rank) +
                 " of a cluster may exit before another block's access to its shared memory");
      break;
    }
  }
  if (machine->schedule.counters) count_requests(block);
}

Thread* next_thread() {
  std::vector<Thread*>& runnable = machine->runnable;
  size_t chosen = 0;
  if (machine->schedule.order == Order::kRandom) {
    chosen = machine->random.below(runnable.size());
    std::swap(runnable[chosen], runnable.back());
    chosen = runnable.size() - 1;
  } else if (machine->schedule.order == Order::kReversed) {
    chosen = runnable.size() - 1;
  }
  Thread* thread = runnable[chosen];
  runnable.erase(runnable.begin() + chosen);
  return thread;
}

void perform_pending() {
  std::vector<AsyncPointer>& pending = machine->pending;
  const size_t chosen = machine->random.below(pending.size());
  const AsyncPointer operation = pending[chosen];
  pending[chosen] = pending.back();
  pending.pop_back();
  perform_async(*operation);
}

// Until all resident threads are done; false if they cannot get there.
bool run_resident(const std::vector<std::unique_ptr<Cluster>>& clusters) {
  const auto live = [&] {
    uint32_t sum = 0;
    for (const auto& cluster : clusters) sum += cluster->live;
    return sum;
  };
  const bool random = machine->schedule.completion == Completion::kRandom;
  while (live() > 0) {
    const bool idle = machine->polls > kIdlePolls;
    if (!machine->pending.empty() && (machine->runnable.empty() || idle ||
                                      (random && machine->random.below(kCompleteOneIn) == 0))) {
      perform_pending();
      continue;
    }
    if (machine->runnable.empty() || machine->polls > kDeadlockPolls) {
      report_deadlock(clusters);
      return false;
    }
    machine->current = next_thread();
    machine->report.counters.switches++;
    machine->current->fiber.resume(machine->main);
    machine->current = nullptr;
    if (machine->crashed) return false;
  }
  // A block's end does not wait for its stores through the async proxy.
  while (!machine->pending.empty()) perform_pending();
  return true;
}

void check_config(const LaunchConfig& config) {
  const auto require = [](bool good, const char* requirement, uint64_t value) {
    if (!good) {
      throw std::runtime_error(std::string("host_executor: ") + requirement + ", got " +
                               std::to_string(value));
    }
  };
  const uint64_t threads = volume(config.block), cluster = volume(config.cluster);
  require(threads >= 1 && threads <= 1024, "a block must have 1 to 1024 threads", threads);
  require(cluster >= 1 && cluster <= 16, "a cluster must have 1 to 16 blocks", cluster);
  require(volume(config.grid) >= 1, "a grid must have blocks", 0);
  require(config.grid.x < (1u << 31), "a grid must have less than 2**31 columns", config.grid.x);
  require(config.grid.y < (1u << 16), "a grid must have less than 2**16 rows", config.grid.y);
  require(config.grid.z < (1u << 16), "a grid must have less than 2**16 layers", config.grid.z);
  require(config.grid.x % config.cluster.x == 0 && config.grid.y % config.cluster.y == 0 &&
              config.grid.z % config.cluster.z == 0,
          "a grid must be a multiple of the cluster", config.grid.x);
  require(config.shared_bytes <= 227 << 10, "shared memory must be at most 227 KiB",
          config.shared_bytes);
  require(volume(config.grid) / cluster < (1u << Epoch::kClusterBits) - 1,
          "a checked launch must have less than 2**22 clusters", volume(config.grid) / cluster);
}

}  // namespace

// ---- threads ----

Dim3 block_idx_of(uint32_t cluster_number, uint32_t rank) {
  const LaunchConfig& config = machine->config;
  const Dim3 clusters{config.grid.x / config.cluster.x, config.grid.y / config.cluster.y,
                      config.grid.z / config.cluster.z};
  const Dim3 corner = position(machine->order[cluster_number - 1], clusters);
  const Dim3 in_cluster = position(rank, config.cluster);
  return {corner.x * config.cluster.x + in_cluster.x, corner.y * config.cluster.y + in_cluster.y,
          corner.z * config.cluster.z + in_cluster.z};
}

Epoch Thread::epoch() const { return Epoch::of(block->cluster->number, agent, time); }

void tick(Thread& thread) {
  if (thread.time + 1 == 1u << Epoch::kTimeBits) {
    report(
        Kind::kInvalid, 0, 0,
        describe(thread) + " took 2**22 steps of synchronisation; races after them go unnoticed");
    return;
  }
  thread.knowledge.seen.raise(thread.agent, ++thread.time);
}

void release(Thread& thread, Knowledge& to) {
  to.join(thread.knowledge);
  tick(thread);
}

void acquire(Thread& thread, const Knowledge& from) { thread.knowledge.join(from); }

uint32_t new_agent(Cluster& cluster) {
  if (cluster.agents >= (1u << Epoch::kAgentBits)) {
    // NOTE: nothing may be thrown on a fiber. Shared, an agent could hide a race, so it is said.
    report(
        Kind::kInvalid, 0, 0,
        "a cluster has 2**14 threads, mbarriers and copying threads, more than can be told apart");
    return cluster.agents - 1;
  }
  cluster.times.resize(cluster.agents + 1, 0);
  return cluster.agents++;
}

uint32_t next_time(Cluster& cluster, uint32_t agent) { return ++cluster.times[agent]; }

void make_runnable(Thread& thread) {
  if (!thread.waiting) return;
  thread.waiting = false;
  machine->polls = 0;
  machine->runnable.push_back(&thread);
}

void yield() {
  std::vector<Thread*>& runnable = machine->runnable;
  // Everybody else comes first.
  runnable.insert(machine->schedule.order == Order::kReversed ? runnable.begin() : runnable.end(),
                  machine->current);
  to_main();
}

void wait(Thread& thread, const char* waits_for, int number, uint32_t site) {
  thread.waits_for = waits_for;
  thread.wait_number = number;
  thread.wait_site = site;
  thread.waiting = true;
  to_main();
}

void poll(Thread& thread, const char* waits_for, int number, uint32_t site) {
  thread.waits_for = waits_for;
  thread.wait_number = number;
  thread.wait_site = site;
  machine->polls++;
  yield();
}

void maybe_preempt() {
  const int one_in = machine->schedule.preempt_one_in;
  if (one_in > 0 && machine->random.below(one_in) == 0) yield();
}

void on_exit(Thread& thread) {
  check_copies_at_exit(thread);
  check_wgmma_at_exit(thread);
  thread.done = true;
  machine->polls = 0;
  Block& block = *thread.block;
  release(thread, block.exits);
  Cluster& cluster = *block.cluster;
  // Who exits counts as arrived, but not twice.
  if (thread.cluster_arrived && thread.cluster_generation == cluster.barrier_generation) {
    cluster.barrier_arrived--;
  }
  cluster.live--;
  if (--block.live == 0) check_block_at_exit(block);
  cluster_barrier_check(*block.cluster);
}

// ---- asynchronous operations ----

AsyncPointer start_async(Thread& thread, uint32_t time, uint32_t site,
                         std::function<void()> perform) {
  auto operation = std::make_shared<AsyncOperation>();
  operation->perform = std::move(perform);
  operation->block = thread.block;
  operation->time = time;
  operation->site = site;
  machine->report.counters.asynchronous++;
  if (machine->schedule.completion == Completion::kEarly) {
    perform_async(*operation);
  } else {
    machine->pending.push_back(operation);
  }
  return operation;
}

void perform_async(AsyncOperation& operation) {
  if (operation.done) return;
  operation.done = true;
  // NOTE: what it captured may hold the operation itself.
  const std::function<void()> perform = std::move(operation.perform);
  operation.perform = nullptr;
  machine->polls = 0;
  perform();
}

// ---- launch ----

Schedule& default_schedule() {
  static Schedule schedule;
  return schedule;
}

std::vector<Report>& reports() {
  static std::vector<Report> all;
  return all;
}

Report launch(const LaunchConfig& config, void (*run)(const void* context), const void* context,
              const Schedule& schedule) {
  check_config(config);
  if (machine != nullptr) throw std::runtime_error("host_executor: launches must not nest");
  Machine running;
  machine = &running;
  const struct Reset {
    ~Reset() { machine = nullptr; }
  } reset;
  Memory::instance().forget_accesses();
  const CrashHandler crash_handler;
  running.schedule = schedule;
  running.config = config;
  running.random.state = schedule.seed * 0x9e3779b97f4a7c15u + 0x1234567u;
  running.run = run;
  running.context = context;

  const uint32_t num_clusters = volume(config.grid) / volume(config.cluster);
  std::vector<uint32_t>& order = running.order;
  order.resize(num_clusters);
  std::iota(order.begin(), order.end(), 0);
  if (schedule.order == Order::kReversed) std::reverse(order.begin(), order.end());
  if (schedule.order == Order::kRandom) {
    for (uint32_t i = num_clusters; i > 1; i--) {
      std::swap(order[i - 1], order[running.random.below(i)]);
    }
  }
  const size_t stacks = volume(config.block) * volume(config.cluster);
  bool good = true;
  for (uint32_t next = 0; good && next < num_clusters;) {
    std::vector<std::unique_ptr<Cluster>> resident;
    for (int i = 0; i < schedule.resident_clusters && next < num_clusters; i++, next++) {
      resident.push_back(make_cluster(config, next + 1, i * stacks));
    }
    good = run_resident(resident);
    for (const auto& cluster : resident) {
      for (const auto& block : cluster->blocks) {
        if (block->shared != nullptr) Memory::instance().free(*block->shared);
      }
    }
    running.runnable.clear();
    running.pending.clear();
  }
  if (good && schedule.require_outputs) {
    for (const Region* region : Memory::instance().regions()) {
      const size_t missing = region->role == Role::kOutput ? unwritten_bytes(region->base) : 0;
      if (missing > 0) {
        report(Kind::kUnwritten, 0, 0,
               std::to_string(missing) + " of " + std::to_string(region->bytes) + " bytes of '" +
                   region->name + "' were not written");
      }
    }
  }
  Memory::instance().add_traffic(running.report);
  return std::move(running.report);
}

}  // namespace host_executor
