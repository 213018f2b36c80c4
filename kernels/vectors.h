// Arithmetic of 16 floats at a time, on CPUs with AVX-512 and its bfloat16, and whether this is one.
//
// For one translation unit each.

#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

extern "C" int is_supported() {
  return __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512bf16");
}

namespace {

constexpr int64_t kVector = 16;

inline __m512 constant(float value) { return _mm512_set1_ps(value); }

// 16 values of bfloat16 as floats, and floats rounded to bfloat16.
inline __m512 widened(__m256i values) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(values), 16));
}
inline __m512 load(const uint16_t* values) {
  return widened(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(values)));
}
inline __m512 load(const float* values) { return _mm512_loadu_ps(values); }
inline void store(uint16_t* values, __m512 floats) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(values), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(floats)));
}
inline void store(float* values, __m512 floats) { _mm512_storeu_ps(values, floats); }

// 16 pairs of neighbouring values of bfloat16, and one of them 16 times.
inline __m512bh pairs_at(const void* words) { return reinterpret_cast<__m512bh>(_mm512_loadu_ps(words)); }
inline __m512bh repeated(const uint16_t* pair) {
  int32_t word;
  std::memcpy(&word, pair, sizeof word);
  return reinterpret_cast<__m512bh>(_mm512_set1_epi32(word));
}

// The polynomial whose highest coefficient comes first.
template <typename... Coefficients>
inline __m512 polynomial(__m512 x, float highest, Coefficients... others) {
  __m512 sum = constant(highest);
  ((sum = _mm512_fmadd_ps(sum, x, constant(others))), ...);
  return sum;
}

// ln 2 in two parts, of which the first times any exponent is exact (Cody and Waite).
constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;

// Natural logarithm of normal positive numbers, within 2 units in the last place. The polynomial is that of Cephes'
// logf (Moshier, netlib.org/cephes).
inline __m512 log(__m512 x) {
  __m512 mantissa = _mm512_getmant_ps(x, _MM_MANT_NORM_1_2, _MM_MANT_SIGN_src);
  __m512 exponent = _mm512_getexp_ps(x);
  const __mmask16 is_high = _mm512_cmp_ps_mask(mantissa, constant(1.41421356f), _CMP_GT_OQ);
  mantissa = _mm512_mask_mul_ps(mantissa, is_high, mantissa, constant(0.5f));
  exponent = _mm512_mask_add_ps(exponent, is_high, exponent, constant(1.0f));
  const __m512 f = _mm512_sub_ps(mantissa, constant(1.0f)), square = _mm512_mul_ps(f, f);
  const __m512 series = polynomial(f, 7.0376836292e-2f, -1.1514610310e-1f, 1.1676998740e-1f, -1.2420140846e-1f,
                                   1.4249322787e-1f, -1.6668057665e-1f, 2.0000714765e-1f, -2.4999993993e-1f,
                                   3.3333331174e-1f);
  __m512 rest = _mm512_mul_ps(_mm512_mul_ps(series, f), square);
  rest = _mm512_fmadd_ps(exponent, constant(kLn2Low), rest);
  rest = _mm512_fnmadd_ps(square, constant(0.5f), rest);
  return _mm512_fmadd_ps(exponent, constant(kLn2High), _mm512_add_ps(f, rest));
}

// e to the x for x up to 88, within 2 units in the last place; 0 for -inf, NaN for NaN. Cephes' expf.
inline __m512 exp(__m512 x) {
  x = _mm512_max_ps(constant(-104.0f), x);  // of a NaN and a number these give the second operand
  const __m512 power = _mm512_roundscale_ps(_mm512_mul_ps(x, constant(1.44269504f)), _MM_FROUND_TO_NEAREST_INT);
  x = _mm512_fnmadd_ps(power, constant(kLn2High), x);
  x = _mm512_fnmadd_ps(power, constant(kLn2Low), x);
  const __m512 series = polynomial(x, 1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f,
                                   1.6666665459e-1f, 5.0000001201e-1f);
  const __m512 value = _mm512_add_ps(_mm512_fmadd_ps(series, _mm512_mul_ps(x, x), x), constant(1.0f));
  return _mm512_scalef_ps(value, power);
}

inline void transpose(__m512 (&rows)[16]) {
  __m512 pairs[16];
  for (int i = 0; i < 16; i += 2) {
    pairs[i] = _mm512_unpacklo_ps(rows[i], rows[i + 1]);
    pairs[i + 1] = _mm512_unpackhi_ps(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; ++j) {
      const __m512d low = _mm512_castps_pd(pairs[i + j]), high = _mm512_castps_pd(pairs[i + 2 + j]);
      rows[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
      rows[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
    }
  for (int i = 0; i < 16; i += 8)
    for (int j = 0; j < 4; ++j) {
      pairs[i + j] = _mm512_shuffle_f32x4(rows[i + j], rows[i + 4 + j], 0x88);
      pairs[i + 4 + j] = _mm512_shuffle_f32x4(rows[i + j], rows[i + 4 + j], 0xdd);
    }
  for (int j = 0; j < 8; ++j) {
    rows[j] = _mm512_shuffle_f32x4(pairs[j], pairs[8 + j], 0x88);
    rows[8 + j] = _mm512_shuffle_f32x4(pairs[j], pairs[8 + j], 0xdd);
  }
}

// The sum of each of 16 vectors.
inline __m512 totals(__m512 (&vectors)[kVector]) {
  transpose(vectors);
  for (int64_t step = kVector / 2; step > 0; step /= 2)
    for (int64_t i = 0; i < step; ++i) vectors[i] = _mm512_add_ps(vectors[i], vectors[i + step]);
  return vectors[0];
}

}  // namespace
