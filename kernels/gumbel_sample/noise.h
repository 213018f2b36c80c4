// Gumbel noise keyed by seed and position, 64 tokens at a time: the bits of reference.py, logarithms within rounding.

#pragma once

#include "../vectors.h"

namespace {

// What the noise of one row depends on.
struct Key {
  uint64_t seed, position;
  uint32_t lane;
};

constexpr int64_t kNoiseTokens = 64;  // of 16 counters

// The high and low halves of 16 products.
inline void multiply_wide(__m512i x, uint32_t factor, __m512i& high, __m512i& low) {
  const __m512i factors = _mm512_set1_epi32(static_cast<int>(factor));
  const __m512i even = _mm512_mul_epu32(x, factors);
  const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64(x, 32), factors);
  low = _mm512_mullo_epi32(x, factors);
  high = _mm512_mask_mov_epi32(_mm512_srli_epi64(even, 32), 0xaaaa, odd);
}

// Philox4x32-10 (Salmon, Moraes, Dror and Shaw, SC 2011) of 16 counters.
inline void philox(__m512i (&words)[4], uint64_t key) {
  auto first = static_cast<uint32_t>(key), second = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round, first += 0x9E3779B9u, second += 0xBB67AE85u) {
    __m512i high0, low0, high1, low1;
    multiply_wide(words[0], 0xD2511F53u, high0, low0);
    multiply_wide(words[2], 0xCD9E8D57u, high1, low1);
    const __m512i keys[] = {_mm512_set1_epi32(static_cast<int>(first)), _mm512_set1_epi32(static_cast<int>(second))};
    words[0] = _mm512_xor_si512(_mm512_xor_si512(high1, words[1]), keys[0]);
    words[2] = _mm512_xor_si512(_mm512_xor_si512(high0, words[3]), keys[1]);
    words[1] = low1;
    words[3] = low0;
  }
}

inline __m512 gumbel(__m512i bits) {
  const __m512 count = _mm512_cvtepi32_ps(_mm512_srli_epi32(bits, 9));
  const __m512 uniform = _mm512_mul_ps(_mm512_add_ps(count, constant(0.5f)), constant(0x1p-23f));
  const __m512 zero = _mm512_setzero_ps();
  return _mm512_sub_ps(zero, log(_mm512_sub_ps(zero, log(uniform))));
}

// Noise of tokens start to start + 63; start is a multiple of 64. Token 4 c + w has word w of counter c.
inline void noise(const Key& key, int64_t start, __m512 (&out)[4]) {
  const __m512i numbers = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  __m512i words[4] = {_mm512_add_epi32(numbers, _mm512_set1_epi32(static_cast<int>(start / 4))),
                      _mm512_set1_epi32(static_cast<int>(key.position)),
                      _mm512_set1_epi32(static_cast<int>(key.position >> 32)),
                      _mm512_set1_epi32(static_cast<int>(key.lane))};
  philox(words, key.seed);
  const __m512 g[4] = {gumbel(words[0]), gumbel(words[1]), gumbel(words[2]), gumbel(words[3])};
  const __m512d low[2] = {_mm512_castps_pd(_mm512_unpacklo_ps(g[0], g[1])),
                          _mm512_castps_pd(_mm512_unpacklo_ps(g[2], g[3]))};
  const __m512d high[2] = {_mm512_castps_pd(_mm512_unpackhi_ps(g[0], g[1])),
                           _mm512_castps_pd(_mm512_unpackhi_ps(g[2], g[3]))};
  // Quarter q of by_counter[i] has the four words of counter 4 q + i.
  const __m512 by_counter[4] = {_mm512_castpd_ps(_mm512_unpacklo_pd(low[0], low[1])),
                                _mm512_castpd_ps(_mm512_unpackhi_pd(low[0], low[1])),
                                _mm512_castpd_ps(_mm512_unpacklo_pd(high[0], high[1])),
                                _mm512_castpd_ps(_mm512_unpackhi_pd(high[0], high[1]))};
  const __m512 a = _mm512_shuffle_f32x4(by_counter[0], by_counter[1], 0x88);  // counters 0, 8 and 1, 9
  const __m512 b = _mm512_shuffle_f32x4(by_counter[2], by_counter[3], 0x88);  // 2, 10 and 3, 11
  const __m512 c = _mm512_shuffle_f32x4(by_counter[0], by_counter[1], 0xdd);  // 4, 12 and 5, 13
  const __m512 d = _mm512_shuffle_f32x4(by_counter[2], by_counter[3], 0xdd);  // 6, 14 and 7, 15
  out[0] = _mm512_shuffle_f32x4(a, b, 0x88);
  out[1] = _mm512_shuffle_f32x4(c, d, 0x88);
  out[2] = _mm512_shuffle_f32x4(a, b, 0xdd);
  out[3] = _mm512_shuffle_f32x4(c, d, 0xdd);
}

}  // namespace
