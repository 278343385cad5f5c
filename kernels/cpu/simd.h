// SPDX-License-Identifier: Apache-2.0
// Sixteen floats at a time, in the compiler's own vector types.
//
// Included once per instruction set, each time into the namespace CLOVER2_ISA: with
// AVX-512 switched on an operation is one instruction, without it the compiler splits
// it. No header guard, therefore. CLOVER2_AVX512 is defined with AVX-512 (the compiler's
// own macros do not follow its target pragma). The including file has included all system and
// torch headers before it switched instructions on, so that no shared inline function
// is compiled with instructions that other machines lack.

namespace clover2::cpu::CLOVER2_ISA {

using f32x16 = float __attribute__((vector_size(64)));
using i32x16 = int32_t __attribute__((vector_size(64)));
using u32x16 = uint32_t __attribute__((vector_size(64)));
using u16x16 = uint16_t __attribute__((vector_size(32)));

#define CLOVER2_INLINE inline __attribute__((always_inline))

CLOVER2_INLINE f32x16 broadcast(float value) { return value - f32x16{}; }

template <typename Vector>
CLOVER2_INLINE Vector load(const void* source) {
  Vector vector;
  std::memcpy(&vector, source, sizeof(vector));
  return vector;
}

CLOVER2_INLINE f32x16 load16(const float* source) {
  return load<f32x16>(source);
}

CLOVER2_INLINE f32x16 load16(const BFloat16* source) {
  const u32x16 bits =
      __builtin_convertvector(load<u16x16>(source), u32x16) << 16;
  return load<f32x16>(&bits);
}

CLOVER2_INLINE f32x16 load16(const Half* source) {
#ifdef CLOVER2_AVX512
  // The form without mask reads an uninitialised register, as far as GCC can tell.
  return _mm512_maskz_cvtph_ps(0xffff, load<__m256i>(source));
#else
  f32x16 vector;
  for (int lane = 0; lane < 16; ++lane) vector[lane] = source[lane];
  return vector;
#endif
}

CLOVER2_INLINE void store16(float* target, const f32x16& vector) {
  std::memcpy(target, &vector, sizeof(vector));
}

// Round to nearest even; a NaN stays one.
CLOVER2_INLINE void store16(BFloat16* target, const f32x16& vector) {
  const u32x16 bits = load<u32x16>(&vector);
  u32x16 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  rounded = vector == vector ? rounded : u32x16{} + 0x7fc0;
  const u16x16 narrow = __builtin_convertvector(rounded, u16x16);
  std::memcpy(target, &narrow, sizeof(narrow));
}

CLOVER2_INLINE void store16(Half* target, const f32x16& vector) {
#ifdef CLOVER2_AVX512
  const __m256i narrow = _mm512_maskz_cvtps_ph(
      0xffff, vector, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  std::memcpy(target, &narrow, sizeof(narrow));
#else
  for (int lane = 0; lane < 16; ++lane) target[lane] = Half(vector[lane]);
#endif
}

// a * b + c, rounded once where the machine can.
CLOVER2_INLINE f32x16 multiply_add(const f32x16& a, const f32x16& b,
                                   const f32x16& c) {
#ifdef CLOVER2_AVX512
  return _mm512_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

CLOVER2_INLINE f32x16 maximum(const f32x16& a, const f32x16& b) {
  return a > b ? a : b;
}

CLOVER2_INLINE float largest(const f32x16& vector) {
  float result = vector[0];
  for (int lane = 1; lane < 16; ++lane) {
    result = vector[lane] > result ? vector[lane] : result;
  }
  return result;
}

// Halves are added to each other: the order of _mm512_reduce_add_ps.
CLOVER2_INLINE float sum(const f32x16& vector) {
  float lanes[16];
  std::memcpy(lanes, &vector, sizeof(lanes));
  for (int half = 8; half > 0; half /= 2) {
    for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  }
  return lanes[0];
}

// e^x, 0 below the smallest normal number. Degree 5 polynomial after reduction by
// ln 2: vLLM's formula (csrc/cpu/cpu_arch_macros.h), so that probabilities, and with
// them the bf16 text, are the same as in its own attention.
CLOVER2_INLINE f32x16 exponential(const f32x16& x) {
  constexpr float kLog2E = 0x1.715476p0f;   // 0x3fb8aa3b
  constexpr float kLn2 = 0x1.62e430p-1f;    // 0x3f317218
  constexpr float kMin = -0x1.5d58a0p+6f;   // 0xc2aeac50, ln of the smallest normal
  constexpr float kMax = 0x1.62e430p+6f;    // 0x42b17218, ln of the largest
  f32x16 value = x < kMax ? x : broadcast(kMax);
  value = maximum(value, broadcast(kMin));
  const f32x16 shifted =
      multiply_add(value, broadcast(kLog2E), broadcast(0.5f));
  i32x16 exponent = __builtin_convertvector(shifted, i32x16);  // truncates
  const f32x16 truncated = __builtin_convertvector(exponent, f32x16);
  exponent += truncated > shifted;  // true is -1: now the floor
  const f32x16 whole = __builtin_convertvector(exponent, f32x16);
  const f32x16 rest = multiply_add(-whole, broadcast(kLn2), value);
  f32x16 result =
      multiply_add(rest, broadcast(0.00828929059f), broadcast(0.0418978221f));
  result = multiply_add(rest, result, broadcast(0.166676521f));
  result = multiply_add(rest, result, broadcast(0.499991506f));
  result = multiply_add(rest, result, broadcast(0.999999701f));
  result = multiply_add(rest, result, broadcast(1.0f));
  // 2^exponent as 2^(exponent - 1) * 2: the exponent may be 128.
  const i32x16 power = (exponent - 1 + 127) << 23;
  result = result * load<f32x16>(&power) * 2.0f;
  return x < kMin ? f32x16{} : result;
}

}  // namespace clover2::cpu::CLOVER2_ISA
