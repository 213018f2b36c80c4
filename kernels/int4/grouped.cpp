// Rows times INT4 matrices, grouped by expert, in bfloat16 on a CPU with AVX-512's own: y = x W^T.
//
// torch's kernel looks every weight up in float32 and scales it before it multiplies: with more than one row
// its time is arithmetic, a multiple of what reading the weights takes. Here the integer codes, which bfloat16
// holds exactly, are looked up two input features at a time and multiplied with up to 16 rows, in tiles where
// LONGROLL_TILES is defined and in vectors elsewhere; a group's sum is scaled once, in float32. A row's sums are taken
// in the same order whatever other rows there are.
//
// W is read where torch's kernel reads it (ATen/native/cpu/int4mm_kernel.cpp): blocks of 64 outputs, each
// [K][32] bytes, where byte d < 16 holds outputs d and, in its high half, d + 32, and byte 16 + d outputs d + 16
// and d + 48; a last block of 16, 32 or 48 outputs is [K][outputs / 2] bytes of neighbours. A code c stands for
// (c - 8) * scale. Scales and zeros are [K/G][N][2] bfloat16; zeros are not read.

#include <immintrin.h>
#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "../tiles.h"
#include "../vectors.h"

namespace {

constexpr int kLanes = 16;                 // outputs of a vector, and of a tile
constexpr int kBlock = 64;                 // outputs of a block
constexpr int kTileRows = 16;              // rows of x, or pairs of input features
constexpr int kTileInputs = 32;            // input features of a tile
constexpr int kTileBytes = 16 * 64;
constexpr int kMaxGroup = 128;
constexpr int kAhead = 4096;               // bytes of weights asked for before they are used

struct Matrix {
  const uint8_t* packed;
  const uint16_t* scales;
  int64_t outputs, inputs, group;
};

// bfloat16 of c - 8 for the code c in the low four bits of an index; its fifth bit is whatever lies above.
__m512i code_values() {
  alignas(64) uint16_t values[32];
  for (int i = 0; i < 32; ++i) {
    const float value = static_cast<float>((i & 15) - 8);
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    values[i] = static_cast<uint16_t>(bits >> 16);
  }
  return _mm512_load_si512(values);
}

// Word 2 d + i gets byte d of input feature i in its low half and byte 16 + d in its high half.
__m512i pair_order() {
  alignas(64) uint8_t order[64];
  for (int d = 0; d < kLanes; ++d)
    for (int i = 0; i < 2; ++i) {
      order[4 * d + 2 * i] = static_cast<uint8_t>(32 * i + d);
      order[4 * d + 2 * i + 1] = static_cast<uint8_t>(32 * i + 16 + d);
    }
  return _mm512_load_si512(order);
}

struct WholeBlock {
  static constexpr int kVectors = 4;
  __m512i order = pair_order();

  // Words whose low four bits are the codes of two neighbouring input features, for 16 outputs a vector.
  void codes(const uint8_t* bytes, __m512i (&words)[kVectors]) const {
    const __m512i all = _mm512_permutexvar_epi8(order, _mm512_loadu_si512(bytes));
    words[0] = all;
    words[1] = _mm512_srli_epi16(all, 8);
    words[2] = _mm512_srli_epi16(all, 4);
    words[3] = _mm512_srli_epi16(all, 12);
  }
};

template <int Vectors>
struct LastBlock {
  static constexpr int kVectors = Vectors;

  static __m512i row(const uint8_t* bytes) {
    const __m128i pairs = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes));
    return _mm512_cvtepu8_epi32(_mm_unpacklo_epi8(pairs, _mm_srli_epi16(pairs, 4)));
  }

  void codes(const uint8_t* bytes, __m512i (&words)[kVectors]) const {
    for (int v = 0; v < kVectors; ++v)
      words[v] = _mm512_or_si512(row(bytes + 8 * v), _mm512_slli_epi32(row(bytes + 8 * (kVectors + v)), 16));
  }
};

#ifdef LONGROLL_TILES

// Tile registers, which instructions name by literals: 0 to 3 sums of 16 outputs each, 4 rows of x, 5 weights.
constexpr int kTiles = 6;

