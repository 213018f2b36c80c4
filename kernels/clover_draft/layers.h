// Layers of a Clover-2 draft over R rows: floats between layers, bfloat16 in and out of products.
//
// What is computed is documented in rollout/speculation/clover.py, whose names these are. H, D and widths of heads are
// multiples of 32.

#pragma once

#include <cmath>
#include <vector>

#include "../dense/product.h"
#include "../vectors.h"

namespace {

constexpr float kNormEps = 1e-6f;  // least length that is divided by
using Floats = std::vector<float>;
using Halves = std::vector<uint16_t>;  // bfloat16

struct Linear {
  const uint16_t *weight, *bias;  // [outputs, inputs], [outputs] or null

  Halves operator()(const Halves& x, int64_t inputs, int64_t outputs) const {
    const auto rows = static_cast<int64_t>(x.size()) / inputs;
    Halves y(rows * outputs);
    multiply_rows({x.data(), weight, bias, rows, outputs, inputs, y.data()});
    return y;
  }
};

template <typename A, typename B>
float dot(const A* a, const B* b, int64_t count) {
  __m512 sum = _mm512_setzero_ps();
  for (int64_t i = 0; i < count; i += kVector) sum = _mm512_fmadd_ps(load(a + i), load(b + i), sum);
  return _mm512_reduce_add_ps(sum);
}

// out = x / |x| · weight · sqrt(count)
template <typename In, typename Out>
void normalise(const In* x, const uint16_t* weight, int64_t count, Out* out) {
  const float scale = std::sqrt(static_cast<float>(count)) / std::max(std::sqrt(dot(x, x, count)), kNormEps);
  for (int64_t i = 0; i < count; i += kVector)
    store(out + i, _mm512_mul_ps(_mm512_mul_ps(load(x + i), constant(scale)), load(weight + i)));
}

template <typename In>
Halves normalised(const std::vector<In>& rows, const uint16_t* weight, int64_t count) {
  Halves out(rows.size());
  for (size_t at = 0; at < rows.size(); at += count) normalise(rows.data() + at, weight, count, out.data() + at);
  return out;
}

inline void add(Floats& sums, const Halves& x) {
  for (size_t i = 0; i < sums.size(); i += kVector) store(&sums[i], _mm512_add_ps(load(&sums[i]), load(&x[i])));
}

inline Halves rounded(const Floats& x) {
  Halves out(x.size());
  for (size_t i = 0; i < x.size(); i += kVector) store(&out[i], load(&x[i]));
  return out;
}

// Rows of a table, by token.
inline Halves looked_up(const uint16_t* table, const int64_t* tokens, int64_t rows, int64_t size) {
  Halves out(rows * size);
  for (int64_t r = 0; r < rows; ++r) std::copy_n(table + tokens[r] * size, size, &out[r * size]);
  return out;
}

// Mixes a token into a state: state + cosine(query, key) · value, head by head.
struct Decoder {
  const uint16_t* norm;
  Linear query, key_value;

  void mix(Floats& state, const Halves& token, int64_t size, int64_t heads) const {
    const Halves queries = query(normalised(state, norm, size), size, size);
    const Halves pairs = key_value(token, size, 2 * size);
    const int64_t rows = static_cast<int64_t>(state.size()) / size, width = size / heads;
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t at = 0; at < size; at += width) {
        const uint16_t *q = &queries[r * size + at], *k = &pairs[2 * r * size + at], *value = k + size;
        const float lengths = std::sqrt(dot(q, q, width)) * std::sqrt(dot(k, k, width));
        const __m512 gate = constant(dot(q, k, width) / std::max(lengths, kNormEps));
        for (int64_t i = 0; i < width; i += kVector) {
          float* mixed = &state[r * size + at + i];
          store(mixed, _mm512_fmadd_ps(gate, load(value + i), load(mixed)));
        }
      }
  }
};

// x silu(g) for rows [g, x] of 2 · size.
inline Halves gated(const Halves& rows, int64_t size) {
  Halves out(rows.size() / 2);
  for (size_t row = 0; row < out.size(); row += size)
    for (int64_t i = 0; i < size; i += kVector) {
      const __m512 gate = load(&rows[2 * row + i]), x = load(&rows[2 * row + size + i]);
      const __m512 below = _mm512_add_ps(constant(1.0f), exp(_mm512_min_ps(_mm512_sub_ps(_mm512_setzero_ps(), gate),
                                                                           constant(88.0f))));
      store(&out[row + i], _mm512_div_ps(_mm512_mul_ps(gate, x), below));
    }
  return out;
}

}  // namespace
