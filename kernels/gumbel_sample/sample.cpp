// Keyed sampling of float32 logits on a CPU: the definition is reference.py's, of which this has the bits of the noise.
//
// A row is read once for its token and once for the sum of its weights. Nothing of the size of the vocabulary is
// written: the noise stays in registers.

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "noise.h"

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct Row {
  const float* logits;
  int64_t vocabulary;
  Key key;
  float inverse;  // 1 / T; 1 for a greedy row
  float floor;    // tokens below it are left out
  bool is_greedy;
};

// Lanes of the vector at `token` that are tokens.
inline __mmask16 lanes_at(const Row& row, int64_t token) {
  const int64_t left = std::clamp<int64_t>(row.vocabulary - token, 0, kVector);
  return static_cast<__mmask16>((1u << left) - 1);
}

// logits / T of 16 tokens, -inf for those left out.
inline __m512 scaled(const Row& row, int64_t token) {
  const __mmask16 lanes = lanes_at(row, token);
  const __m512 x = _mm512_mul_ps(_mm512_maskz_loadu_ps(lanes, row.logits + token), constant(row.inverse));
  const __mmask16 kept = _mm512_mask_cmp_ps_mask(lanes, x, constant(row.floor), _CMP_NLT_UQ);
  return _mm512_mask_mov_ps(constant(-kInfinity), kept, x);
}

// The token of the largest perturbed value, the lowest of equals, and the largest value without noise.
int64_t sample(const Row& row, float& largest) {
  __m512 best = constant(-kInfinity), most = constant(-kInfinity);
  __m512i where = _mm512_setzero_si512();
  const __m512i numbers = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  for (int64_t start = 0; start < row.vocabulary; start += kNoiseTokens) {
    __m512 drawn[4];
    if (!row.is_greedy) noise(row.key, start, drawn);
    for (int64_t part = 0; part < 4; ++part) {
      const int64_t token = start + part * kVector;
      const __m512 x = scaled(row, token);
      const __m512 perturbed = row.is_greedy ? x : _mm512_add_ps(x, drawn[part]);
      const __mmask16 is_better = _mm512_cmp_ps_mask(perturbed, best, _CMP_GT_OQ);
      best = _mm512_mask_mov_ps(best, is_better, perturbed);
      where = _mm512_mask_add_epi32(where, is_better, numbers, _mm512_set1_epi32(static_cast<int>(token)));
      most = _mm512_max_ps(most, x);
    }
  }
  largest = _mm512_reduce_max_ps(most);
  const __mmask16 winners = _mm512_cmp_ps_mask(best, constant(_mm512_reduce_max_ps(best)), _CMP_EQ_OQ);
  return winners ? _mm512_mask_reduce_min_epu32(winners, where) : 0;
}

// The log-probability of a token among those kept.
float log_probability(const Row& row, int64_t token, float largest) {
  if (largest == -kInfinity) return -kInfinity;
  __m512 sum = _mm512_setzero_ps();
  for (int64_t start = 0; start < row.vocabulary; start += kVector)
    sum = _mm512_add_ps(sum, exp(_mm512_sub_ps(scaled(row, start), constant(largest))));
  return row.logits[token] * row.inverse - largest - std::log(_mm512_reduce_add_ps(sum));
}

}  // namespace

// logits [rows] of `stride` floats each; seeds, positions, temperature [rows]; threshold [rows] or null → tokens and
// logprobs [rows]. Returns whether every row's arguments are within their ranges; nothing is written where they are not.
extern "C" int gumbel_sample(const float* logits, int64_t rows, int64_t vocabulary, int64_t stride,
                             const int64_t* seeds, const int64_t* positions, const float* temperature,
                             const float* threshold, int64_t lane, int64_t* tokens, float* logprobs) {
  for (int64_t r = 0; r < rows; ++r) {
    const bool is_finite = temperature[r] >= 0 && temperature[r] < kInfinity && 1.0f / temperature[r] < kInfinity;
    if (seeds[r] < 0 || positions[r] < 0 || !(is_finite || temperature[r] == 0)) return 0;
  }
#pragma omp parallel for schedule(static) if (rows > 1 && omp_get_max_threads() > 1)
  for (int64_t r = 0; r < rows; ++r) {
    const bool is_greedy = temperature[r] == 0;
    const Row row{logits + r * stride,
                  vocabulary,
                  {static_cast<uint64_t>(seeds[r]), static_cast<uint64_t>(positions[r]), static_cast<uint32_t>(lane)},
                  is_greedy ? 1.0f : 1.0f / temperature[r],
                  is_greedy || threshold == nullptr ? -kInfinity : threshold[r],
                  is_greedy};
    float largest;
    tokens[r] = sample(row, largest);
    logprobs[r] = log_probability(row, tokens[r], largest);
  }
  return 1;
}
