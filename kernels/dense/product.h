// Rows times a matrix as it lies in memory, in bfloat16 on a CPU with AVX-512's own: y = x W^T + bias.
//
// For one translation unit each. In tiles where LONGROLL_TILES is defined, in vectors elsewhere.
//
// A library's product of few rows either re-orders W beforehand, which then cannot be overwritten, or reads it at
// half the speed of memory. A product of pairs takes its left operand as it lies and its right operand in pairs of
// input features. So for few rows W is the left operand and x is re-ordered, once a call; for many rows x is the
// left one and W is re-ordered, 32 outputs at a time. Either way an output sums its input features in the same
// order in float32, whatever other rows and outputs there are: products commute.
//
// W [outputs, inputs] and x [rows, inputs] are bfloat16, inputs a multiple of 32; subnormals count as zero.

#pragma once

#include <immintrin.h>
#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <iterator>
#include <memory>

#include "../tiles.h"
#include "../vectors.h"

namespace {

constexpr int64_t kLanes = 16;           // rows or outputs of a tile
constexpr int64_t kBlock = 2 * kLanes;   // of two tiles of each operand, which are multiplied at a time
constexpr int64_t kTileInputs = 32;
constexpr int64_t kFewRows = 128;  // about where re-ordering x and re-ordering W take the same time

struct Product {
  const uint16_t* x;
  const uint16_t* weight;
  const uint16_t* bias;  // or null
  int64_t rows, outputs, inputs;
  uint16_t* y;
};

struct Free {
  void operator()(uint32_t* words) const { std::free(words); }
};
using Words = std::unique_ptr<uint32_t, Free>;

// Room for `vectors` vectors of inputs, whole tiles of them, as a right operand. Without memory the process ends and says
// why: no exception may leave a parallel region.
Words right_operand(int64_t vectors, int64_t inputs) {
  const size_t tiles = (vectors + kLanes - 1) / kLanes;
  const size_t bytes = tiles * kLanes * inputs * sizeof(uint16_t);
  Words words(static_cast<uint32_t*>(std::aligned_alloc(64, bytes)));
  if (!words && bytes) {
    std::fprintf(stderr, "dense product: got no memory, expected %zu bytes for its right operand\n", bytes);
    std::abort();
  }
  return words;
}

// Vectors [count, inputs] as a right operand: for every 16 of them [inputs / 2][16] pairs of neighbouring input
// features, zero past the last vector.
void order(const uint16_t* vectors, int64_t count, int64_t inputs, uint32_t* ordered) {
  for (int64_t first = 0; first < count; first += kLanes)
    for (int64_t k = 0; k < inputs; k += kTileInputs) {
      __m512 pairs[kLanes];
      for (int64_t i = 0; i < kLanes; ++i)
        pairs[i] = first + i < count ? _mm512_loadu_ps(vectors + (first + i) * inputs + k) : _mm512_setzero_ps();
      transpose(pairs);
      for (const __m512& pair : pairs) {
        _mm512_store_ps(ordered, pair);
        ordered += kLanes;
      }
    }
}

#ifdef LONGROLL_TILES

// Tile registers, which instructions name by literals: 0 to 3 sums [left][right], 4 and 5 left, 6 and 7 right; here
// for `lefts` vectors of the left operand, at most kBlock.
void configure(int64_t lefts) {
  const auto first = static_cast<uint8_t>(std::min(lefts, kLanes));
  const auto second = static_cast<uint8_t>(std::max<int64_t>(lefts - kLanes, 1));
  const uint8_t rows[] = {first, first, second, second, first, second, kLanes, kLanes};
  TileConfig config;
  std::copy(std::begin(rows), std::end(rows), config.rows);
  std::fill_n(config.bytes, std::size(rows), 64);
  _tile_loadconfig(&config);
}

// sums [16 Lefts][kBlock], of which 16 Rights columns are written.
template <int Lefts, int Rights>
void multiply(const uint16_t* left, const uint32_t* right, int64_t inputs, float* sums) {
  const int64_t stride = inputs * sizeof(uint16_t);
  const uint16_t* second_left = left + kLanes * inputs;
  const uint32_t* second_right = right + kLanes * inputs / 2;
  _tile_zero(0);
  if constexpr (Rights > 1) _tile_zero(1);
  if constexpr (Lefts > 1) _tile_zero(2);
  if constexpr (Lefts > 1 && Rights > 1) _tile_zero(3);
  for (int64_t k = 0; k < inputs; k += kTileInputs) {
    _tile_loadd(4, left + k, stride);
    _tile_loadd(6, right + k / 2 * kLanes, 64);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (Rights > 1) {
      _tile_loadd(7, second_right + k / 2 * kLanes, 64);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (Lefts > 1) {
      _tile_loadd(5, second_left + k, stride);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (Rights > 1) _tile_dpbf16ps(3, 5, 7);
    }
  }
  constexpr int64_t kStride = kBlock * sizeof(float);
  _tile_stored(0, sums, kStride);
  if constexpr (Rights > 1) _tile_stored(1, sums + kLanes, kStride);
  if constexpr (Lefts > 1) _tile_stored(2, sums + kLanes * kBlock, kStride);
  if constexpr (Lefts > 1 && Rights > 1) _tile_stored(3, sums + kLanes * kBlock + kLanes, kStride);
}

// The product of up to kBlock vectors of each operand; the tiles are configured for `lefts`.
void multiply(const uint16_t* left, int64_t lefts, const uint32_t* right, int64_t rights, int64_t inputs, float* sums) {
  if (lefts > kLanes)
    rights > kLanes ? multiply<2, 2>(left, right, inputs, sums) : multiply<2, 1>(left, right, inputs, sums);
  else
    rights > kLanes ? multiply<1, 2>(left, right, inputs, sums) : multiply<1, 1>(left, right, inputs, sums);
}

#else

constexpr int64_t kAtOnce = 8;  // vectors of the left operand, whose sums with two of the right fit the registers

void configure(int64_t) {}

// sums [lefts][kBlock], of which 16 Rights columns are written.
template <int Rights>
void multiply(const uint16_t* left, int64_t lefts, const uint32_t* right, int64_t inputs, float* sums) {
  for (int64_t first = 0; first < lefts; first += kAtOnce) {
    const uint16_t* vectors[kAtOnce];
    __m512 totals[kAtOnce][Rights];
    for (int64_t i = 0; i < kAtOnce; ++i) {
      vectors[i] = left + std::min(first + i, lefts - 1) * inputs;
      for (__m512& total : totals[i]) total = _mm512_setzero_ps();
    }
    for (int64_t k = 0; k < inputs; k += 2) {
      __m512bh pairs[Rights];
      for (int64_t r = 0; r < Rights; ++r) pairs[r] = pairs_at(right + (r * inputs + k) / 2 * kLanes);
      for (int64_t i = 0; i < kAtOnce; ++i) {
        const __m512bh pair = repeated(vectors[i] + k);
        for (int64_t r = 0; r < Rights; ++r) totals[i][r] = _mm512_dpbf16_ps(totals[i][r], pair, pairs[r]);
      }
    }
    for (int64_t i = 0; i < std::min(lefts - first, kAtOnce); ++i)
      for (int64_t r = 0; r < Rights; ++r) _mm512_store_ps(sums + (first + i) * kBlock + r * kLanes, totals[i][r]);
  }
}

// The product of up to kBlock vectors of each operand.
void multiply(const uint16_t* left, int64_t lefts, const uint32_t* right, int64_t rights, int64_t inputs, float* sums) {
  rights > kLanes ? multiply<2>(left, lefts, right, inputs, sums) : multiply<1>(left, lefts, right, inputs, sums);
}

#endif

// Up to 16 outputs of a row from `output`, of `count` that there are.
void write(__m512 sums, const Product& p, int64_t row, int64_t output, int64_t count) {
  const auto mask = static_cast<__mmask16>((1u << std::min(count, kLanes)) - 1);
  if (p.bias != nullptr) {
    const __m512i bias = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, p.bias + output));
    sums = _mm512_add_ps(sums, _mm512_castsi512_ps(_mm512_slli_epi32(bias, 16)));
  }
  const auto rounded = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(sums));
  _mm256_mask_storeu_epi16(p.y + row * p.outputs + output, mask, rounded);
}

