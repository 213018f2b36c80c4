// Tile registers (AMX), where LONGROLL_TILES is defined; elsewhere nothing.
//
// For one translation unit each. The process must have been granted tiles.

#pragma once

#include <immintrin.h>

#include <cstdint>

namespace {

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};

// As long as it lives, a thread may configure its tiles anew: it finds them as they were.
class TileScope {
#ifdef LONGROLL_TILES
 public:
  TileScope() { _tile_storeconfig(&found_); }
  ~TileScope() { _tile_loadconfig(&found_); }
  TileScope(const TileScope&) = delete;
  TileScope& operator=(const TileScope&) = delete;

 private:
  TileConfig found_;
#endif
};

}  // namespace
