// wgmma: descriptors, operands in shared memory, and products in issue order.
#include <algorithm>
#include <cstring>

#include "host_executor/matrix.h"
#include "host_executor/state.h"

namespace host_executor {
namespace {

constexpr int kM = 64, kK = 16;

// Checks a read of the operand's rows [begin, end), 16 bytes at a time.
void check_operand(const MatrixDescriptor& descriptor, bool mn_major, int begin, int end,
                   const Access& access) {
  for (int mn = begin; mn < end; mn += mn_major ? 8 : 1) {
    for (int k = 0; k < kK; k += mn_major ? 1 : 8) {
      const uint32_t address = wgmma_address(descriptor, mn_major, mn, k);
      const unsigned char* p = shared_pointer(address, 16, access.site, "wgmma operand");
      if (p == nullptr || !Memory::instance().read(p, 16, access)) return;
    }
  }
}

// What a bad address holds is of no interest: it was reported.
uint16_t element_at(const Block& block, uint32_t address) {
  const uint32_t offset = (address & ((1u << kSharedRankShift) - 1)) - kSharedBase;
  uint16_t bits = 0x7fff;
  if (block.shared->contains(offset, 2)) std::memcpy(&bits, block.shared->base + offset, 2);
  return bits;
}

void multiply(const Block& block, const WgmmaOperation& operation) {
  const MatrixDescriptor a_descriptor = decode_descriptor(operation.a_descriptor);
  const MatrixDescriptor b_descriptor = decode_descriptor(operation.b_descriptor);
  float a[kM][kK];
  std::vector<float> b(static_cast<size_t>(kK) * operation.n);  // [k][n]
  for (int k = 0; k < kK; k++) {
    for (int n = 0; n < operation.n; n++) {
      const uint32_t address = wgmma_address(b_descriptor, operation.b_mn_major, n, k);
      b[static_cast<size_t>(k) * operation.n + n] =
          value_of(operation.element, element_at(block, address));
    }
    for (int m = 0; m < kM && !operation.from_registers; m++) {
      const uint32_t address = wgmma_address(a_descriptor, operation.a_mn_major, m, k);
      a[m][k] = value_of(operation.element, element_at(block, address));
    }
  }
  for (int thread = 0; operation.from_registers && thread < kWarpgroupSize; thread++) {
    const auto* halves = reinterpret_cast<const uint16_t*>(operation.a[thread]);
    for (int i = 0; i < 8; i++) {
      const Place place = wgmma_a_place(thread, i);
      a[place.row][place.column] = value_of(operation.element, halves[i]);
    }
  }
  std::vector<double> products(static_cast<size_t>(kM) * operation.n, 0.0);
  for (int m = 0; m < kM; m++) {
    double* row = &products[static_cast<size_t>(m) * operation.n];
    for (int k = 0; k < kK; k++) {
      const float* b_row = &b[static_cast<size_t>(k) * operation.n];
      const double factor = a[m][k];
      for (int n = 0; n < operation.n; n++) row[n] += factor * b_row[n];
    }
  }
  for (int thread = 0; thread < kWarpgroupSize; thread++) {
    for (int i = 0; i < operation.n / 2; i++) {
      const Place place = wgmma_d_place(thread, i);
      float& d = operation.d[thread][i];
      const double sum = products[static_cast<size_t>(place.row) * operation.n + place.column];
      d = static_cast<float>(sum + (operation.accumulate ? double{d} : 0.0));
    }
  }
}

void check_descriptor(const MatrixDescriptor& descriptor, uint32_t site) {
  if (descriptor.reserved_bits || descriptor.base_offset != 0) {
    report(Kind::kInvalid, site, 0,
           "a matrix descriptor must have zero reserved bits and base offset 0");
  }
}

// All threads have issued it: check what it reads, and start it.
void start(Block& block, Warpgroup& group, const std::shared_ptr<WgmmaOperation>& operation,
           uint32_t time, uint32_t site) {
  Knowledge all = operation->issuers[0];
  for (int warp = 1; warp < 4; warp++) all.meet(operation->issuers[warp]);
  Access access{&all, Epoch::of(block.cluster->number, group.agent, time), site};
  access.async_proxy = true;
  // NOTE: a descriptor has 18 bits of an address, in the shared memory of its own block.
  const uint32_t window = block.rank << kSharedRankShift;
  MatrixDescriptor b = decode_descriptor(operation->b_descriptor);
  b.address |= window;
  check_descriptor(b, site);
  check_operand(b, operation->b_mn_major, 0, operation->n, access);
  if (!operation->from_registers) {
    MatrixDescriptor a = decode_descriptor(operation->a_descriptor);
    a.address |= window;
    check_descriptor(a, site);
    for (int warp = 0; warp < 4; warp++) {
      access.knowledge = &operation->issuers[warp];
      check_operand(a, operation->a_mn_major, 16 * warp, 16 * warp + 16, access);
    }
  }
  operation->operation = start_async(*machine->current, time, site, [&block, &group, operation] {
    // Products of a warpgroup are performed in order.
    while (!group.queue.empty()) {
      const std::shared_ptr<WgmmaOperation> oldest = group.queue.front();
      group.queue.pop_front();
      group.first++;
      multiply(block, *oldest);
      if (oldest == operation) break;
      oldest->operation->done = true;
      oldest->operation->perform = nullptr;
    }
  });
}

void own(std::vector<OwnedRegisters>& list, const void* registers, size_t bytes, bool readable,
         uint64_t operation) {
  const auto* begin = static_cast<const unsigned char*>(registers);
  for (OwnedRegisters& owned : list) {
    if (owned.begin != begin || owned.bytes != bytes) continue;
    owned.operation = operation;
    return;
  }
  list.push_back({begin, bytes, readable, operation});
}

bool overlaps(const OwnedRegisters& owned, const unsigned char* p, size_t bytes) {
  return p < owned.begin + owned.bytes && owned.begin < p + bytes;
}

}  // namespace

MatrixDescriptor decode_descriptor(uint64_t bits) {
  constexpr uint64_t kReserved =
      uint64_t{3} << 14 | uint64_t{3} << 30 | uint64_t{7} << 46 | uint64_t{0x3ff} << 52;
  constexpr Swizzle kSwizzles[] = {Swizzle::kNone, Swizzle::k128, Swizzle::k64, Swizzle::k32};
  const auto field = [bits](int shift) {
    return static_cast<uint32_t>(bits >> shift & 0x3fff) << 4;
  };
  return {field(0),
          field(16),
          field(32),
          static_cast<uint32_t>(bits >> 49 & 7),
          kSwizzles[bits >> 62],
          (bits & kReserved) != 0};
}

uint32_t wgmma_address(const MatrixDescriptor& descriptor, bool mn_major, int mn, int k) {
  // Rows of 16, 32, 64 or 128 bytes, eight to an atom, with the swizzle of their width.
  const int units = 1 << static_cast<int>(descriptor.swizzle);  // of 16 bytes in a row
  const bool plain = descriptor.swizzle == Swizzle::kNone;
  uint32_t offset = 0;
  if (!mn_major) {
    offset = mn / 8 * descriptor.stride_bytes + mn % 8 * units * 16 + k % 8 * 2;
    offset += k / 8 * (plain ? descriptor.leading_bytes : 16);
  } else {
    const uint32_t mn_bytes = plain ? descriptor.stride_bytes : descriptor.leading_bytes;
    const uint32_t k_bytes = plain ? descriptor.leading_bytes : descriptor.stride_bytes;
    offset = mn / (8 * units) * mn_bytes + mn % (8 * units) * 2;
    offset += k / 8 * k_bytes + k % 8 * units * 16;
  }
  return swizzled(descriptor.address + offset, descriptor.swizzle);
}

void check_registers(Thread& thread, const void* p, size_t bytes, bool is_write, uint32_t site) {
  const auto* begin = static_cast<const unsigned char*>(p);
  for (const OwnedRegisters& owned : thread.owned) {
    if (overlaps(owned, begin, bytes) && (is_write || !owned.readable)) {
      report(Kind::kWgmma, site, 0,
             describe(thread) + " touches a register of a wgmma that it has not waited for");
    }
  }
  for (const OwnedRegisters& used : thread.accumulators) {
    if (is_write && overlaps(used, begin, bytes)) thread.wgmma_fenced = false;
  }
}

void check_wgmma_at_exit(Thread& thread) {
  if (thread.wgmma_issued > thread.wgmma_waited) {
    report(Kind::kUnwaited, thread.wgmma_site, 0,
           describe(thread) + " exits with a wgmma that it never waited for");
  }
}

// ---- device.h ----

void wgmma_fence() { machine->current->wgmma_fenced = true; }

void wgmma(Element element, int n, float* d, const uint32_t* a_registers, uint64_t a_descriptor,
           uint64_t b_descriptor, bool accumulate, bool a_mn_major, bool b_mn_major) {
  const uint32_t site = HOST_EXECUTOR_SITE;
  maybe_preempt();
  Thread& thread = *machine->current;
  Block& block = *thread.block;
  Warpgroup& group = block.warpgroups[thread.index / kWarpgroupSize];
  if (block.threads.size() < (thread.index / kWarpgroupSize + 1) * size_t{kWarpgroupSize}) {
    report(Kind::kInvalid, site, 0, "wgmma needs a whole warpgroup of 128 threads");
    return;
  }
  if (group.agent == 0) group.agent = new_agent(*block.cluster);
  if (!thread.wgmma_fenced) {
    report(Kind::kWgmma, site, 0,
           "wgmma needs wgmma.fence after " + describe(thread) + " wrote its registers");
    thread.wgmma_fenced = true;
  }
  thread.wgmma_site = site;
  const uint64_t number = thread.wgmma_issued++;
  const size_t place = number - group.first;
  if (place == group.queue.size()) {
    auto operation = std::make_shared<WgmmaOperation>();
    operation->n = n;
    operation->element = element;
    operation->a_descriptor = a_descriptor;
    operation->b_descriptor = b_descriptor;
    operation->accumulate = accumulate;
    operation->a_mn_major = a_mn_major;
    operation->b_mn_major = b_mn_major;
    operation->from_registers = a_registers != nullptr;
    group.queue.push_back(operation);
  }
  const std::shared_ptr<WgmmaOperation> operation = group.queue[place];
  if (operation->n != n || operation->accumulate != accumulate ||
      operation->b_descriptor != b_descriptor || operation->element != element ||
      (a_registers == nullptr && operation->a_descriptor != a_descriptor)) {
    report(Kind::kDivergence, site, 0, "threads of a warpgroup issue different wgmma");
  }
  const uint32_t slot = thread.index % kWarpgroupSize;
  operation->d[slot] = d;
  own(thread.owned, d, n / 2 * sizeof(float), /*readable=*/false, number);
  own(thread.accumulators, d, n / 2 * sizeof(float), false, number);
  if (a_registers != nullptr) {
    check_registers(thread, a_registers, 16, /*is_write=*/false, site);
    std::memcpy(operation->a[slot], a_registers, sizeof(operation->a[slot]));
    own(thread.owned, a_registers, 16, /*readable=*/true, number);
    own(thread.accumulators, a_registers, 16, true, number);
  }
  Knowledge& known = operation->issuers[slot / kWarpSize];
  if (known.cluster == 0) {
    known = thread.knowledge;
  } else {
    known.meet(thread.knowledge);
  }
  tick(thread);
  if (++operation->arrived == kWarpgroupSize) {
    start(block, group, operation, static_cast<uint32_t>(number + 1), site);
    std::vector<Thread*> waiters;
    std::swap(waiters, group.waiters);
    for (Thread* waiter : waiters) make_runnable(*waiter);
  }
}

void wgmma_commit() {
  Thread& thread = *machine->current;
  thread.wgmma_groups.push_back(thread.wgmma_issued);
}

void wgmma_wait(int pending_groups) {
  const uint32_t site = HOST_EXECUTOR_SITE;
  Thread& thread = *machine->current;
  Warpgroup& group = thread.block->warpgroups[thread.index / kWarpgroupSize];
  const size_t committed = thread.wgmma_groups.size();
  if (committed <= static_cast<size_t>(pending_groups)) return;
  const size_t finished = committed - pending_groups;
  const uint64_t target = thread.wgmma_groups[finished - 1];
  // The hardware would wait for the rest of the warpgroup, too.
  while (group.first < target) {
    const std::shared_ptr<WgmmaOperation> oldest = group.queue.front();
    if (oldest->arrived == kWarpgroupSize) {
      perform_async(*oldest->operation);
    } else {
      group.waiters.push_back(&thread);
      wait(thread, "wgmma of the rest of warpgroup", static_cast<int>(thread.index) / 128, site);
    }
  }
  thread.wgmma_waited = target;
  thread.wgmma_groups.erase(thread.wgmma_groups.begin(), thread.wgmma_groups.begin() + finished);
  thread.knowledge.seen.raise(group.agent, static_cast<uint32_t>(target));
  std::vector<OwnedRegisters>& owned = thread.owned;
  owned.erase(std::remove_if(owned.begin(), owned.end(),
                             [&](const OwnedRegisters& one) { return one.operation < target; }),
              owned.end());
}

void set_max_registers(int count, bool /*increase*/) {
  if (count % 8 != 0 || count < 24 || count > 256) {
    report(Kind::kInvalid, HOST_EXECUTOR_SITE, 0,
           "setmaxnreg takes a multiple of 8 from 24 to 256, got " + std::to_string(count));
  }
}

// The executor runs one grid at a time.
void grid_dependency_wait() {}
void grid_dependency_launch() {}

}  // namespace host_executor