// Rows that are the left operand: sums [rows][outputs].
void write_rows(const float* sums, const Product& p, int64_t row, int64_t rows, int64_t output, int64_t outputs) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t o = 0; o < outputs; o += kLanes)
      write(_mm512_load_ps(sums + r * kBlock + o), p, row + r, output + o, outputs - o);
}

// Rows that are the right operand: sums [outputs][rows].
void write_columns(const float* sums, const Product& p, int64_t output, int64_t outputs, int64_t row, int64_t rows) {
  for (int64_t o = 0; o < outputs; o += kLanes)
    for (int64_t r = 0; r < rows; r += kLanes) {
      __m512 columns[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) columns[i] = _mm512_load_ps(sums + (o + i) * kBlock + r);
      transpose(columns);
      for (int64_t i = 0; i < std::min(rows - r, kLanes); ++i)
        write(columns[i], p, row + r + i, output + o, outputs - o);
    }
}

// Outputs first to last, with x as the right operand.
void few_rows(const Product& p, const uint32_t* x, int64_t first, int64_t last) {
  alignas(64) float sums[kBlock * kBlock];
  int64_t configured = 0;
  for (int64_t output = first; output < last; output += kBlock) {
    const int64_t outputs = std::min(last - output, kBlock);
    if (outputs != configured) configure(outputs);
    configured = outputs;
    for (int64_t row = 0; row < p.rows; row += kBlock) {
      const int64_t rows = std::min(p.rows - row, kBlock);
      multiply(p.weight + output * p.inputs, outputs, x + row * p.inputs / 2, rows, p.inputs, sums);
      write_columns(sums, p, output, outputs, row, rows);
    }
  }
}

