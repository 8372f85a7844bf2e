// A register of floats, as wide as the instruction set that the file is compiled for, and the loads
// and stores that turn fp16 and bf16 memory into it. Written with the compilers' vector extension:
// the same source is AVX-512, AVX2, SSE2 and NEON.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "common/dtype.h"
#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace keye_ops {

#if defined(__AVX512F__)
constexpr int kSimdWidth = 16;
#elif defined(__AVX2__)
constexpr int kSimdWidth = 8;
#else
constexpr int kSimdWidth = 4;
#endif

typedef float Floats __attribute__((vector_size(kSimdWidth * 4)));
typedef int32_t Ints __attribute__((vector_size(kSimdWidth * 4)));
typedef uint32_t Words __attribute__((vector_size(kSimdWidth * 4)));
typedef uint16_t Halves __attribute__((vector_size(kSimdWidth * 2)));
typedef double Doubles __attribute__((vector_size(kSimdWidth * 8)));

// ---- bits of fp32 <-> bits of the 16-bit formats, for a word or for a vector of words ----

template <class To, class From>
KEYE_HOST_DEVICE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

// To nearest, ties to even. Right for a NaN only if its last 16 bits are zero; others may overflow.
template <class W>
KEYE_HOST_DEVICE W rounded_bfloat16_bits_of(W word) {
  return (word + 0x7fffu + ((word >> 16) & 1u)) >> 16;
}

template <class W>
KEYE_HOST_DEVICE W bfloat16_bits_of(W word) {
  const W rounded = rounded_bfloat16_bits_of(word);
  const W nan = (word >> 16) | 0x40u;
  return (word & 0x7fffffffu) > 0x7f800000u ? nan : rounded;
}

template <class F, class W>
KEYE_HOST_DEVICE W half_bits_of(W word) {
  const W sign = (word >> 16) & 0x8000u;
  const W magnitude = word & 0x7fffffffu;
  // Below 2**-14 the result is subnormal: adding 0.5 makes the FPU round at its last place, 2**-24.
  const W subnormal = bit_cast<W>(bit_cast<F>(magnitude) + 0.5f) - 0x3f000000u;
  const W normal = (magnitude + 0xc8000fffu + ((magnitude >> 13) & 1u)) >> 13;
  const W special = magnitude > 0x7f800000u ? (W{} + 0x7e00u) : (W{} + 0x7c00u);
  W bits = magnitude < 0x38800000u ? subnormal : normal;
  bits = magnitude >= 0x47800000u ? special : bits;
  return sign | bits;
}

template <class F, class W>
KEYE_HOST_DEVICE F float_of_half_bits(W bits) {
  const W magnitude = bits & 0x7fffu;
  const F scaled = bit_cast<F>(magnitude << 13) * 0x1p112f;  // exact, subnormals included
  const W special = bit_cast<W>(scaled) | 0x7f800000u;
  const W word = magnitude >= 0x7c00u ? special : bit_cast<W>(scaled);
  return bit_cast<F>(word | ((bits & 0x8000u) << 16));
}

// ---- scalars ----

KEYE_HOST_DEVICE double load(const double* p) { return *p; }
KEYE_HOST_DEVICE float load(const float* p) { return *p; }
KEYE_HOST_DEVICE float load(const BFloat16* p) { return bit_cast<float>(uint32_t{p->bits} << 16); }
KEYE_HOST_DEVICE float load(const Half* p) {
  return float_of_half_bits<float>(static_cast<uint32_t>(p->bits));
}

KEYE_HOST_DEVICE void store(double* p, double x) { *p = x; }
KEYE_HOST_DEVICE void store(float* p, float x) { *p = x; }
KEYE_HOST_DEVICE void store(BFloat16* p, float x) {
  p->bits = static_cast<uint16_t>(bfloat16_bits_of(bit_cast<uint32_t>(x)));
}
KEYE_HOST_DEVICE void store(Half* p, float x) {
  p->bits = static_cast<uint16_t>(half_bits_of<float>(bit_cast<uint32_t>(x)));
}

KEYE_HOST_DEVICE float floor_of(float x) { return __builtin_floorf(x); }
KEYE_HOST_DEVICE float round_of(float x) { return __builtin_rintf(x); }

// ---- vectors ----

KEYE_HOST_DEVICE Floats load_vector(const float* p) {
  Floats x;
  std::memcpy(&x, p, sizeof(x));
  return x;
}

