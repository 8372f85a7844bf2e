// ldmatrix, stmatrix and mma.sync: the layouts of fragments, and the products.
#include "host_executor/matrix.h"

#include <cstring>

#include "host_executor/collective.h"

namespace host_executor {
namespace {

struct MatrixArguments {
  uint32_t* registers;
  uint32_t address;
  int count;
  bool transposed;
};

// Row `row` of matrix `matrix` is the 16 bytes that lane 8 * matrix + row points to.
template <class F>
void for_each_row(Block& block, uint32_t warp, Rendezvous& rendezvous, const char* what,
                  const F& f) {
  const int count = static_cast<MatrixArguments*>(rendezvous.arguments[0])->count;
  for (int lane = 0; lane < 8 * count; lane++) {
    const auto& arguments = *static_cast<MatrixArguments*>(rendezvous.arguments[lane]);
    const uint32_t site = rendezvous.sites[lane];
    Thread& thread = block.threads[warp * kWarpSize + lane];
    if (arguments.address % 16 != 0) {
      report(Kind::kMisaligned, site, 0,
             std::string(what) + " of a row whose address is no multiple of 16, by " +
                 describe(thread));
    }
    unsigned char* row = shared_pointer(arguments.address, 16, site, what);
    if (row == nullptr) continue;
    f(thread, site, row, lane / 8, lane % 8);
    if (machine->schedule.counters) count_request(thread, row, 16, site, /*shared=*/true);
  }
}

// The register half that holds element (row, column) of an 8 x 8 matrix.
uint16_t* fragment_element(Rendezvous& rendezvous, int matrix, int row, int column,
                           bool transposed) {
  if (transposed) std::swap(row, column);
  const int lane = row * 4 + column / 2;
  const auto& arguments = *static_cast<MatrixArguments*>(rendezvous.arguments[lane]);
  return reinterpret_cast<uint16_t*>(&arguments.registers[matrix]) + column % 2;
}

void run_load(Block& block, uint32_t warp, Rendezvous& rendezvous) {
  const bool transposed = static_cast<MatrixArguments*>(rendezvous.arguments[0])->transposed;
  for_each_row(block, warp, rendezvous, "ldmatrix",
               [&](Thread& thread, uint32_t site, unsigned char* row, int matrix, int r) {
                 Memory::instance().read(row, 16, access_of(thread, site));
                 for (int column = 0; column < 8; column++) {
                   std::memcpy(fragment_element(rendezvous, matrix, r, column, transposed),
                               row + 2 * column, 2);
                 }
               });
}

void run_store(Block& block, uint32_t warp, Rendezvous& rendezvous) {
  const bool transposed = static_cast<MatrixArguments*>(rendezvous.arguments[0])->transposed;
  for_each_row(block, warp, rendezvous, "stmatrix",
               [&](Thread& thread, uint32_t site, unsigned char* row, int matrix, int r) {
                 if (!Memory::instance().write(row, 16, access_of(thread, site))) return;
                 for (int column = 0; column < 8; column++) {
                   std::memcpy(row + 2 * column,
                               fragment_element(rendezvous, matrix, r, column, transposed), 2);
                 }
               });
}

struct MmaArguments {
  Element element;
  int k;
  float* d;
  const uint32_t* a;
  const uint32_t* b;
  const float* c;
};

void run_mma(Block&, uint32_t, Rendezvous& rendezvous) {
  const auto arguments = [&](int lane) -> const MmaArguments& {
    return *static_cast<MmaArguments*>(rendezvous.arguments[lane]);
  };
  const int k = arguments(0).k;
  const Element element = arguments(0).element;
  float a[16][16], b[16][8];
  for (int lane = 0; lane < kWarpSize; lane++) {
    const auto* a_halves = reinterpret_cast<const uint16_t*>(arguments(lane).a);
    for (int i = 0; i < k / 2; i++) {
      const Place place = mma_a_place(lane, i);
      a[place.row][place.column] = value_of(element, a_halves[i]);
    }
    const auto* b_halves = reinterpret_cast<const uint16_t*>(arguments(lane).b);
    for (int i = 0; i < k / 4; i++) {
      const Place place = mma_b_place(lane, i);
      b[place.row][place.column] = value_of(element, b_halves[i]);
    }
  }
  for (int lane = 0; lane < kWarpSize; lane++) {
    for (int i = 0; i < 4; i++) {
      const Place place = mma_d_place(lane, i);
      double sum = arguments(lane).c[i];
      for (int j = 0; j < k; j++) sum += double{a[place.row][j]} * b[j][place.column];
      arguments(lane).d[i] = static_cast<float>(sum);
    }
  }
}

}  // namespace

float value_of(Element element, uint16_t bits) {
  if (element == Element::kBFloat16) {
    const uint32_t word = uint32_t{bits} << 16;
    float value;
    std::memcpy(&value, &word, 4);
    return value;
  }
  _Float16 half;
  std::memcpy(&half, &bits, 2);
  return static_cast<float>(half);
}

// ---- device.h ----

void ldmatrix(uint32_t* registers, uint32_t shared, int count, bool transposed) {
  MatrixArguments arguments{registers, shared, count, transposed};
  check_registers(*machine->current, registers, 4 * count, /*is_write=*/true, HOST_EXECUTOR_SITE);
  meet(Collective::kMatrixLoad, ~0u, &arguments, HOST_EXECUTOR_SITE, true, &run_load);
}

void stmatrix(uint32_t shared, const uint32_t* registers, int count, bool transposed) {
  MatrixArguments arguments{const_cast<uint32_t*>(registers), shared, count, transposed};
  check_registers(*machine->current, registers, 4 * count, /*is_write=*/false, HOST_EXECUTOR_SITE);
  meet(Collective::kMatrixStore, ~0u, &arguments, HOST_EXECUTOR_SITE, true, &run_store);
}

void mma_m16n8(Element element, int k, float* d, const uint32_t* a, const uint32_t* b,
               const float* c) {
  MmaArguments arguments{element, k, d, a, b, c};
  Thread& thread = *machine->current;
  const uint32_t site = HOST_EXECUTOR_SITE;
  check_registers(thread, a, k, /*is_write=*/false, site);
  check_registers(thread, b, k / 2, /*is_write=*/false, site);
  check_registers(thread, c, 16, /*is_write=*/false, site);
  check_registers(thread, d, 16, /*is_write=*/true, site);
  meet(Collective::kMma, ~0u, &arguments, HOST_EXECUTOR_SITE, true, &run_mma);
}

}  // namespace host_executor
