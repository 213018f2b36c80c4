// Attention of token trees over a paged cache whose keys lie transposed, on a CPU with AVX-512.
//
// The cache is [blocks, K, 2, block · D]: of a block and head, D rows of `block` keys, then `block` rows of D values, as
// vLLM's CPU attention for vector instructions keeps them. Transposed keys give 16 scores a load, without a sum across
// lanes. All rows of a tree, and all query heads of a KV head, meet each vector of keys and values while it is loaded.
//
// A row sees the positions before the root, and of its tree the rows on its path from the root, itself included.

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "../vectors.h"

namespace {

constexpr int64_t kTogether = 8;  // queries that meet a vector of keys or values
constexpr float kInfinity = std::numeric_limits<float>::infinity();

template <typename T>
struct Cache {
  const T* pages;
  int64_t kv_heads, block, width;  // K, tokens, D

  const T* keys(int64_t page, int64_t head) const { return pages + (page * kv_heads + head) * 2 * block * width; }
  const T* values(int64_t page, int64_t head) const { return keys(page, head) + block * width; }
};

struct Tree {
  const int32_t* table;    // pages of the request
  const int32_t* parents;  // [rows], the root's own being 0
  int64_t first, base, rows;

  int64_t length() const { return base + rows; }
};

// Scores [together][stride] of queries [together][D] with all keys, 16 at a time; `count` queries differ.
template <typename T>
void score(const Cache<T>& cache, const Tree& tree, int64_t head, const float* queries, float* scores,
           int64_t stride) {
  for (int64_t start = 0; start < tree.length(); start += cache.block) {
    const T* keys = cache.keys(tree.table[start / cache.block], head);
    const int64_t left = std::min(cache.block, tree.length() - start);
    for (int64_t key = 0; key < left; key += kVector) {
      __m512 sums[kTogether];
      for (__m512& sum : sums) sum = _mm512_setzero_ps();
      for (int64_t d = 0; d < cache.width; ++d) {
        const __m512 features = load(keys + d * cache.block + key);
        for (int64_t q = 0; q < kTogether; ++q)
          sums[q] = _mm512_fmadd_ps(constant(queries[q * cache.width + d]), features, sums[q]);
      }
      for (int64_t q = 0; q < kTogether; ++q) store(scores + q * stride + start + key, sums[q]);
    }
  }
}

// Weighted sums of values, [together][D].
template <typename T>
void gather(const Cache<T>& cache, const Tree& tree, int64_t head, const float* weights, int64_t stride, float* out) {
  for (int64_t d = 0; d < cache.width; d += kVector) {
    __m512 sums[kTogether];
    for (__m512& sum : sums) sum = _mm512_setzero_ps();
    for (int64_t start = 0; start < tree.length(); start += cache.block) {
      const T* values = cache.values(tree.table[start / cache.block], head) + d;
      const int64_t left = std::min(cache.block, tree.length() - start);
      for (int64_t token = 0; token < left; ++token) {
        const __m512 features = load(values + token * cache.width);
        for (int64_t q = 0; q < kTogether; ++q)
          sums[q] = _mm512_fmadd_ps(constant(weights[q * stride + start + token]), features, sums[q]);
      }
    }
    for (int64_t q = 0; q < kTogether; ++q) store(out + q * cache.width + d, sums[q]);
  }
}

// Turns the scores of a row, of `stride` entries, into weights that add up to 1.
void soften(const Tree& tree, int64_t row, const uint8_t* sees, float* scores, int64_t stride) {
  for (int64_t other = 0; other < tree.rows; ++other)
    if (!sees[row * tree.rows + other]) scores[tree.base + other] = -kInfinity;
  std::fill(scores + tree.length(), scores + stride, -kInfinity);
  __m512 most = constant(-kInfinity), total = _mm512_setzero_ps();
  for (int64_t l = 0; l < stride; l += kVector) most = _mm512_max_ps(most, load(scores + l));
  const __m512 largest = constant(_mm512_reduce_max_ps(most));
  for (int64_t l = 0; l < stride; l += kVector) {
    const __m512 weights = exp(_mm512_sub_ps(load(scores + l), largest));
    store(scores + l, weights);
    total = _mm512_add_ps(total, weights);
  }
  const __m512 inverse = constant(1.0f / _mm512_reduce_add_ps(total));
  for (int64_t l = 0; l < stride; l += kVector) store(scores + l, _mm512_mul_ps(load(scores + l), inverse));
}

// [rows][rows]: which rows of the tree each row sees.
std::vector<uint8_t> seen_rows(const Tree& tree) {
  std::vector<uint8_t> sees(tree.rows * tree.rows);
  for (int64_t row = 0; row < tree.rows; ++row) {
    if (row > 0) std::copy_n(&sees[tree.parents[row] * tree.rows], tree.rows, &sees[row * tree.rows]);
    sees[row * tree.rows + row] = 1;
  }
  return sees;
}

// One tree and KV head; query and out are [flat rows, H, D].
template <typename T>
void attend_head(const Cache<T>& cache, const Tree& tree, int64_t head, int64_t heads, const T* query, float scale,
                 T* out) {
  const int64_t group = heads / cache.kv_heads, count = tree.rows * group;
  const int64_t stride = (tree.length() + kVector - 1) / kVector * kVector;
  const std::vector<uint8_t> sees = seen_rows(tree);
  std::vector<float> queries(kTogether * cache.width), scores(kTogether * stride), sums(kTogether * cache.width);
  const auto place = [&](int64_t q) {
    return ((tree.first + q / group) * heads + head * group + q % group) * cache.width;
  };
  for (int64_t first = 0; first < count; first += kTogether) {
    for (int64_t q = 0; q < kTogether; ++q)
      for (int64_t d = 0; d < cache.width; d += kVector) {
        const __m512 features = load(query + place(std::min(first + q, count - 1)) + d);
        store(&queries[q * cache.width + d], _mm512_mul_ps(features, constant(scale)));
      }
    score(cache, tree, head, queries.data(), scores.data(), stride);
    for (int64_t q = 0; q < kTogether; ++q)
      soften(tree, std::min(first + q, count - 1) / group, sees.data(), &scores[q * stride], stride);
    gather(cache, tree, head, scores.data(), stride, sums.data());
    for (int64_t q = 0; q < std::min(kTogether, count - first); ++q)
      for (int64_t d = 0; d < cache.width; d += kVector)
        store(out + place(first + q) + d, load(&sums[q * cache.width + d]));
  }
}

// What all trees of a step share, and of each tree: see kernels/tree_attention/native.py.
struct Step {
  int64_t heads, kv_heads, width, block, trees, table_stride;
  float scale;
};

template <typename T>
void attend(const Step& step, const T* query, const T* pages, const int32_t* table, const int64_t* numbers,
            const int32_t* parents, T* out) {
  const Cache<T> cache{pages, step.kv_heads, step.block, step.width};
  std::vector<Tree> trees;
  for (int64_t t = 0; t < step.trees; ++t) {
    const int64_t* n = numbers + 3 * t;
    trees.push_back({table + t * step.table_stride, parents, n[0], n[1], n[2]});
    parents += n[2];
  }
#pragma omp parallel for collapse(2) schedule(dynamic) if (omp_get_max_threads() > 1)
  for (int64_t t = 0; t < step.trees; ++t)
    for (int64_t head = 0; head < step.kv_heads; ++head)
      attend_head(cache, trees[t], head, step.heads, query, step.scale, out);
}

}  // namespace

// query and out [rows, H, D]; table [trees, table_stride]; numbers [trees, 3]: the first flat row, the root's position
// and the rows of each tree; parents, one tree after the other.
#define LONGROLL_ATTEND(T, type)                                                                                      \
  extern "C" void attend_##type(int64_t heads, int64_t kv_heads, int64_t width, int64_t block, int64_t trees,          \
                                int64_t table_stride, float scale, const T* query, const T* pages,                     \
                                const int32_t* table, const int64_t* numbers, const int32_t* parents, T* out) {        \
    attend({heads, kv_heads, width, block, trees, table_stride, scale}, query, pages, table, numbers, parents, out);   \
  }

LONGROLL_ATTEND(uint16_t, bfloat16)
LONGROLL_ATTEND(float, float32)