// Sixteen bits a lane. Compilers do not find the one instruction for these, so it is named.
KEYE_HOST_DEVICE Words load_halves(const uint16_t* p) {
#if defined(__AVX512F__)
  const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return bit_cast<Words>(_mm512_cvtepu16_epi32(x));
#elif defined(__AVX2__)
  const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return bit_cast<Words>(_mm256_cvtepu16_epi32(x));
#else
  Halves x;
  std::memcpy(&x, p, sizeof(x));
  return __builtin_convertvector(x, Words);
#endif
}
KEYE_HOST_DEVICE void store_halves(uint16_t* p, Words x) {
#if defined(__AVX512F__)
  const __m256i bits = _mm512_cvtepi32_epi16(bit_cast<__m512i>(x));
#elif defined(__AVX2__)
  const __m256i pairs = _mm256_packus_epi32(bit_cast<__m256i>(x), bit_cast<__m256i>(x));
  const __m128i bits = _mm256_castsi256_si128(_mm256_permute4x64_epi64(pairs, 0x08));
#else
  const Halves bits = __builtin_convertvector(x, Halves);
#endif
  std::memcpy(p, &bits, sizeof(bits));
}

KEYE_HOST_DEVICE Floats load_vector(const BFloat16* p) {
  return bit_cast<Floats>(load_halves(&p->bits) << 16);
}
KEYE_HOST_DEVICE Floats load_vector(const Half* p) {
  return float_of_half_bits<Floats>(load_halves(&p->bits));
}

KEYE_HOST_DEVICE void store_vector(float* p, Floats x) { std::memcpy(p, &x, sizeof(x)); }
KEYE_HOST_DEVICE void store_vector(BFloat16* p, Floats x) {
  store_halves(&p->bits, bfloat16_bits_of(bit_cast<Words>(x)));
}
// Without a test for NaN: for values whose NaNs stem from 16-bit inputs and so end in 16 zero bits.
KEYE_HOST_DEVICE void store_vector_from_16_bits(BFloat16* p, Floats x) {
  store_halves(&p->bits, rounded_bfloat16_bits_of(bit_cast<Words>(x)));
}
KEYE_HOST_DEVICE void store_vector(Half* p, Floats x) {
  store_halves(&p->bits, half_bits_of<Floats>(bit_cast<Words>(x)));
}

// a > b ? a : b, lane by lane; b where either is NaN. Compilers do not find the one instruction.
KEYE_HOST_DEVICE Floats larger_of(Floats a, Floats b) {
#if defined(__AVX512F__)
  return bit_cast<Floats>(_mm512_max_ps(bit_cast<__m512>(a), bit_cast<__m512>(b)));
#elif defined(__AVX2__)
  return bit_cast<Floats>(_mm256_max_ps(bit_cast<__m256>(a), bit_cast<__m256>(b)));
#else
  return a > b ? a : b;
#endif
}

// For |x| < 2**31.
KEYE_HOST_DEVICE Floats floor_of(Floats x) {
  const Ints truncated = __builtin_convertvector(x, Ints);
  const Floats back = __builtin_convertvector(truncated, Floats);
  return back - (back > x ? (Floats{} + 1.0f) : Floats{});
}

// To nearest, halves away from zero, for |x| < 2**31.
KEYE_HOST_DEVICE Floats round_of(Floats x) {
  const Floats truncated = __builtin_convertvector(__builtin_convertvector(x, Ints), Floats);
  const Floats rest = x - truncated;
  const Floats up = rest >= 0.5f ? (Floats{} + 1.0f) : Floats{};
  const Floats down = rest <= -0.5f ? (Floats{} + 1.0f) : Floats{};
  return truncated + (up - down);
}

