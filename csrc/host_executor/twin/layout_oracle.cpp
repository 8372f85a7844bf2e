// Holds the executor's layouts of matrices and swizzles to those of CuTe. An argument, the name of
// a check, makes one value of it wrong. Prints "OK" and the number of values, or what differs.
#define CUTE_SM90_EXTENDED_MMA_SHAPES_ENABLED
#include <cute/atom/mma_traits_sm80.hpp>
#include <cute/atom/mma_traits_sm90_gmma.hpp>
#include <cute/tensor.hpp>
#include <iostream>
#include <string>

#include "common/ptx/wgmma.cuh"
#include "common/swizzle.h"
#include "host_executor/matrix.h"

namespace host_executor {
namespace {

std::string planted;
int64_t num_values = 0, num_wrong = 0;

void expect(const std::string& check, const std::string& what, int64_t value, int64_t expected) {
  if (check == planted) {
    value ^= 1;
    planted.clear();
  }
  num_values++;
  if (value != expected && num_wrong++ < 10) {
    std::cerr << check << ": " << what << " is " << value << " and in CuTe " << expected << "\n";
  }
}

// CuTe counts the elements of a fragment's matrix down its columns.
template <class CuteLayout, class F>
void check_fragment(const std::string& check, const CuteLayout& layout, int rows, const F& place) {
  for (int thread = 0; thread < cute::size<0>(layout); thread++) {
    for (int i = 0; i < cute::size<1>(layout); i++) {
      const Place p = place(thread, i);
      expect(check, "value " + std::to_string(i) + " of thread " + std::to_string(thread),
             p.row + p.column * rows, static_cast<int>(layout(thread, i)));
    }
  }
}

template <class Operation>
void check_mma(const std::string& shape) {
  using Traits = cute::MMA_Traits<Operation>;
  check_fragment("mma_a " + shape, typename Traits::ALayout{}, 16, mma_a_place);
  check_fragment("mma_b " + shape, typename Traits::BLayout{}, 8, [](int lane, int i) {
    const Place place = mma_b_place(lane, i);  // (k, n)
    return Place{place.column, place.row};
  });
  check_fragment("mma_d " + shape, typename Traits::CLayout{}, 16, mma_d_place);
}

template <class Operation>
void check_wgmma_d(int n) {
  check_fragment("wgmma_d " + std::to_string(n), typename cute::MMA_Traits<Operation>::CLayout{},
                 64, wgmma_d_place);
}

// A matrix of kMn x 64: CuTe's descriptor of its first 16 of K, moved along as CuTe does.
template <cute::SM90::GMMA::Major kMajor, int kMn, class Atom>
void check_operand(const std::string& check, Swizzle swizzle, const Atom& atom) {
  using namespace cute;
  constexpr bool kMnMajor = kMajor == SM90::GMMA::Major::MN;
  const auto layout = tile_to_shape(atom, Shape<Int<kMn>, _64>{});
  const auto elements = as_position_independent_swizzle_layout(layout);
  const auto plain = get_nonswizzle_portion(layout);
  const auto tensor = make_tensor(make_smem_ptr(static_cast<bfloat16_t*>(nullptr)), layout);
  const auto tile = local_tile(tensor, Shape<Int<kMn>, _16>{}, make_coord(0, 0));
  const uint64_t bits = SM90::GMMA::make_gmma_desc<kMajor>(tile).desc_;
  const MatrixDescriptor first = decode_descriptor(bits);
  expect(check, "the swizzle", static_cast<int>(first.swizzle), static_cast<int>(swizzle));
  expect(check, "reserved bits", first.reserved_bits, 0);
  expect(check, "the descriptor",
         keye_ops::ptx::wgmma_descriptor({first.address, first.leading_bytes, first.stride_bytes, 0,
                                          static_cast<keye_ops::Swizzle>(swizzle)}),
         bits);
  for (int k = 0; k < 64; k++) {
    MatrixDescriptor descriptor = first;
    descriptor.address += static_cast<uint32_t>(plain(0, k / 16 * 16)) * 2;
    for (int mn = 0; mn < kMn; mn++) {
      expect(check, "the address of (" + std::to_string(mn) + ", " + std::to_string(k) + ")",
             wgmma_address(descriptor, kMnMajor, mn, k % 16), elements(mn, k) * 2);
    }
  }
}

template <int kMn>
void check_operands() {
  using namespace cute::SM90::GMMA;
  using T = cute::bfloat16_t;
  const std::string size = " " + std::to_string(kMn);
  check_operand<Major::K, kMn>("k none" + size, Swizzle::kNone, Layout_K_INTER_Atom<T>{});
  check_operand<Major::K, kMn>("k 32" + size, Swizzle::k32, Layout_K_SW32_Atom<T>{});
  check_operand<Major::K, kMn>("k 64" + size, Swizzle::k64, Layout_K_SW64_Atom<T>{});
  check_operand<Major::K, kMn>("k 128" + size, Swizzle::k128, Layout_K_SW128_Atom<T>{});
  if constexpr (kMn % 64 == 0) {
    check_operand<Major::MN, kMn>("mn none" + size, Swizzle::kNone, Layout_MN_INTER_Atom<T>{});
    check_operand<Major::MN, kMn>("mn 32" + size, Swizzle::k32, Layout_MN_SW32_Atom<T>{});
    check_operand<Major::MN, kMn>("mn 64" + size, Swizzle::k64, Layout_MN_SW64_Atom<T>{});
    check_operand<Major::MN, kMn>("mn 128" + size, Swizzle::k128, Layout_MN_SW128_Atom<T>{});
  }
}

template <int kBits>
void check_swizzle() {
  for (uint32_t offset = 0; offset < 4096; offset++) {
    const uint32_t expected = cute::Swizzle<kBits, 4, 3>{}(offset);
    const std::string check = "swizzle " + std::to_string(16 << kBits);
    const std::string what = "offset " + std::to_string(offset);
    expect(check, what, keye_ops::swizzled(keye_ops::Swizzle{kBits}, offset), expected);
    expect(check, what, swizzled(offset, Swizzle{kBits}), expected);
  }
}

void check_everything() {
  using namespace cute;
  check_mma<SM80_16x8x8_F32BF16BF16F32_TN>("16x8x8");
  check_mma<SM80_16x8x16_F32BF16BF16F32_TN>("16x8x16");
  check_mma<SM80_16x8x16_F32F16F16F32_TN>("16x8x16 fp16");
  constexpr auto kK = SM90::GMMA::Major::K;
  check_fragment("wgmma_a", MMA_Traits<SM90::GMMA::MMA_64x64x16_F32BF16BF16_RS<kK, kK>>::ALayout{},
                 64, wgmma_a_place);
  check_wgmma_d<SM90::GMMA::MMA_64x8x16_F32BF16BF16_SS<kK, kK>>(8);
  check_wgmma_d<SM90::GMMA::MMA_64x72x16_F32BF16BF16_SS<kK, kK>>(72);
  check_wgmma_d<SM90::GMMA::MMA_64x128x16_F32BF16BF16_RS<kK, kK>>(128);
  check_wgmma_d<SM90::GMMA::MMA_64x256x16_F32BF16BF16_SS<kK, kK>>(256);
  check_operands<8>();
  check_operands<64>();
  check_operands<72>();
  check_operands<256>();
  check_swizzle<0>();
  check_swizzle<1>();
  check_swizzle<2>();
  check_swizzle<3>();
}

}  // namespace
}  // namespace host_executor

int main(int argc, char** argv) {
  if (argc > 1) host_executor::planted = argv[1];
  host_executor::check_everything();
  if (host_executor::num_wrong > 0) return 1;
  std::cerr << "OK " << host_executor::num_values << "\n";
}