// Outputs first to last, with their weights as the right operand.
void many_rows(const Product& p, int64_t first, int64_t last) {
  alignas(64) float sums[kBlock * kBlock];
  const Words weight = right_operand(kBlock, p.inputs);
  int64_t configured = 0;
  for (int64_t output = first; output < last; output += kBlock) {
    const int64_t outputs = std::min(last - output, kBlock);
    order(p.weight + output * p.inputs, outputs, p.inputs, weight.get());
    for (int64_t row = 0; row < p.rows; row += kBlock) {
      const int64_t rows = std::min(p.rows - row, kBlock);
      if (rows != configured) configure(rows);
      configured = rows;
      multiply(p.x + row * p.inputs, rows, weight.get(), outputs, p.inputs, sums);
      write_rows(sums, p, row, rows, output, outputs);
    }
  }
}

// p.y = p.x p.weight^T + p.bias, on torch's threads.
void multiply_rows(const Product& p) {
  const bool is_few = p.rows <= kFewRows;
  Words ordered;
  if (is_few) {
    ordered = right_operand(p.rows, p.inputs);
    order(p.x, p.rows, p.inputs, ordered.get());
  }
  const int64_t blocks = (p.outputs + kBlock - 1) / kBlock;
#pragma omp parallel if (omp_get_max_threads() > 1)
  {
    const int64_t threads = omp_get_num_threads(), thread = omp_get_thread_num();
    const int64_t first = blocks * thread / threads * kBlock;
    const int64_t last = std::min(p.outputs, blocks * (thread + 1) / threads * kBlock);
    const TileScope scope;
    is_few ? few_rows(p, ordered.get(), first, last) : many_rows(p, first, last);
  }
}

}  // namespace
