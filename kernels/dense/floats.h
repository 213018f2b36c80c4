// Rows times a matrix as it lies in memory, in float32 on a CPU with AVX-512: y = x W^T + bias.
//
// For one translation unit each, and for few rows: x and W are read once for every four rows and outputs of the other.
// A sum takes its input features in the same order whatever other rows and outputs there are.

#pragma once

#include <omp.h>

#include <algorithm>

#include "../vectors.h"

namespace {

constexpr int64_t kSide = 4;  // rows, and outputs, of a block: one vector of sums

struct FloatProduct {
  const float* x;
  const float* weight;
  const float* bias;  // or null
  int64_t rows, outputs, inputs;  // inputs a multiple of 16
  float* y;
};

// Products of four rows with four outputs, [row][output]; missing ones repeat the last.
inline __m512 block_of(const FloatProduct& p, int64_t row, int64_t output) {
  const float *x[kSide], *weight[kSide];
  for (int64_t i = 0; i < kSide; ++i) {
    x[i] = p.x + std::min(row + i, p.rows - 1) * p.inputs;
    weight[i] = p.weight + std::min(output + i, p.outputs - 1) * p.inputs;
  }
  __m512 sums[kVector];
  for (__m512& sum : sums) sum = _mm512_setzero_ps();
  for (int64_t k = 0; k < p.inputs; k += kVector) {
    __m512 left[kSide], right[kSide];
    for (int64_t i = 0; i < kSide; ++i) {
      left[i] = _mm512_loadu_ps(x[i] + k);
      right[i] = _mm512_loadu_ps(weight[i] + k);
    }
    for (int64_t i = 0; i < kSide; ++i)
      for (int64_t j = 0; j < kSide; ++j) sums[kSide * i + j] = _mm512_fmadd_ps(left[i], right[j], sums[kSide * i + j]);
  }
  return totals(sums);
}

inline void multiply_rows(const FloatProduct& p) {
#pragma omp parallel for schedule(static) if (omp_get_max_threads() > 1)
  for (int64_t output = 0; output < p.outputs; output += kSide)
    for (int64_t row = 0; row < p.rows; row += kSide) {
      alignas(64) float sums[kVector];
      _mm512_store_ps(sums, block_of(p, row, output));
      for (int64_t r = row; r < std::min(row + kSide, p.rows); ++r)
        for (int64_t o = output; o < std::min(output + kSide, p.outputs); ++o)
          p.y[r * p.outputs + o] = sums[kSide * (r - row) + o - output] + (p.bias == nullptr ? 0.0f : p.bias[o]);
    }
}

}  // namespace
