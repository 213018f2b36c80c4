// Layers of a Clover-2 draft over R rows: floats between layers, the draft's own type in and out of products.
//
// What is computed is documented in rollout/speculation/clover.py, whose names these are. T is uint16_t, which holds
// bfloat16, or float. H, D and widths of heads are multiples of 32.

#pragma once

#include <cmath>
#include <vector>

#include "../dense/floats.h"
#include "../dense/product.h"
#include "../vectors.h"

namespace {

constexpr float kNormEps = 1e-6f;  // least length that is divided by
using Floats = std::vector<float>;
template <typename T>
using Rows = std::vector<T>;

template <typename T>
struct ProductOf;
template <>
struct ProductOf<uint16_t> {
  using Type = Product;
};
template <>
struct ProductOf<float> {
  using Type = FloatProduct;
};

template <typename T>
struct Linear {
  const T *weight, *bias;  // [outputs, inputs], [outputs] or null

  Rows<T> operator()(const Rows<T>& x, int64_t inputs, int64_t outputs) const {
    const auto rows = static_cast<int64_t>(x.size()) / inputs;
    Rows<T> y(rows * outputs);
    multiply_rows(typename ProductOf<T>::Type{x.data(), weight, bias, rows, outputs, inputs, y.data()});
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
template <typename In, typename T, typename Out>
void normalise(const In* x, const T* weight, int64_t count, Out* out) {
  const float scale = std::sqrt(static_cast<float>(count)) / std::max(std::sqrt(dot(x, x, count)), kNormEps);
  for (int64_t i = 0; i < count; i += kVector)
    store(out + i, _mm512_mul_ps(_mm512_mul_ps(load(x + i), constant(scale)), load(weight + i)));
}

template <typename In, typename T>
Rows<T> normalised(const Rows<In>& rows, const T* weight, int64_t count) {
  Rows<T> out(rows.size());
  for (size_t at = 0; at < rows.size(); at += count) normalise(rows.data() + at, weight, count, out.data() + at);
  return out;
}

template <typename T>
void add(Floats& sums, const Rows<T>& x) {
  for (size_t i = 0; i < sums.size(); i += kVector) store(&sums[i], _mm512_add_ps(load(&sums[i]), load(&x[i])));
}

template <typename T>
Rows<T> rounded(const Floats& x) {
  Rows<T> out(x.size());
  for (size_t i = 0; i < x.size(); i += kVector) store(&out[i], load(&x[i]));
  return out;
}

// Rows of a table, by token.
template <typename T>
Rows<T> looked_up(const T* table, const int64_t* tokens, int64_t rows, int64_t size) {
  Rows<T> out(rows * size);
  for (int64_t r = 0; r < rows; ++r) std::copy_n(table + tokens[r] * size, size, &out[r * size]);
  return out;
}

// Mixes a token into a state: state + cosine(query, key) · value, head by head.
template <typename T>
struct Decoder {
  const T* norm;
  Linear<T> query, key_value;

  void mix(Floats& state, const Rows<T>& token, int64_t size, int64_t heads) const {
    const Rows<T> queries = query(normalised(state, norm, size), size, size);
    const Rows<T> pairs = key_value(token, size, 2 * size);
    const int64_t rows = static_cast<int64_t>(state.size()) / size, width = size / heads;
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t at = 0; at < size; at += width) {
        const T *q = &queries[r * size + at], *k = &pairs[2 * r * size + at], *value = k + size;
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
template <typename T>
Rows<T> gated(const Rows<T>& rows, int64_t size) {
  Rows<T> out(rows.size() / 2);
  for (size_t row = 0; row < out.size(); row += size)
    for (int64_t i = 0; i < size; i += kVector) {
      const __m512 gate = load(&rows[2 * row + i]), x = load(&rows[2 * row + size + i]);
      const __m512 power = _mm512_min_ps(constant(88.0f), _mm512_sub_ps(_mm512_setzero_ps(), gate));
      const __m512 below = _mm512_add_ps(constant(1.0f), exp(power));
      store(&out[row + i], _mm512_div_ps(_mm512_mul_ps(gate, x), below));
    }
  return out;
}

}  // namespace