// Tiles for `rows` rows of x at a time; what they held is gone.
void configure(int rows) {
  TileConfig config;
  for (int tile = 0; tile < kTiles; ++tile) {
    config.bytes[tile] = 64;
    config.rows[tile] = static_cast<uint8_t>(tile == kTiles - 1 ? kTileRows : rows);
  }
  _tile_loadconfig(&config);
}

// sums [rows, Vectors, 16] of one group: x [rows, group] times dequantised tiles [group / 32][Vectors].
template <int Vectors>
void multiply_group(const uint16_t* x, int, int64_t inputs, const uint8_t* tiles, int64_t group, float* sums) {
  const int64_t stride = inputs * sizeof(uint16_t);
  _tile_zero(0);
  if constexpr (Vectors > 1) _tile_zero(1);
  if constexpr (Vectors > 2) _tile_zero(2);
  if constexpr (Vectors > 3) _tile_zero(3);
  for (int64_t k = 0; k < group; k += kTileInputs, tiles += Vectors * kTileBytes) {
    _tile_loadd(4, x + k, stride);
    _tile_loadd(5, tiles, 64);
    _tile_dpbf16ps(0, 4, 5);
    if constexpr (Vectors > 1) {
      _tile_loadd(5, tiles + kTileBytes, 64);
      _tile_dpbf16ps(1, 4, 5);
    }
    if constexpr (Vectors > 2) {
      _tile_loadd(5, tiles + 2 * kTileBytes, 64);
      _tile_dpbf16ps(2, 4, 5);
    }
    if constexpr (Vectors > 3) {
      _tile_loadd(5, tiles + 3 * kTileBytes, 64);
      _tile_dpbf16ps(3, 4, 5);
    }
  }
  constexpr int kStride = Vectors * 64;
  _tile_stored(0, sums, kStride);
  if constexpr (Vectors > 1) _tile_stored(1, sums + kLanes, kStride);
  if constexpr (Vectors > 2) _tile_stored(2, sums + 2 * kLanes, kStride);
  if constexpr (Vectors > 3) _tile_stored(3, sums + 3 * kLanes, kStride);
}

#else

constexpr int kAtOnce = 4;  // rows whose sums with four vectors fit the registers

void configure(int) {}

// The same, `rows` rows.
template <int Vectors>
void multiply_group(const uint16_t* x, int rows, int64_t inputs, const uint8_t* tiles, int64_t group, float* sums) {
  for (int first = 0; first < rows; first += kAtOnce) {
    const uint16_t* at[kAtOnce];
    __m512 totals[kAtOnce][Vectors];
    for (int i = 0; i < kAtOnce; ++i) {
      at[i] = x + std::min(first + i, rows - 1) * inputs;
      for (__m512& total : totals[i]) total = _mm512_setzero_ps();
    }
    for (int64_t k = 0; k < group; k += 2) {
      const uint8_t* words = tiles + k / kTileInputs * Vectors * kTileBytes + k % kTileInputs / 2 * 64;
      __m512bh weights[Vectors];
      for (int v = 0; v < Vectors; ++v) weights[v] = pairs_at(words + v * kTileBytes);
      for (int i = 0; i < kAtOnce; ++i) {
        const __m512bh pair = repeated(at[i] + k);
        for (int v = 0; v < Vectors; ++v) totals[i][v] = _mm512_dpbf16_ps(totals[i][v], pair, weights[v]);
      }
    }
    for (int i = 0; i < std::min(rows - first, kAtOnce); ++i)
      for (int v = 0; v < Vectors; ++v) _mm512_store_ps(sums + ((first + i) * Vectors + v) * kLanes, totals[i][v]);
  }
}

#endif

// Ask for a line of memory: the CPU's own foresight ends at the page, which is soon over here.
void prefetch(const void* address) { _mm_prefetch(static_cast<const char*>(address), _MM_HINT_T0); }