#if defined(__FMA__) || defined(__aarch64__)
KEYE_HOST_DEVICE float fused_multiply_add(float a, float b, float c) {
  return __builtin_fmaf(a, b, c);
}
// Named, because compilers fuse by themselves only where they optimise.
KEYE_HOST_DEVICE Floats fused_multiply_add(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
  return bit_cast<Floats>(
      _mm512_fmadd_ps(bit_cast<__m512>(a), bit_cast<__m512>(b), bit_cast<__m512>(c)));
#elif defined(__AVX2__)
  return bit_cast<Floats>(
      _mm256_fmadd_ps(bit_cast<__m256>(a), bit_cast<__m256>(b), bit_cast<__m256>(c)));
#else
  return bit_cast<Floats>(
      vfmaq_f32(bit_cast<float32x4_t>(c), bit_cast<float32x4_t>(a), bit_cast<float32x4_t>(b)));
#endif
}
#else
// Without the instruction: the product of two floats is exact in double.
KEYE_HOST_DEVICE float fused_multiply_add(float a, float b, float c) {
  return static_cast<float>(static_cast<double>(a) * b + c);
}
KEYE_HOST_DEVICE Floats fused_multiply_add(Floats a, Floats b, Floats c) {
  const Doubles product = __builtin_convertvector(a, Doubles) * __builtin_convertvector(b, Doubles);
  return __builtin_convertvector(product + __builtin_convertvector(c, Doubles), Floats);
}
#endif

// Sums of the lanes, halves first.
typedef float Floats4 __attribute__((vector_size(16)));
typedef float Floats8 __attribute__((vector_size(32)));
typedef float Floats16 __attribute__((vector_size(64)));

template <class Half>
struct TwoHalves {
  Half low, high;
};

KEYE_HOST_DEVICE float sum_of(Floats4 x) { return (x[0] + x[2]) + (x[1] + x[3]); }
KEYE_HOST_DEVICE float sum_of(Floats8 x) {
  const auto halves = bit_cast<TwoHalves<Floats4>>(x);
  return sum_of(halves.low + halves.high);
}
KEYE_HOST_DEVICE float sum_of(Floats16 x) {
  const auto halves = bit_cast<TwoHalves<Floats8>>(x);
  return sum_of(halves.low + halves.high);
}

// The largest lane.
KEYE_HOST_DEVICE float largest_of(Floats4 x) {
  const float a = x[0] > x[2] ? x[0] : x[2], b = x[1] > x[3] ? x[1] : x[3];
  return a > b ? a : b;
}
KEYE_HOST_DEVICE float largest_of(Floats8 x) {
  const auto halves = bit_cast<TwoHalves<Floats4>>(x);
  return largest_of(halves.low > halves.high ? halves.low : halves.high);
}
KEYE_HOST_DEVICE float largest_of(Floats16 x) {
  const auto halves = bit_cast<TwoHalves<Floats8>>(x);
  return largest_of(halves.low > halves.high ? halves.low : halves.high);
}

// ---- fp64, and what a file needs that is written once for both widths of arithmetic ----

KEYE_HOST_DEVICE Doubles load_vector(const double* p) {
  Doubles x;
  std::memcpy(&x, p, sizeof(x));
  return x;
}
KEYE_HOST_DEVICE void store_vector(double* p, Doubles x) { std::memcpy(p, &x, sizeof(x)); }

KEYE_HOST_DEVICE double sum_of(Doubles x) {
  double sum = 0;
  for (int i = 0; i < kSimdWidth; i++) sum += x[i];
  return sum;
}

// What arithmetic on T is done in, and a vector of it.
template <class T>
using Compute = std::conditional_t<std::is_same_v<T, double>, double, float>;
template <class C>
using Lanes = std::conditional_t<std::is_same_v<C, double>, Doubles, Floats>;

// Loads as the type of the first argument: a vector or one value.
template <class T>
KEYE_HOST_DEVICE Lanes<Compute<T>> load_as(Lanes<Compute<T>>, const T* p) {
  return load_vector(p);
}
template <class T>
KEYE_HOST_DEVICE Compute<T> load_as(Compute<T>, const T* p) {
  return load(p);
}
template <class T>
KEYE_HOST_DEVICE void store_as(T* p, Lanes<Compute<T>> x) {
  store_vector(p, x);
}
template <class T>
KEYE_HOST_DEVICE void store_as(T* p, Compute<T> x) {
  store(p, x);
}

// Rounded twice where there is no instruction; fp64 is for gradient checks.
KEYE_HOST_DEVICE double fused_multiply_add(double a, double b, double c) { return a * b + c; }
KEYE_HOST_DEVICE Doubles fused_multiply_add(Doubles a, Doubles b, Doubles c) { return a * b + c; }

// Adds the lanes of x, or of x * y, to as many sums in fp64.
KEYE_HOST_DEVICE void add_to(double* sums, double x) { *sums += x; }
KEYE_HOST_DEVICE void add_to(double* sums, Doubles x) { store_vector(sums, load_vector(sums) + x); }
KEYE_HOST_DEVICE void add_to(double* sums, double x, double y) { *sums += x * y; }
KEYE_HOST_DEVICE void add_to(double* sums, Doubles x, Doubles y) { add_to(sums, x * y); }

