// SPDX-License-Identifier: Apache-2.0
// As many floats at a time as the machine has, in the compiler's vector types.
//
// Included once per instruction set, each time into the namespace CLOVER2_ISA,
// hence without a header guard. CLOVER2_LANES is the number of floats: 16 with
// AVX-512, 8 with AVX2, else 4. (The compiler's own macros do not follow its
// target pragma.) The including file has included all system and torch headers
// before it switched instructions on, so that no shared inline function is
// compiled with instructions that other machines lack.

namespace clover2::cpu::CLOVER2_ISA {

constexpr int kLanes = CLOVER2_LANES;

using floats = float __attribute__((vector_size(4 * kLanes)));
using ints = int32_t __attribute__((vector_size(4 * kLanes)));
using words = uint32_t __attribute__((vector_size(4 * kLanes)));
using shorts = uint16_t __attribute__((vector_size(2 * kLanes)));

#define CLOVER2_INLINE inline __attribute__((always_inline))

CLOVER2_INLINE floats broadcast(float value) { return value - floats{}; }

template <typename Vector>
CLOVER2_INLINE Vector load(const void* source) {
  Vector vector;
  std::memcpy(&vector, source, sizeof(vector));
  return vector;
}

CLOVER2_INLINE floats load_floats(const float* source) {
  return load<floats>(source);
}

CLOVER2_INLINE floats load_floats(const BFloat16* source) {
  const words bits = __builtin_convertvector(load<shorts>(source), words) << 16;
  return load<floats>(&bits);
}

CLOVER2_INLINE floats load_floats(const Half* source) {
#if CLOVER2_LANES == 16
  // The form without mask reads an uninitialised register, as far as GCC can
  // tell.
  return _mm512_maskz_cvtph_ps(0xffff, load<__m256i>(source));
#elif CLOVER2_LANES == 8
  return _mm256_cvtph_ps(load<__m128i>(source));
#else
  floats vector;
  for (int lane = 0; lane < kLanes; ++lane) vector[lane] = source[lane];
  return vector;
#endif
}

CLOVER2_INLINE void store_floats(float* target, const floats& vector) {
  std::memcpy(target, &vector, sizeof(vector));
}

// Round to nearest even; a NaN stays one.
CLOVER2_INLINE void store_floats(BFloat16* target, const floats& vector) {
#ifdef CLOVER2_BF16
  const auto narrow = _mm512_maskz_cvtneps_pbh(0xffff, vector);
#else
  const words bits = load<words>(&vector);
  words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  rounded = vector == vector ? rounded : words{} + 0x7fc0;
  const shorts narrow = __builtin_convertvector(rounded, shorts);
#endif
  std::memcpy(target, &narrow, sizeof(narrow));
}

CLOVER2_INLINE void store_floats(Half* target, const floats& vector) {
#if CLOVER2_LANES == 16
  const __m256i narrow = _mm512_maskz_cvtps_ph(
      0xffff, vector, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  std::memcpy(target, &narrow, sizeof(narrow));
#elif CLOVER2_LANES == 8
  const __m128i narrow = _mm256_cvtps_ph(vector, _MM_FROUND_TO_NEAREST_INT);
  std::memcpy(target, &narrow, sizeof(narrow));
#else
  for (int lane = 0; lane < kLanes; ++lane) target[lane] = Half(vector[lane]);
#endif
}

// a * b + c, rounded once where the machine can.
CLOVER2_INLINE floats multiply_add(const floats& a, const floats& b,
                                   const floats& c) {
#if CLOVER2_LANES == 16
  return _mm512_fmadd_ps(a, b, c);
#elif CLOVER2_LANES == 8
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

CLOVER2_INLINE floats maximum(const floats& a, const floats& b) {
#if CLOVER2_LANES == 16
  return _mm512_maskz_max_ps(0xffff, a, b);
#else
  return a > b ? a : b;
#endif
}

CLOVER2_INLINE floats minimum(const floats& a, const floats& b) {
#if CLOVER2_LANES == 16
  return _mm512_maskz_min_ps(0xffff, a, b);
#else
  return a < b ? a : b;
#endif
}

// The largest integers not above.
CLOVER2_INLINE ints round_down(const floats& vector) {
#if CLOVER2_LANES == 16
  return reinterpret_cast<ints>(_mm512_maskz_cvt_roundps_epi32(
      0xffff, vector, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC));
#else
  const ints truncated = __builtin_convertvector(vector, ints);
  // True is -1.
  return truncated + (__builtin_convertvector(truncated, floats) > vector);
#endif
}

// Bit i: lane i of a is greater than that of b.
CLOVER2_INLINE uint32_t greater(const floats& a, const floats& b) {
#if CLOVER2_LANES == 16
  return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ);
#elif CLOVER2_LANES == 8
  return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ));
#else
  uint32_t bits = 0;
  for (int lane = 0; lane < kLanes; ++lane) bits |= (a[lane] > b[lane]) << lane;
  return bits;
#endif
}

CLOVER2_INLINE float largest(const floats& vector) {
  float result = vector[0];
  for (int lane = 1; lane < kLanes; ++lane) {
    result = vector[lane] > result ? vector[lane] : result;
  }
  return result;
}

// Halves are added to each other: the order of _mm512_reduce_add_ps.
CLOVER2_INLINE float sum(const floats& vector) {
  float lanes[kLanes];
  std::memcpy(lanes, &vector, sizeof(lanes));
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  }
  return lanes[0];
}

// e^x, 0 below the smallest normal number. Degree 5 polynomial after reduction
// by ln 2: vLLM's formula (csrc/cpu/cpu_arch_macros.h), so that probabilities,
// and with them the bf16 text, are the same as in its own attention.
CLOVER2_INLINE floats exponential(const floats& x) {
  constexpr float kLog2E = 0x1.715476p0f;  // 0x3fb8aa3b
  constexpr float kLn2 = 0x1.62e430p-1f;   // 0x3f317218
  constexpr float kMin =
      -0x1.5d58a0p+6f;  // 0xc2aeac50, ln of the smallest normal
  constexpr float kMax = 0x1.62e430p+6f;  // 0x42b17218, ln of the largest
  const floats value = maximum(minimum(x, broadcast(kMax)), broadcast(kMin));
  const floats shifted =
      multiply_add(value, broadcast(kLog2E), broadcast(0.5f));
  const ints exponent = round_down(shifted);
  const floats whole = __builtin_convertvector(exponent, floats);
  const floats rest = multiply_add(-whole, broadcast(kLn2), value);
  floats result =
      multiply_add(rest, broadcast(0.00828929059f), broadcast(0.0418978221f));
  result = multiply_add(rest, result, broadcast(0.166676521f));
  result = multiply_add(rest, result, broadcast(0.499991506f));
  result = multiply_add(rest, result, broadcast(0.999999701f));
  result = multiply_add(rest, result, broadcast(1.0f));
  // 2^exponent as 2^(exponent - 1) * 2: the exponent may be 128.
  const ints power = (exponent - 1 + 127) << 23;
  result = result * load<floats>(&power) * 2.0f;
  return x < kMin ? floats{} : result;
}

}  // namespace clover2::cpu::CLOVER2_ISA
