// The augmenting block of a Clover-2 draft over new rows of several sequences, each with keys and values of its own.

#pragma once

#include "layers.h"

namespace {

struct BlockShape {
  int64_t size, heads, kv_heads, width, inner;  // H, query and KV heads, D, feed-forward
  float rope_theta;
};

// Memory of one sequence: [layers, 2, K, capacity, D], of which `length` tokens are taken in; `count` rows
// follow, the first at `position`.
template <typename T>
struct Memory {
  T* rows;
  int64_t capacity, length, count, position;
};

// Rotates a head's halves as pairs, by the angles of a position.
template <typename T>
void rotate(T* head, const float* cosines, const float* sines, int64_t width) {
  const int64_t half = width / 2;
  for (int64_t i = 0; i < half; i += kVector) {
    const __m512 first = load(head + i), second = load(head + half + i);
    const __m512 cosine = load(cosines + i), sine = load(sines + i);
    store(head + i, _mm512_fmsub_ps(first, cosine, _mm512_mul_ps(second, sine)));
    store(head + half + i, _mm512_fmadd_ps(second, cosine, _mm512_mul_ps(first, sine)));
  }
}

// Onto the sums of 32 features of a product.
inline __m512 product(const uint16_t* a, const uint16_t* b, __m512 sum) {
  const auto left = reinterpret_cast<__m512bh>(_mm512_loadu_si512(a));
  return _mm512_dpbf16_ps(sum, left, reinterpret_cast<__m512bh>(_mm512_loadu_si512(b)));
}
inline __m512 product(const float* a, const float* b, __m512 sum) {
  sum = _mm512_fmadd_ps(load(a), load(b), sum);
  return _mm512_fmadd_ps(load(a + kVector), load(b + kVector), sum);
}

// Products of a query with 16 keys [D], those from `count` on being 0.
template <typename T>
__m512 products(const T* query, const T* keys, int64_t count, int64_t width) {
  __m512 sums[kVector];
  for (int64_t k = 0; k < kVector; ++k) {
    sums[k] = _mm512_setzero_ps();
    for (int64_t i = 0; k < count && i < width; i += 2 * kVector)
      sums[k] = product(query + i, keys + k * width + i, sums[k]);
  }
  return totals(sums);
}

// 16 features of the sum of values [D], each times its weight.
template <typename T>
__m512 weighted(const Floats& weights, const T* values, int64_t length, int64_t width) {
  __m512 sums[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
  int64_t l = 0;
  for (; l + 4 <= length; l += 4)
    for (int64_t k = 0; k < 4; ++k)
      sums[k] = _mm512_fmadd_ps(constant(weights[l + k]), load(values + (l + k) * width), sums[k]);
  for (; l < length; ++l) sums[0] = _mm512_fmadd_ps(constant(weights[l]), load(values + l * width), sums[0]);
  return _mm512_add_ps(_mm512_add_ps(sums[0], sums[1]), _mm512_add_ps(sums[2], sums[3]));
}

// Attention of one query over the first `length` keys [D] and values [D] of a head; `scores` has room for them and for
// a vector more.
template <typename T>
void attend(const T* query, const T* keys, const T* values, int64_t length, int64_t width, Floats& scores, T* out) {
  const __m512 scale = constant(1.0f / std::sqrt(static_cast<float>(width)));
  __m512 most = constant(-INFINITY);
  for (int64_t l = 0; l < length; l += kVector) {
    const auto lanes = static_cast<__mmask16>((1u << std::min(length - l, kVector)) - 1);
    const __m512 found = _mm512_mul_ps(scale, products(query, keys + l * width, length - l, width));
    store(&scores[l], found);
    most = _mm512_mask_max_ps(most, lanes, most, found);
  }
  const __m512 largest = constant(_mm512_reduce_max_ps(most));
  __m512 total = _mm512_setzero_ps();
  for (int64_t l = 0; l < length; l += kVector) {
    const auto lanes = static_cast<__mmask16>((1u << std::min(length - l, kVector)) - 1);
    const __m512 weights = _mm512_maskz_mov_ps(lanes, exp(_mm512_sub_ps(load(&scores[l]), largest)));
    store(&scores[l], weights);
    total = _mm512_add_ps(total, weights);
  }
  const __m512 inverse = constant(1.0f / _mm512_reduce_add_ps(total));
  for (int64_t i = 0; i < width; i += kVector)
    store(out + i, _mm512_mul_ps(weighted(scores, values + i, length, width), inverse));
}

template <typename T>
struct BlockLayer {
  const T* input_norm;
  Linear<T> qkv;
  const T *q_norm, *k_norm;
  Linear<T> o;
  const T* post_norm;
  Linear<T> gate_up, down;

  // state [R, H], rows of the memories one after the other; cosines and sines [R, D / 2].
  void forward(Floats& state, const std::vector<Memory<T>>& memories, int64_t layer, const Floats& cosines,
               const Floats& sines, const BlockShape& s) const {
    Rows<T> rows = qkv(normalised(state, input_norm, s.size), s.size, (s.heads + 2 * s.kv_heads) * s.width);
    add(state, o(attended(rows, memories, layer, cosines, sines, s), s.heads * s.width, s.size));
    add(state, down(gated(gate_up(normalised(state, post_norm, s.size), s.size, 2 * s.inner), s.inner), s.inner,
                    s.size));
  }

 private:
  Rows<T> attended(Rows<T>& rows, const std::vector<Memory<T>>& memories, int64_t layer, const Floats& cosines,
                  const Floats& sines, const BlockShape& s) const {
    const int64_t row_size = (s.heads + 2 * s.kv_heads) * s.width, half = s.width / 2;
    Rows<T> out(rows.size() / row_size * s.heads * s.width);
    Floats scores;
    int64_t r = 0;
    for (const Memory<T>& memory : memories) {
      T* keys = memory.rows + 2 * layer * s.kv_heads * memory.capacity * s.width;
      T* values = keys + s.kv_heads * memory.capacity * s.width;
      scores.resize(std::max<size_t>(scores.size(), memory.length + memory.count + kVector));
      for (int64_t one = 0; one < memory.count; ++one, ++r) {
        T* row = &rows[r * row_size];
        for (int64_t head = 0; head < s.heads + s.kv_heads; ++head) {
          T* at = row + head * s.width;
          normalise(at, head < s.heads ? q_norm : k_norm, s.width, at);
          rotate(at, &cosines[r * half], &sines[r * half], s.width);
        }
        const int64_t place = memory.length + one;
        for (int64_t head = 0; head < s.kv_heads; ++head) {
          const int64_t to = (head * memory.capacity + place) * s.width;
          std::copy_n(row + (s.heads + head) * s.width, s.width, keys + to);
          std::copy_n(row + (s.heads + s.kv_heads + head) * s.width, s.width, values + to);
        }
        for (int64_t head = 0; head < s.heads; ++head) {
          const int64_t from = head * s.kv_heads / s.heads * memory.capacity * s.width;
          attend(row + head * s.width, keys + from, values + from, place + 1, s.width, scores,
                 &out[(r * s.heads + head) * s.width]);
        }
      }
    }
    return out;
  }
};

}  // namespace