typedef float HalfFloats __attribute__((vector_size(kSimdWidth * 2)));
typedef double HalfDoubles __attribute__((vector_size(kSimdWidth * 4)));

KEYE_HOST_DEVICE void add_to_half(double* sums, HalfDoubles x) {
  HalfDoubles sum;
  std::memcpy(&sum, sums, sizeof(sum));
  sum += x;
  std::memcpy(sums, &sum, sizeof(sum));
}
KEYE_HOST_DEVICE HalfDoubles doubles_of(HalfFloats x) {
  return __builtin_convertvector(x, HalfDoubles);
}
KEYE_HOST_DEVICE void add_to(double* sums, Floats x) {
  const auto halves = bit_cast<TwoHalves<HalfFloats>>(x);
  add_to_half(sums, doubles_of(halves.low));
  add_to_half(sums + kSimdWidth / 2, doubles_of(halves.high));
}
KEYE_HOST_DEVICE void add_to(double* sums, Floats x, Floats y) {
  const auto a = bit_cast<TwoHalves<HalfFloats>>(x), b = bit_cast<TwoHalves<HalfFloats>>(y);
  add_to_half(sums, doubles_of(a.low) * doubles_of(b.low));
  add_to_half(sums + kSimdWidth / 2, doubles_of(a.high) * doubles_of(b.high));
}

// ---- two vectors at a time, for work that does not care in which order the values lie ----

// bf16 comes as the even and the odd values of a register of words, which costs half of what two
// conversions in order do; all other types come as two vectors in order.
template <class V>
struct Pair {
  V first, second;
};

template <class V>
KEYE_HOST_DEVICE Pair<V> operator+(Pair<V> a, Pair<V> b) {
  return {a.first + b.first, a.second + b.second};
}
template <class V>
KEYE_HOST_DEVICE Pair<V> operator-(Pair<V> a, Pair<V> b) {
  return {a.first - b.first, a.second - b.second};
}
template <class V>
KEYE_HOST_DEVICE Pair<V> operator*(Pair<V> a, Pair<V> b) {
  return {a.first * b.first, a.second * b.second};
}
template <class V, class S>
KEYE_HOST_DEVICE Pair<V> operator+(Pair<V> a, S b) {
  return {a.first + b, a.second + b};
}
template <class V, class S>
KEYE_HOST_DEVICE Pair<V> operator-(Pair<V> a, S b) {
  return {a.first - b, a.second - b};
}
template <class V, class S>
KEYE_HOST_DEVICE Pair<V> operator*(S a, Pair<V> b) {
  return {a * b.first, a * b.second};
}
template <class V>
KEYE_HOST_DEVICE Pair<V> fused_multiply_add(Pair<V> a, Pair<V> b, Pair<V> c) {
  return {fused_multiply_add(a.first, b.first, c.first),
          fused_multiply_add(a.second, b.second, c.second)};
}

template <class T>
KEYE_HOST_DEVICE Pair<Lanes<Compute<T>>> load_as(Pair<Lanes<Compute<T>>>, const T* p) {
  return {load_vector(p), load_vector(p + kSimdWidth)};
}
KEYE_HOST_DEVICE Pair<Floats> load_as(Pair<Floats>, const BFloat16* p) {
  Words words;
  std::memcpy(&words, p, sizeof(words));
  return {bit_cast<Floats>(words << 16), bit_cast<Floats>(words & 0xffff0000u)};
}

template <class T>
KEYE_HOST_DEVICE void store_as(T* p, Pair<Lanes<Compute<T>>> x) {
  store_vector(p, x.first);
  store_vector(p + kSimdWidth, x.second);
}
// Without a test for NaN, as store_vector_from_16_bits.
KEYE_HOST_DEVICE void store_as(BFloat16* p, Pair<Floats> x) {
  const auto rounded = [](Floats y) __attribute__((always_inline)) {
    const Words word = bit_cast<Words>(y);
    return word + 0x7fffu + ((word >> 16) & 1u);
  };
  const Words words = (rounded(x.first) >> 16) | (rounded(x.second) & 0xffff0000u);
  std::memcpy(p, &words, sizeof(words));
}

}  // namespace keye_ops