// `rows` rows of x, as many as the tiles are configured for, against one block of outputs.
template <class Block>
void rows_times_block(const uint16_t* x, int rows, const uint8_t* packed, const uint16_t* scales, const Matrix& w,
                      uint16_t* y) {
  constexpr int kVectors = Block::kVectors;
  constexpr int kBytes = kVectors * kLanes / 2;  // of one input feature
  const Block block;
  const __m512i values = code_values();
  alignas(64) uint8_t tiles[kMaxGroup / kTileInputs * kVectors * kTileBytes];
  alignas(64) float sums[kTileRows * kVectors * kLanes];
  alignas(64) float totals[kTileRows * kVectors * kLanes] = {};
  for (int64_t first = 0; first < w.inputs; first += w.group, scales += 2 * w.outputs) {
    for (int v = 0; v < kVectors; ++v) prefetch(scales + 2 * (w.outputs + kLanes * v));
    for (int64_t k = 0; k < w.group; k += 2, packed += 2 * kBytes) {
      __m512i words[kVectors];
      prefetch(packed + kAhead);
      block.codes(packed, words);
      uint8_t* target = tiles + k / kTileInputs * kVectors * kTileBytes + k % kTileInputs / 2 * 64;
      for (int v = 0; v < kVectors; ++v)
        _mm512_store_si512(target + v * kTileBytes, _mm512_permutexvar_epi16(words[v], values));
    }
    multiply_group<kVectors>(x + first, rows, w.inputs, tiles, w.group, sums);
    for (int v = 0; v < kVectors; ++v) {
      const __m512i both = _mm512_loadu_si512(scales + 2 * kLanes * v);
      const __m512 scale = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
      for (int place = v * kLanes; place < rows * kVectors * kLanes; place += kVectors * kLanes)
        _mm512_store_ps(totals + place, _mm512_fmadd_ps(_mm512_load_ps(sums + place), scale,
                                                        _mm512_load_ps(totals + place)));
    }
  }
  for (int row = 0; row < rows; ++row)
    for (int v = 0; v < kVectors; ++v) {
      const __m256bh rounded = _mm512_cvtneps_pbh(_mm512_load_ps(totals + (row * kVectors + v) * kLanes));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(y + row * w.outputs + v * kLanes),
                          reinterpret_cast<__m256i>(rounded));
    }
}

// `rows` rows of x against the block of outputs that begins at `output`.
void rows_times_outputs(const uint16_t* x, int rows, const Matrix& w, int64_t output, uint16_t* y) {
  const uint8_t* packed = w.packed + output * (w.inputs / 2);
  const uint16_t* scales = w.scales + 2 * output;
  switch (std::min<int64_t>(w.outputs - output, kBlock) / kLanes) {
    case 1: rows_times_block<LastBlock<1>>(x, rows, packed, scales, w, y + output); break;
    case 2: rows_times_block<LastBlock<2>>(x, rows, packed, scales, w, y + output); break;
    case 3: rows_times_block<LastBlock<3>>(x, rows, packed, scales, w, y + output); break;
    default: rows_times_block<WholeBlock>(x, rows, packed, scales, w, y + output);
  }
}

// Up to 16 rows that meet one matrix.
struct Piece {
  int64_t row;
  int rows;
  int64_t expert;
};

}  // namespace

// x [rows, inputs] and y [rows, outputs] bfloat16; rows bounds[e] up to bounds[e + 1] meet matrix e of `experts`.
extern "C" void grouped_int4(const uint16_t* x, const int64_t* bounds, int64_t experts, const uint8_t* packed,
                             const uint16_t* scales, int64_t outputs, int64_t inputs, int64_t group, uint16_t* y) {
  std::vector<Piece> pieces;
  for (int64_t e = 0; e < experts; ++e)
    for (int64_t row = bounds[e]; row < bounds[e + 1]; row += kTileRows)
      pieces.push_back({row, static_cast<int>(std::min<int64_t>(bounds[e + 1] - row, kTileRows)), e});
  const int64_t blocks = (outputs + kBlock - 1) / kBlock;
  const int64_t products = static_cast<int64_t>(pieces.size()) * blocks;
#pragma omp parallel if (omp_get_max_threads() > 1)
  {
    const int64_t threads = omp_get_num_threads(), thread = omp_get_thread_num();
    const TileScope scope;
    int configured = 0;
    for (int64_t product = products * thread / threads; product < products * (thread + 1) / threads; ++product) {
      const Piece& piece = pieces[product / blocks];
      if (piece.rows != configured) configure(piece.rows);
      configured = piece.rows;
      const Matrix w{packed + piece.expert * outputs * inputs / 2,
                     scales + 2 * piece.expert * outputs * (inputs / group), outputs, inputs, group};
      rows_times_outputs(x + piece.row * inputs, piece.rows, w, product % blocks * kBlock, y + piece.row * outputs);
    }
  }
}
